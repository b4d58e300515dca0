"""Writing and restoring the checkpoints of a run (reading alone: inference/checkpoint.py)."""

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
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from jax.experimental import multihost_utils
from orbax.checkpoint import multihost
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, LatestN

from detclipv2_jax.common.errors import UserError
from detclipv2_jax.inference.checkpoint import (
    SUBDIRECTORY,
    check_shapes,
    first_line,
    item_handlers,
    score_of,
)
from detclipv2_jax.training.state import TrainState

_PATIENCE = 3  # checkpoints in a row that cannot be written before the run stops
_WAIT = 60  # seconds for the threads of one that could not be written


class Checkpointer:
    """Saves and restores the state of one run; saving happens in the background and is atomic."""

    def __init__(self, workdir: Path | str, keep: int):
        """Keeps the newest `keep` checkpoints and the one with the best `score`.

        Raises:
          UserError: the directory cannot be made or read.
        """
        _stop_leaks()
        self._failures, self._writing = 0, None  # in a row; the step that is being written
        self._scores: dict[int, float] = {}
        options = ocp.CheckpointManagerOptions(
            preservation_policy=AnyPreservationPolicy([LatestN(keep), _Best(self._scores)]),
            cleanup_tmp_directories=True,
            # Threads would wait for a directory that cannot be made, for twenty minutes.
            async_options=ocp.AsyncOptions(
                create_directories_asynchronously=False, barrier_sync_fn=_meet_unless_failed
            ),
        )
        root = Path(workdir).absolute() / SUBDIRECTORY
        try:
            self._manager = ocp.CheckpointManager(
                root, item_handlers=item_handlers(), options=options
            )
        except OSError as error:
            raise UserError(
                f"{root}: cannot be made or read ({error.strerror}); use a --workdir that you may "
                "write to."
            ) from None
        self._last_good = self.latest
        for step in self._manager.all_steps():
            with contextlib.suppress(Exception):  # of a damaged one, which `restore` tells
                self._note(step, score_of(root, step))

    @property
    def latest(self) -> int | None:
        """The newest complete checkpoint's step; None before the first."""
        return self._manager.latest_step()

    def save(self, state: TrainState, meta: dict[str, Any], score: float | None) -> None:
        """Starts to write the state after `state.step` steps; returns when it left the devices.

        The `score` goes into the meta, too. A checkpoint that cannot be written is told, and the
        run goes on to the next one.

        Raises:
          UserError: `_PATIENCE` of them in a row could not, or one by several processes; names the
            last good one.
        """
        self.wait()
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        self._remove_parts()
        self._note(step, score)
        try:
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    model=ocp.args.StandardSave(state.ema),
                    state=ocp.args.StandardSave(_without_average(state)),
                    meta=ocp.args.JsonSave(meta | {"score": score}),
                ),
            )
            self._writing = step
        except Exception as error:  # a full disk, a lost bucket, whatever a file system says
            self._failed(step, error)

    def _note(self, step: int, score: float | None) -> None:
        self._scores.pop(step, None)
        if score is not None:
            self._scores[step] = score

    def wait(self) -> None:
        """Returns when everything saved is on disk. What cannot be written is told as by `save`."""
        step, self._writing = self._writing, None
        if step is None:
            return
        try:
            self._manager.wait_until_finished()
            self._failures, self._last_good = 0, step
        except Exception as error:
            self._failed(step, error)

    def _failed(self, step: int, error: Exception) -> None:
        self._failures += 1
        several = jax.process_count() > 1  # the others may have written it, and wait for this one
        if not several:
            self._give_up()
        told = f"{self._manager.directory}: the checkpoint of step {step} could not be written"
        told += f" ({first_line(error)})"
        if self._failures >= _PATIENCE or several:
            row = "" if several else f", as {self._failures} in a row"
            raise UserError(
                f"{told}{row}; {self._good()}: make room, then start again with the same command."
            ) from None
        print(f"{told}; {self._good()}", flush=True)

    def _give_up(self) -> None:
        """Nothing is left of a save that failed: no thread to meet the next one's, no part."""
        with contextlib.suppress(Exception):
            self._manager.wait_until_finished()
        deadline = time.monotonic() + _WAIT
        for thread in threading.enumerate():
            if type(thread).__module__.startswith("orbax."):
                with contextlib.suppress(Exception):  # which each of them raises: no news
                    thread.join(max(deadline - time.monotonic(), 0.0))
        self._manager.reload()
        self._remove_parts()

    def _remove_parts(self) -> None:
        """They take room. tensorstore writes on when its save was given up: asked at each save."""
        if jax.process_index() == 0:
            for part in Path(self._manager.directory).glob("*.orbax-checkpoint-tmp*"):
                shutil.rmtree(part, ignore_errors=True)

    def _good(self) -> str:
        if self._last_good is None:
            return "there is no good one yet"
        return f"the last good one is of step {self._last_good}"

    def restore(self, target: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """The newest checkpoint in the shapes and shardings of the abstract `target`, and its meta.

        One that cannot be read is told, set aside as `STEP.damaged`, and the one before it is read.

        Raises:
          UserError: if it was made with another model, or none can be read.
        """
        for step in sorted(self._manager.all_steps(), reverse=True):
            where = self._manager.directory / str(step)
            found, reason = None, ""
            try:
                found = self._restore(step, target, where)
            except UserError:
                raise
            except Exception as error:  # whatever a damaged file comes to
                reason = first_line(error)
            if _everywhere(found is not None):
                return found
            print(f"the checkpoint {where} cannot be read ({reason}): going back before it")
            self._set_aside(step)
        raise UserError(
            f"{self._manager.directory}: none of its checkpoints can be read; they are set aside "
            "as *.damaged, and the next start begins anew."
        )

    def _restore(
        self, step: int, target: TrainState, where: Any
    ) -> tuple[TrainState, dict[str, Any]]:
        meta = self._manager.restore(
            step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())
        ).meta
        check_shapes(self._manager, step, target.ema, where)
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                model=ocp.args.StandardRestore(target.ema),
                state=ocp.args.StandardRestore(_without_average(target)),
            ),
        )
        return TrainState(ema=restored.model, **restored.state), meta

    def _set_aside(self, step: int) -> None:
        """Out of the way of the run, which will write that step again; kept for people."""
        where = Path(self._manager.directory) / str(step)
        if jax.process_index() == 0:
            aside = where.with_name(f"{step}.damaged")
            shutil.rmtree(aside, ignore_errors=True)
            try:
                where.rename(aside)
            except OSError as error:
                raise UserError(
                    f"{where}: cannot be set aside ({error.strerror}); move it away, then start "
                    "again with the same command."
                ) from None
        _everywhere(True)  # the others wait for it
        self._manager.reload()

    def close(self) -> None:
        """Finishes writing and lets go of the directory.

        Raises:
          UserError: the last checkpoint could not be written.
        """
        self.wait()
        self._manager.close()
        if self._failures:
            raise UserError(
                f"{self._manager.directory}: the last checkpoint could not be written; "
                f"{self._good()}: make room, then start again with the same command."
            )


