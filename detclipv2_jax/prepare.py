#!/usr/bin/env python
"""Turn annotated images into prepared sources, which training reads.

    detclip prepare SOURCE   --from=DIR --to=DIR    a published archive, as one source
    detclip prepare custom   --from=DIR --to=DIR    your own folder: COCO boxes, MDETR phrases and
                                                    captions, as TO/detection, TO/grounding, ...
    detclip prepare symbols  --to=DIR               the built-in data, drawn and prepared
    detclip prepare concepts --from=DIR --to=DIR    the concept dictionary of prepared sources
    detclip prepare index    --from=DIR             the index of a dataset that `tfds build` wrote
    detclip prepare minival  --from=FILE --to=FILE  LVIS minival for evaluation, from LVIS's val

`python scripts/prepare_data.py` in the repository is the same command.

A folder has its annotation files directly in it or in annotations/, and its images in images/ (or
--images=DIR). docs/data.md describes each archive: where to get it and its layout on disk.

All cores are used. You can stop the command at any time: run it again to resume. TO appears when it
is complete, and a source that is already prepared is not prepared again. The report at the end says
what was read, written and dropped, and why; TO/info.json contains the same.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
# One thread per process, because there is one process per core: see phrases.noun_phrases.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

# Functions import the rest: --help answers at once, and worker processes, which import the main
# module again, start faster.
from detclipv2_jax.common.cli import exit_status, local_path, refuse_renamed
from detclipv2_jax.common.errors import UserError

EXAMPLES = {
    "objects365": "--from=objects365 --to=data/objects365 --subset=660000",
    "goldg": "--from=goldg --to=data/goldg",
    "conceptual_captions": "--from=cc15m --to=data/cc15m --store_side=448",
    "lvis": "--from=coco --to=data/lvis",
    "coco": "--from=coco --to=data/coco",
    "odinw": "--from=odinw --to=data/pothole \\\n"
    "      --annotations=pothole/train/annotations_without_background.json",
    "imagenet": "--from=imagenet --to=data/imagenet --store_side=448",
    "image_text": "--from=my_photos --to=data/my_captions",
    "custom": "--from=my_photos --to=data/my_photos",
    "symbols": "--to=data/symbols",
    "concepts": "--from=data --to=data/concepts --text=ViT-B-32.pt --lvis=lvis_v1_train.json",
    "index": "--from=data/objects365/1.0.0",
    "minival": "--from=lvis_v1_val.json --to=lvis_v1_minival.json",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status.

    Args:
        arguments: of the command line; None: those of this process.

    Returns:
        0 if everything is prepared, 2 after a message about what the user can fix, 130 after
        Ctrl-C, 143 after SIGTERM.
    """
    return exit_status(_run, arguments, what_next="Run the same command again to resume.")


