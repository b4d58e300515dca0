"""Run tasks in worker processes that report progress and stop together with their parent."""

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

_WAITING_TASKS = 1  # tasks submitted beyond those that run: bounds the memory of their arguments
_POLL_SECONDS = 0.5  # seconds between two readings of the workers' progress

#: What a worker does: work(number of the task, task, progress).
Work = Callable[[int, Any, Callable[[int], None]], None]


def run(
    work: Work, tasks: Iterator[tuple[int, Any]], jobs: int, progress: Callable[[int], Any]
) -> None:
    """Call `work(number, task, progress)` for each task, in `jobs` processes.

    With one job everything runs in this process. An error or Ctrl-C here stops the workers soon.

    Args:
        work: picklable. It calls its own `progress` regularly with the amount of work done
            since the last call.
        tasks: (number, task); taken from the iterator only when they are about to run.
        jobs: processes.
        progress: receives the amounts that all workers report.

    Raises:
        UserError: a worker process was killed.
    """
    if jobs == 1:
        for number, task in tasks:
            work(number, task, progress)
        return
    # Spawned, not forked: the threads of spaCy and JAX do not survive a fork.
    context = multiprocessing.get_context("spawn")
    done, stopped = context.Value("q", 0), context.Event()
    pool = concurrent.futures.ProcessPoolExecutor(
        jobs, context, initializer=_start_worker, initargs=(done, stopped)
    )
    reported, running = 0, set()
    try:
        for task in itertools.chain(tasks, [None]):
            if task is not None:
                running.add(pool.submit(_run_task, work, *task))
            while len(running) >= jobs + _WAITING_TASKS or (task is None and running):
                ready, running = concurrent.futures.wait(
                    running, timeout=_POLL_SECONDS, return_when=concurrent.futures.FIRST_COMPLETED
                )
                total = done.value
                progress(total - reported)
                reported = total
                for future in ready:
                    future.result()
    except concurrent.futures.process.BrokenProcessPool as error:
        raise UserError(
            "a worker process was killed, probably because memory ran out. Use fewer processes "
            f"with --jobs={max(1, jobs // 2)}; what is finished is kept."
        ) from error
    finally:
        stopped.set()
        pool.shutdown(cancel_futures=True)


def _start_worker(done, stopped) -> None:
    """Leave signals to the parent, and exit when the parent is gone, even after SIGKILL.

    A terminal sends Ctrl-C, and a cluster SIGTERM, to all processes of a command.
    """
    global _done, _stopped
    _done, _stopped = done, stopped
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)

    def exit_with_parent():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=exit_with_parent, daemon=True).start()


def _run_task(work: Work, number: int, task: Any) -> None:
    def progress(amount: int) -> None:
        if _stopped.is_set():
            raise InterruptedError
        with _done.get_lock():
            _done.value += amount

    work(number, task, progress)
