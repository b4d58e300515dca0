#!/usr/bin/env python
"""Turn archives into prepared sources, which training reads.

    prepare_data.py SOURCE  --from=DIR --to=DIR   an archive as it was published, to one source
    prepare_data.py custom  --from=DIR --to=DIR   all that a folder of yours has: COCO boxes, MDETR
                                                  phrases, captions, to TO/detection and so on
    prepare_data.py symbols --to=DIR              the built-in data, drawn and prepared
    prepare_data.py index   --from=DIR            for training, beside what `tfds build` wrote
    prepare_data.py minival --from=FILE --to=FILE LVIS minival, to evaluate on, out of LVIS's val

A folder has its annotation files in it or in annotations/, its images in images/ (or --images=DIR).
docs/data.md tells where each archive comes from and how it lies on disk.

All cores work on it. Stop it whenever you like, by Ctrl-C or worse: the same command goes on with
what is missing, TO appears when it is whole, and the same command once more finds its work done.
What was read, written and left out, and why, is told at the end and stays in TO/info.json.
"""

import argparse
import dataclasses
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # a process a core: see phrases.noun_phrases

# The rest is imported by the functions: --help answers at once, and worker processes, which import
# this file again, start sooner.
from detclipv2_jax.common.cli import refuse_renamed
from detclipv2_jax.common.errors import UserError

KINDS = ("detection", "grounding", "image_text")
SYMBOLS_HELP = "the built-in data: symbols, drawn from a seed"


