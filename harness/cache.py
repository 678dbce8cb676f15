"""Caches: sharded, memory-mapped arrays on disk, one SHA-256 a shard.

A cache is a folder `<cache>/<kind>-<key12>/` with `index.json` and `shard-00000.npy`, `shard-00001.npy`, ... A shard
is written to a temporary name, synced and renamed, and only then entered in the index; the index is marked complete
last. So a half-written cache is never read, and an interrupted build goes on from the shards that are whole.
"""

import contextlib
import fcntl
import io
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from harness.config import OutputConfig
from harness.errors import UserError
from harness.records import canonical, digest, file_digest, read_json, write_atomic, write_json

Report = Callable[[str, int, int], None]
"""Progress: what is being made, how much of it is done, how much there is."""

ROWS_PER_CALL = 64
"""Rows made together. Fixed, because the batch size changes the last bits of a network's output."""
SHARD_BYTES = 64 * 2**20
"""Size that a shard comes close to."""


def cache_folder(config: OutputConfig) -> Path:
    """Folder of all caches: `output.cache`, else $DITBENCH_CACHE, else ./cache."""
    return Path(config.cache or os.environ.get("DITBENCH_CACHE") or "cache")


def entry(cache: Path, kind: str, key: Mapping[str, Any]) -> Path:
    """Folder of one cache: its name carries the first 12 digits of its key's digest."""
    return cache / f"{kind}-{digest(key)[:12]}"


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


class Sharded:
    """A complete cache, read-only. A shard's checksum is checked when the shard is first touched."""

    def __init__(self, folder: Path) -> None:
        """Open a cache; `UserError` when it is missing or unfinished."""
        self.folder = folder
        index = _read_index(folder)
        if not index or not index["complete"]:
            raise UserError(f"{folder} is not a finished cache: run `ditbench prepare` to make it")
        self.shape: tuple[int, ...] = tuple(index["shape"])
        self.dtype = np.dtype(index["dtype"])
        self.key: dict[str, Any] = index["key"]
        self._rows_per_shard: int = index["rows_per_shard"]
        self._checksums: list[str] = index["checksums"]
        self._shards: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return self.shape[0]

    def rows(self, indices: np.ndarray) -> np.ndarray:
        """Gather rows in the order of `indices` (int64, 0 ... len - 1) into a new array [len(indices), ...]."""
        indices = np.asarray(indices, dtype=np.int64)
        assert indices.size == 0 or 0 <= indices.min() <= indices.max() < len(self), "row outside the cache"
        out = np.empty((len(indices), *self.shape[1:]), self.dtype)
        shard_of, offset = np.divmod(indices, self._rows_per_shard)
        for number in np.unique(shard_of):
            here = shard_of == number
            out[here] = self._shard(int(number))[offset[here]]
        return out

    def verify(self, report: Report | None = None) -> None:
        """Check every shard; `UserError` names the first bad one."""
        for number in range(len(self._checksums)):
            self._shards.pop(number, None)
            self._shard(number)
            if report is not None:
                report(f"checking {self.folder.name}", number + 1, len(self._checksums))

    def _shard(self, number: int) -> np.ndarray:
        if number not in self._shards:
            path = _shard_path(self.folder, number)
            if not path.is_file():
                raise UserError(f"{path} is missing: run `ditbench prepare` to make it again")
            if file_digest(path) != self._checksums[number]:
                raise UserError(
                    f"{path} is damaged (its checksum is wrong): delete it and run `ditbench prepare` again"
                )
            self._shards[number] = np.load(path, mmap_mode="r", allow_pickle=False)
        return self._shards[number]


