"""`ditbench prepare`: the estimate before it starts, several processes, kills, time left, whole verification."""

import multiprocessing
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from harness.data import cache
from harness.errors import UserError
from harness.machine import disk
from studies import cli
from studies.commands import prepare as command

NUM, SIDE, ROWS = 44, 16, 4
"""Images, their size, and rows that are made together; two shards of moments and more of tokens than processes."""
ENCODER = "efficientnet_lite0"


@pytest.fixture
def words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """`prepare` of small pictures in small shards; helpers are forked, so that they have small shards too."""
    monkeypatch.setattr(cache, "ROWS_PER_CALL", ROWS)
    monkeypatch.setattr(cache, "SHARD_BYTES", 2 * ROWS * 4 * 1280 * 2)  # 8 rows of tokens
    monkeypatch.setattr(cache, "SHARDS", 2)
    monkeypatch.setattr(command, "CONTEXT", multiprocessing.get_context("fork"))
    random = np.random.default_rng(0)
    for i in range(NUM):
        path = tmp_path / "images" / "ab"[i % 2] / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)).save(path)
    named = {"path": tmp_path / "images", "name": "imagefolder", "image_size": SIDE}
    data = [word for key, value in named.items() for word in (f"--data.{key}", str(value))]
    method = ["--model.name", "SiT-pico/2", "--method", "repa", "--repa.encoders", ENCODER]
    return ["prepare", *data, *method, "--output.cache", str(tmp_path / "cache")]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def in_a_fork(run: Callable[[], Any]) -> int | None:
    """Exit code of a process that runs it."""
    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join(120)
    if process.is_alive():
        process.kill()
        process.join()
    return process.exitcode


def test_the_estimate_is_what_the_caches_take(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*words, "--data.flip", "true"]) == 0
    lines = capsys.readouterr().out.splitlines()
    sizes = {
        "images": NUM * SIDE * SIDE * 3,
        "moments": NUM * 8 * 4 * 4 * 4,
        f"tokens-{ENCODER}": NUM * 4 * 1280 * 2,
    }
    sizes |= {f"{kind}-mirrored": size for kind, size in sizes.items() if kind != "images"}
    listed = ", ".join(f"{kind} {size / 1e6:.1f} MB" for kind, size in sizes.items())
    assert f"take {sum(sizes.values()) / 1e6:.1f} MB in all ({listed}); " in lines[0]
    assert re.search(r"; \d+\.\d [GM]B of its disk are free$", lines[0])
    for kind, size in sizes.items():
        (folder,) = (tmp_path / "cache").glob(f"{kind}-" + "[0-9a-f]" * 12)
        shards = list(folder.glob("shard-*.npy"))
        assert sum(path.stat().st_size for path in shards) == size + 128 * len(shards)  # numpy's headers
    assert lines[-1] == f"{NUM} images of 2 classes are ready"


def test_a_disk_too_small_for_all_caches_is_refused_before_the_first_is_made(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*words[:-6], *words[-2:]]) == 0, "the images, and moments for a method without an encoder"
    encoded = NUM * 4 * 1280 * 2
    monkeypatch.setattr(disk, "free_bytes", lambda folder: encoded + NUM * 8 * 4 * 4 * 4 - 1)
    before = contents(tmp_path / "cache")
    assert cli.main([*words, "--data.flip", "true"]) == 2
    assert "make room or name another folder" in capsys.readouterr().err
    assert contents(tmp_path / "cache") == before
    assert cli.main(words) == 0, "without flips there is room"


