"""Flip random bits in the files of a checkpoint and see whether every command finds them.

    python scripts/verify/flip_bits.py --checkpoint=runs/quickstart [--flips=60] [--seed=0]

The newest checkpoint of the run is saved twice, as training does, in a temporary directory. Then
one bit at a time is flipped in the newer copy: most in a file drawn by size, every fourth in a file
drawn evenly, so that small files have their turn. Each flip is tried by the four loads: training
(must set the copy aside and restore the older one), evaluate and detect (must use the older one)
and export of that step (must refuse). Prints what each flip hit and what the check costs. Exit
status: 1 if a load missed a flip.
"""

import argparse
import contextlib
import dataclasses
import io
import json
import random
import re
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from detclipv2_jax.common import config_dict, digest_list
from detclipv2_jax.common.errors import UserError
from detclipv2_jax.inference import checkpoint, checkpoint_files
from detclipv2_jax.training import optimizer, sharding
from detclipv2_jax.training import state as state_lib
from detclipv2_jax.training.checkpointer import Checkpointer, abstract_state
from detclipv2_jax.training.optimizer import OptimizerConfig
from detclipv2_jax.training.state import TrainState

OLDER, NEWER = 1, 2  # steps of the two copies


def saved_twice(run: Path, workdir: Path) -> TrainState:
    """Save the newest model of a run as the checkpoints `OLDER` and `NEWER`; return the target."""
    loaded = checkpoint.load_model(run)
    section = config_dict.with_current_names(OptimizerConfig, loaded.run["optimizer"])
    section = config_dict.known_fields(OptimizerConfig, section)
    config = config_dict.from_dict(OptimizerConfig, section, "config.optimizer")
    rule = optimizer.create(config, loaded.params, 10)
    state = state_lib.create(loaded.params, rule)
    saver = Checkpointer(workdir, 3)
    meta = {"config": loaded.run, "names": loaded.names, "definitions": loaded.definitions}
    for step in (OLDER, NEWER):
        saver.save(dataclasses.replace(state, step=jnp.asarray(step, jnp.int32)), meta, step / 10)
    saver.close()
    one_device = sharding.replicated(sharding.make_mesh(1))
    return abstract_state(state, jax.tree.map(lambda _: one_device, state))


def flipped(root: Path, number: int, moments: random.Random) -> tuple[Path, int]:
    """Flip one random bit below a directory; return its file and number there."""
    files = sorted(p for p in root.rglob("*") if p.is_file() and p.stat().st_size)
    weights = [1 if number % 4 == 3 else p.stat().st_size for p in files]
    (path,) = moments.choices(files, weights)
    bit = moments.randrange(8 * path.stat().st_size)
    flip(path, bit)
    return path, bit


def flip(path: Path, bit: int) -> None:
    """Flip a bit of a file in place."""
    with path.open("r+b") as file:
        file.seek(bit // 8)
        (byte,) = file.read(1)
        file.seek(bit // 8)
        file.write(bytes([byte ^ 1 << bit % 8]))


def by_training(workdir: Path, target: TrainState) -> bool:
    """Return whether a start sets the newer copy aside and restores the older one."""
    restored, _ = Checkpointer(workdir, 3).restore(target)
    aside = workdir / "checkpoints" / f"DAMAGED-{NEWER}"
    if is_found := int(restored.step) == OLDER and aside.is_dir():
        aside.rename(aside.with_name(str(NEWER)))
    return is_found


def by_evaluate(workdir: Path) -> bool:
    """Return whether `evaluate` chooses the older copy."""
    step = checkpoint_files.newest_intact(workdir)
    return checkpoint.load_model(workdir, step).step == OLDER


def by_detect(workdir: Path) -> bool:
    """Return whether `detect`, `Detector` and the page load the older copy."""
    return checkpoint.load_model(workdir).step == OLDER


def by_export(workdir: Path) -> bool:
    """Return whether `export --step` refuses the newer copy and names the older one."""
    try:
        checkpoint.load_model(workdir, NEWER)
    except UserError as error:
        return f"Use the checkpoint of step {OLDER}, which is intact" in str(error)
    return False


def attempt(load: Callable[..., bool], *arguments: Any) -> tuple[bool, str]:
    """Return whether a load found the damage, and what it printed."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        try:
            is_found = load(*arguments)
        except Exception as error:  # noqa: BLE001 - a traceback is a miss, whatever it is
            return False, f"{type(error).__name__}: {error}"
    return is_found, printed.getvalue()


def costs(path: Path) -> dict[str, float]:
    """Return what the check costs on one checkpoint: seconds, and seconds per GB."""
    gigabytes = sum(p.stat().st_size for p in path.rglob("*") if p.is_file()) / 1e9
    began = time.perf_counter()
    digest_list.write(path)
    written = time.perf_counter()
    if problem := digest_list.problem(path):
        raise RuntimeError(problem)
    read = time.perf_counter()
    return {
        "megabytes": gigabytes * 1e3,
        "save_seconds": written - began,
        "save_seconds_per_gb": (written - began) / gigabytes,
        "load_seconds": read - written,
        "load_seconds_per_gb": (read - written) / gigabytes,
    }


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, required=True, help="a run; it is only read")
    parser.add_argument("--flips", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    moments, found = random.Random(args.seed), {}
    with tempfile.TemporaryDirectory() as directory:
        workdir = Path(directory)
        target = saved_twice(args.checkpoint, workdir)
        newer = workdir / "checkpoints" / str(NEWER)
        print(json.dumps({k: round(v, 3) for k, v in costs(newer).items()}), flush=True)
        for number in range(args.flips):
            path, bit = flipped(newer, number, moments)
            tries = {
                "training": attempt(by_training, workdir, target),
                "evaluate": attempt(by_evaluate, workdir),
                "detect": attempt(by_detect, workdir),
                "export": attempt(by_export, workdir),
            }
            flip(path, bit)
            for door, (is_found, _) in tries.items():
                found[door] = found.get(door, 0) + is_found
            missed = {door: text[-300:] for door, (is_found, text) in tries.items() if not is_found}
            reason = re.search(r"\((.*?)\)", tries["detect"][1])
            said = reason[1] if reason else "-"
            print(f"{number + 1:>3} {path.relative_to(newer)} bit {bit}: {said} {missed or ''}")
    print(", ".join(f"{door} {count} of {args.flips}" for door, count in found.items()))
    sys.exit(int(any(count < args.flips for count in found.values())))


if __name__ == "__main__":
    main()
