"""Holds every part against an independent implementation and writes the table of what was seen.

    ./scripts/test.sh tests/parity          # installs the reference packages (Python 3.11)
    python scripts/verify/parity.py                # all comparisons; writes docs/parity.md

The comparisons are the tests in tests/parity. A table is written only if all of them pass.
"""

import argparse
import datetime
import importlib.metadata
import itertools
import json
import os
import platform
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from detclipv2_jax.common.atomic import replacing

ROOT = Path(__file__).resolve().parents[2]

PARTS = (  # a table without one of these is not written
    "Tokenizer",
    "Text tower",
    "Swin-T",
    "Swin-S",
    "Swin-B",
    "Swin-L",
    "FPN",
    "ATSS head",
    "Deformable convolution",
    "Anchors",
    "Boxes decoded",
    "Boxes encoded",
    "ATSS assignment, labels, box targets",
    "Centerness targets",
    "Focal loss",
    "GIoU loss",
    "Centerness loss",
    "Contrastive loss",
    "Suppression",
    "Weights in: Swin",
    "Weights in: CLIP",
    "Weights in: bias tables",
)


def main() -> int:
    """Runs the comparisons; 0 if all passed and the table is written."""
    parser = argparse.ArgumentParser(
        description="Holds every part against an independent implementation; writes a table."
    )
    parser.add_argument(
        "--output", default=str(ROOT / "docs/parity.md"), help="(default: docs/parity.md)"
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        rows, report = Path(directory) / "rows.jsonl", Path(directory) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "tests/parity", "-m", "slow or not slow"]
        command.append(f"--junitxml={report}")
        status = subprocess.run(command, cwd=ROOT, env=os.environ | {"PARITY_ROWS": str(rows)})
        lines = rows.read_text().splitlines() if rows.is_file() else []
        skipped = skips(report) if report.is_file() else []
    if status.returncode:
        print(f"error: no table is written: pytest ended with {status.returncode}", file=sys.stderr)
        return 2
    if skipped:
        print(
            f"error: no table is written, since tests were skipped: {skipped[0]}", file=sys.stderr
        )
        return 2
    found = [json.loads(line) for line in lines]
    missing = [part for part in PARTS if part not in {row["part"] for row in found}]
    if missing:
        print(f"error: no table is written: nothing for {', '.join(missing)}", file=sys.stderr)
        return 2
    with replacing(args.output) as temporary:
        temporary.write_text(page(found), encoding="utf-8")
    print(f"{args.output}: {len(found)} comparisons")
    return 0


def skips(report: Path) -> list[str]:
    """Why tests of a JUnit report were skipped."""
    return [skip.get("message", "") for skip in ElementTree.parse(report).iter("skipped")]


def page(rows: list[dict]) -> str:
    """The Markdown page."""
    order = {part: index for index, part in enumerate(PARTS)}
    rows = sorted(rows, key=lambda row: order.get(row["part"], len(order)))
    versions = ", ".join(f"{n} {importlib.metadata.version(n)}" for n in ("jax", "flax", "numpy"))
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    lines = [
        "# Parity",
        "",
        "What was compared with what, on what, and the largest error seen, made by",
        "`python scripts/verify/parity.py`.",
        f"{datetime.date.today()}, Python {platform.python_version()}, {versions}, "
        f"{platform.machine()} CPU, commit {commit}.",
        "",
        "An error is the largest difference relative to the largest value of the reference's",
        "array; float32 against float32 unless float64 is named. 1e-4 is what float32 sums in",
        "another order come to through dozens of layers; 0 means equal. Weights are random and",
        "copied across by the code that reads published checkpoints.",
    ]
    for part, group in itertools.groupby(rows, key=lambda row: row["part"]):
        lines += ["", f"## {part}", "", "| against | on | error | allowed |", "|---|---|---|---|"]
        for row in group:
            seen = f"{row['error']:.1e}" if row["error"] else "0"
            allowed = f"{row['tolerance']:g}"
            lines.append(f"| {row['reference']} | {row['on']} | {seen} | {allowed} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