def test_several_processes_make_the_same_bytes_as_one(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever writes a shard of tokens waits until two processes have one."""
    makers = tmp_path / "makers"
    makers.mkdir()
    write = cache._write_shard

    def together(path: Path, rows: np.ndarray) -> str:
        if "tokens" in path.parent.name:  # of the others there is one shard
            (makers / str(os.getpid())).touch()
            assert any(len(list(makers.iterdir())) == 2 for _ in waiting(60)), "one process alone"
        return write(path, rows)

    with monkeypatch.context() as patched:
        patched.setattr(cache, "_write_shard", together)
        assert in_a_fork(lambda: os._exit(cli.main([*words, "--jobs", "2"]))) == 0
    assert len(list(makers.iterdir())) == 2
    made = contents(tmp_path / "cache")
    assert len([name for name in made if name.startswith("tokens-") and name.endswith(".npy")]) == 6
    assert not [name for name in made if name.endswith(("lock", ".tmp"))]
    assert cli.main([*words, "--output.cache", str(tmp_path / "alone")]) == 0
    alone = contents(tmp_path / "alone")
    assert {name: made[name] for name in alone} == alone


def test_a_killed_command_keeps_whole_shards_and_ends_its_helpers(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    helpers = tmp_path / "helpers"
    helpers.mkdir()
    write = cache._write_shard

    def deadly(path: Path, rows: np.ndarray) -> str:
        if "tokens" in path.parent.name:
            if multiprocessing.parent_process().name == "MainProcess":  # type: ignore[union-attr]
                # The command itself, in its fork: it dies in its second shard of tokens.
                if list(path.parent.glob("shard-*.npy")):
                    assert any(list(helpers.iterdir()) for _ in waiting(60)), "no helper is at work"
                    os.kill(os.getpid(), signal.SIGKILL)
            else:
                (helpers / str(os.getpid())).touch()
                time.sleep(60)  # a helper at work when the command dies
        return write(path, rows)

    with monkeypatch.context() as patched:
        patched.setattr(cache, "_write_shard", deadly)
        assert in_a_fork(lambda: os._exit(cli.main([*words, "--jobs", "2"]))) == -signal.SIGKILL
    (helper,) = [int(path.name) for path in helpers.iterdir()]
    assert any(has_ended(helper) for _ in waiting(30)), "a helper outlived its command"
    kept = contents(tmp_path / "cache")
    calls: list[str] = []

    def counted(path: Path, rows: np.ndarray) -> str:
        calls.append(f"{path.parent.name}/{path.name}")
        return write(path, rows)

    monkeypatch.setattr(cache, "_write_shard", counted)
    assert cli.main([*words, "--verify", "full"]) == 0
    whole = [name for name in kept if name.endswith(".npy")]
    assert whole and not set(whole) & set(calls), "whole shards are kept"
    assert cli.main([*words, "--output.cache", str(tmp_path / "alone")]) == 0
    assert contents(tmp_path / "cache") == contents(tmp_path / "alone")


def waiting(seconds: float) -> Iterator[None]:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        yield
        time.sleep(0.02)


def has_ended(process: int) -> bool:
    """Whether it is gone, or a zombie that nobody has waited for."""
    try:
        state = Path(f"/proc/{process}/stat").read_text()
    except FileNotFoundError:
        return True
    return state.rpartition(")")[2].split()[0] == "Z"


def test_whole_verification_finds_and_mends_a_flipped_bit(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(words) == 0
    before = contents(tmp_path / "cache")
    (shard,) = (tmp_path / "cache").glob("tokens-*/shard-00003.npy")
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(bytes(content))
    assert cli.main(words) == 0 and contents(tmp_path / "cache") != before
    capsys.readouterr()
    assert cli.main([*words, "--verify", "full"]) == 0
    out = capsys.readouterr().out
    assert f"{shard} is missing or damaged and is made again" in out
    assert out.splitlines()[-1].endswith("are ready, every shard checked")
    assert contents(tmp_path / "cache") == before


def test_speed_and_time_left_count_from_what_was_there_when_it_began(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([100.0, 110.0, 120.0, 130.0, 130.0, 131.0, 132.0])
    monkeypatch.setattr(command.time, "monotonic", lambda: next(clock))
    told: list[str] = []
    pace = command._Pace(lambda what, done, total: told.append(f"{what}: {done} of {total}"))
    for done in (500, 600, 800, 1000):
        pace.report("tokens", done, 1000)
    for done in (1, 9):
        pace.report("reading files", done, 9)
    pace.report("shard-00000.npy is damaged and is made again", 1, 1)
    # 100 rows in 10 s, 400 left: 40 s. 300 rows in 20 s, 200 left: 13 s. 500 rows in 30 s.
    assert told == [
        "tokens: 500 of 1000",
        "tokens, 10 images/s, 0:40 left: 600 of 1000",
        "tokens, 15 images/s, 0:13 left: 800 of 1000",
        "tokens, 17 images/s: 1000 of 1000",
        "reading files: 1 of 9",
        "reading files, 8.0 files/s: 9 of 9",
        "shard-00000.npy is damaged and is made again: 1 of 1",
    ]
    assert pace.summary() == "tokens: 17 images/s; reading files: 8.0 files/s"


def test_the_command_says_how_fast_each_cache_was_made(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(words) == 0
    *shown, summary, last = capsys.readouterr().out.splitlines()
    assert last == f"{NUM} images of 2 classes are ready"
    folders = sorted(path.name for path in (tmp_path / "cache").iterdir() if path.is_dir())
    speeds = re.findall(r"([\w-]+) \([\d.]+ MB\): [\d,.]+ images/s", summary)
    assert len(folders) == 3 and sorted(speeds) == folders
    assert re.search(r"(^|; )reading files: [\d,.]+ files/s", summary)
    for folder in folders:
        assert [line for line in shown if re.match(rf"{folder} .*, [\d,.]+ images/s: {NUM} of {NUM}$", line)]
    assert cli.main(words) == 0
    assert "/s" not in capsys.readouterr().out, "a second start makes nothing"


def test_processes_of_a_launcher_take_their_own_places(monkeypatch: pytest.MonkeyPatch) -> None:
    assert command._Group.of("cpu", 0) == command._Group(kind="cpu", size=1, started=1, place=0)
    assert command._Group.of("cpu", 3) == command._Group(kind="cpu", size=3, started=3, place=0)
    for name, value in {"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4", "LOCAL_RANK": "3"}.items():
        monkeypatch.setenv(name, value)
    group = command._Group.of("cuda", 0)
    assert group == command._Group(kind="cuda", size=4, started=1, place=3)
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert group.device(0) == "cuda:1"
    with pytest.raises(UserError, match=r"--jobs is 2: a launcher has started 4 processes here"):
        command._Group.of("cuda", 2)


def test_numbers_of_processes_that_make_no_sense(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*words, "--jobs", "-1"]) == 2
    assert "--jobs is -1: give 0 to 1024 processes" in capsys.readouterr().err
