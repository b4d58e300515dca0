"""Find the checkpoints of a run and check their files; checkpoint.py and training load them.

`directory` is the workdir of a run, its `checkpoints/`, or one checkpoint in it, local or in a
bucket. A checkpoint has a list of digests (common/digest_list.py), which every load checks.
"""

import functools
import json
import os
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from detclipv2_jax.common import digest_list, lfs_pointer
from detclipv2_jax.common.errors import UserError

SUBDIRECTORY = "checkpoints"
# Key in a checkpoint's meta: True if it has a list of digests. Those of older versions have none.
DIGESTS = "digests"
_STEP = re.compile("0|[1-9][0-9]{0,18}")  # the name of a checkpoint's directory
_DELETION = 2.0  # seconds that a checkpoint which training deletes may be there in part

T = TypeVar("T")


class DamagedError(UserError):
    """A checkpoint that must not be used; the message says what is wrong with it."""


def located(directory: str | os.PathLike) -> tuple[Any, int | None]:
    """Return the directory of all checkpoints of a run, and the step if `directory` names one."""
    path = digest_list.as_path(directory)
    if (path / SUBDIRECTORY).is_dir():
        return path / SUBDIRECTORY, None
    step = _step_of(path.name)
    if step is not None and (path / "meta").is_dir():
        return path.parent, step
    return path, None


def _step_of(name: str) -> int | None:
    """Return the step of a checkpoint by the name of its directory; None if it is another name.

    Training writes and reads "600", not the copies that people make: "000600", "600.backup".
    """
    return int(name) if _STEP.fullmatch(name) else None


def steps(directory: str | os.PathLike) -> list[int]:
    """Return the steps of the complete checkpoints of a run, ascending; [] if there are none.

    If `directory` is one checkpoint, it is that step alone. A damaged checkpoint counts.
    """
    root, step = located(directory)
    if step is not None:
        return [step]
    if not root.is_dir():
        return []
    # On a local file system the name is complete only when the checkpoint is, in a bucket not.
    in_bucket = "://" in os.fspath(root)

    def is_complete(path: Any) -> bool:
        return (path / "commit_success.txt").exists() if in_bucket else path.is_dir()

    found = ((_step_of(path.name), path) for path in root.iterdir())
    return sorted(step for step, path in found if step is not None and is_complete(path))


def require_steps(directory: str | os.PathLike) -> list[int]:
    """Return what `steps` returns; raise `UserError` if there are none."""
    found = steps(directory)
    if not found:
        raise UserError(
            f"there is no checkpoint in {directory}. Give the --workdir of a training run."
        )
    return found


def read_meta(path: Any) -> dict[str, Any]:
    """Return what a checkpoint stores as JSON; `path` is its own directory.

    Raises:
      DamagedError: the file is missing or damaged.
    """
    try:
        meta = json.loads((path / "meta" / "metadata").read_bytes())
    except FileNotFoundError:
        raise DamagedError("meta/metadata is missing") from None
    except (OSError, ValueError) as error:
        is_pointer = lfs_pointer.is_pointer_file(path / "meta" / "metadata")
        why = lfs_pointer.REASON if is_pointer else error
        raise DamagedError(f"meta/metadata cannot be read ({why})") from None
    if not isinstance(meta, dict) or "config" not in meta:
        raise DamagedError("meta/metadata is not that of a checkpoint")
    return meta


def newest_meta(directory: str | os.PathLike) -> dict[str, Any]:
    """Return what the newest checkpoint with a readable meta stores; {} if there is none."""
    root, _ = located(directory)
    for step in reversed(steps(directory)):
        try:
            return read_meta(root / str(step))
        except DamagedError:
            continue
    return {}


def check(path: Any) -> bool:
    """Check the files of one checkpoint, whose directory is `path`, against its digests.

    Returns:
      False if it has none, because an older version wrote it; a line says so, once.

    Raises:
      DamagedError: a file is missing or has another content than was written.
    """
    if not (path / digest_list.NAME).exists():
        if read_meta(path).get(DIGESTS):
            raise DamagedError(f"{digest_list.NAME} is missing")
        _note_no_digests(os.fspath(path))
        return False
    if what := digest_list.problem(path):
        if what.endswith("missing"):
            _raise_if_deleted(path)
        raise DamagedError(what)
    return True


