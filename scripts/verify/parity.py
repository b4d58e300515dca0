"""Compare every part of the model with an independent implementation; write a table of errors.

    ./scripts/test.sh tests/parity          # installs the reference packages (Python 3.11)
    python scripts/verify/parity.py                # all comparisons; writes docs/parity.md

The comparisons are the tests in tests/parity. The table is written only if all of them pass.
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

from detclipv2_jax.common.atomic import write_text

ROOT = Path(__file__).resolve().parents[2]

PARTS = (  # all must be compared, or the table is not written
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
    """Run the comparisons; return 0 if all passed and the table is written, else 2."""
    parser = argparse.ArgumentParser(
        description="Compare every part of the model with an independent implementation."
    )
    parser.add_argument(
        "--output",
        default=str(ROOT / "docs/parity.md"),
        help="file for the table (default: docs/parity.md)",
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
        print(f"error: no table written: pytest ended with {status.returncode}.", file=sys.stderr)
        return 2
    if skipped:
        print(f"error: no table written, because tests were skipped: {skipped[0]}", file=sys.stderr)
        return 2
    found = [json.loads(line) for line in lines]
    missing = [part for part in PARTS if part not in {row["part"] for row in found}]
    if missing:
        print(f"error: no table written: no comparison of {', '.join(missing)}", file=sys.stderr)
        return 2
    write_text(args.output, page(found))
    print(f"{args.output}: {len(found)} comparisons")
    return 0


def skips(report: Path) -> list[str]:
    """Return the reasons of the skipped tests in a JUnit report."""
    return [skip.get("message", "") for skip in ElementTree.parse(report).iter("skipped")]


def page(rows: list[dict]) -> str:
    """Return the page docs/parity.md."""
    order = {part: index for index, part in enumerate(PARTS)}
    rows = sorted(rows, key=lambda row: order.get(row["part"], len(order)))
    versions = ", ".join(f"{n} {importlib.metadata.version(n)}" for n in ("jax", "flax", "numpy"))
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    lines = [
        "# Parity",
        "",
        "Each part of the model, compared with an independent implementation. Written by",
        "`python scripts/verify/parity.py`.",
        f"{datetime.date.today()}, Python {platform.python_version()}, {versions}, "
        f"{platform.machine()} CPU, commit {commit}.",
        "",
        "An error is the largest difference, relative to the largest value of the reference's",
        "array. Both sides use float32 unless float64 is named. Over dozens of layers, float32",
        "sums in another order differ by about 1e-4; 0 means equal. Weights are random and are",
        "copied by the code that reads published checkpoints.",
    ]
    for part, group in itertools.groupby(rows, key=lambda row: row["part"]):
        lines += [
            "",
            f"## {part}",
            "",
            "| compared with | on | error | allowed |",
            "|---|---|---|---|",
        ]
        for row in group:
            seen = f"{row['error']:.1e}" if row["error"] else "0"
            allowed = f"{row['tolerance']:g}"
            lines.append(f"| {row['reference']} | {row['on']} | {seen} | {allowed} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
