"""Digests of values and files, and files that are written whole or not at all."""

import contextlib
import errno
import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from harness.errors import StorageError, UserError
from harness.records.locks import locked


def canonical(value: Any) -> str:
    """JSON with sorted keys and without blanks: equal values give equal text. Non-finite floats become strings."""
    return json.dumps(_plain(value), sort_keys=True, separators=(",", ":"), allow_nan=False)


def digest(value: Any) -> str:
    """SHA-256 of a JSON-like value, as 64 hex digits."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a file's content, as 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _plain(value: Any) -> Any:
    """JSON has no NaN: non-finite floats travel as the strings nan, inf and -inf."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, Path):
        return str(value)
    return value


def number(value: float | str) -> float:
    """A recorded number: undoes what `_plain` did to non-finite floats."""
    return float(value)


DISK_ERRORS = frozenset(
    (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR)
)
"""What a full, broken or write-protected disk answers."""


@contextlib.contextmanager
def storing(path: Path) -> Iterator[None]:
    """Turn what the disk answers to a write of `path` into a `StorageError`."""
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        raise StorageError(error.errno, error.strerror, str(path)) from error


def write_atomic(path: Path, content: bytes) -> None:
    """Write a file whole or not at all: temporary name, sync, rename. `StorageError` when the disk refuses."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with storing(path):
        try:
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically, readable by people."""
    text = json.dumps(_plain(value), indent=1, sort_keys=True, allow_nan=False)
    write_atomic(path, (text + "\n").encode())


def read_json(path: Path) -> Any:
    """Read a JSON file; `UserError` names the file when it is missing or broken."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path} is missing: is this a run folder of ditbench?") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid JSON ({error}): remove the folder and run the cell again") from None


@contextlib.contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A fresh temporary folder that takes the place of `path` when the block ends without an error.

    Killed at any moment, it leaves the old folder or the new one whole; between the two renames the old one has a
    hidden name, which `put_back` undoes and so does the next call. Processes that replace one folder at once do so
    one after another. `StorageError` when the disk refuses.
    """
    temporary, old = path.with_name(f".{path.name}.tmp"), _old(path)
    with storing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(path.with_name(f".{path.name}.lock")):
            put_back(path)
            for leftover in (temporary, old):
                shutil.rmtree(leftover, ignore_errors=True)
            try:
                temporary.mkdir()
                yield temporary
                sync_tree(temporary)
                if path.exists():
                    path.rename(old)
                temporary.rename(path)
            except BaseException:
                put_back(path)
                shutil.rmtree(temporary, ignore_errors=True)
                raise
            sync_path(path.parent)
            shutil.rmtree(old, ignore_errors=True)


def put_back(path: Path) -> bool:
    """Undo a replacement that was cut off between its two renames; says whether there was one."""
    old = _old(path)
    if path.exists() or not old.exists():
        return False
    old.rename(path)
    return True


def _old(path: Path) -> Path:
    """Where a folder stands while another takes its place."""
    return path.with_name(f".{path.name}.old")


def sync_tree(folder: Path) -> None:
    """Flush every file of a folder, and the folder, to the disk."""
    paths: Iterable[Path] = [*folder.rglob("*"), folder]
    for path in paths:
        sync_path(path)


def sync_path(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
