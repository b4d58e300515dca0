"""Say in a table what a source holds, and what its preparation dropped, changed and doubts."""

from collections.abc import Sequence

import numpy as np

from detclipv2_jax.common.printable import counted, printable
from detclipv2_jax.data.index import Source
from detclipv2_jax.data.prepare.examples import HELD_OUT

_SHOWN_NAMES = 4  # sentences about names that a report shows for each reason
_SHOWN_CLASSES = 5  # of the most and of the least frequent names
_RARE = 10  # boxes


def format_report(source: Source) -> str:
    """Return a table of what was written, dropped and changed, and why."""
    info, concepts = source.info, len(source.keys)
    lines = [f"{source.name} ({source.kind}) in {source.directory}"]
    files = info.get("annotation_files", ())
    width = max([31, *(len(file["file"]) + 1 for file in files)])
    for file in files:
        boxes = ""
        if source.kind in ("detection", "grounding"):
            boxes = f", {counted(file['boxes'], 'box', 'boxes')}"
        name = printable(file["file"])
        lines.append(f"  from {name:<{width}}{file['images']:>10,} records{boxes}")
    left_out = ("images", "captions", "shards")
    dropped = sum(n for reason, n in info["dropped"].items() if reason.startswith(left_out))
    rows = [("read", len(source) + dropped), ("records", len(source))]
    if source.kind == "detection":
        rows += [("of which without boxes", images_without_boxes(source))]
    rows += [("boxes", info.get("boxes", 0)), ("concepts", concepts)]
    rows += [("of which captions", concepts - int(np.count_nonzero(source.vocabulary)))]
    images = info.get("images", {})  # missing where TFDS built the records
    rows += [("images re-encoded as JPEG", images.get("reencoded", 0))]
    rows += [("images stored smaller", images.get("shrunk", 0))]
    lines += [f"  {label:<36}{count:>10,}" for label, count in rows if count or label == "records"]
    lines += class_lines(source)
    for title, field in (("dropped", "dropped"), ("changed", "mended"), ("note", "noted")):
        for reason, count in sorted(info.get(field, {}).items()):
            label = f"{title} {reason}"
            if reason == HELD_OUT:  # nothing is lost
                label = reason.removeprefix("images: ")
            lines.append(f"  {label:<36}{count:>10,}")
            shown = _SHOWN_NAMES if reason.startswith("names") else 1
            sentences = info["explained"].get(reason, ())
            lines += [f"      {sentence}" for sentence in sentences[:shown]]
            if shown > 1 and len(sentences) > shown:
                more = len(sentences) - shown
                lines.append(f"      and {more:,} more in {source.directory}/info.json")
    return "\n".join(lines)


def images_without_boxes(source: Source) -> int:
    """Return how many records of a detection source have no box."""
    return int(np.count_nonzero(np.diff(source.positives_offsets) == 0))


def boxes_per_name(source: Source) -> dict[str, int]:
    """Return the boxes of each name of a detection source, the most frequent first."""
    counts = {row["name"]: row["count"] for row in source.concepts}
    return dict(sorted(counts.items(), key=lambda pair: -pair[1]))


def class_lines(source: Source, whole_table: str | None = None) -> list[str]:
    """Return the boxes of the most and least frequent names of a detection source, in lines.

    Args:
        source: of any kind; others than detection have no lines.
        whole_table: the file with the boxes of every name; None: the source's concepts.jsonl.
    """
    if source.kind != "detection" or not len(source.keys):
        return []
    counts = boxes_per_name(source)
    boxed = [(name, count) for name, count in counts.items() if count]
    unboxed = [name for name, count in counts.items() if not count]
    lines = []
    if len(boxed) <= 2 * _SHOWN_CLASSES:
        lines.append(("boxes per name", _listed(boxed)))
    else:
        rare = sum(count < _RARE for _, count in boxed)
        lines.append(("most boxes", _listed(boxed[:_SHOWN_CLASSES])))
        lines.append(("fewest boxes", _listed(boxed[-_SHOWN_CLASSES:])))
        if rare:
            lines.append((f"names with under {_RARE} boxes", f"{rare:,}"))
    if unboxed:
        shown = ", ".join(unboxed[:_SHOWN_CLASSES]) + ", …" * (len(unboxed) > _SHOWN_CLASSES)
        lines.append(("names without boxes", f"{len(unboxed):,} ({shown})"))
    if len(boxed) > 2 * _SHOWN_CLASSES:
        table = whole_table or str(source.directory / "concepts.jsonl")
        lines.append(("boxes of every name", table))
    return [f"  {label + ':':<28} {text}" for label, text in lines if text]


def _listed(pairs: Sequence[tuple[str, int]]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in pairs)