def _run(arguments: Sequence[str] | None) -> None:
    args = build_parser().parse_args(arguments)
    try:
        args.run(args)
    except BrokenPipeError:  # of the output, not of a file
        raise
    except OSError as error:
        raise UserError(f"{error.filename or args.to}: {error.strerror or error}.") from error


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line, with one subcommand per source."""
    from detclipv2_jax.data.index import TEXT_KINDS
    from detclipv2_jax.data.prepare.registry import SOURCES

    parser = argparse.ArgumentParser(
        prog="detclip prepare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    subparsers = parser.add_subparsers(dest="source", required=True, metavar="SOURCE")
    for name, source in SOURCES.items():
        one = _add_command(subparsers, name, source.about, _run_archive)
        _add_folders(one)
        one.add_argument(
            "--annotations",
            metavar="FILE",
            action="append",
            type=local_path,
            help=f"{source.kind} annotations; may be repeated (default: those found in --from)",
        )
        for option, keywords in source.options.items():
            one.add_argument(f"--{option}", **keywords)
            if "_" in option:
                refuse_renamed(one, {f"--{option.replace('_', '-')}": f"--{option}"})
        if source.kind == "image_text":
            _add_caption_options(one)
        if source.kind in TEXT_KINDS:
            _add_store_side(one)
    _add_custom(subparsers)
    _add_symbols(subparsers)
    _add_concepts(subparsers)
    _add_index(subparsers)
    _add_minival(subparsers)
    return parser


def _add_command(subparsers, name: str, about: str, run) -> argparse.ArgumentParser:
    """Add a subcommand that calls `run(args)`. `about` completes "detclip prepare NAME: …"."""
    description = f"prepare {about}" if run in (_run_archive, _run_custom) else about
    parser = subparsers.add_parser(
        name,
        help=about,
        description=f"{description[0].upper()}{description[1:]}.",
        epilog=f"example:\n  detclip prepare {name} {EXAMPLES[name]}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser


def _add_custom(subparsers) -> None:
    from detclipv2_jax.data.prepare.registry import OF_KIND

    about = "your own folder: COCO boxes, MDETR phrases, captions, or several of these"
    parser = _add_command(subparsers, "custom", about, _run_custom)
    _add_folders(parser)
    for kind in OF_KIND:
        parser.add_argument(
            f"--{kind}",
            metavar="FILE",
            action="append",
            type=local_path,
            help=f"{kind} annotations; may be repeated (default: all files found in --from, unless "
            "one of any kind is named)",
        )
    refuse_renamed(parser, {"--image-text": "--image_text"})
    parser.add_argument(
        "--validation",
        metavar="FILE",
        help="COCO boxes to measure on while training, written to TO/validation (default: the file "
        "in --from whose name or folder says val, such as annotations/instances_val.json or "
        "valid/_annotations.coco.json); none: no such file",
    )
    parser.add_argument(
        "--val_share",
        metavar="SHARE",
        type=float,
        help="where there is no file for validation, hold out this share of the pictures, such as "
        "0.1: chosen by a seeded hash of each picture, so a picture stays in its set when others "
        "are added",
    )
    parser.add_argument(
        "--val_seed", metavar="N", type=int, default=0, help="seed of --val_share (default: 0)"
    )
    _add_caption_options(parser)
    _add_store_side(parser)


def _add_symbols(subparsers) -> None:
    about = "draw the built-in data from a seed, as archives in TO/archives, and prepare it"
    parser = _add_command(subparsers, "symbols", about, _run_symbols)
    _add_target(parser)
    _add_caption_options(parser)
    _add_store_side(parser)
    parser.add_argument("--seed", type=int, default=0, help="seed of the scenes (default: 0)")
    parser.add_argument(
        "--option",
        metavar="NAME=VALUE",
        action="append",
        default=[],
        help="a field of SymbolsOptions (data/prepare/sources/symbols.py), such as "
        "--option=novel=60; may be repeated",
    )


def _add_concepts(subparsers) -> None:
    about = (
        "write TO/dictionary.jsonl: the names and frequent phrases of all prepared sources in "
        "--from, with definitions"
    )
    parser = _add_command(subparsers, "concepts", about, _run_concepts)
    _add_path(parser, "--from", "origin", "DIR", "folder of prepared sources")
    _add_path(parser, "--to", "to", "DIR", "directory of the dictionary")
    parser.add_argument(
        "--min_count",
        metavar="N",
        type=int,
        default=5,
        help="minimum number of mentions of a phrase; categories need none (default: %(default)s)",
    )
    parser.add_argument(
        "--size",
        metavar="N",
        type=int,
        default=14_000,
        help="largest number of concepts; the most frequent phrases are kept (default: "
        "%(default)s, as in the paper)",
    )
    parser.add_argument(
        "--lvis",
        metavar="FILE",
        type=local_path,
        help="LVIS v1 annotations, or its list of categories: use the synsets of its names",
    )
    parser.add_argument(
        "--definitions_file",
        metavar="FILE",
        type=local_path,
        help="table of your own: name, synset, definition, separated by tabs, with this header; "
        "used before all but a dataset's own definitions",
    )
    parser.add_argument(
        "--text",
        metavar="FILE",
        type=local_path,
        help="CLIP weights: choose a name's sense, and define a name that WordNet lacks by the "
        "nearest concept (default: by its head noun)",
    )
    refuse_renamed(parser, {"--min-count": "--min_count"})


def _add_index(subparsers) -> None:
    about = "write the index that training needs for a dataset that `tfds build` wrote"
    parser = _add_command(subparsers, "index", about, _run_index)
    _add_path(
        parser,
        "--from",
        "to",
        "DIR",
        "the dataset, such as DATA_DIR/objects365/1.0.0; its records are not changed",
    )
    parser.add_argument("--split", default="train", help="split of the dataset (default: train)")
    _add_jobs(parser)


def _add_minival(subparsers) -> None:
    about = "write LVIS minival for evaluation: the images of LVIS v1 val that are in COCO val2017"
    parser = _add_command(subparsers, "minival", about, _run_minival)
    _add_path(parser, "--from", "origin", "FILE", "lvis_v1_val.json")
    _add_path(parser, "--to", "to", "FILE", "file to write, lvis_v1_minival.json")


def _add_path(parser, flag: str, dest: str, metavar: str, help_text: str) -> None:
    parser.add_argument(
        flag, dest=dest, metavar=metavar, type=local_path, required=True, help=help_text
    )


def _add_folders(parser: argparse.ArgumentParser) -> None:
    _add_path(parser, "--from", "origin", "DIR", "folder of the archive")
    parser.add_argument(
        "--images",
        metavar="DIR",
        type=local_path,
        help="folder of the images (default: FROM/images, then FROM)",
    )
    _add_target(parser)


def _add_target(parser: argparse.ArgumentParser) -> None:
    _add_path(parser, "--to", "to", "DIR", "directory to write")
    parser.add_argument(
        "--name", help="name of the source in counts and logs (default: last part of TO)"
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace a source in TO that was prepared from other files or options",
    )
    _add_jobs(parser)


def _add_jobs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--jobs", type=int, help="number of processes (default: number of cores)")


def _add_caption_options(parser: argparse.ArgumentParser) -> None:
    """Add the options for the phrases of captions."""
    refuse_renamed(parser, {"--spacy-model": "--spacy_model"})
    parser.add_argument(
        "--spacy_model",
        metavar="NAME",
        help="spaCy pipeline that finds noun phrases (default: en_core_web_sm or a package with "
        "the same content)",
    )
    parser.add_argument(
        "--phrases",
        metavar="N",
        type=int,
        default=7,
        help="at most this many noun phrases per caption (default: 7)",
    )


def _add_store_side(parser: argparse.ArgumentParser) -> None:
    """Add the option for the size of images with texts."""
    refuse_renamed(parser, {"--store-side": "--store_side"})
    parser.add_argument(
        "--store_side",
        metavar="N",
        type=int,
        help="store images with captions or classes with at most N pixels on their longer side, as "
        "JPEG of quality 90: they take less space and are decoded faster. Training needs the side "
        "of its canvas times the largest of `scales`, which is 448 (320 times 1.4) for "
        "configs/pretrain.py. Smaller images are kept as they are (default: keep all)",
    )


def _run_archive(args: argparse.Namespace) -> None:
    from detclipv2_jax.data.prepare import commands
    from detclipv2_jax.data.prepare.registry import SOURCES

    source = SOURCES[args.source]
    commands.prepare_archive(
        source,
        args.origin,
        _target(args),
        annotations=args.annotations,
        images=args.images,
        reader_options={option: getattr(args, option) for option in source.options},
    )


def _run_custom(args: argparse.Namespace) -> None:
    from detclipv2_jax.data.prepare import commands, validation
    from detclipv2_jax.data.prepare.registry import OF_KIND

    named = {kind: getattr(args, kind) for kind in OF_KIND if getattr(args, kind)}
    if args.validation not in (None, "none") and args.val_share is not None:
        raise UserError("--validation=FILE and --val_share exclude each other. Leave one out.")
    validate_on = None
    if args.val_share is not None:
        validate_on = validation.Split(args.val_share, args.val_seed)
    elif args.validation not in (None, "none"):
        validate_on = Path(args.validation)
    commands.prepare_folder(
        args.origin,
        _target(args),
        annotations=named,
        images=args.images,
        validate_on=validate_on,
        find_validation=args.validation is None,
    )


def _run_symbols(args: argparse.Namespace) -> None:
    from detclipv2_jax.data.prepare import commands

    commands.prepare_symbols(_target(args), seed=args.seed, settings=args.option)


def _run_concepts(args: argparse.Namespace) -> None:
    from detclipv2_jax.data.prepare.concepts import prepare_concepts

    prepare_concepts(
        args.origin,
        args.to,
        min_count=args.min_count,
        size=args.size,
        lvis=args.lvis,
        definitions_file=args.definitions_file,
        text=args.text,
    )


def _run_index(args: argparse.Namespace) -> None:
    from detclipv2_jax.data.prepare import commands

    commands.add_index(args.to, split=args.split, jobs=_options(args).jobs)


def _run_minival(args: argparse.Namespace) -> None:
    from detclipv2_jax.data.prepare import commands

    commands.write_minival(args.origin, args.to)


def _target(args: argparse.Namespace):
    from detclipv2_jax.data.prepare.commands import Target

    return Target(args.to, args.name, args.overwrite, _options(args))


def _options(args: argparse.Namespace):
    """Return the PrepareOptions of the command line; `UserError` for an invalid number."""
    from detclipv2_jax.data.prepare.options import PrepareOptions

    chosen: dict[str, Any] = {}
    if args.jobs is not None:
        if args.jobs < 1:
            raise UserError(f"--jobs={args.jobs}: too small. Use 1 or more processes.")
        chosen["jobs"] = args.jobs
    if hasattr(args, "phrases"):
        if args.phrases < 0:
            raise UserError(f"--phrases={args.phrases}: negative. Use 0 or more.")
        chosen |= {"phrase_model": args.spacy_model, "phrase_limit": args.phrases}
    if hasattr(args, "store_side"):
        if args.store_side is not None and args.store_side < 32:
            raise UserError(f"--store_side={args.store_side}: too small. Use 32 or more pixels.")
        chosen["store_side"] = args.store_side
    return PrepareOptions(**chosen)


if __name__ == "__main__":
    sys.exit(main())
