"""Locks: one holder at a time, freed by its death, and nothing that is not ours is followed, emptied or removed."""

import errno
import fcntl
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from harness.errors import UserError
from harness.records.files import replaced
from harness.records.locks import NoLocks, holder, locked, take, try_take

PRECIOUS = "the only copy\n"


def open_replaced(folder: Path) -> None:
    with replaced(folder / "report"):
        pass


def open_locked(folder: Path) -> None:
    with locked(folder / ".report.lock"):
        pass


WAYS: dict[str, Callable[[Path], object]] = {
    "take": lambda folder: take(folder / ".report.lock"),
    "try_take": lambda folder: try_take(folder / ".report.lock"),
    "shared": lambda folder: try_take(folder / ".report.lock", shared=True, makes=False),
    "locked": open_locked,
    "replaced": open_replaced,
}


@pytest.fixture
def precious(tmp_path: Path) -> Iterator[Path]:
    """A file outside of the study, which is as it was after the test."""
    path = tmp_path / "precious"
    path.write_text(PRECIOUS)
    yield path
    assert path.read_text() == PRECIOUS


def link(lock: Path, precious: Path) -> None:
    lock.symlink_to(precious)


def dangle(lock: Path, precious: Path) -> None:
    lock.symlink_to(precious.with_name("nothing"))


def hard_link(lock: Path, precious: Path) -> None:
    lock.hardlink_to(precious)


def folder(lock: Path, precious: Path) -> None:
    lock.mkdir()


def pipe(lock: Path, precious: Path) -> None:
    os.mkfifo(lock)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("lay", [link, dangle, hard_link, folder, pipe])
def test_what_is_no_lock_file_is_refused_and_left_alone(
    tmp_path: Path, precious: Path, way: str, lay: Callable[[Path, Path], None]
) -> None:
    study = tmp_path / "s"
    study.mkdir()
    lock = study / ".report.lock"
    lay(lock, precious)
    with pytest.raises(UserError) as refused:
        WAYS[way](study)
    assert str(lock) in str(refused.value)
    assert "\n" not in str(refused.value)
    assert os.path.lexists(lock)
    assert not (tmp_path / "nothing").exists()
    assert not (study / "report").exists()


def test_a_lock_file_that_is_replaced_by_a_link_locks_nothing(tmp_path: Path, precious: Path) -> None:
    lock = tmp_path / "lock"
    with take(lock):
        lock.unlink()
        lock.symlink_to(precious)
        with pytest.raises(UserError, match=str(lock)):
            try_take(lock)


def test_shared_locks_keep_out_one_that_is_not(tmp_path: Path) -> None:
    path = tmp_path / "new" / "lock"
    with pytest.raises(FileNotFoundError):
        try_take(path, shared=True, makes=False)
    assert not path.parent.exists()
    first, second = try_take(path, shared=True), try_take(path, shared=True)
    assert first is not None
    assert second is not None
    first.release()
    assert try_take(path) is None
    second.release()
    with take(path):
        assert try_take(path, shared=True) is None


def test_a_signed_lock_says_who_holds_it_until_it_is_released(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    path.write_text(json.dumps({"host": "a killed holder", "pid": 1, "since": "before"}) + "\n" * 200)
    with take(path) as lock:
        assert holder(path) == "a killed holder, process 1"
        lock.sign()
        assert holder(path) == f"{os.uname().nodename}, process {os.getpid()}"
        assert path.read_text().count("\n") == 1
    assert path.read_bytes() == b""
    path.write_text('{"ho')  # a full disk took no more
    with take(path):
        assert holder(path) == ""


def test_the_file_of_a_block_is_gone_after_it(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with locked(path) as is_held:
        assert is_held
        with locked(path, waits=False) as again:
            assert not again
        assert path.exists(), "who did not get the lock leaves its file"
    assert not path.exists()


def test_a_file_system_without_locks_is_told_from_one_that_refuses_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(handle: int, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError):
        take(tmp_path / "file" / "folder" / "lock")
    monkeypatch.setattr(fcntl, "flock", none)
    with pytest.raises(NoLocks) as refused:
        take(tmp_path / "lock")
    assert (refused.value.errno, refused.value.filename) == (errno.ENOLCK, str(tmp_path / "lock"))
