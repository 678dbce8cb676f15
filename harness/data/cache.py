"""Caches: sharded, memory-mapped arrays on disk, one SHA-256 a shard.

A cache is a folder `<cache>/<kind>-<key12>/` with `index.json` and `shard-00000.npy`, `shard-00001.npy`, ... A shard
is written to a temporary name, synced and renamed, and only then entered in the index; the index is marked complete
last. So a half-written cache is never read, and an interrupted build goes on from the shards that are whole. Processes
that need one cache at once make its shards side by side: each holds a lock on the shard that it makes, which the system
lets go when it dies. A cache can always be made again: damaged files are, and `OnProgress` is told which.
"""

import contextlib
import hashlib
import io
import json
import math
import mmap
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from harness.config import OutputConfig
from harness.errors import UserError
from harness.machine.disk import check_room, size_in_words, writing_to
from harness.machine.progress import OnProgress, tell
from harness.records.files import canonical, digest, file_digest, write_atomic, write_json
from harness.records.locks import locked

ROWS_PER_CALL = 64
"""Rows made together. Fixed, because the batch size changes the last bits of a network's output."""
SHARD_BYTES = 64 * 2**20
"""Size that a shard of a large cache comes close to."""
SHARDS = 8
"""So many, where there are rows for them: processes that make a small cache together each find some to make."""
ROWS_MAPPED = 128
"""Rows whose shards are mapped together: this many files are open at once, and the disk is asked for this many rows
before the first is waited for."""


def cache_folder(config: OutputConfig) -> Path:
    """Folder of all caches: `output.cache`, else $DITBENCH_CACHE, else ./cache."""
    return Path(config.cache or os.environ.get("DITBENCH_CACHE") or "cache")


def entry(cache: Path, kind: str, key: Mapping[str, Any]) -> Path:
    """Folder of one cache: its name carries the first 12 digits of its key's digest."""
    return cache / f"{kind}-{digest(key)[:12]}"


def write_small(path: Path, value: Any) -> None:
    """Keep a small JSON value, with a checksum. `UserError` when the disk refuses."""
    with writing_to(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"value": value, "digest": digest(value)})


def write_long(path: Path, value: Any) -> None:
    """As `write_small`, for long lists, on one line: text that people can read takes ten times the memory to make."""
    text = canonical(value)
    content = f'{{"digest":"{hashlib.sha256(text.encode()).hexdigest()}","value":{text}}}\n'.encode()
    with writing_to(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, content)


def read_small(path: Path, on_progress: OnProgress | None = None) -> Any:
    """What these two kept; None, and a notice, when it is damaged, and None when there is nothing."""
    try:
        stored = json.loads(path.read_bytes())
        if digest(stored["value"]) == stored["digest"]:
            return stored["value"]
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, TypeError, KeyError):
        pass  # no JSON, or JSON of another form
    tell(on_progress, f"{path} is damaged and is made again")
    return None


class Rows(Protocol):
    """An array on the disk, read row by row."""

    shape: tuple[int, ...]
    dtype: np.dtype

    def __len__(self) -> int: ...

    def rows(self, indices: np.ndarray) -> np.ndarray:
        """Rows in the order of `indices` (int64, 0 ... len - 1), [len(indices), ...]."""

    def verify(self, on_progress: OnProgress | None = None) -> None:
        """Check everything; `UserError` names what is damaged and cannot be made again."""


