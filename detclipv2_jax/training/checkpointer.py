"""Writing and restoring the checkpoints of a run (inference/checkpoint.py only reads them)."""

import contextlib
import copy
import dataclasses
import functools
import shutil
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from jax.experimental import multihost_utils
from jaxtyping import PyTree
from orbax.checkpoint import multihost
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, LatestN

from detclipv2_jax.common import digest_list
from detclipv2_jax.common.errors import UserError
from detclipv2_jax.inference import checkpoint_files
from detclipv2_jax.inference.checkpoint import (
    check_shapes,
    first_line,
    first_not_finite,
    item_handlers,
    reading,
)
from detclipv2_jax.inference.checkpoint_files import SUBDIRECTORY, DamagedError
from detclipv2_jax.training.state import TrainState

_MAX_FAILURES = 3  # checkpoints in a row that cannot be written before the run stops
_THREAD_TIMEOUT = 60  # seconds to wait for the threads of a save that failed
_MAKE_ROOM = "Make room on the disk, then run the same command again."
_LOWER_RATE = "Resume with a lower config.optimizer.learning_rate."
_ELSEWHERE = "another process of the run found that"
# Orbax writes them after everything else.
_WRITTEN_LAST = ("_CHECKPOINT_METADATA", "commit_success.txt")


