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

from detclipv2_jax.common.errors import UserError
from detclipv2_jax.inference.checkpoint import (
    SUBDIRECTORY,
    check_shapes,
    first_line,
    item_handlers,
    stored_score,
)
from detclipv2_jax.training.state import TrainState

_MAX_FAILURES = 3  # checkpoints in a row that cannot be written before the run stops
_THREAD_TIMEOUT = 60  # seconds to wait for the threads of a save that failed
_MAKE_ROOM = "Make room on the disk, then run the same command again."


class Checkpointer:
    """Saves and restores the state of one run. Saving is atomic and happens in the background."""

    def __init__(self, workdir: Path | str, keep: int):
        """Open the checkpoints of a run.

        Args:
            workdir: of the run; checkpoints are in its subdirectory `checkpoints`.
            keep: how many of the newest checkpoints to keep, besides the one with the best score.

        Raises:
            UserError: the directory cannot be created or read.
        """
        _stop_tensorstore_leaks()
        self._failures = 0  # checkpoints in a row that could not be written
        self._writing: int | None = None  # the step that is being written
        self._scores: dict[int, float] = {}  # by step
        options = ocp.CheckpointManagerOptions(
            preservation_policy=AnyPreservationPolicy([LatestN(keep), _Best(self._scores)]),
            cleanup_tmp_directories=True,
            # Asynchronous creation waits twenty minutes for a directory that cannot be created.
            async_options=ocp.AsyncOptions(
                create_directories_asynchronously=False, barrier_sync_fn=_barrier_unless_failed
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
        self._last_good = self.latest
        for step in self._manager.all_steps():
            with contextlib.suppress(Exception):  # a damaged one, which `restore` reports
                self._note_score(step, stored_score(root, step))

    @property
    def latest(self) -> int | None:
        """Return the step of the newest complete checkpoint; None if there is none."""
        return self._manager.latest_step()

    def save(self, state: TrainState, meta: dict[str, Any], score: float | None) -> None:
        """Start to write a checkpoint of `state.step`; return once the state has left the devices.

        A checkpoint that cannot be written is reported, and the run continues without it.

        Args:
            state: of the run.
            meta: what a checkpoint stores as JSON; `score` is added to it.
            score: of the last evaluation, if one belongs to this step.

        Raises:
            UserError: `_MAX_FAILURES` checkpoints in a row could not be written, or one of a run of
                several processes.
        """
        self.wait()
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        self._remove_unfinished()
        self._note_score(step, score)
        try:
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    model=ocp.args.StandardSave(state.ema),
                    state=ocp.args.StandardSave(_without_ema(state)),
                    meta=ocp.args.JsonSave(meta | {"score": score}),
                ),
            )
            self._writing = step
        except Exception as error:  # its type depends on the file system
            self._save_failed(step, error)

    def _note_score(self, step: int, score: float | None) -> None:
        self._scores.pop(step, None)
        if score is not None:
            self._scores[step] = score

    def wait(self) -> None:
        """Wait until everything saved is on disk; failures are handled as `save` does."""
        step, self._writing = self._writing, None
        if step is None:
            return
        try:
            self._manager.wait_until_finished()
            self._failures, self._last_good = 0, step
        except Exception as error:
            self._save_failed(step, error)

    def _save_failed(self, step: int, error: Exception) -> None:
        """Report a checkpoint that could not be written, or end the run."""
        self._failures += 1
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
        """Restore the newest checkpoint that can be read.

        One that cannot be read is reported and renamed to `STEP.damaged`.

        Args:
            target: the abstract state (`abstract_state`): the shapes and shardings to restore to.

        Returns:
            The state and the checkpoint's meta.

        Raises:
            UserError: the checkpoint is of another model, or none can be read.
        """
        for step in sorted(self._manager.all_steps(), reverse=True):
            path = self._manager.directory / str(step)
            restored, reason = None, ""
            try:
                restored = self._restore_step(step, target, path)
            except UserError:
                raise
            except Exception as error:  # its type depends on what is damaged
                reason = first_line(error)
            is_readable = _in_all_processes(restored is not None)
            if restored is not None and is_readable:
                return restored
            print(f"warning: the checkpoint {path} cannot be read ({reason}); using the one before")
            self._set_aside(step)
        raise UserError(
            f"{self._manager.directory}: no checkpoint can be read. They are renamed to *.damaged; "
            "the same command now starts from the first step."
        )

    def _restore_step(
        self, step: int, target: TrainState, path: Any
    ) -> tuple[TrainState, dict[str, Any]]:
        stored = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))
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
        return dataclasses.replace(state, norms=norms), stored["meta"]

    def _set_aside(self, step: int) -> None:
        """Rename a damaged checkpoint, so that the run can write its step again."""
        path = Path(self._manager.directory) / str(step)
        if jax.process_index() == 0:
            aside = path.with_name(f"{step}.damaged")
            shutil.rmtree(aside, ignore_errors=True)
            try:
                path.rename(aside)
            except OSError as error:
                raise UserError(
                    f"{path}: a damaged checkpoint cannot be renamed ({error.strerror}). Move it "
                    "away, then run the same command again."
                ) from None
        _in_all_processes(True)  # the other processes wait for the rename
        self._manager.reload()

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
                f"{self._last_good_text()} {_MAKE_ROOM}"
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