class Sharded:
    """A complete cache, read-only. A shard's checksum is checked when the shard is first touched.

    Shards are mapped while rows are copied out of them, and no longer: a map that stays holds a file open, of which a
    process may have 1,024, and the pages that were read count as the process's memory. Threads may read at once.
    """

    def __init__(self, folder: Path, mend: Callable[[int], str] | None = None) -> None:
        """Open a cache; `UserError` when it is missing or unfinished.

        Args:
            folder: from `entry`.
            mend: makes a damaged shard again and returns its checksum; without it a damaged shard is a `UserError`.
        """
        self.folder = folder
        index = _read_index(folder)
        if not index or not index["complete"]:
            raise UserError(f"{folder} is not a finished cache: run `ditbench prepare` to make it")
        self.shape: tuple[int, ...] = tuple(index["shape"])
        self.dtype = np.dtype(index["dtype"])
        self.key: dict[str, Any] = index["key"]
        self._rows_per_shard: int = index["rows_per_shard"]
        self._checksums: list[str] = index["checksums"]
        self._offsets: dict[int, int] = {}
        """Bytes before the first row, of each shard whose checksum was found good."""
        self._checking = threading.Lock()
        self._mend = mend

    def __len__(self) -> int:
        return self.shape[0]

    def rows(self, indices: np.ndarray) -> np.ndarray:
        """Gather rows in the order of `indices` (int64, 0 ... len - 1) into a new array [len(indices), ...]."""
        indices = np.asarray(indices, dtype=np.int64)
        assert indices.size == 0 or 0 <= indices.min() <= indices.max() < len(self), "row outside the cache"
        out = np.empty((len(indices), *self.shape[1:]), self.dtype)
        shard_of, place = np.divmod(indices, self._rows_per_shard)
        self._check(np.unique(shard_of).tolist())
        by_shard = np.argsort(shard_of, kind="stable")
        for first in range(0, len(by_shard), ROWS_MAPPED):
            together = by_shard[first : first + ROWS_MAPPED]
            shards = {number: self._map(number) for number in np.unique(shard_of[together]).tolist()}
            read = [(int(i), shards[int(shard_of[i])], int(place[i])) for i in together]
            for _, shard, row in read:
                shard.fetch(row)
            for i, shard, row in read:
                out[i] = shard.rows[row]
        return out

    def verify(self, on_progress: OnProgress | None = None) -> None:
        """Check every shard; a bad one is made again, or is a `UserError` that names it."""
        num_shards, together = len(self._checksums), os.cpu_count() or 1
        for first in range(0, num_shards, together):
            numbers = range(first, min(first + together, num_shards))
            for number in numbers:
                self._offsets.pop(number, None)
            self._check(numbers)
            if on_progress is not None:
                on_progress(f"checking {self.folder.name}", numbers.stop, num_shards)

    def _check(self, numbers: Sequence[int]) -> None:
        """Compare shards with their checksums, unless that was done before; those that differ are made again."""
        with self._checking:
            unchecked = [number for number in numbers if number not in self._offsets]
            if not unchecked:
                return
            with ThreadPoolExecutor(os.cpu_count()) as pool:  # hashing leaves other threads running
                good = pool.map(lambda n: _is_good(_shard_path(self.folder, n), self._checksums[n]), unchecked)
            for number, is_good in zip(unchecked, good, strict=True):
                if not is_good:
                    self._checksums[number] = self._made_again(number)
                self._offsets[number] = _first_row(_shard_path(self.folder, number))

    def _made_again(self, number: int) -> str:
        """Checksum of a damaged shard that is whole again."""
        if self._mend is None:
            raise UserError(
                f"{_shard_path(self.folder, number)} is missing or damaged (its checksum is wrong): run "
                "`ditbench prepare` to make it again"
            )
        return self._mend(number)

    def _map(self, number: int) -> "_Mapped":
        """A shard that was checked; one that is gone or cut since then is made again."""
        path, shape = _shard_path(self.folder, number), (self._num_rows(number), *self.shape[1:])
        try:
            return _Mapped.open(path, self._offsets[number], shape, self.dtype)
        except (OSError, ValueError):
            self._offsets.pop(number, None)
            self._check([number])
            return _Mapped.open(path, self._offsets[number], shape, self.dtype)

    def _num_rows(self, number: int) -> int:
        """Rows of a shard; the last one may have fewer."""
        return min(self._rows_per_shard, len(self) - number * self._rows_per_shard)


@dataclass(frozen=True)
class _Mapped:
    """One shard in memory; nothing of it is read before it is asked for."""

    pages: mmap.mmap
    offset: int
    """Bytes before the first row."""
    rows: np.ndarray

    @classmethod
    def open(cls, path: Path, offset: int, shape: tuple[int, ...], dtype: np.dtype) -> "_Mapped":
        """Raises OSError or ValueError for a file that is missing or too short."""
        with path.open("rb") as file:
            pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return cls(pages, offset, np.frombuffer(pages, dtype, math.prod(shape), offset).reshape(shape))

    def fetch(self, row: int) -> None:
        """Have the system read a row ahead. Without it a row that is not in memory is read page by page as it is
        touched, each read waiting for the last."""
        num_bytes = self.rows.strides[0]
        start = self.offset + row * num_bytes
        page = start - start % mmap.PAGESIZE
        self.pages.madvise(mmap.MADV_WILLNEED, page, start + num_bytes - page)


