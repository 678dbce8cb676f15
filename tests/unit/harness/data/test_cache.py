"""Caches: what is read is what was written, whole, in order, and never half."""

import json
import multiprocessing
import multiprocessing.synchronize
import os
import shutil
import signal
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from harness.config import OutputConfig
from harness.data import cache
from harness.data.cache import Sharded, build, cache_folder, entry
from harness.errors import UserError

KEY = {"data": "abc", "transform": "none"}
SHAPE = (2, 3)


def rows_by_formula(start: int, stop: int) -> np.ndarray:
    """Row i is i * 100 + 0..5: every number says where it belongs."""
    return (np.arange(start, stop)[:, None] * 100 + np.arange(6)).reshape(-1, *SHAPE).astype(np.int64)


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """4 rows a call and 8 rows a shard: 21 rows make shards of 8, 8 and 5."""
    monkeypatch.setattr(cache, "ROWS_PER_CALL", 4)
    monkeypatch.setattr(cache, "SHARD_BYTES", 8 * 6 * 8)
    monkeypatch.setattr(cache, "SHARDS", 1)


def build_21(folder: Path, make_rows=rows_by_formula, report=None) -> Sharded:
    return build(folder, KEY, 21, SHAPE, np.int64, make_rows, report)


def test_rows_come_back_in_the_order_asked_for(tmp_path: Path, small_shards: None) -> None:
    opened = build_21(tmp_path / "c")
    assert len(opened) == 21 and opened.shape == (21, 2, 3) and opened.dtype == np.int64
    assert sorted(path.name for path in (tmp_path / "c").glob("shard*")) == [f"shard-0000{n}.npy" for n in range(3)]
    order = np.array([20, 0, 8, 7, 7, 16])
    expected = [[[i * 100, i * 100 + 1, i * 100 + 2], [i * 100 + 3, i * 100 + 4, i * 100 + 5]] for i in order]
    assert opened.rows(order).tolist() == expected
    assert opened.rows(np.array([], dtype=np.int64)).shape == (0, 2, 3)


def test_rows_are_made_in_fixed_steps_and_only_once(tmp_path: Path, small_shards: None) -> None:
    calls: list[tuple[int, int]] = []
    told: list[tuple[int, int]] = []

    def make_rows(start: int, stop: int) -> np.ndarray:
        calls.append((start, stop))
        return rows_by_formula(start, stop)

    build_21(tmp_path / "c", make_rows, lambda what, done, total: told.append((done, total)))
    steps = [(0, 4), (4, 8), (8, 12), (12, 16), (16, 20), (20, 21)]
    assert calls == steps
    assert told == [(stop, 21) for _, stop in steps]
    build_21(tmp_path / "c", make_rows)
    assert calls == steps


@pytest.mark.parametrize("dtype", [np.uint8, np.int64, np.float16, np.float32])
def test_shards_are_the_bytes_of_numpys_own_writer(tmp_path: Path, dtype: type[np.generic]) -> None:
    rows = rows_by_formula(0, 5).astype(dtype)
    folder = build(tmp_path / "c", KEY, 5, SHAPE, dtype, lambda start, stop: rows[start:stop]).folder
    np.save(tmp_path / "theirs.npy", rows)
    assert (folder / "shard-00000.npy").read_bytes() == (tmp_path / "theirs.npy").read_bytes()


@pytest.mark.parametrize("rows_mapped", [1, 2, 5, 100])
def test_rows_come_from_a_few_maps_at_a_time_and_none_stays(
    tmp_path: Path, small_shards: None, monkeypatch: pytest.MonkeyPatch, rows_mapped: int
) -> None:
    """Rows of 3 shards, some twice; a map that stayed would be listed by the system with the shard's name."""
    monkeypatch.setattr(cache, "ROWS_MAPPED", rows_mapped)
    opened, order = build_21(tmp_path / "c"), np.random.default_rng(1).integers(0, 21, 50)
    rows = opened.rows(order)
    assert np.array_equal(rows, [rows_by_formula(row, row + 1)[0] for row in order])
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()
    assert not [link for link in Path("/proc/self/fd").iterdir() if str(tmp_path) in str(link.resolve())]