def build_parser() -> argparse.ArgumentParser:
    """The command line: one subcommand a source."""
    from detclipv2_jax.data.prepare.registry import SOURCES

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    sources = parser.add_subparsers(dest="source", required=True, metavar="SOURCE")
    for name, source in SOURCES.items():
        one = _add(sources, name, source.about)
        one.add_argument(
            "--annotations",
            metavar="FILE",
            action="append",
            type=Path,
            help=f"{source.kind} file; may be repeated (default: those found in --from)",
        )
        for flag, settings in source.options.items():
            one.add_argument(f"--{flag}", **settings)
            if "_" in flag:
                refuse_renamed(one, {f"--{flag.replace('_', '-')}": f"--{flag}"})
        _add_phrases(one, source.kind == "image_text")
    custom = _add(
        sources, "custom", "a folder with COCO boxes, MDETR phrases, captions, or any of them"
    )
    for kind in KINDS:
        custom.add_argument(
            f"--{kind}",
            metavar="FILE",
            action="append",
            type=Path,
            help=f"{kind} file; where any file is named, only named ones are prepared",
        )
    refuse_renamed(custom, {"--image-text": "--image_text"})
    _add_phrases(custom, True)
    index_help = "what training needs, beside the records of a dataset that `tfds build` wrote"
    index = sources.add_parser("index", help=index_help, description=index_help)
    index.add_argument(
        "--from",
        dest="to",
        metavar="DIR",
        type=Path,
        required=True,
        help="the dataset, such as DATA_DIR/objects365/1.0.0; its records stay as they are",
    )
    index.add_argument("--split", default="train", help="which of its splits (default: train)")
    _add_jobs(index)
    minival_help = "LVIS minival, to evaluate on: the part of LVIS v1 val that is COCO's val2017"
    minival = sources.add_parser("minival", help=minival_help, description=minival_help)
    for flag, field, help_text in (
        ("--from", "origin", "lvis_v1_val.json"),
        ("--to", "to", "the file to write, lvis_v1_minival.json"),
    ):
        minival.add_argument(
            flag, dest=field, metavar="FILE", type=Path, required=True, help=help_text
        )
    symbols = sources.add_parser(
        "symbols",
        help=SYMBOLS_HELP,
        description=f"{SYMBOLS_HELP}. Archives go to TO/archives, sources beside them.",
    )
    _add_common(symbols)
    _add_phrases(symbols, True)
    symbols.add_argument("--seed", type=int, default=0, help="of the scenes (default: 0)")
    symbols.add_argument(
        "--option",
        metavar="NAME=VALUE",
        action="append",
        default=[],
        help="a field of SymbolsOptions (sources/symbols.py): --option=novel=60; may be repeated",
    )
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; 0 if all is prepared, 2 (and a sentence) if the user can mend it."""
    args = build_parser().parse_args(arguments)
    try:
        others = {"custom": _custom, "symbols": _symbols, "index": _index, "minival": _minival}
        run = others.get(args.source, _single)
        run(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error.filename or args.to}: {error.strerror or error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from here", file=sys.stderr)
        return 130
    return 0


def _add(sources, name: str, help_text: str) -> argparse.ArgumentParser:
    parser = sources.add_parser(name, help=help_text, description=help_text)
    parser.add_argument(
        "--from",
        dest="origin",
        metavar="DIR",
        type=Path,
        required=True,
        help="folder of the archive",
    )
    parser.add_argument(
        "--images",
        metavar="DIR",
        type=Path,
        help="folder of the images (default: FROM/images, FROM)",
    )
    _add_common(parser)
    return parser


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--to", metavar="DIR", type=Path, required=True, help="where it is prepared"
    )
    parser.add_argument("--name", help="of the source in counts and logs (default: TO's last part)")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace what is prepared there from other inputs"
    )
    _add_jobs(parser)


def _add_jobs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--jobs", type=int, help="processes (default: the number of cores)")


def _add_phrases(parser: argparse.ArgumentParser, wanted: bool) -> None:
    """Options of noun phrases, for the sources that take captions apart."""
    if not wanted:
        return
    refuse_renamed(parser, {"--spacy-model": "--spacy_model", "--store-side": "--store_side"})
    parser.add_argument(
        "--spacy_model",
        metavar="NAME",
        help="spaCy pipeline (default: en_core_web_sm or its re-upload)",
    )
    parser.add_argument(
        "--phrases",
        metavar="N",
        type=int,
        default=7,
        help="noun phrases a caption at most (default: 7)",
    )
    parser.add_argument(
        "--store_side",
        metavar="N",
        type=int,
        help="store captioned pictures no larger than N pixels on their longer side, as JPEG of "
        "quality 90; training decodes them faster and they take less room. It needs the side of "
        "its canvas times the largest of `scales`: 448 for configs/pretrain.py, 320 times 1.4; "
        "smaller pictures are kept as they are (default: all are)",
    )


def _options(args: argparse.Namespace):
    from detclipv2_jax.data.prepare.image_encoding import Options

    if args.jobs is not None and args.jobs < 1:
        raise UserError(f"--jobs={args.jobs}: give 1 or more processes")
    if getattr(args, "phrases", 0) < 0:
        raise UserError(f"--phrases={args.phrases}: give 0 or more phrases a caption")
    if getattr(args, "store_side", None) is not None and args.store_side < 32:
        raise UserError(f"--store_side={args.store_side}: give 32 or more pixels")
    chosen = {"jobs": args.jobs} if args.jobs else {}
    if hasattr(args, "phrases"):
        chosen |= {"phrase_model": args.spacy_model, "phrase_limit": args.phrases}
        chosen |= {"store_side": args.store_side}
    return Options(**chosen)


def _single(args: argparse.Namespace) -> None:
    """An archive of SOURCES, its files into one source."""
    from detclipv2_jax.data.prepare.registry import SOURCES

    source = SOURCES[args.source]
    chosen = {flag: getattr(args, flag) for flag in source.options}
    files = args.annotations or source.files(args.origin)
    name = args.name or args.to.name
    _prepare(args, source, files, args.origin, args.images, args.to, name, chosen)


def _custom(args: argparse.Namespace) -> None:
    """Each kind that the folder has, into a source of its own."""
    from detclipv2_jax.data.prepare.registry import OF_KIND, discovered

    named = {kind: getattr(args, kind) for kind in KINDS if getattr(args, kind)}
    files = named or discovered(args.origin)
    if not files:
        raise UserError(
            f"{args.origin}: no annotation file for training in it or in its annotations/; name "
            "one with --detection=FILE, --grounding=FILE or --image_text=FILE"
        )
    name = args.name or args.to.name
    for kind in KINDS:
        if kind in files:
            to, source = args.to / kind, OF_KIND[kind]
            _prepare(args, source, files[kind], args.origin, args.images, to, f"{name}_{kind}")
        else:
            print(f"{kind}: no file for it in {args.origin}")


def _symbols(args: argparse.Namespace) -> None:
    """Draw the archives, then prepare them as anybody's."""
    from detclipv2_jax.data.prepare.registry import OF_KIND
    from detclipv2_jax.data.prepare.sources.symbols import generate

    options, archives = _options(args), args.to / "archives"
    archives.parent.mkdir(parents=True, exist_ok=True)
    generate(
        archives, seed=args.seed, processes=options.jobs, options=_symbols_options(args.option)
    )
    files = {
        "detection": "detection_train.json",
        "grounding": "grounding_train.json",
        "image_text": "image_text_train.jsonl",
    }
    name = args.name or args.to.name
    for kind, file in files.items():
        path = archives / "annotations" / file
        _prepare(args, OF_KIND[kind], [path], archives, None, args.to / kind, f"{name}_{kind}")