def build(
    folder: Path,
    key: Mapping[str, Any],
    num_rows: int,
    row_shape: tuple[int, ...],
    dtype: np.typing.DTypeLike,
    make_rows: Callable[[int, int], np.ndarray],
    on_progress: OnProgress | None = None,
) -> Sharded:
    """Open the cache in `folder`, making first what is missing of it; what is damaged is made again when touched.

    Args:
        folder: from `entry`.
        key: everything the content depends on; kept whole in the index and compared.
        num_rows, row_shape, dtype: the array is [num_rows, *row_shape].
        make_rows: `make_rows(start, stop)` returns rows start ... stop - 1; called in steps of `ROWS_PER_CALL` from
            row 0, in any order of shards, so it must depend on nothing but the rows asked for.
        on_progress: told about rows made, and about damaged files.
    """
    wanted = _wanted(key, num_rows, row_shape, dtype)
    maker = _ShardMaker(folder, wanted, make_rows, on_progress)
    if not maker.is_whole(on_progress):
        maker.make()
    return Sharded(folder, maker.mend)


def missing_bytes(
    folder: Path, key: Mapping[str, Any], num_rows: int, row_shape: tuple[int, ...], dtype: np.typing.DTypeLike
) -> int:
    """What `build` with these arguments would have to write."""
    maker = _ShardMaker(folder, _wanted(key, num_rows, row_shape, dtype), lambda start, stop: np.empty(0), None)
    return 0 if maker.is_whole(None) else maker.missing_bytes()


def _wanted(
    key: Mapping[str, Any], num_rows: int, row_shape: tuple[int, ...], dtype: np.typing.DTypeLike
) -> dict[str, Any]:
    """What the index of such a cache says besides the checksums."""
    row_bytes = int(np.prod(row_shape)) * np.dtype(dtype).itemsize
    most, few = SHARD_BYTES // max(1, row_bytes * ROWS_PER_CALL), -(-num_rows // (SHARDS * ROWS_PER_CALL))
    return {
        "key": json.loads(canonical(key)),  # as it will be read back: tuples become lists
        "shape": [num_rows, *row_shape],
        "dtype": np.dtype(dtype).name,
        "rows_per_shard": max(1, min(most, few)) * ROWS_PER_CALL,
    }


