"""Lock files between processes."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    pass


def is_open(file: IO[Any], path: Path) -> bool:
    """Whether `file` is what lies at `path`, which another process may have removed or replaced since."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def locked(path: Path, waits: bool = True) -> Iterator[bool]:
    """Hold the lock file `path` during the block, while other processes wait for it; it is gone afterwards.

    Without `waits`, the block runs at once, and is told whether the lock is held or another process has it.
    """
    while True:
        with path.open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX if waits else fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            # Its last holder may have removed the file that was opened here, which then locks nothing.
            if not is_open(lock, path):
                continue
            try:
                yield True
            finally:
                path.unlink(missing_ok=True)
            return
