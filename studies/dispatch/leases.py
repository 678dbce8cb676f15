"""Leases: who works on a run, and who uses a device. Both are file locks, so that the kernel lets go of what a killed
process held, at once and without a clock.

A lease on a run is an exclusive lock on `<runs>/<study>/.leases/<cell>--seed<k>.lock`; it works between machines that
share the folder, where the file system shares locks (NFSv4 does). The users of a device are locked files in
`<temporary folder>/ditbench-<user id>/<device>/`, which are this machine's and this user's.
"""

import contextlib
import fcntl
import io
import json
import os
import socket
import tempfile
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from harness.errors import UserError
from harness.records.locks import is_open
from studies.runs.folders import LEASES


class Lease:
    """A lock that this process holds until it releases it or dies. The file says who holds it, for people."""

    def __init__(self, file: io.TextIOWrapper) -> None:
        self._file = file
        holder = {"host": socket.gethostname(), "pid": os.getpid(), "since": datetime.now(UTC).isoformat()}
        self._write(json.dumps(holder) + "\n")

    def release(self) -> None:
        """Let go. The file stays: another process may be about to lock it."""
        self._write("")
        with contextlib.suppress(OSError):
            self._file.close()

    def _write(self, text: str) -> None:
        # On a full disk the lock itself still holds.
        with contextlib.suppress(OSError):
            self._file.truncate(0)
            self._file.write(text)
            self._file.flush()


def claim(path: Path) -> Lease | None:
    """The lease on a lock file, or None while another process holds it.

    Raises:
        UserError: the file cannot be made, or its file system cannot lock.
    """
    file = _locked_at(path, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return Lease(file) if file else None


@contextlib.contextmanager
def held(path: Path) -> Iterator[None]:
    """Hold a lock file within the block, after waiting for it."""
    file = _locked_at(path, fcntl.LOCK_EX)
    assert file is not None, path
    with file:
        yield


def clear_away(study: Path) -> None:
    """Remove a study's folder that holds nothing but lock files which nobody holds: its first command was refused."""
    leases = study / LEASES
    if not leases.is_dir() or list(study.iterdir()) != [leases]:
        return
    files = list(leases.iterdir())
    with contextlib.ExitStack() as stack, contextlib.suppress(OSError):  # another command has just begun
        for path in files:
            fcntl.flock(stack.enter_context(path.open("a")), fcntl.LOCK_EX | fcntl.LOCK_NB)
        for path in files:
            path.unlink()
        leases.rmdir()
        study.rmdir()


def holder(path: Path) -> str:
    """Who holds a lock file, as host and process; "" when it does not say."""
    try:
        facts: dict[str, Any] = json.loads(path.read_text())
        return f"{facts['host']}, process {facts['pid']}"
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _locked_at(path: Path, how: int) -> io.TextIOWrapper | None:
    """Open and lock a file of a study; None while another process holds it and `how` does not wait.

    Raises:
        UserError: the file cannot be made, or its file system cannot lock.
    """
    while True:
        file = _open(path)
        try:
            fcntl.flock(file, how)
        except BlockingIOError:
            file.close()
            return None
        except OSError as error:
            file.close()
            raise _no_lock(path, error) from None
        if is_open(file, path):
            return file
        file.close()  # it was cleared away between the two


def _open(path: Path) -> io.TextIOWrapper:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.open("a")
    except OSError as error:
        raise UserError(
            f"output.runs: cannot write to {path.parent} ({error.strerror}): make room or name another folder"
        ) from None


def _no_lock(path: Path, error: OSError) -> UserError:
    return UserError(
        f"output.runs: cannot lock {path} ({error.strerror}): name a folder on a file system that has file locks"
    )


# -- devices --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def presence(device: str, group: str) -> Iterator[Callable[[], bool]]:
    """Use a device within the block; yields a function that says whether another group uses one of the group's devices.

    Args:
        device: its name in the registry, such as `cpu`.
        group: name of the processes that train one run together; they are no company to each other.
    """
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(_signed_in(device, group))
        except OSError:
            # Nobody sees this run, nor can it look: it cannot be said to be alone.
            yield lambda: True
        else:
            yield lambda: _has_company(group)


def registry() -> Path:
    """Folder of the devices of this machine."""
    return Path(tempfile.gettempdir()) / f"ditbench-{os.getuid()}"


@contextlib.contextmanager
def _signed_in(device: str, group: str) -> Iterator[None]:
    folder = registry() / device
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = folder / f"{group}.{os.getpid()}"
    with _locked(path):
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _locked(path: Path) -> io.TextIOWrapper:
    """Open and lock a file of one's own; again when somebody took it for a dead one's before it was locked."""
    while True:
        file = path.open("a")
        fcntl.flock(file, fcntl.LOCK_EX)
        if is_open(file, path):
            return file
        file.close()


def _has_company(group: str) -> bool:
    own = {path.parent for path in registry().glob(f"*/{group}.*")}
    others = (path for folder in own for path in folder.iterdir() if not path.name.startswith(f"{group}."))
    return any(_is_alive(path) for path in others)


def _is_alive(path: Path) -> bool:
    """Whether a process holds the file; a dead one's is removed."""
    try:
        handle = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return False
    try:
        # Shared, so that two processes that look at once do not take each other for its owner.
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        path.unlink(missing_ok=True)
    except BlockingIOError:
        return True
    finally:
        os.close(handle)
    return False