def build(
    folder: Path,
    key: Mapping[str, Any],
    num_rows: int,
    row_shape: tuple[int, ...],
    dtype: np.typing.DTypeLike,
    make_rows: Callable[[int, int], np.ndarray],
    report: Report | None = None,
) -> Sharded:
    """Open the cache in `folder`, making first what is missing of it.

    Args:
        folder: from `entry`.
        key: everything the content depends on; kept whole in the index and compared.
        num_rows, row_shape, dtype: the array is [num_rows, *row_shape].
        make_rows: `make_rows(start, stop)` returns rows start ... stop - 1; called in steps of `ROWS_PER_CALL` from
            row 0, in any order of shards, so it must depend on nothing but the rows asked for.
        report: told about rows made.
    """
    row_bytes = int(np.prod(row_shape)) * np.dtype(dtype).itemsize
    rows_per_shard = max(1, SHARD_BYTES // max(1, row_bytes * ROWS_PER_CALL)) * ROWS_PER_CALL
    wanted = {
        "key": json.loads(canonical(key)),  # as it will be read back: tuples become lists
        "shape": [num_rows, *row_shape],
        "dtype": np.dtype(dtype).name,
        "rows_per_shard": rows_per_shard,
    }
    if not _is_whole(folder, wanted):
        with _locked(folder):
            # Another process may have made it while this one waited for the lock.
            if not _is_whole(folder, wanted):
                _make(folder, wanted, make_rows, report)
    return Sharded(folder)


def _make(
    folder: Path, wanted: dict[str, Any], make_rows: Callable[[int, int], np.ndarray], report: Report | None
) -> None:
    """Write the missing shards, each entered in the index once it is on the disk; the caller holds the lock."""
    num_rows, per_shard = wanted["shape"][0], wanted["rows_per_shard"]
    num_shards = -(-num_rows // per_shard)
    checksums = _whole_shards(folder, wanted, num_shards)
    missing_rows = sum(min(per_shard, num_rows - n * per_shard) for n in range(num_shards) if checksums[n] is None)
    row_bytes = int(np.prod(wanted["shape"][1:])) * np.dtype(wanted["dtype"]).itemsize
    _check_room(folder, missing_rows * row_bytes)
    for number in range(num_shards):
        if checksums[number] is None:
            rows = _make_shard(folder, number, wanted, make_rows, report)
            with writing_to(folder):
                checksums[number] = _write_shard(_shard_path(folder, number), rows)
                write_json(folder / "index.json", {**wanted, "checksums": checksums, "complete": False})
    with writing_to(folder):
        write_json(folder / "index.json", {**wanted, "checksums": checksums, "complete": True})


def _make_shard(
    folder: Path,
    number: int,
    wanted: dict[str, Any],
    make_rows: Callable[[int, int], np.ndarray],
    report: Report | None,
) -> np.ndarray:
    num_rows, per_shard = wanted["shape"][0], wanted["rows_per_shard"]
    start, stop = number * per_shard, min((number + 1) * per_shard, num_rows)
    out = np.empty((stop - start, *wanted["shape"][1:]), wanted["dtype"])
    for first in range(start, stop, ROWS_PER_CALL):
        last = min(first + ROWS_PER_CALL, stop)
        rows = make_rows(first, last)
        assert rows.shape == out[first - start : last - start].shape and rows.dtype == out.dtype, (
            f"{folder.name}: rows {rows.shape} {rows.dtype}, wanted {wanted['shape']} {wanted['dtype']}"
        )
        out[first - start : last - start] = rows
        if report is not None:
            report(f"{folder.name} ({_size(out[0].nbytes * num_rows)})", last, num_rows)
    return out


def _write_shard(path: Path, rows: np.ndarray) -> str:
    """Write one shard whole or not at all; returns the file's SHA-256."""
    content = io.BytesIO()
    np.save(content, rows, allow_pickle=False)
    write_atomic(path, content.getvalue())
    return file_digest(path)


def _whole_shards(folder: Path, wanted: dict[str, Any], num_shards: int) -> list[str | None]:
    """Checksums of the shards that an earlier build left whole, None for the others; clears temporary files."""
    with writing_to(folder):
        for leftover in folder.glob(".*.tmp"):
            leftover.unlink()
    index = _read_index(folder)
    if not index or any(index[name] != wanted[name] for name in wanted):
        return [None] * num_shards
    checksums: list[str | None] = index["checksums"]
    for number, checksum in enumerate(checksums):
        path = _shard_path(folder, number)
        if checksum is not None and not (path.is_file() and file_digest(path) == checksum):
            checksums[number] = None
    return checksums


def _is_whole(folder: Path, wanted: dict[str, Any]) -> bool:
    """Whether the cache is complete, is the wanted one, and has all its files (their content is checked on use)."""
    index = _read_index(folder)
    if not index or not index["complete"]:
        return False
    if index["key"] != wanted["key"]:
        raise UserError(f"{folder} belongs to other data or weights with the same short key: delete it and run again")
    same = all(index[name] == wanted[name] for name in wanted)
    return same and all(_shard_path(folder, number).is_file() for number in range(len(index["checksums"])))


def _read_index(folder: Path) -> dict[str, Any] | None:
    path = folder / "index.json"
    return read_json(path) if path.is_file() else None


def _shard_path(folder: Path, number: int) -> Path:
    return folder / f"shard-{number:05d}.npy"


def _check_room(folder: Path, num_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if num_bytes > free:
        raise UserError(
            f"output.cache: {folder} needs {_size(num_bytes)} and the disk has {_size(free)} left: "
            "make room or name another folder"
        )


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the folder's lock, so that two processes never build one cache at once; the second waits."""
    with writing_to(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / "lock").open("w")
    with lock:
        with writing_to(folder):
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
