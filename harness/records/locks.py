"""Locks between processes. A lock is a file that the kernel locks for its holder and lets go of when the holder ends or
is killed, at once and without a clock.

A lock file is a plain file that is empty, or says who holds the lock. What else lies at its path is not ours: it is
refused, and neither followed, emptied nor removed.
"""

import contextlib
import errno
import fcntl
import json
import os
import socket
import stat
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Self

from harness.errors import UserError

SIGNED = b'{"host": '
"""The first bytes of a lock file that says who holds the lock."""


class NoLocks(OSError):
    """The file system has no file locks."""


class Lock:
    """A lock that this process holds until it releases it or ends."""

    def __init__(self, path: Path, handle: int) -> None:
        """`handle` is the open and locked file at `path`."""
        self._path, self._handle, self._is_signed = path, handle, False

    def sign(self) -> None:
        """Write into the file who holds the lock. On a full disk the lock itself still holds."""
        facts = {"host": socket.gethostname(), "pid": os.getpid(), "since": datetime.now(UTC).isoformat()}
        self._is_signed = True
        with contextlib.suppress(OSError):
            os.ftruncate(self._handle, 0)
            os.pwrite(self._handle, (json.dumps(facts) + "\n").encode(), 0)

    def remove(self) -> None:
        """Remove the file while the lock is still held: who waits for the lock then makes another file."""
        self._path.unlink(missing_ok=True)

    def release(self) -> None:
        """Let go. The file stays, as another process may be about to lock it; it no longer says who holds it."""
        with contextlib.suppress(OSError):
            if self._is_signed:
                os.ftruncate(self._handle, 0)
        with contextlib.suppress(OSError):
            os.close(self._handle)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def take(path: Path) -> Lock:
    """The lock at `path`, after waiting for it; the file and its folder are made if need be.

    Raises:
        UserError: what lies at the path is no lock file.
        NoLocks, OSError: the file system has no locks, or the file cannot be made.
    """
    lock = _take(path, fcntl.LOCK_EX)
    assert lock is not None, path
    return lock


def try_take(path: Path, shared: bool = False, makes: bool = True) -> Lock | None:
    """As `take`, but None while another process holds the lock.

    Args:
        shared: several processes may hold the lock together, while none holds it alone.
        makes: make the file and its folder if need be; otherwise a missing file is a `FileNotFoundError`.
    """
    return _take(path, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB, makes)


@contextlib.contextmanager
def locked(path: Path, waits: bool = True) -> Iterator[bool]:
    """Hold the lock at `path` during the block; its file is gone afterwards.

    Without `waits`, the block runs at once, and is told whether the lock is held or another process has it.
    """
    lock = take(path) if waits else try_take(path)
    if lock is None:
        yield False
        return
    with lock:
        try:
            yield True
        finally:
            lock.remove()


def holder(path: Path) -> str:
    """Who holds the lock at `path`, as host and process; "" when its file does not say."""
    try:
        facts: dict[str, str | int] = json.loads(path.read_text())
        return f"{facts['host']}, process {facts['pid']}"
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _take(path: Path, how: int, makes: bool = True) -> Lock | None:
    while True:
        handle = _open(path, makes)
        try:
            fcntl.flock(handle, how)
        except BlockingIOError:
            os.close(handle)
            return None
        except OSError as error:
            os.close(handle)
            raise NoLocks(error.errno, error.strerror, str(path)) from None
        if _is_open(handle, path):
            return Lock(path, handle)
        os.close(handle)  # its last holder removed the file that was opened here, which then locks nothing


def _open(path: Path, makes: bool) -> int:
    """Open a lock file and leave its content alone."""
    if makes:
        path.parent.mkdir(parents=True, exist_ok=True)
    try:
        # Not blocking, as the opening of a pipe may wait for its other end.
        handle = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | (os.O_CREAT if makes else 0), 0o666)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise _no_lock_file(path) from None
        raise
    if not _is_lock_file(handle):
        os.close(handle)
        raise _no_lock_file(path)
    return handle


def _is_lock_file(handle: int) -> bool:
    """Whether an open file is a plain one that is empty or signed, be it in part as on a full disk."""
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        return False
    return SIGNED.startswith(os.pread(handle, len(SIGNED), 0))


def _no_lock_file(path: Path) -> UserError:
    return UserError(f"{path} is no lock file of ditbench, which needs that name: move it away and run again")


def _is_open(handle: int, path: Path) -> bool:
    """Whether an open file is what lies at `path`, which another process may have removed or replaced since."""
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False
