#!/usr/bin/env python
"""Turn archives into prepared sources, which training reads.

    prepare_data.py coco       --from=DIR --to=DIR  boxes: COCO instances JSON (Objects365, yours)
    prepare_data.py goldg      --from=DIR --to=DIR  phrases with boxes: MDETR JSON (GoldG)
    prepare_data.py image_text --from=DIR --to=DIR  captions: JSON lines, TSV, COCO captions JSON
    prepare_data.py custom     --from=DIR --to=DIR  all that a folder has of these, to
                                                    TO/detection, TO/grounding, TO/image_text
    prepare_data.py symbols    --to=DIR             the built-in data, drawn and prepared

A folder has its annotation files in it or in annotations/, its images in images/ (or --images=DIR).
"""

import argparse
import dataclasses
import os
import sys
from pathlib import Path

# The package is used from the checkout, installed or not.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # a process a core: see phrases.noun_phrases

# The rest is imported by the functions: --help answers at once, and worker processes, which import
# this file again, are spared TensorFlow.
from detclipv2_jax.errors import UserError  # noqa: E402

KINDS = {"coco": "detection", "goldg": "grounding", "image_text": "image_text"}
SYMBOLS_HELP = "the built-in data: symbols, drawn from a seed"


def build_parser() -> argparse.ArgumentParser:
    """The command line: one subcommand a source."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    sources = parser.add_subparsers(dest="source", required=True, metavar="SOURCE")
    for source, kind, help_text in (
        ("coco", "detection", "COCO instances JSON: boxes with category names"),
        ("goldg", "grounding", "MDETR JSON: captions whose phrases have boxes"),
        ("image_text", "image_text", "images with captions: JSON lines, TSV or COCO captions JSON"),
    ):
        one = _add(sources, source, help_text)
        one.add_argument(
            "--annotations",
            metavar="FILE",
            action="append",
            type=Path,
            help=f"{kind} file; may be repeated (default: those found in --from)",
        )
        _add_phrases(one, source == "image_text")
    custom = _add(
        sources, "custom", "a folder with COCO boxes, MDETR phrases, captions, or any of them"
    )
    for kind in KINDS.values():
        custom.add_argument(
            f"--{kind.replace('_', '-')}",
            metavar="FILE",
            action="append",
            type=Path,
            help=f"{kind} file; where any file is named, only named ones are prepared",
        )
    _add_phrases(custom, True)
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
        run = {"custom": _custom, "symbols": _symbols}.get(args.source, _single)
        run(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error.filename or args.to}: {error.strerror or error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: nothing was left behind", file=sys.stderr)
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
    parser.add_argument("--jobs", type=int, help="processes (default: the number of cores)")


def _add_phrases(parser: argparse.ArgumentParser, wanted: bool) -> None:
    """Options of noun phrases, for the sources that take captions apart."""
    if not wanted:
        return
    parser.add_argument(
        "--spacy-model",
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


def _options(args: argparse.Namespace):
    from detclipv2_jax.data.pictures import Options

    if args.jobs is not None and args.jobs < 1:
        raise UserError(f"--jobs={args.jobs}: give 1 or more processes")
    if getattr(args, "phrases", 0) < 0:
        raise UserError(f"--phrases={args.phrases}: give 0 or more phrases a caption")
    chosen = {"jobs": args.jobs} if args.jobs else {}
    if hasattr(args, "phrases"):
        chosen |= {"phrase_model": args.spacy_model, "phrase_limit": args.phrases}
    return Options(**chosen)


def _single(args: argparse.Namespace) -> None:
    """coco, goldg, image_text: the files of one kind into one source."""
    kind = KINDS[args.source]
    files = args.annotations
    if not files:
        files = _discovered(args.origin).get(kind)
        if not files:
            raise UserError(
                f"{args.origin}: no {args.source} file for training in it or in its annotations/; "
                "name one with --annotations=FILE"
            )
    _prepare(args, kind, files, args.origin, args.images, args.to, args.name or args.to.name)


def _custom(args: argparse.Namespace) -> None:
    """Each kind that the folder has, into a source of its own."""
    named = {kind: getattr(args, kind) for kind in KINDS.values() if getattr(args, kind)}
    files = named or _discovered(args.origin)
    if not files:
        raise UserError(
            f"{args.origin}: no annotation file for training in it or in its annotations/; name "
            "one with --detection=FILE, --grounding=FILE or --image-text=FILE"
        )
    name = args.name or args.to.name
    for kind in KINDS.values():
        if kind in files:
            _prepare(
                args, kind, files[kind], args.origin, args.images, args.to / kind, f"{name}_{kind}"
            )
        else:
            print(f"{kind}: no file for it in {args.origin}")


def _symbols(args: argparse.Namespace) -> None:
    """Draw the archives, then prepare them as anybody's."""
    from detclipv2_jax.data.sources.symbols import generate

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
        _prepare(args, kind, [path], archives, None, args.to / kind, f"{name}_{kind}")


def _symbols_options(settings: list[str]):
    """NAME=VALUE settings as SymbolsOptions; a pair is written 24,64."""
    from detclipv2_jax.data.sources.symbols import SymbolsOptions

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


def _discovered(origin: Path) -> dict[str, list[Path]]:
    from detclipv2_jax.data.archives import discover

    found, left_out = discover(origin)
    for path, reason in left_out.items():
        print(f"{path}: left out, {reason}")
    return found


def _prepare(
    args: argparse.Namespace,
    kind: str,
    files: list[Path],
    origin: Path,
    images: Path | None,
    to: Path,
    name: str,
) -> None:
    from detclipv2_jax.data import archives
    from detclipv2_jax.data.examples import ImageFolder

    if not origin.is_dir():
        raise UserError(f"{origin}: no such directory; check --from")
    # A file is named by its path, or as it lies in the archive.
    places = (Path(), origin, origin / "annotations")
    files = [next((p / file for p in places if (p / file).is_file()), file) for file in files]
    if images is not None:
        folder = ImageFolder(images)
    else:
        folder = ImageFolder(origin / "images" / kind, origin / "images", origin)
    options = _options(args)
    inputs = archives.fingerprint(files, folder, options if kind == "image_text" else None)
    source = archives.prepared_before(to, inputs, overwrite=args.overwrite)
    if source is not None:
        print(f"{to}: already prepared, {len(source):,} records of {kind}")
        return
    opened = archives.open_archives(files, folder, kind)

    from detclipv2_jax.data.prepare import prepare, report  # TensorFlow comes in here

    print(report(prepare(opened, to, name=name, inputs=inputs, options=options)))


if __name__ == "__main__":
    sys.exit(main())
