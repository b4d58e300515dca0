"""Work spread over processes that end when they should, with word of how far it is."""

import concurrent.futures
import concurrent.futures.process
import itertools
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

from detclipv2_jax.common.errors import UserError

_AHEAD = 1  # tasks waiting beside those that are worked on: bounds the memory that they take
_LOOK = 0.5  # seconds between looks at how far the processes are

Work = Callable[[int, Any, Callable[[int], None]], None]


def run(work: Work, tasks: Iterator[tuple[int, Any]], jobs: int, told: Callable[[int], Any]):
    """Call `work(number, task, told)` for each task, in `jobs` processes, or here if that is one.

    `work` must be picklable, and calls its `told` every so often with the count of what it did
    since; the sum of these reaches the `told` given here. Tasks are taken as they are begun.
    `UserError` where a process was killed. An error or Ctrl-C here ends the processes soon.
    """
    if jobs == 1:
        for number, task in tasks:
            work(number, task, told)
        return
    # Fresh processes, not forked ones: spaCy's and JAX's threads do not survive a fork.
    context = multiprocessing.get_context("spawn")
    done, stopped = context.Value("q", 0), context.Event()
    pool = concurrent.futures.ProcessPoolExecutor(
        jobs, context, initializer=_start, initargs=(done, stopped)
    )
    shown, working = 0, set()
    try:
        for task in itertools.chain(tasks, [None]):
            if task is not None:
                working.add(pool.submit(_work, work, *task))
            while len(working) >= jobs + _AHEAD or (task is None and working):
                ready, working = concurrent.futures.wait(
                    working, timeout=_LOOK, return_when=concurrent.futures.FIRST_COMPLETED
                )
                now = done.value
                told(now - shown)
                shown = now
                for future in ready:
                    future.result()
    except concurrent.futures.process.BrokenProcessPool as error:
        raise UserError(
            "a worker process was killed, probably for lack of memory; use fewer with "
            f"--jobs={max(1, jobs // 2)}, what was finished is kept"
        ) from error
    finally:
        stopped.set()
        pool.shutdown(cancel_futures=True)


def _start(done, stopped) -> None:
    """A worker leaves Ctrl-C to its parent, and ends when that is gone, even by SIGKILL."""
    global _done, _stopped
    _done, _stopped = done, stopped
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def follow():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _work(work: Work, number: int, task: Any) -> None:
    def told(more: int) -> None:
        if _stopped.is_set():
            raise InterruptedError
        with _done.get_lock():
            _done.value += more

    work(number, task, told)
