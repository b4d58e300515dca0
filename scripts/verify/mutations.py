"""Mutation test: make one deliberate mistake at a time and check that a test fails.

    python scripts/verify/mutations.py [--only=WORD]

tests/parity/mistakes.toml lists the mistakes. Each is made in a copy of the working tree, where the
tests named in the list must fail. All mistakes take about eight minutes and write docs/mistakes.md.
Exit status: 1 if no test fails for one of them.
"""

import argparse
import dataclasses
import datetime
import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

from tqdm import tqdm

from detclipv2_jax.common.atomic import write_text

ROOT = Path(__file__).resolve().parents[2]


@dataclasses.dataclass(frozen=True)
class Mistake:
    """A text that occurs once in a file, its replacement, and the tests that should fail."""

    what: str
    file: str  # in detclipv2_jax/
    right: str
    wrong: str
    tests: str


def noticed(mistake: Mistake) -> bool:
    """Return whether the tests fail in a copy of the tree with this mistake."""
    with tempfile.TemporaryDirectory() as directory:
        copy = Path(directory) / "tree"
        listed = subprocess.run(
            ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT, capture_output=True, text=True, check=True,
        ).stdout.splitlines()  # fmt: skip
        for name in listed:
            if (ROOT / name).is_file():
                (copy / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, copy / name)
        path = copy / "detclipv2_jax" / mistake.file
        text = path.read_text()
        if text.count(mistake.right) != 1:
            raise SystemExit(
                f"error: {mistake.file} contains {mistake.right!r} {text.count(mistake.right)} "
                "times, expected once. Fix tests/parity/mistakes.toml."
            )
        path.write_text(text.replace(mistake.right, mistake.wrong))
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-m", "not slow", mistake.tests]
        cache = {"JAX_COMPILATION_CACHE_DIR": str(ROOT / ".jax_cache")}
        result = subprocess.run(command, cwd=copy, env=os.environ | cache, capture_output=True)
        if result.returncode not in (0, 1):
            raise SystemExit(f"error: pytest failed: {result.stdout.decode()[-2000:]}")
        return result.returncode == 1


def page(outcomes: dict[Mistake, bool]) -> str:
    """Return the page docs/mistakes.md."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    lines = [
        "# Mistakes that the tests notice",
        "",
        "Each mistake was made in a copy of the code; then the tests were run. Written by",
        f"`python scripts/verify/mutations.py`, {datetime.date.today()}, commit {commit}.",
        "",
        "| mistake | file | noticed by |",
        "|---|---|---|",
    ]
    for m, was_noticed in outcomes.items():
        lines.append(f"| {m.what} | {m.file} | {m.tests if was_noticed else '**no test**'} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Try the mistakes; return 1 if one went unnoticed, else 0."""
    parser = argparse.ArgumentParser(
        description="Make one deliberate mistake at a time and check that a test fails."
    )
    parser.add_argument(
        "--only", default="", help="only mistakes whose description contains this; write no page"
    )
    args = parser.parse_args()
    listed = tomllib.loads((ROOT / "tests/parity/mistakes.toml").read_text())["mistake"]
    outcomes = {}
    chosen = [m for m in (Mistake(**fields) for fields in listed) if args.only in m.what]
    for mistake in tqdm(chosen, unit="mistake"):
        outcomes[mistake] = noticed(mistake)
        if not outcomes[mistake]:
            tqdm.write(f"UNNOTICED: {mistake.what} ({mistake.file})")
    if not args.only:
        write_text(ROOT / "docs/mistakes.md", page(outcomes))
    print(f"{sum(outcomes.values())} of {len(outcomes)} mistakes noticed")
    return 0 if all(outcomes.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