class Checkpointer:
    """Saves and restores the state of one run. Saving is atomic and happens in the background."""

    def __init__(self, workdir: Path | str, keep: int):
        """Open the checkpoints of a run.

        Args:
            workdir: of the run; checkpoints are in its subdirectory `checkpoints`.
            keep: how many of the newest checkpoints to keep, besides the one with the best score.
                At least two are kept: the newest is known to be good only when an update from
                its state was finite, and it may become damaged.

        Raises:
            UserError: the directory cannot be created or read.
        """
        _stop_tensorstore_leaks()
        self._failures = 0  # checkpoints in a row that could not be written
        self._remedy = ""  # of the last failure
        self._writing: int | None = None  # the step that is being written
        self._scores: dict[int, float] = {}  # by step
        options = ocp.CheckpointManagerOptions(
            preservation_policy=AnyPreservationPolicy([LatestN(max(keep, 2)), _Best(self._scores)]),
            cleanup_tmp_directories=True,
            # Asynchronous creation waits twenty minutes for a directory that cannot be created.
            async_options=ocp.AsyncOptions(
                create_directories_asynchronously=False,
                barrier_sync_fn=_barrier_unless_failed,
                post_finalization_callback=self._write_digests,
            ),
        )
        root = Path(workdir).absolute() / SUBDIRECTORY
        try:
            self._manager = ocp.CheckpointManager(
                root, item_handlers=item_handlers(), options=options
            )
        except OSError as error:
            raise UserError(
                f"{root}: cannot be created or read ({error.strerror}). Use a --workdir that you "
                "may write to."
            ) from None
        self._last_good = self._manager.latest_step()
        self._scores |= checkpoint_files.scores(root)

    @property
    def workdir(self) -> Any:
        """Return the workdir of the run."""
        return self._manager.directory.parent

    @property
    def latest(self) -> int | None:
        """Return the step of the newest complete checkpoint; None if there is none."""
        self.wait()
        return self._manager.latest_step()

    def save(
        self,
        state: TrainState,
        meta: dict[str, Any],
        score: float | None,
        *,
        is_last: bool = False,
    ) -> bool:
        """Start to write a checkpoint of `state.step`; return once the state has left the devices.

        A checkpoint that cannot be written, or whose state is not finite, is reported, and the run
        continues without it.

        Args:
            state: of the run.
            meta: what a checkpoint stores as JSON; `score` is added to it.
            score: of the last evaluation, if one belongs to this step.
            is_last: whether the run ends with this state.

        Returns:
            False if nothing is saved now because the update of this step was skipped: save the
            state after the next update. The last state is saved nevertheless, if it is finite.

        Raises:
            UserError: `_MAX_FAILURES` checkpoints in a row could not be written, or one of a run of
                several processes.
        """
        self.wait()
        step = int(state.step)
        if step in self._manager.all_steps():
            return True
        if (skipped := int(state.skipped_in_row)) and not is_last:
            return False
        name = not_finite(state)
        if not _in_all_processes(not name):
            self._refuse_not_finite(step, name)
            return True
        if skipped:
            print(f"warning: the last {skipped} updates of the run were skipped")
        self._remove_unfinished()
        self._note_score(step, score)
        self._writing = step
        try:
            self._manager.save(step, args=ocp.args.Composite(**self._items(state, meta, score)))
        except Exception as error:  # its type depends on the file system
            self._writing = None
            self._save_failed(step, error)
        return True

    @staticmethod
    def _items(state: TrainState, meta: dict[str, Any], score: float | None) -> dict[str, Any]:
        """Return the items of a checkpoint, as Orbax takes them."""
        return {
            "model": ocp.args.StandardSave(state.ema),
            "state": ocp.args.StandardSave(_without_ema(state)),
            "meta": ocp.args.JsonSave(meta | {"score": score, checkpoint_files.DIGESTS: True}),
        }

    def is_best(self, score: float | None) -> bool:
        """Return whether a score is at least as good as that of every checkpoint kept so far."""
        return score is not None and score >= max(self._scores.values(), default=score)

    def _note_score(self, step: int, score: float | None) -> None:
        self._scores.pop(step, None)
        if score is not None:
            self._scores[step] = score

    def _write_digests(self) -> None:
        """Write the list of digests into the checkpoint that is being written.

        Orbax calls it in the first process, in the thread that saves, when all files but
        `_WRITTEN_LAST` are there and the checkpoint does not have its final name yet.
        """
        root, step = self._manager.directory, self._writing
        unfinished = list(root.glob(f"{step}.orbax-checkpoint-tmp*"))  # none in a bucket
        path = unfinished[0] if unfinished else root / str(step)
        digest_list.write(path, leave_out=_WRITTEN_LAST)

    def wait(self) -> None:
        """Wait until everything saved is on disk; failures are handled as `save` does."""
        if (step := self._writing) is None:
            return
        try:
            self._manager.wait_until_finished()
            if jax.process_index() == 0:
                with contextlib.suppress(OSError):  # the list is valid without `_WRITTEN_LAST`
                    digest_list.complete(self._manager.directory / str(step))
            self._failures, self._last_good = 0, step
        except Exception as error:
            self._save_failed(step, error)
        finally:
            self._writing = None

    def _refuse_not_finite(self, step: int, name: str) -> None:
        """Report a state that is not saved, or end the run."""
        self._failures, self._remedy = self._failures + 1, _LOWER_RATE
        problem = (
            f"{self._manager.directory}: the state of step {step} is not saved, because {name} has "
            "values that are not finite"
        )
        if self._failures >= _MAX_FAILURES:
            raise UserError(
                f"{problem}; {self._failures} in a row have failed. {self._last_good_text()} "
                f"{self._remedy}"
            )
        print(f"warning: {problem}. {self._last_good_text()}", flush=True)

    def fall_back_before(self, first_skipped: int) -> str:
        """Set aside the state that all updates since were skipped from; return what is left.

        No update from that state was finite, so it may be the cause, although it is finite itself.
        It stays if it is the only one.

        Args:
            first_skipped: the first step of those whose updates were skipped.

        Returns:
            A sentence that names the last good checkpoint.
        """
        self.wait()
        known = self._manager.all_steps()
        doubtful = [step for step in known if step >= first_skipped - 1]
        aside = [self._set_aside(step) for step in doubtful if len(doubtful) < len(known)]
        self._last_good = self._manager.latest_step()
        renamed = f" No update from {', '.join(aside)} was applied." if aside else ""
        return self._last_good_text() + renamed

    def _save_failed(self, step: int, error: Exception) -> None:
        """Report a checkpoint that could not be written, or end the run."""
        self._failures, self._remedy = self._failures + 1, _MAKE_ROOM
        # Other processes may have written their part, and would wait for this one.
        is_alone = jax.process_count() == 1
        if is_alone:
            self._clean_up_failed_save()
        problem = (
            f"{self._manager.directory}: the checkpoint of step {step} could not be written "
            f"({first_line(error)})"
        )
        if is_alone and self._failures < _MAX_FAILURES:
            print(f"warning: {problem}. {self._last_good_text()}", flush=True)
            return
        row = f"; {self._failures} in a row have failed" if is_alone else ""
        raise UserError(f"{problem}{row}. {self._last_good_text()} {_MAKE_ROOM}") from None

    def _clean_up_failed_save(self) -> None:
        """End the threads of a failed save, which would disturb the next, and remove its files."""
        with contextlib.suppress(Exception):
            self._manager.wait_until_finished()
        deadline = time.monotonic() + _THREAD_TIMEOUT
        for thread in threading.enumerate():
            if type(thread).__module__.startswith("orbax."):
                with contextlib.suppress(Exception):  # each raises the error again
                    thread.join(max(deadline - time.monotonic(), 0.0))
        self._manager.reload()
        self._remove_unfinished()

    def _remove_unfinished(self) -> None:
        """Remove what failed saves left on disk.

        Each save calls it again, because tensorstore continues to write after a save has failed.
        """
        if jax.process_index() == 0:
            for path in Path(self._manager.directory).glob("*.orbax-checkpoint-tmp*"):
                shutil.rmtree(path, ignore_errors=True)

    def _last_good_text(self) -> str:
        if self._last_good is None:
            return "There is no checkpoint yet."
        return f"The last good checkpoint is that of step {self._last_good}."

    def restore(self, target: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """Restore the newest checkpoint that is intact.

        One that is damaged, or whose state is not finite, is reported and renamed to
        `DAMAGED-STEP`.

        Args:
            target: the abstract state (`abstract_state`): the shapes and shardings to restore to.

        Returns:
            The state and the checkpoint's meta.

        Raises:
            UserError: the checkpoint is of another model or cannot be loaded, or none is intact.
        """
        passed: list[str] = []
        known = sorted(self._manager.all_steps(), reverse=True)
        for step in known:
            path = self._manager.directory / str(step)
            restored, reason = None, ""
            try:
                state, meta = self._restore_step(step, target, path)
                reason = _doubt(state, meta, is_only=step == known[-1])
                restored = None if reason else (state, meta)
            except DamagedError as error:
                reason = str(error)
            if _in_all_processes(restored is not None) and restored is not None:
                if passed:
                    print(f"warning: {'; '.join(passed)}; resuming from step {step} instead")
                self._last_good = step
                return restored
            aside = self._set_aside(step)
            passed.append(
                f"{path} must not be used ({reason or _ELSEWHERE}) and is renamed to {aside}"
            )
        raise UserError(
            f"{'; '.join(passed)}. No checkpoint of the run is intact. Restore one from a copy, "
            "or run the same command again to start from the first step."
        )

    def _restore_step(
        self, step: int, target: TrainState, path: Any
    ) -> tuple[TrainState, dict[str, Any]]:
        is_checked = _checked_by_first_process(path)
        meta = checkpoint_files.read_meta(path)
        with reading(path, is_checked):
            check_shapes(self._manager, step, target.ema, path)
            # A checkpoint from before the last kind of data was added has norms of fewer kinds.
            kinds = self._manager.item_metadata(step).state["norms"]["seen"].shape[0]
            wanted = dataclasses.replace(target, norms=_resized(target.norms, kinds))
            restored = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    model=ocp.args.StandardRestore(target.ema),
                    state=ocp.args.StandardRestore(_without_ema(wanted)),
                ),
            )
        state = TrainState(ema=restored["model"], **restored["state"])
        norms = jax.tree.map(_padded, state.norms, target.norms)
        return dataclasses.replace(state, norms=norms), meta

    def _set_aside(self, step: int) -> str:
        """Rename a damaged checkpoint, so that the run can write its step again.

        Returns:
            Its new name.
        """
        path = self._manager.directory / str(step)
        names = [f"DAMAGED-{step}", *(f"DAMAGED-{step}-{n}" for n in range(2, 1000))]
        name = next(name for name in names if not (path.parent / name).exists())
        _in_all_processes(True)  # all have chosen the name
        if jax.process_index() == 0:
            try:
                path.rename(path.parent / name)
            except OSError as error:
                raise UserError(
                    f"{path}: a damaged checkpoint cannot be renamed ({error.strerror}). Move it "
                    "away, then run the same command again."
                ) from None
        _in_all_processes(True)  # the other processes wait for the rename
        self._manager.reload()
        self._scores.pop(step, None)
        return name

    def close(self) -> None:
        """Finish writing and release the directory.

        Raises:
            UserError: the last checkpoint could not be written.
        """
        self.wait()
        self._manager.close()
        if self._failures:
            raise UserError(
                f"{self._manager.directory}: the last checkpoint could not be written. "
                f"{self._last_good_text()} {self._remedy}"
            )


