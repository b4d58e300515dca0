"""A command that is stopped says one sentence and ends with the signal's exit status."""

import signal
import subprocess
import sys
import textwrap
import time

import pytest

from detclipv2_jax.common.interruption import Stopped

# `work` waits in Python; `outside` in C, where no exception can be raised, as a compilation does.
PROGRAM = """
    import ctypes, pathlib, sys, time
    from detclipv2_jax.common import atomic, cli, interruption

    def write(stopped=None):
        atomic.write_text(out / "answers.json", "answered")
        return f"{stopped}: written."

    def run(kind):
        with interruption.at_stop(write), atomic.replacing(out / "unfinished") as temporary:
            temporary.write_text("half")
            try:
                print("ready", flush=True)
                while kind == "work":
                    time.sleep(0.01)
                if kind == "outside":  # a mutex is waited for through any signal
                    libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(256)
                    libc.pthread_mutex_lock(mutex)
                    libc.pthread_mutex_lock(mutex)
                while kind == "deaf":
                    try:
                        time.sleep(10)
                    except KeyboardInterrupt:
                        print("deaf", flush=True)
                while kind == "pipe":
                    print("x" * 1000)
            except interruption.Stopped as stopped:
                raise stopped.told(write(stopped)) from None

    out = pathlib.Path(sys.argv[2])
    sys.exit(cli.exit_status(run, sys.argv[1], what_next="Run the same command again."))
"""


def run(program, *arguments):
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program), *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        # The tests themselves may run under nohup, which children inherit.
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),
    )  # fmt: skip


def start(kind, out):
    process = run(PROGRAM, kind, str(out))
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_first_signal_ends_it_with_a_sentence(tmp_path, number):
    with start("work", tmp_path) as process:
        process.send_signal(number)
        _, error = process.communicate(timeout=60)
    name = "Ctrl-C" if number == signal.SIGINT else number.name
    assert process.returncode == 128 + number
    assert error.strip() == f"stopped by {name}: written. Run the same command again."
    assert [path.name for path in tmp_path.iterdir()] == ["answers.json"]


def test_code_outside_python_is_not_waited_for(tmp_path):
    began = time.monotonic()
    with start("outside", tmp_path) as process:
        time.sleep(0.5)
        process.send_signal(signal.SIGTERM)
        _, error = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM and time.monotonic() - began < 15
    assert error.strip() == "stopped by SIGTERM: written."
    assert [path.name for path in tmp_path.iterdir()] == ["answers.json"]


def test_the_second_signal_ends_it_at_once(tmp_path):
    with start("deaf", tmp_path) as process:
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == "deaf\n"
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGINT
    assert not list(tmp_path.iterdir())


def test_a_closed_pipe_is_silent(tmp_path):
    with start("pipe", tmp_path) as process:
        process.stdout.close()
        error = process.stderr.read()
        assert process.wait(60) == 128 + signal.SIGPIPE
    assert not error


def test_a_signal_that_is_ignored_stays_ignored(tmp_path):
    line = [sys.executable, "-c", textwrap.dedent(PROGRAM), "work", str(tmp_path)]
    with subprocess.Popen(
        ["nohup", *line], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGHUP)
        time.sleep(0.5)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM


def test_a_stop_is_no_error_that_code_handles():
    assert not issubclass(Stopped, Exception) and issubclass(Stopped, KeyboardInterrupt)


TRAINING = """
    import sys, time
    from detclipv2_jax.common import interruption

    interruption.end_at_once("Run the same command to resume.")
    if sys.argv[1] == "early":
        print("ready", flush=True)
        time.sleep(60)
    stop = interruption.StopRequest()
    print("ready", flush=True)
    end = time.monotonic() + 3  # a step, longer than the grace for code outside Python
    while time.monotonic() < end:
        time.sleep(0.1)
    sys.exit(0 if not stop.is_due(1) else 128 + stop.signal)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("when", ["early", "in a step"])
def test_training_ends_at_once_before_its_loop_and_after_a_step_in_it(when, number):
    with run(TRAINING, when) as process:
        assert process.stdout.readline() == "ready\n"
        began = time.monotonic()
        process.send_signal(number)
        _, error = process.communicate(timeout=60)
        took = time.monotonic() - began
    assert process.returncode == 128 + number
    assert took > 2.5 if when == "in a step" else took < 30  # of the 60 that it would sleep
    assert ("Run the same command to resume." in error) == (when == "early")