@dataclass(frozen=True)
class _ShardMaker:
    """Makes the shards of one cache, each entered in the index once it is on the disk."""

    folder: Path
    wanted: dict[str, Any]
    """What the index says besides the checksums."""
    make_rows: Callable[[int, int], np.ndarray]
    on_progress: OnProgress | None

    @property
    def num_shards(self) -> int:
        return -(-self.wanted["shape"][0] // self.wanted["rows_per_shard"])

    def is_whole(self, on_progress: OnProgress | None) -> bool:
        """Whether the cache is complete, is the wanted one, and has all its files (their content is checked on use)."""
        index = _read_index(self.folder, on_progress)
        if not index or not index["complete"]:
            return False
        if index["key"] != self.wanted["key"]:
            raise UserError(
                f"{self.folder} belongs to other data or weights with the same short key: delete it and run again"
            )
        same = all(index[name] == self.wanted[name] for name in self.wanted)
        return same and all(_shard_path(self.folder, number).is_file() for number in range(self.num_shards))

    def make(self) -> None:
        """Make the missing shards, together with every other process that is at it; at the end all are there."""
        with writing_to(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        check_room(self.folder, self.missing_bytes())
        for waits in (False, True):
            for number in self._missing():
                self._make_unless_others_do(number, waits)
        with _building(self.folder):
            checksums = self._checksums()
            self._write_index(checksums, complete=None not in checksums)

    def _make_unless_others_do(self, number: int, waits: bool) -> None:
        """Make a missing shard; if another process is making it, pass over it, or wait until it is there."""
        with holding(_shard_path(self.folder, number).with_suffix(".lock"), waits) as is_mine:
            if not is_mine or number not in self._missing():
                return
            with writing_to(self.folder):
                for leftover in self.folder.glob(f".shard-{number:05d}.*.tmp"):
                    leftover.unlink()
            checksum = self._make_shard(number)
            with _building(self.folder):
                checksums = self._checksums()
                checksums[number] = checksum
                self._write_index(checksums, complete=False)

    def _missing(self) -> list[int]:
        """Shards that are not in the index or not on the disk; what is in the others is looked at on use."""
        checksums = self._checksums()
        return [n for n, it in enumerate(checksums) if it is None or not _shard_path(self.folder, n).is_file()]

    def _num_rows(self, numbers: Iterable[int]) -> int:
        """Rows of some shards."""
        num_rows, per_shard = self.wanted["shape"][0], self.wanted["rows_per_shard"]
        return sum(min(per_shard, num_rows - number * per_shard) for number in numbers)

    def missing_bytes(self) -> int:
        """Bytes of the shards that have to be made."""
        return self._num_rows(self._missing()) * self._row_bytes()

    def mend(self, number: int) -> str:
        """Make one damaged shard again; returns its checksum."""
        with _building(self.folder):
            checksums = self._checksums()
            checksum = checksums[number]
            # Another process may have mended it while this one waited for the lock.
            if checksum is None or not self._is_good(number, checksum):
                checksum = checksums[number] = self._make_shard(number)
                self._write_index(checksums, complete=None not in checksums)
            return checksum

    def _checksums(self) -> list[str | None]:
        """A checksum for each shard that the index knows, None for the others."""
        index = _read_index(self.folder)
        if not index or any(index[name] != self.wanted[name] for name in self.wanted):
            return [None] * self.num_shards
        return index["checksums"]

    def _is_good(self, number: int, checksum: str) -> bool:
        """Whether a shard is what was written; tells when it is not."""
        path = _shard_path(self.folder, number)
        good = _is_good(path, checksum)
        if not good:
            tell(self.on_progress, f"{path} is missing or damaged and is made again")
        return good

    def _make_shard(self, number: int) -> str:
        """Make and write one shard; returns its file's checksum."""
        num_rows, per_shard = self.wanted["shape"][0], self.wanted["rows_per_shard"]
        start, stop = number * per_shard, min((number + 1) * per_shard, num_rows)
        others = num_rows - self._num_rows({*self._missing(), number})
        out = np.empty((stop - start, *self.wanted["shape"][1:]), self.wanted["dtype"])
        for first in range(start, stop, ROWS_PER_CALL):
            last = min(first + ROWS_PER_CALL, stop)
            rows = self.make_rows(first, last)
            assert rows.shape == out[first - start : last - start].shape and rows.dtype == out.dtype, (
                f"{self.folder.name}: rows {rows.shape} {rows.dtype}, wanted {self.wanted}"
            )
            out[first - start : last - start] = rows
            if self.on_progress is not None:
                what = f"{self.folder.name} ({size_in_words(self._row_bytes() * num_rows)})"
                self.on_progress(what, others + last - start, num_rows)
        with writing_to(self.folder):
            return _write_shard(_shard_path(self.folder, number), out)

    def _row_bytes(self) -> int:
        return int(np.prod(self.wanted["shape"][1:])) * np.dtype(self.wanted["dtype"]).itemsize

    def _write_index(self, checksums: list[str | None], complete: bool) -> None:
        write_small(self.folder / INDEX, {**self.wanted, "checksums": checksums, "complete": complete})


def _write_shard(path: Path, rows: np.ndarray) -> str:
    """Write one shard whole or not at all, as `np.save` does; returns the file's SHA-256."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(rows))
    content = b"".join((header.getvalue(), rows.data))  # the one copy: `np.save` into memory makes three
    write_atomic(path, content)
    return hashlib.sha256(content).hexdigest()


def _first_row(path: Path) -> int:
    """Bytes of a shard's file before its first row."""
    try:
        # The format's own reader, which knows no pickles.
        return np.lib.format.open_memmap(path, mode="r").offset
    except ValueError as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path} is no array of plain numbers ({reason}): delete {path.parent} and run again") from None


def _is_good(path: Path, checksum: str | None) -> bool:
    """Whether a shard's file is there and is what was written."""
    return path.is_file() and file_digest(path) == checksum


INDEX = "index.json"


def _read_index(folder: Path, on_progress: OnProgress | None = None) -> dict[str, Any] | None:
    return read_small(folder / INDEX, on_progress)


def _shard_path(folder: Path, number: int) -> Path:
    return folder / f"shard-{number:05d}.npy"


@contextlib.contextmanager
def _building(folder: Path) -> Iterator[None]:
    """Hold the lock of the folder's index; others wait."""
    with holding(folder / "lock", waits=True):
        yield


@contextlib.contextmanager
def holding(path: Path, waits: bool) -> Iterator[bool]:
    """Hold a lock file in a folder of caches; without `waits`, say whether it is held or another process has it."""
    with contextlib.ExitStack() as held:
        with writing_to(path.parent):
            is_held = held.enter_context(locked(path, waits))
        yield is_held