def abstract_state(state: TrainState, shardings: TrainState) -> TrainState:
    """Return the shapes, types and shardings of a state, as `Checkpointer.restore` expects them."""
    return jax.tree.map(
        lambda array, sharding: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding),
        state,
        shardings,
    )


@dataclasses.dataclass
class _Best:
    """Orbax policy: keep the checkpoint with the best score, the last one of equals.

    Orbax's own BestN does not know the scores from before the start, or before a `reload`.
    """

    scores: dict[int, float]  # by step

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Return for each checkpoint whether to keep it."""
        scored = [c.step for c in checkpoints if c.step in self.scores]
        best = max(scored, key=lambda step: (self.scores[step], step), default=None)
        return [c.step == best for c in checkpoints]


def _barrier_unless_failed(*, key: str, timeout_ms: int) -> None:
    """Orbax's barrier between the processes' saving threads, skipped by a thread with an error.

    Orbax enters the barrier even while an error is raised. There this process would wait for the
    others, and they for its part of the checkpoint, for twenty minutes.
    """
    if (error := sys.exc_info()[1]) is not None:
        raise error
    multihost.get_barrier_sync_fn()(key=key, timeout_ms=timeout_ms)


@functools.cache  # once per process
def _stop_tensorstore_leaks() -> None:
    """Patch tensorstore so that host memory does not grow with every checkpoint.

    tensorstore (at least 0.1.78 to 0.1.86) never frees the strings and lists of the JSON that it
    returns to Python. At each save Orbax asks for all its counters, only to log them, and for the
    description of the same directory once per array.
    """
    tensorstore.experimental_collect_matching_metrics = lambda *_, **__: []
    original, cache = tensorstore.KvStore.Spec.to_json, {}

    def to_json(spec: tensorstore.KvStore.Spec, **options: Any) -> Any:
        key = f"{spec} {options}"
        if (found := cache.get(key)) is None:
            if len(cache) > 100:
                cache.clear()
            found = cache[key] = original(spec, **options)
        return copy.deepcopy(found)

    # The stub names the option; `to_json` passes on all of them.
    tensorstore.KvStore.Spec.to_json = to_json  # pyright: ignore[reportAttributeAccessIssue]


def not_finite(state: TrainState) -> str:
    """Return what part of a state has a value that is not finite; "" if all are finite."""
    if jax.default_backend() == "cpu":  # its arrays are on the host; the program takes 5 s to build
        return first_not_finite(state)
    leaves = [leaf for leaf in jax.tree.leaves(state) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    return "" if bool(all_finite(leaves)) else "a parameter, its average or a moment"


@jax.jit
def all_finite(leaves: list[jax.Array]) -> jax.Array:
    """Return whether all values are finite: one pass over the state, on the devices."""
    return jnp.all(jnp.stack([jnp.isfinite(leaf).all() for leaf in leaves]))


def _checked_by_first_process(path: Any) -> bool:
    """Return `checkpoint_files.check(path)`; only the first process reads the files.

    Raises:
        DamagedError: in all processes; the reason is known in the first one.
    """
    is_checked, reason = True, ""
    if jax.process_index() == 0:
        try:
            is_checked = checkpoint_files.check(path)
        except DamagedError as error:
            reason = str(error)
    if not _in_all_processes(not reason):
        raise DamagedError(reason)
    return _in_all_processes(is_checked)


def _doubt(state: TrainState, meta: dict[str, Any], is_only: bool) -> str:
    """Return why a run must not resume from a state whose files are intact; "" if it may."""
    if name := first_not_finite(state):
        return f"{name} has values that are not finite"
    skipped, step = int(state.skipped_in_row), int(state.step)
    is_last = step == meta.get("total_steps") or meta.get("auto_step", {}).get("is_over", False)
    if skipped and not is_only and not is_last:
        return f"the last {skipped} updates before it were skipped"
    return ""


def _in_all_processes(value: bool) -> bool:
    """Return whether `value` is true in all processes; each waits for the others."""
    if jax.process_count() == 1:
        return value
    return bool(np.all(multihost_utils.process_allgather(np.array(value))))


def _resized(norms: PyTree, kinds: int) -> PyTree:
    """Return the shapes of norms (`abstract_state`) of so many kinds."""
    return jax.tree.map(
        lambda wanted: jax.ShapeDtypeStruct((kinds,), wanted.dtype, sharding=wanted.sharding), norms
    )


def _padded(array: jax.Array, wanted: jax.ShapeDtypeStruct) -> jax.Array:
    """Return an array with the wanted length; 0, as before the first step, for what it lacks."""
    missing = wanted.shape[0] - array.shape[0]
    if not missing:
        return array
    return jax.jit(jnp.pad, static_argnums=1, out_shardings=wanted.sharding)(array, (0, missing))


def _without_ema(state: TrainState) -> dict[str, Any]:
    fields = {f.name: getattr(state, f.name) for f in dataclasses.fields(state)}
    del fields["ema"]
    if state.rate_factor is None:
        del fields["rate_factor"]
    return fields
