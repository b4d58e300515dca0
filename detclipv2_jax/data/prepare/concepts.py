"""Make the concept dictionary of prepared sources: names and frequent phrases, with definitions.

See data/dictionary.py for the file and docs/concepts.md for its use.
"""

from pathlib import Path

from detclipv2_jax.common.errors import UserError
from detclipv2_jax.data.index import Source
from detclipv2_jax.data.prepare import dictionary_writer
from detclipv2_jax.text.checked import read_table
from detclipv2_jax.text.definitions import Knowledge


def find_sources(root: Path) -> list[Source]:
    """Open the prepared sources in a folder, in its folders and in their folders.

    Raises:
        UserError: there is none, or one of them is damaged.
    """
    patterns = ("info.json", "*/info.json", "*/*/info.json")
    found = sorted(path.parent for pattern in patterns for path in root.glob(pattern))
    unfinished = (".partial", ".old")
    found = [p for p in found if not any(part.endswith(unfinished) for part in p.parts)]
    if not found:
        raise UserError(
            f"{root}: no prepared source here or in its folders. Prepare one with `detclip prepare "
            "SOURCE --from=DIR --to=DIR`."
        )
    return [Source.open(path) for path in found]


def prepare_concepts(
    origin: Path,
    to: Path,
    *,
    min_count: int = 5,
    size: int = 14_000,
    lvis: Path | None = None,
    definitions_file: Path | None = None,
    text: Path | None = None,
) -> None:
    """Write the dictionary of the sources in a folder, and print what it contains.

    Args:
        origin: folder of prepared sources.
        to: directory of the dictionary.
        min_count: mentions that a phrase needs; categories need none.
        size: largest number of concepts.
        lvis: LVIS v1 annotations or list of categories, for the synsets of its names.
        definitions_file: table of names with synsets or definitions (`checked.read_table`), used
            before WordNet's.
        text: CLIP weights. They choose among the senses of a name; a name that WordNet lacks is
            then defined by the nearest concept, otherwise by its head noun.

    Raises:
        UserError: a file or a source is missing or damaged.
    """
    sources = find_sources(origin)
    corrections = read_table(definitions_file) if definitions_file else {}
    embed = None
    if text:
        from detclipv2_jax.weights.text_embedder import text_embedder  # imports jax

        embed = text_embedder(text)
    counted = dictionary_writer.count(sources)
    names = counted.chosen(min_count=min_count, size=size)
    dictionary = dictionary_writer.build(
        to,
        names,
        counted.counts,
        Knowledge(
            own=counted.own,
            corrections=corrections,
            synsets=dictionary_writer.lvis_synsets(lvis) if lvis else {},
        ),
        embed=embed,
        created_from={
            "sources": {source.name: len(source) for source in sources},
            "min_count": min_count,
            "size": size,
            "lvis": lvis and lvis.name,
            "definitions_file": definitions_file and definitions_file.name,
            "text": text and text.name,
        },
    )
    for source in sources:
        print(f"{source.name} ({source.kind}): {int(source.vocabulary.sum()):,} names and phrases")
    frequent = sum(counted.counts[name] >= min_count for name in counted.counts)
    print(
        f"all sources: {len(counted.counts):,} names and phrases, {len(counted.categories):,} of "
        f"them categories; {frequent:,} occur at least {min_count} times"
    )
    print(dictionary_writer.report(dictionary))