def _index(args: argparse.Namespace) -> None:
    """What training needs, beside the records that TFDS wrote."""
    from detclipv2_jax.data.prepare.prepare import report
    from detclipv2_jax.data.prepare.tfds_index import add_index

    print(report(add_index(args.to, split=args.split, jobs=_options(args).jobs)))


def _minival(args: argparse.Namespace) -> None:
    """LVIS minival out of LVIS's val."""
    from detclipv2_jax.data.prepare.sources.lvis import write_minival

    print(f"{args.to}: {write_minival(args.origin, args.to):,} images")


def _symbols_options(settings: list[str]):
    """NAME=VALUE settings as SymbolsOptions; a pair is written 24,64."""
    from detclipv2_jax.data.prepare.sources.symbols import SymbolsOptions

    defaults, chosen = dataclasses.asdict(SymbolsOptions()), {}
    for setting in settings:
        name, _, value = setting.partition("=")
        if name not in defaults:
            raise UserError(f"--option={setting}: no such option; there are {', '.join(defaults)}")
        try:
            if isinstance(defaults[name], tuple):
                first, second = value.strip("()").split(",")
                kind = type(defaults[name][0])
                chosen[name] = (kind(first), kind(second))
            else:
                chosen[name] = type(defaults[name])(value)
        except ValueError as error:
            raise UserError(
                f"--option={setting}: give a value like the default, {defaults[name]}"
            ) from error
    return SymbolsOptions(**chosen)


def _prepare(
    args: argparse.Namespace,
    source,
    files: list[Path],
    origin: Path,
    images: Path | None,
    to: Path,
    name: str,
    chosen: dict[str, Any] | None = None,
) -> None:
    """Prepare files of an ArchiveSource, read with the options `chosen`."""
    from detclipv2_jax.data.prepare import registry
    from detclipv2_jax.data.prepare.examples import ImageFolder
    from detclipv2_jax.data.prepare.prepare import left_behind, prepare, report

    if not origin.is_dir():
        raise UserError(f"{origin}: no such directory; check --from")
    # A file is named by its path, or as it lies in the archive.
    places = (Path(), origin, origin / "annotations")
    files = [next((p / file for p in places if (p / file).exists()), file) for file in files]
    kind, options, chosen = source.kind, _options(args), chosen or {}
    folder = ImageFolder(images) if images else registry.image_folder(origin, kind)
    inputs = registry.fingerprint(files, folder, options if kind == "image_text" else None)
    inputs |= {"reader": {flag: str(value) for flag, value in chosen.items()}} if chosen else {}
    before = registry.prepared_before(to, inputs, overwrite=args.overwrite)
    if before is not None:
        left_behind(to, inputs)
        print(f"{to}: already prepared, {len(before):,} records of {kind}")
        return
    opened = [source.read(path, folder, **chosen) for path in files]
    print(report(prepare(opened, to, name=name, inputs=inputs, options=options)))


if __name__ == "__main__":
    sys.exit(main())
