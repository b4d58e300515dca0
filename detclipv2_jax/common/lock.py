"""A lock on a directory: one process at a time writes into it.

The lock is a file that names its holder and has a heartbeat. It works on local and shared file
systems and in buckets (any path of etils), and survives a crash: a lock whose holder is dead is
taken over. A holder on this machine is dead if its process is gone; one elsewhere if its heartbeat
stands still for a minute.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

from detclipv2_jax.common import atomic, digest_list
from detclipv2_jax.common.errors import UserError

NAME = ".lock.json"
HEARTBEAT = 10.0  # seconds between heartbeats
DEAD_AFTER = 60.0  # seconds without one
_SETTLE = 0.2  # seconds after which a lock just written is read again; longer in a bucket
_SETTLE_IN_BUCKET = 2.0
_held: set["Lock"] = set()


@dataclasses.dataclass(frozen=True)
class _Holder:
    """What the file says."""

    token: str  # of this lock, not of the process
    host: str
    machine: str  # where process numbers have one meaning: a boot of a machine, and a container
    place: str  # the directory on that machine, to recognize a copy of it
    pid: int
    started: str  # when the process started, as its machine counts; "" if unknown
    since: str  # when it took the lock, for people
    beat: float  # changes with each heartbeat


class Lock:
    """A lock that this process holds. Use `held`."""

    def __init__(
        self,
        directory: str | os.PathLike,
        does: str,
        advice: str,
        on_loss: Callable[[], None] = lambda: None,
    ):
        """Take the lock of a directory, which is created.

        Args:
            directory: to lock.
            does: what the holder does, for the message, such as "trains here".
            advice: what to do instead of waiting, such as "give another --workdir".
            on_loss: called, in a thread, if another process took the lock over, because this one
                seemed dead.

        Raises:
            UserError: another process holds it; or the file cannot be written.
        """
        self._on_loss = on_loss
        self._directory, self._path = directory, digest_list.as_path(directory) / NAME
        self._in_bucket = "://" in os.fspath(self._path)
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._mine = _Holder(
                token=uuid.uuid4().hex,
                host=socket.gethostname(),
                machine=_machine(),
                place="" if self._in_bucket else _place(self._path.parent),
                pid=os.getpid(),
                started=_start_of(os.getpid()),
                since=time.strftime("%Y-%m-%d %H:%M:%S"),
                beat=time.time(),
            )
            self._take(does, advice)
        except OSError as error:
            raise UserError(
                f"{self._path}: cannot be written ({error.strerror or error}). "
                f"{atomic.remedy(error)}"
            ) from error
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lock", daemon=True)
        self._thread.start()
        _held.add(self)

    def release(self) -> None:
        """Remove the lock, unless another process took it over."""
        self._ended.set()
        self._thread.join(timeout=2.0)  # it may be writing
        _held.discard(self)
        with contextlib.suppress(Exception):  # a bucket has errors of its own
            found = self._read()
            if found is not None and found.token == self._mine.token:
                self._path.unlink()

    def _take(self, does: str, advice: str) -> None:
        """Write the lock; `UserError` if a living process holds it."""
        for _ in range(10):
            found = self._read()
            if found is None and self._create():
                time.sleep(_SETTLE_IN_BUCKET if self._in_bucket else _SETTLE)
                found = self._read()
                if found is not None and found.token == self._mine.token:
                    return
            if found is None:  # removed meanwhile
                continue
            if self._is_alive(found):
                raise UserError(
                    f"{self._directory}: process {found.pid} on host {found.host} {does} since "
                    f"{found.since}. Wait for it, or {advice}."
                )
            self._remove(found)
        raise UserError(
            f"{self._directory}: other processes are starting to write here at the same time. "
            f"Run one at a time, or {advice}."
        )

    def _read(self) -> _Holder | None:
        """Return the holder; None if there is none. A file that is no lock has a dead holder."""
        try:
            text = self._path.read_text()
        except FileNotFoundError:
            return None
        try:
            values = json.loads(text)
            return _Holder(**{f.name: values[f.name] for f in dataclasses.fields(_Holder)})
        except (ValueError, TypeError, KeyError):
            return _Holder("", "", "", "", 0, "", "", 0.0)

    def _text(self) -> str:
        return json.dumps(dataclasses.asdict(self._mine), indent=1) + "\n"

    def _create(self) -> bool:
        """Write the file if there is none; return whether this process did."""
        if self._in_bucket:  # whether it won is seen when the file is read again
            self._path.write_text(self._text())
            return True
        draft = self._draft()
        try:
            draft.write_text(self._text())
            try:
                os.link(draft, self._path)  # with its content, and only if there is none
            except FileExistsError:
                return False
            except OSError:  # a file system without links
                try:
                    with open(self._path, "x") as file:
                        file.write(self._text())
                except FileExistsError:
                    return False
            return True
        finally:
            draft.unlink(missing_ok=True)

    def _draft(self) -> pathlib.Path:
        return self._path.with_name(f"{NAME}.{self._mine.token}")

    def _remove(self, dead: _Holder) -> None:
        """Remove the lock of a dead holder, if it still is that one."""
        if self._in_bucket:
            with contextlib.suppress(FileNotFoundError):
                self._path.unlink()
            return
        aside = self._draft()
        try:
            os.rename(self._path, aside)
        except FileNotFoundError:
            return
        values = aside.read_text()
        if dead.token and dead.token not in values:  # of a process that was faster
            with contextlib.suppress(OSError):
                os.link(aside, self._path)
        aside.unlink(missing_ok=True)

    def _is_alive(self, holder: _Holder) -> bool:
        if not holder.token:
            return False
        if holder.machine == self._mine.machine:
            is_copy = holder.place != self._mine.place
            return not is_copy and _is_running(holder.pid, holder.started)
        return self._beats(holder)

    def _beats(self, holder: _Holder) -> bool:
        """Watch the heartbeat of a holder elsewhere; its clock may differ from this one's."""
        deadline, announced = time.monotonic() + DEAD_AFTER, False
        while time.monotonic() < deadline:
            time.sleep(min(1.0, HEARTBEAT / 4))
            found = self._read()
            if found is None or found.token != holder.token:
                return found is not None
            if found.beat != holder.beat:
                return True
            if not announced and deadline - time.monotonic() < DEAD_AFTER - 1.5 * HEARTBEAT:
                announced = True
                print(
                    f"{self._directory}: waiting up to {DEAD_AFTER:.0f} s for a sign of life of "
                    f"process {holder.pid} on host {holder.host}",
                    file=sys.stderr,
                    flush=True,
                )
        return False

    def _beat(self) -> None:
        """Renew the heartbeat until the lock is released or lost."""
        while not self._ended.wait(HEARTBEAT):
            self._mine = dataclasses.replace(self._mine, beat=time.time())
            # A full disk or a file system that is away for a while is no reason to give up.
            with contextlib.suppress(Exception):
                found = self._read()
                if found is not None and found.token != self._mine.token:
                    self._on_loss()
                    return
                self._write_again()

    def _write_again(self) -> None:
        if self._in_bucket:
            self._path.write_text(self._text())
            return
        draft = self._draft()
        try:
            draft.write_text(self._text())
            if not self._ended.is_set():
                os.replace(draft, self._path)
        finally:
            draft.unlink(missing_ok=True)


@contextlib.contextmanager
def held(
    directory: str | os.PathLike,
    does: str,
    advice: str,
    on_loss: Callable[[], None] = lambda: None,
) -> Iterator[Lock]:
    """Hold the lock of a directory within the block; see `Lock` for arguments and errors."""
    lock = Lock(directory, does, advice, on_loss)
    try:
        yield lock
    finally:
        lock.release()


def release_all() -> None:
    """Release what this process holds, before it ends without unwinding."""
    for lock in list(_held):
        lock.release()


def _machine() -> str:
    """Return what identifies this boot of this machine and the container's process numbers."""
    parts: list[Any] = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def _place(directory: pathlib.Path) -> str:
    """Return what identifies a directory on this machine, whatever path leads to it."""
    status = directory.stat()
    return f"{status.st_dev}:{status.st_ino}"


def _start_of(pid: int) -> str:
    """Return when a process started, in clock ticks since boot; "" if that is unknown."""
    try:
        stat = pathlib.Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ""
    return stat.rpartition(")")[2].split()[19]  # field 22; the name before may have spaces


def _is_running(pid: int, started: str) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # of another user
    return started in ("", _start_of(pid))
