#!/usr/bin/env python
"""Makes the concept dictionary of prepared sources: names and frequent phrases, with definitions.

    python scripts/prepare_concepts.py --from=data --to=data/concepts
    python scripts/prepare_concepts.py --from=data --to=data/concepts \\
        --text=ViT-B-32.pt --lvis=lvis_v1_train.json

Reads the names of every source under --from, writes TO/dictionary.jsonl whole or not at all. With
--text, a name that WordNet lacks is defined as the nearest concept that it has; without, as its
head noun. --config.data.dictionary=concepts then trains with it (docs/concepts.md).
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from detclipv2_jax.common.cli import exit_status, refuse_renamed
from detclipv2_jax.common.errors import UserError
from detclipv2_jax.data import dictionary as dictionary_lib
from detclipv2_jax.data.index import Source


def find_sources(root: Path) -> list[Source]:
    """The prepared sources in a folder, or in its folders, or in theirs.

    Raises:
        UserError: there is none, or one is damaged.
    """
    patterns = ("info.json", "*/info.json", "*/*/info.json")
    found = sorted(path.parent for pattern in patterns for path in root.glob(pattern))
    unfinished = (".partial", ".old")
    found = [p for p in found if not any(part.endswith(unfinished) for part in p.parts)]
    if not found:
        raise UserError(
            f"{root}: no prepared source here, nor in its folders; prepare one with `python "
            "scripts/prepare_data.py SOURCE --from=DIR --to=DIR`"
        )
    return [Source.open(path) for path in found]


def run(args: argparse.Namespace) -> None:
    """Writes the dictionary that the command line asks for, and says what is in it."""
    sources = find_sources(args.origin)
    embed = None
    if args.text:
        from detclipv2_jax.weights.text_embedder import text_embedder  # jax: only where needed

        embed = text_embedder(args.text)
    counted = dictionary_lib.count(sources)
    names = counted.chosen(min_count=args.min_count, size=args.size)
    dictionary = dictionary_lib.build(
        args.to,
        names,
        counted.counts,
        synsets=dictionary_lib.lvis_synsets(args.lvis) if args.lvis else None,
        embed=embed,
        created_from={
            "sources": {source.name: len(source) for source in sources},
            "min_count": args.min_count,
            "size": args.size,
            "lvis": args.lvis and args.lvis.name,
            "text": args.text and args.text.name,
        },
    )
    for source in sources:
        print(f"{source.name} ({source.kind}): {int(source.vocabulary.sum()):,} names and phrases")
    frequent = sum(counted.counts[n] >= args.min_count for n in counted.counts)
    print(
        f"together {len(counted.counts):,}: {len(counted.categories):,} categories; {frequent:,} "
        f"occur {args.min_count} times or more"
    )
    print(dictionary_lib.report(dictionary))


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    result.add_argument(
        "--from", dest="origin", metavar="DIR", type=Path, required=True, help="prepared sources"
    )
    result.add_argument("--to", metavar="DIR", type=Path, required=True, help="where to write")
    result.add_argument(
        "--min_count",
        metavar="N",
        type=int,
        default=5,
        help="mentions that a phrase needs; categories need none (default: %(default)s)",
    )
    result.add_argument(
        "--size",
        metavar="N",
        type=int,
        default=14_000,
        help="concepts at most, the most frequent phrases of all (default: %(default)s, the "
        "paper's)",
    )
    result.add_argument(
        "--lvis",
        metavar="FILE.json",
        type=Path,
        help="LVIS v1 annotations (or its list of categories): the synsets of the names it has",
    )
    result.add_argument(
        "--text",
        metavar="FILE",
        type=Path,
        help="CLIP weights, for the nearest concept (default: head nouns)",
    )
    refuse_renamed(result, {"--min-count": "--min_count"})
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; 2 if something that the user can mend went wrong, in one sentence."""
    return exit_status(run, parser().parse_args(arguments))


if __name__ == "__main__":
    sys.exit(main())