def traced_peak(folder: Path, num_rows: int) -> int:
    """Most bytes that were held at once while a cache of rows of 1 kB was made and read through."""
    tracemalloc.start()
    opened = build(folder, KEY, num_rows, (1024,), np.uint8, lambda start, stop: np.zeros((stop - start, 1024), "u1"))
    for start in range(0, num_rows, 64):
        opened.rows(np.arange(start, min(start + 64, num_rows)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def test_memory_does_not_grow_with_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """2 and 32 shards of 256 kB. A shard is held as rows and as its file's content."""
    monkeypatch.setattr(cache, "SHARD_BYTES", 2**18)
    monkeypatch.setattr(cache, "SHARDS", 1)
    few, many = traced_peak(tmp_path / "few", 512), traced_peak(tmp_path / "many", 8192)
    assert 2 * 2**18 < few < 4 * 2**18
    assert many < few + 2**18


@pytest.mark.parametrize(
    ("num_rows", "row_bytes", "per_shard"),
    [
        (1, 8, 64),
        (512, 8, 64),  # 8 shards of as many rows as are made together
        (513, 8, 128),
        (10_000, 2048, 1280),  # 8 shards, the last one shorter
        (1_281_167, 2 * 256 * 768, 128),  # ImageNet's tokens of a ViT-B/14: 50 MB, as 192 rows would be 75 MB
        (1_281_167, 4 * 8 * 32 * 32, 2048),  # its moments: 64 MB
        (3, 2**30, 64),
    ],
)
def test_rows_of_a_shard(tmp_path: Path, num_rows: int, row_bytes: int, per_shard: int) -> None:
    """64 MB at most and 8 shards at least, where 64 rows or more are left for each."""
    wanted = cache._wanted(KEY, num_rows, (row_bytes,), np.uint8)
    assert wanted["rows_per_shard"] == per_shard


def test_key_names_the_folder() -> None:
    import hashlib

    text = '{"data":"abc","transform":"none"}'
    assert entry(Path("c"), "images", KEY) == Path("c") / f"images-{hashlib.sha256(text.encode()).hexdigest()[:12]}"
    assert entry(Path("c"), "images", {**KEY, "data": "abd"}) != entry(Path("c"), "images", KEY)


def test_two_keys_with_one_folder_are_refused(tmp_path: Path) -> None:
    build(tmp_path / "c", KEY, 3, SHAPE, np.int64, rows_by_formula)
    with pytest.raises(UserError, match="belongs to other data"):
        build(tmp_path / "c", {**KEY, "data": "abd"}, 3, SHAPE, np.int64, rows_by_formula)


def test_a_key_with_tuples_is_found_again(tmp_path: Path) -> None:
    for _ in range(2):
        opened = build(tmp_path / "c", {"mean": (0.5, 0.25)}, 3, SHAPE, np.int64, rows_by_formula)
    assert opened.key == {"mean": [0.5, 0.25]}


def interrupted_after(num_rows: int):
    def make_rows(start: int, stop: int) -> np.ndarray:
        if start >= num_rows:
            raise KeyboardInterrupt
        return rows_by_formula(start, stop)

    return make_rows


def test_an_interrupted_build_is_not_read_and_goes_on_where_it_stopped(tmp_path: Path, small_shards: None) -> None:
    folder = tmp_path / "c"
    with pytest.raises(KeyboardInterrupt):
        build_21(folder, interrupted_after(12))
    assert [path.name for path in folder.glob("shard*")] == ["shard-00000.npy"]
    with pytest.raises(UserError, match="not a finished cache: run `ditbench prepare`"):
        Sharded(folder)
    calls: list[int] = []

    def make_rows(start: int, stop: int) -> np.ndarray:
        calls.append(start)
        return rows_by_formula(start, stop)

    continued = build_21(folder, make_rows)
    assert calls == [8, 12, 16, 20]
    assert continued.rows(np.arange(21)).tolist() == rows_by_formula(0, 21).tolist()
    whole = build_21(tmp_path / "whole")
    for name in ("index.json", "shard-00000.npy", "shard-00001.npy", "shard-00002.npy"):
        assert (folder / name).read_bytes() == (whole.folder / name).read_bytes()


def test_a_torn_shard_of_an_interrupted_build_is_made_again(tmp_path: Path, small_shards: None) -> None:
    folder = tmp_path / "c"
    with pytest.raises(KeyboardInterrupt):
        build_21(folder, interrupted_after(16))
    torn = folder / "shard-00000.npy"
    torn.write_bytes(torn.read_bytes()[:-40])
    (folder / ".shard-00002.npy.1234.tmp").write_bytes(b"left by a killed process")
    calls: list[int] = []

    def make_rows(start: int, stop: int) -> np.ndarray:
        calls.append(start)
        return rows_by_formula(start, stop)

    continued = build_21(folder, make_rows)
    assert calls == [16, 20]
    assert continued.rows(np.arange(21)).tolist() == rows_by_formula(0, 21).tolist()
    assert calls == [16, 20, 0, 4], "the torn one is found when it is touched"
    assert not list(folder.glob(".*.tmp"))


class Builds:
    """Builds the cache of 21 rows, keeping what was made and told."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.made: list[int] = []
        self.told: list[str] = []

    def make_rows(self, start: int, stop: int) -> np.ndarray:
        self.made.append(start)
        return rows_by_formula(start, stop)

    def open(self) -> Sharded:
        self.made.clear()
        self.told.clear()
        return build_21(self.folder, self.make_rows, lambda what, done, total: self.told.append(what))


@pytest.fixture
def builds(tmp_path: Path, small_shards: None) -> Builds:
    """A finished cache of 21 rows in three shards."""
    builds = Builds(tmp_path / "c")
    builds.open()
    return builds


def flip(path: Path, offset: int, bit: int = 1) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= bit
    path.write_bytes(content)


@pytest.mark.parametrize("damage", ["data", "header", "cut", "empty", "missing"])
def test_a_damaged_shard_is_named_and_made_again_when_touched(builds: Builds, damage: str) -> None:
    path = builds.folder / "shard-00001.npy"
    whole, opened = path.read_bytes(), builds.open()
    if damage in ("data", "header"):
        flip(path, {"data": -1, "header": 20}[damage])
    elif damage == "missing":
        path.unlink()
    else:
        path.write_bytes(whole[:-40] if damage == "cut" else b"")
    assert opened.rows(np.array([0, 20])).shape == (2, 2, 3)
    assert builds.made == [], "the other shards are still good"
    assert opened.rows(np.arange(21)).tolist() == rows_by_formula(0, 21).tolist()
    assert builds.made == [8, 12]
    assert builds.told[0] == f"{path} is missing or damaged and is made again"
    assert path.read_bytes() == whole
    builds.open().verify()
    assert builds.made == []


def test_every_flipped_bit_of_a_shard_is_found(builds: Builds) -> None:
    path = builds.folder / "shard-00002.npy"
    content = path.read_bytes()
    for offset in range(0, len(content), 7):
        flip(path, offset, 1 << offset % 8)
        assert builds.open().rows(np.array([20])).tolist() == rows_by_formula(20, 21).tolist()
        assert builds.made == [16, 20], offset
        assert path.read_bytes() == content


def test_any_damage_of_the_index_makes_the_cache_again(builds: Builds) -> None:
    """Every byte with a flipped bit, and other forms: each is told, and nothing of the index is believed."""
    path = builds.folder / "index.json"
    content = path.read_bytes()
    flipped = [bytes([*content[:i], content[i] ^ 1 << i % 8, *content[i + 1 :]]) for i in range(0, len(content), 3)]
    swapped = [
        content.replace(b'"complete": true', b'"complete": 1'),
        content.replace(b'"shape": [\n   21', b'"shape": [\n   20'),
    ]
    assert all(other != content for other in swapped)
    for damaged in [*flipped, *swapped, content[:-9], b"", b"[]", b"null", b"{}", b"\xff"]:
        path.write_bytes(damaged)
        opened = builds.open()
        assert opened.rows(np.arange(21)).tolist() == rows_by_formula(0, 21).tolist()
        assert builds.made == [0, 4, 8, 12, 16, 20], damaged
        assert builds.told[0] == f"{path} is damaged and is made again"
        assert builds.told.count(builds.told[0]) == 1
        assert path.read_bytes() == content


def test_a_shard_entered_under_another_checksum_is_made_again(builds: Builds) -> None:
    """An index that is whole in itself: two shards changed places."""
    one, two = (builds.folder / f"shard-0000{number}.npy" for number in (0, 1))
    aside = builds.folder / "aside"
    one.rename(aside)
    two.rename(one)
    aside.rename(two)
    assert builds.open().rows(np.arange(21)).tolist() == rows_by_formula(0, 21).tolist()
    assert builds.made == [0, 4, 8, 12]


def test_verify_checks_again_what_was_read_before(builds: Builds) -> None:
    opened = builds.open()
    opened.verify()
    path = opened.folder / "shard-00002.npy"
    path.write_bytes(path.read_bytes()[:-8] + b"12345678")
    opened.verify()
    assert builds.told[0] == f"{path} is missing or damaged and is made again"
    assert opened.rows(np.array([20])).tolist() == rows_by_formula(20, 21).tolist()


@pytest.mark.parametrize("damage", ["missing", "a row less", "empty"])
def test_a_shard_that_is_lost_after_it_was_read_is_made_again(builds: Builds, damage: str) -> None:
    opened, path = builds.open(), builds.folder / "shard-00001.npy"
    assert opened.rows(np.arange(21)).tolist() == rows_by_formula(0, 21).tolist()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-48] if damage == "a row less" else b"")
    assert opened.rows(np.arange(21)).tolist() == rows_by_formula(0, 21).tolist()
    assert builds.made == [8, 12]


def test_threads_that_meet_damaged_shards_make_them_again_once(builds: Builds) -> None:
    for number in (0, 2):
        flip(builds.folder / f"shard-0000{number}.npy", -1)
    opened = builds.open()
    with ThreadPoolExecutor(4) as pool:
        for rows in pool.map(opened.rows, [np.arange(21)] * 8):
            assert rows.tolist() == rows_by_formula(0, 21).tolist()
    assert builds.made == [0, 4, 16, 20]


@pytest.mark.parametrize("missing", [False, True])
def test_without_its_maker_a_cache_with_a_damaged_shard_is_refused(builds: Builds, missing: bool) -> None:
    path = builds.folder / "shard-00001.npy"
    if missing:
        path.unlink()
    else:
        flip(path, -1)
    with pytest.raises(UserError, match=r"shard-00001\.npy is missing or damaged .*: run `ditbench prepare` to make"):
        Sharded(builds.folder).rows(np.array([9]))


def _touch_all(folder: Path, calls: Path) -> None:
    def make_rows(start: int, stop: int) -> np.ndarray:
        with calls.open("a") as file:
            file.write(f"{start}\n")
        return rows_by_formula(start, stop)

    opened = build(folder, KEY, 200, SHAPE, np.int64, make_rows)
    assert opened.rows(np.arange(200)).tolist() == rows_by_formula(0, 200).tolist()


def test_processes_that_meet_one_damaged_shard_make_it_again_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "SHARDS", 1)
    folder, calls = build(tmp_path / "c", KEY, 200, SHAPE, np.int64, rows_by_formula).folder, tmp_path / "calls"
    flip(folder / "shard-00000.npy", -1)
    context = multiprocessing.get_context("fork")
    jobs = [context.Process(target=_touch_all, args=(folder, calls)) for _ in range(3)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    assert [job.exitcode for job in jobs] == [0, 0, 0]
    assert calls.read_text().split() == ["0", "64", "128", "192"]


# -- small caches -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("write", [cache.write_small, cache.write_long])
def test_small_caches_come_back_or_are_told_to_be_damaged(tmp_path: Path, write: Callable[[Path, Any], None]) -> None:
    path, value, told = tmp_path / "new" / "x.json", {"a": [1, 0.5, None, "é\udc80\n"]}, []
    assert cache.read_small(path) is None
    write(path, value)
    content = path.read_bytes()
    for damaged in [*(content[:i] + bytes([content[i] ^ 2]) + content[i + 1 :] for i in range(len(content))), b"3"]:
        path.write_bytes(damaged)
        told.clear()
        assert cache.read_small(path, lambda *line: told.append(line)) is None, damaged
        assert told == [(f"{path} is damaged and is made again", 1, 1)]
    path.write_bytes(content)
    assert cache.read_small(path, lambda *line: told.append(line)) == value
    assert len(told) == 1
    path.unlink()
    assert cache.read_small(path, lambda *line: told.append(line)) is None
    assert len(told) == 1, "a cache that is not there is not damaged"


def test_an_unwritable_folder_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a file where a folder is wanted")
    with pytest.raises(UserError, match=r"output\.cache: cannot write to .*file"):
        build(tmp_path / "file" / "c", KEY, 3, SHAPE, np.int64, rows_by_formula)


def test_a_disk_that_is_too_small_is_found_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=143))

    def make_rows(start: int, stop: int) -> np.ndarray:
        raise AssertionError("no row may be made")

    with pytest.raises(UserError, match="make room or name another folder"):
        build(tmp_path / "c", KEY, 3, SHAPE, np.int64, make_rows)  # 3 rows of 48 bytes: 144
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=144))
    assert len(build(tmp_path / "c", KEY, 3, SHAPE, np.int64, rows_by_formula)) == 3


def test_a_disk_that_fills_up_leaves_no_finished_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_space(path: Path, content: bytes) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(cache, "write_atomic", no_space)
        with pytest.raises(UserError, match="No space left on device"):
            build(tmp_path / "c", KEY, 3, SHAPE, np.int64, rows_by_formula)
    with pytest.raises(UserError, match="not a finished cache"):
        Sharded(tmp_path / "c")
    assert build(tmp_path / "c", KEY, 3, SHAPE, np.int64, rows_by_formula).rows(np.array([2]))[0, 0, 0] == 200


def _count_and_build(folder: Path, calls: Path) -> None:
    def make_rows(start: int, stop: int) -> np.ndarray:
        with calls.open("a") as file:
            file.write(f"{os.getpid()} {start}\n")
        return rows_by_formula(start, stop)

    build(folder, KEY, 200, SHAPE, np.int64, make_rows).verify()


def test_processes_build_one_shard_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "SHARDS", 1)
    context = multiprocessing.get_context("fork")
    jobs = [context.Process(target=_count_and_build, args=(tmp_path / "c", tmp_path / "calls")) for _ in range(3)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    assert [job.exitcode for job in jobs] == [0, 0, 0]
    made = [line.split() for line in (tmp_path / "calls").read_text().splitlines()]
    assert [int(start) for _, start in made] == [0, 64, 128, 192]
    assert len({process for process, _ in made}) == 1


def _build_slowly(folder: Path, calls: Path, barrier: multiprocessing.synchronize.Barrier, dies_at: int) -> None:
    """Build 21 rows in 3 shards; each process meets the others once, in its first shard."""
    met: list[bool] = []

    def make_rows(start: int, stop: int) -> np.ndarray:
        with calls.open("a") as file:
            file.write(f"{os.getpid()} {start}\n")
        if not met:
            met.append(True)
            barrier.wait(30)
        if start == dies_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return rows_by_formula(start, stop)

    build_21(folder, make_rows).verify()


def _side_by_side(tmp_path: Path, num: int, dies_at: int = -1) -> tuple[list[int | None], dict[int, list[int]]]:
    """Exit codes of `num` processes that build one cache, and by process the rows at which it began calls."""
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(num)
    arguments = (tmp_path / "c", tmp_path / "calls", barrier, dies_at)
    jobs = [context.Process(target=_build_slowly, args=arguments) for _ in range(num)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    made: dict[int, list[int]] = {}
    for line in (tmp_path / "calls").read_text().splitlines():
        made.setdefault(int(line.split()[0]), []).append(int(line.split()[1]))
    return sorted(job.exitcode for job in jobs if job.exitcode is not None), made


def test_processes_make_shards_side_by_side_and_each_once(tmp_path: Path, small_shards: None) -> None:
    """Each is in a shard of its own at the same time: the barrier opens only then."""
    codes, made = _side_by_side(tmp_path, 3)
    assert codes == [0, 0, 0] and len(made) == 3
    assert sorted(start for calls in made.values() for start in calls) == [0, 4, 8, 12, 16, 20]
    alone = build_21(tmp_path / "alone")
    for path in alone.folder.iterdir():
        assert (tmp_path / "c" / path.name).read_bytes() == path.read_bytes(), path.name
    assert {path.name for path in (tmp_path / "c").iterdir()} == {path.name for path in alone.folder.iterdir()}


def test_others_make_the_shard_of_a_process_that_is_killed(tmp_path: Path, small_shards: None) -> None:
    codes, made = _side_by_side(tmp_path, 2, dies_at=4)
    # Row 4 kills whoever makes it: the first process, then the one that takes over its shard.
    assert codes == [-signal.SIGKILL, -signal.SIGKILL]
    assert sorted(start for calls in made.values() for start in calls) == [0, 0, 4, 4, 8, 12, 16, 20]
    calls: list[int] = []

    def make_rows(start: int, stop: int) -> np.ndarray:
        calls.append(start)
        return rows_by_formula(start, stop)

    assert build_21(tmp_path / "c", make_rows).rows(np.arange(21)).tolist() == rows_by_formula(0, 21).tolist()
    assert calls == [0, 4], "whole shards are kept"
    assert not list((tmp_path / "c").glob("*.lock"))


def test_missing_bytes_are_those_of_the_shards_that_are_not_whole(tmp_path: Path, small_shards: None) -> None:
    wanted = (tmp_path / "c", KEY, 21, SHAPE, np.int64)
    assert cache.missing_bytes(*wanted) == 21 * 48 and not (tmp_path / "c").exists()
    with pytest.raises(KeyboardInterrupt):
        build_21(tmp_path / "c", interrupted_after(12))
    assert cache.missing_bytes(*wanted) == 13 * 48
    build_21(tmp_path / "c")
    assert cache.missing_bytes(*wanted) == 0
    (tmp_path / "c" / "shard-00002.npy").unlink()
    assert cache.missing_bytes(*wanted) == 5 * 48


def test_index_holds_the_whole_key(tmp_path: Path) -> None:
    folder = build(tmp_path / "c", KEY, 3, SHAPE, np.int64, rows_by_formula).folder
    index = json.loads((folder / "index.json").read_text())["value"]
    assert index["key"] == KEY and index["complete"] is True
    assert index["shape"] == [3, 2, 3] and index["dtype"] == "int64" and len(index["checksums"]) == 1


def test_cache_folder_by_config_then_variable_then_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DITBENCH_CACHE", raising=False)
    assert cache_folder(OutputConfig()) == Path("cache")
    monkeypatch.setenv("DITBENCH_CACHE", "/somewhere")
    assert cache_folder(OutputConfig()) == Path("/somewhere")
    assert cache_folder(OutputConfig(cache="/named")) == Path("/named")
