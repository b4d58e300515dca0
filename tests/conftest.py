"""Shared by all tests: CPU, four virtual devices, and one compilation cache."""

import fcntl
import os
import signal
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".jax_cache"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
# Four devices for the tests of sharding. LLVM optimization costs more time than tiny programs gain.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0",
)
# A process that a shell starts in the background ignores Ctrl-C, and so would its children.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 64 MB; the test is skipped if the user may not mount one."""
    root = tmp_path / "disk"
    root.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "none", str(root)]
    try:
        mounted = subprocess.run(mount, capture_output=True).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("may not mount a file system")
    yield root
    subprocess.run(["umount", "--lazy", str(root)], check=True)


@pytest.fixture
def make_read_only():
    """`make_read_only(directory)`; for root, who ignores permission bits, by a read-only mount."""
    mounted = []

    def make_read_only(directory):
        if os.geteuid():
            directory.chmod(0o555)
            return
        for options in (["--bind"], ["-o", "remount,bind,ro"]):
            line = ["mount", *options, str(directory), str(directory)]
            if subprocess.run(line, capture_output=True).returncode:
                pytest.skip("may not mount a file system")
            mounted[:] = [directory]

    yield make_read_only
    for directory in mounted:
        subprocess.run(["umount", "--lazy", str(directory)], check=True)


@pytest.fixture
def fill():
    """`fill(directory, left)` fills a disk up to `left` bytes; it returns the file to remove."""

    def fill(directory, left):
        path = directory / "filling"
        with path.open("wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(4096))
            except OSError:
                pass
        os.truncate(path, max(path.stat().st_size - left, 0))
        return path

    return fill


@pytest.fixture(scope="session")
def made_once(tmp_path_factory):
    """`made_once(name, make)`: the folder that `make(folder)` makes, shared by all workers."""

    def made_once(name, make):
        base = tmp_path_factory.getbasetemp()
        folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / f"once_{name}"
        done = folder.with_suffix(".done")
        with open(folder.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not done.exists():
                make(folder)
                done.touch()
        return folder

    return made_once


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """The address of a bucket that etils reads and writes; its objects lie in a local directory."""
    from etils.epath import backend, gpath

    class Backend:
        def __getattr__(self, name):
            def call(*paths, **options):
                local = [str(p).replace("gs://bucket", str(tmp_path / "bucket")) for p in paths]
                return getattr(backend.os_backend, name)(*local, **options)

            return call

    monkeypatch.setattr(gpath.PosixGPath, "_backend", Backend())
    return "gs://bucket"
