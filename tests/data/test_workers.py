"""Ctrl-C while processes work: it is heard, once, and not where it could do harm."""

import os
import signal
import threading

import pytest

from detclipv2_jax.data import workers


def work(number, task, told):
    told(task)


def interrupt():
    os.kill(os.getpid(), signal.SIGINT)


def test_what_is_told_adds_up():
    said = []
    workers.run(work, ((number, number) for number in range(7)), 2, said.append)
    assert sum(said) == sum(range(7))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_interrupt_waits_until_it_does_no_harm():
    finished = []

    def told(more):
        interrupt()  # as if it came in the middle of something
        finished.append(more)

    with pytest.raises(KeyboardInterrupt):
        workers.run(work, ((number, 1) for number in range(50)), 2, told)
    assert len(finished) == 1
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_interrupt_while_a_task_is_made_ends_the_run():
    made = []

    def tasks():
        for number in range(50):
            made.append(number)
            if number == 1:
                interrupt()
            yield number, 1

    with pytest.raises(KeyboardInterrupt):
        workers.run(work, tasks(), 2, lambda more: None)
    assert made == [0, 1]


def test_a_second_interrupt_does_not_wait():
    finished = []

    def told(more):
        interrupt()
        interrupt()
        finished.append(more)

    with pytest.raises(KeyboardInterrupt):
        workers.run(work, ((number, 1) for number in range(50)), 2, told)
    assert not finished


def test_whoever_handles_interrupts_goes_on_doing_so():
    heard = []
    before = signal.signal(signal.SIGINT, lambda *_: heard.append(1))
    try:
        told = lambda more: None if heard else interrupt()
        workers.run(work, ((number, 1) for number in range(7)), 2, told)
    finally:
        signal.signal(signal.SIGINT, before)
    assert heard == [1]


def test_processes_may_be_started_from_another_thread():
    said = []
    run = lambda: workers.run(work, ((number, 1) for number in range(7)), 2, said.append)
    thread = threading.Thread(target=run)
    thread.start()
    thread.join(60)
    assert not thread.is_alive() and sum(said) == 7


def test_an_interrupt_at_the_very_end_is_heard():
    said = []

    def told(more):
        said.append(more)
        if sum(said) == 3:
            interrupt()

    with pytest.raises(KeyboardInterrupt):
        workers.run(work, ((number, 1) for number in range(3)), 2, told)
    assert sum(said) == 3


def test_what_fails_because_of_an_interrupt_is_an_interrupt():
    def told(more):
        interrupt()
        raise OSError("a worker went away")

    with pytest.raises(KeyboardInterrupt):
        workers.run(work, ((number, 1) for number in range(3)), 2, told)