def fall_back(root: Any, known: Sequence[int], load: Callable[[int], T]) -> T:
    """Return `load(step)` of the last of the steps that is intact; a warning names the others.

    Args:
      root: the directory of the checkpoints.
      known: steps, the preferred one last.
      load: raises `DamagedError` for a damaged checkpoint.

    Raises:
      UserError: no checkpoint is intact.
    """
    damaged: list[str] = []
    for step in reversed(known):
        try:
            result = load(step)
        except DamagedError as error:
            damaged.append(f"{root / str(step)} is damaged ({error})")
            continue
        if damaged:
            print(
                f"warning: {'; '.join(damaged)}; using the checkpoint of step {step} instead",
                file=sys.stderr,
                flush=True,
            )
        return result
    raise UserError(
        f"{root} has no intact checkpoint: {'; '.join(damaged)}. Restore one from a copy, or "
        "train again."
    )


def by_preference(directory: str | os.PathLike) -> list[int]:
    """Return the steps of a run, the one that commands use without --step last.

    That is the newest checkpoint; or the best one, if training measured the newest and others on
    its validation set. (An old measurement says nothing about a run that has gone on since.)
    """
    known, measured = require_steps(directory), scores(directory)
    if known[-1] not in measured:
        return known
    ranked = sorted(measured, key=lambda step: (measured[step], step))
    return [step for step in known if step not in measured] + ranked


def note_choice(directory: str | os.PathLike, step: int) -> None:
    """Print which checkpoint is used where it is the best one and not the newest.

    Where the best one is damaged, the warning of `fall_back` says which one is used instead.
    """
    if step != (newest := steps(directory)[-1]) and step == by_preference(directory)[-1]:
        print(
            f"using the checkpoint of step {step}, the best on the validation set of the run's "
            f"training (the newest is that of step {newest})",
            file=sys.stderr,
            flush=True,
        )


def chosen_intact(directory: str | os.PathLike) -> int:
    """Return the intact step that `by_preference` prefers, and note it."""
    step = _first_intact(directory, by_preference(directory))
    note_choice(directory, step)
    return step


def newest_intact(directory: str | os.PathLike) -> int:
    """Return the newest step whose files are intact; a warning names what is passed over."""
    return _first_intact(directory, require_steps(directory))


def _first_intact(directory: str | os.PathLike, order: Sequence[int]) -> int:
    root, _ = located(directory)

    def checked(step: int) -> int:
        check(root / str(step))
        return step

    return fall_back(root, order, checked)


def refused(root: Any, step: int, reason: Any) -> DamagedError:
    """Return the error for a damaged checkpoint that the user asked for: it names intact ones."""
    others = [other for other in steps(root) if other != step]
    earlier = next((s for s in reversed(others) if s < step and _is_intact(root, s)), None)
    later = next((s for s in others if s > step and _is_intact(root, s)), None)
    intact = [str(other) for other in (earlier, later) if other is not None]
    advice = "No other checkpoint there is intact: restore it from a copy, or train again."
    if intact:
        advice = f"Use the checkpoint of step {' or '.join(intact)}, which is intact."
    return DamagedError(f"{root / str(step)} is damaged: {reason}. {advice}")


def _is_intact(root: Any, step: int) -> bool:
    try:
        check(root / str(step))
    except DamagedError:
        return False
    return True


def _raise_if_deleted(path: Any) -> None:
    """Raise `DamagedError` with that reason if training is deleting the checkpoint right now."""
    deadline = time.monotonic() + _DELETION
    while time.monotonic() < deadline:
        if not path.is_dir():
            raise DamagedError("training has deleted it")
        time.sleep(0.1)


@functools.cache  # once per checkpoint
def _note_no_digests(path: str) -> None:
    print(
        f"note: {path} has no digests, because an older version wrote it: damage to it would go "
        "unnoticed",
        file=sys.stderr,
        flush=True,
    )


def scores(directory: str | os.PathLike) -> Mapping[int, float]:
    """Return the score that training measured at each step; not of steps without a score."""
    root, _ = located(directory)
    found: dict[int, float] = {}
    for step in steps(directory):
        try:
            score = read_meta(root / str(step)).get("score")
        except DamagedError:  # its loading reports it
            continue
        if score is not None:
            found[step] = score
    return found
