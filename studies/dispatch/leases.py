"""Leases: who works on a run, and who uses a device. Both are file locks, so that the kernel lets go of what a killed
process held, at once and without a clock.

A lease on a run is an exclusive lock on `<runs>/<study>/.leases/<cell>--seed<k>.lock`; it works between machines that
share the folder, where the file system shares locks (NFSv4 does). The users of a device are locked files in
`<temporary folder>/ditbench-<user id>/<device>/`, which are this machine's and this user's.
"""

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from harness.errors import UserError
from harness.records.locks import Lock, NoLocks, locked, take, try_take
from studies.runs.folders import LEASES


def claim(path: Path) -> Lock | None:
    """The lease on a lock file, or None while another process holds it. The file says who holds it, for people.

    Raises:
        UserError: the file cannot be made, or its file system cannot lock.
    """
    with _refusing(path):
        lease = try_take(path)
    if lease is not None:
        lease.sign()
    return lease


@contextlib.contextmanager
def held(path: Path) -> Iterator[None]:
    """Hold a lock file of a study within the block, after waiting for it.

    Raises:
        UserError: the file cannot be made, or its file system cannot lock.
    """
    with _refusing(path):
        lock = take(path)
    with lock:
        yield


@contextlib.contextmanager
def _refusing(path: Path) -> Iterator[None]:
    """Turn what the disk answers to the lock of a study into one line."""
    try:
        yield
    except NoLocks as error:
        raise UserError(
            f"output.runs: cannot lock {path} ({error.strerror}): name a folder on a file system that has file locks"
        ) from None
    except OSError as error:
        raise UserError(
            f"output.runs: cannot write to {path.parent} ({error.strerror}): make room or name another folder"
        ) from None


def clear_away(study: Path) -> None:
    """Remove a study's folder that holds nothing but lock files which nobody holds: its first command was refused."""
    leases = study / LEASES
    if not leases.is_dir() or list(study.iterdir()) != [leases]:
        return
    with contextlib.ExitStack() as stack, contextlib.suppress(OSError, UserError):
        locks = [try_take(path) for path in leases.iterdir()]
        for lock in filter(None, locks):
            stack.enter_context(lock)
        if not all(locks):  # another command has just begun
            return
        for lock in filter(None, locks):
            lock.remove()
        leases.rmdir()
        study.rmdir()


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
        except (OSError, UserError):
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
    with locked(folder / f"{group}.{os.getpid()}"):
        yield


def _has_company(group: str) -> bool:
    own = {path.parent for path in registry().glob(f"*/{group}.*")}
    others = (path for folder in own for path in folder.iterdir() if not path.name.startswith(f"{group}."))
    return any(_is_alive(path) for path in others)


def _is_alive(path: Path) -> bool:
    """Whether a process holds the file; a dead one's is removed."""
    try:
        # Shared, so that two processes that look at once do not take each other for its owner.
        lock = try_take(path, shared=True, makes=False)
    except (FileNotFoundError, UserError):
        return False
    if lock is None:
        return True
    with lock:
        lock.remove()
    return False
