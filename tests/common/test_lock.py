import json
import multiprocessing
import os
import shutil
import socket
import subprocess
import sys
import threading
import time

import pytest

from detclipv2_jax.common import lock
from detclipv2_jax.common.errors import UserError


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    for name, seconds in [("HEARTBEAT", 0.1), ("DEAD_AFTER", 0.8), ("_SETTLE", 0.01)]:
        monkeypatch.setattr(lock, name, seconds)
    monkeypatch.setattr(lock, "_SETTLE_IN_BUCKET", 0.05)


def hold(directory):
    return lock.held(directory, "trains here", "give another --workdir")


def rewrite(directory, **changes):
    path = directory / lock.NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_second_holder_is_refused_by_name_until_the_first_one_ends(tmp_path):
    with hold(tmp_path):
        with pytest.raises(UserError) as error, hold(tmp_path):
            pass
        assert str(error.value).startswith(
            f"{tmp_path}: process {os.getpid()} on host {socket.gethostname()} trains here since 2"
        )
        assert str(error.value).endswith(". Wait for it, or give another --workdir.")
    with hold(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


_DIES = """
import os, sys
from detclipv2_jax.common import lock
lock.Lock(sys.argv[1], "trains here", "wait")
os.kill(os.getpid(), 9)
"""


def test_a_lock_of_a_killed_process_is_taken_over_at_once(tmp_path):
    subprocess.run([sys.executable, "-c", _DIES, str(tmp_path)], check=False)
    assert json.loads((tmp_path / lock.NAME).read_text())["pid"] != os.getpid()
    began = time.monotonic()
    with hold(tmp_path):
        assert time.monotonic() - began < 0.5


def test_a_process_number_that_was_used_again_is_not_the_holder(tmp_path):
    with hold(tmp_path):
        rewrite(tmp_path, started="1")
        with hold(tmp_path):
            pass


def test_the_copy_of_a_directory_in_use_is_free_and_a_link_to_it_is_not(tmp_path):
    with hold(tmp_path / "run"):
        shutil.copytree(tmp_path / "run", tmp_path / "copy")
        with hold(tmp_path / "copy"):
            pass
        (tmp_path / "link").symlink_to(tmp_path / "run")
        with pytest.raises(UserError, match="trains here since"), hold(tmp_path / "link"):
            pass


@pytest.mark.parametrize("where", ["local", "bucket"])
def test_a_holder_elsewhere_is_dead_if_its_heartbeat_stands_still(
    tmp_path, bucket, where, capsys, monkeypatch
):
    directory = tmp_path / "run" if where == "local" else f"{bucket}/run"
    monkeypatch.setattr(lock, "_machine", lambda: "there")
    elsewhere = lock.Lock(directory, "trains here", "wait")
    monkeypatch.setattr(lock, "_machine", lambda: "here")
    with pytest.raises(UserError, match="trains here since"), hold(directory):
        pass
    elsewhere._ended.set()  # its process dies
    elsewhere._thread.join()
    lock._held.discard(elsewhere)
    with hold(directory):
        pass
    assert "sign of life of process" in capsys.readouterr().err


def test_a_holder_whose_lock_was_taken_over_learns_of_it(tmp_path):
    lost = threading.Event()
    with lock.held(tmp_path, "trains here", "wait", lost.set):
        rewrite(tmp_path, token="another")
        assert lost.wait(5)
    assert json.loads((tmp_path / lock.NAME).read_text())["token"] == "another"  # it stays


@pytest.mark.parametrize("content", ["", "{", "[]", '{"token": "a"}'])
def test_a_file_that_is_no_lock_is_replaced(tmp_path, content):
    (tmp_path / lock.NAME).write_text(content)
    with hold(tmp_path):
        assert json.loads((tmp_path / lock.NAME).read_text())["pid"] == os.getpid()


def _try(directory, results):
    try:
        lock.Lock(directory, "trains here", "wait")
        results.put("held")
    except UserError:
        results.put("refused")
    time.sleep(2)
    os._exit(0)


def test_of_many_that_start_at_once_one_holds_it(tmp_path):
    """With a dead lock in place, so that they also race to remove it."""
    (tmp_path / lock.NAME).write_text("")
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    started = [context.Process(target=_try, args=(tmp_path, results)) for _ in range(8)]
    for process in started:
        process.start()
    found = sorted(results.get(timeout=30) for _ in started)
    for process in started:
        process.join()
    assert found == ["held"] + ["refused"] * 7


def test_a_directory_that_cannot_be_written_is_a_user_error(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(UserError, match="cannot be written .*Check the path"),
        hold(tmp_path / "file" / "run"),
    ):
        pass


def test_all_locks_are_released_before_a_process_ends_at_once(tmp_path):
    lock.Lock(tmp_path, "trains here", "wait")
    lock.release_all()
    assert list(tmp_path.iterdir()) == []