@dataclasses.dataclass
class _Best:
    """Orbax's policy that keeps the checkpoint of the best score, of equal ones the last.

    Its own one, BestN, knows no score of before the start, nor of before a `reload`.
    """

    scores: dict[int, float]  # by step

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """For each checkpoint there is: must it stay?"""
        scored = [c.step for c in checkpoints if c.step in self.scores]
        best = max(scored, key=lambda step: (self.scores[step], step), default=None)
        return [c.step == best for c in checkpoints]


def _meet_unless_failed(*, key: str, timeout_ms: int) -> None:
    """Orbax's barrier of the threads that save, which they would also come to with an error.

    There this process would wait for the others, and they for its part, for twenty minutes.
    """
    if (error := sys.exc_info()[1]) is not None:
        raise error
    multihost.get_barrier_sync_fn()(key=key, timeout_ms=timeout_ms)


@functools.cache  # once
def _stop_leaks() -> None:
    """Keeps host memory from growing with every checkpoint.

    tensorstore (0.1.78 to 0.1.86 at least) never frees the keys, strings and lists of the JSON that
    it hands to Python. At each save Orbax asks it for all its counters, for a log, and for every
    array for the description of the same directory.
    """
    tensorstore.experimental_collect_matching_metrics = lambda *_, **__: []
    asked, known = tensorstore.KvStore.Spec.to_json, {}

    def to_json(spec: tensorstore.KvStore.Spec, **options: Any) -> Any:
        key = f"{spec} {options}"
        if (found := known.get(key)) is None:
            if len(known) > 100:
                known.clear()
            found = known[key] = asked(spec, **options)
        return copy.deepcopy(found)

    tensorstore.KvStore.Spec.to_json = to_json


def _everywhere(good: bool) -> bool:
    """Is it so in every process? Each waits for the others."""
    if jax.process_count() == 1:
        return good
    return bool(np.all(multihost_utils.process_allgather(np.array(good))))


def _without_average(state: TrainState) -> dict[str, Any]:
    fields = {f.name: getattr(state, f.name) for f in dataclasses.fields(state)}
    del fields["ema"]
    return fields
