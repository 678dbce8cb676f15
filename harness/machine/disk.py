"""How much room a disk has, and whether what is to be written fits."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from harness.errors import UserError


@contextlib.contextmanager
def writing_to(folder: Path) -> Iterator[None]:
    """Turn a full or unwritable disk into a `UserError` that names the folder."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(
            f"output.cache: cannot write to {folder} ({reason}): make room or name another folder"
        ) from None


def check_room(folder: Path, num_bytes: int) -> None:
    """Refuse a disk that has not so much left; `folder` need not be there yet."""
    free = free_bytes(folder)
    if num_bytes > free:
        raise UserError(
            f"output.cache: {folder} needs {size_in_words(num_bytes)} and the disk has {size_in_words(free)} left: "
            "make room or name another folder"
        )


def free_bytes(folder: Path) -> int:
    """What is left on the disk of a folder that need not be there yet."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())
    return shutil.disk_usage(there).free


def size_in_words(num_bytes: int) -> str:
    """Bytes as MB or GB."""
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"
