"""Data sets by their name on the hub: a server on this machine stands in for it."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import constants

from harness.config import DataConfig
from harness.data import images as data
from harness.data import parquet
from harness.data.image_set import ImageSet
from harness.data.images import load_images
from harness.errors import UserError
from harness.frozen import hub
from harness.machine import progress
from tests.unit.harness.data.test_parquet import CLASSES, NAMES, features, picture, write
from tests.unit.harness.frozen.hub_factory import DATASET, Server, running

TRAIN = ("plain_text/train-00000-of-00002.parquet", "plain_text/train-00001-of-00002.parquet")
TEST = "plain_text/test-00000-of-00001.parquet"


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """The data set as it would lie in a folder."""
    root = tmp_path / "set"
    write(root / TRAIN[0], range(5), features())
    write(root / TRAIN[1], range(5, 7), features())
    write(root / TEST, range(2), features())
    (root / "README.md").write_text("pictures")
    return root


@pytest.fixture
def server(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """The hub's stand-in has those files."""
    with running(tmp_path, monkeypatch) as server:
        for path in sorted(path for path in files.rglob("*") if path.is_file()):
            server.pictures[path.relative_to(files).as_posix()] = path.read_bytes()
        yield server


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def load(path: str, tmp_path: Path, on_progress: progress.OnProgress | None = None) -> ImageSet:
    return load_images(DataConfig(name="parquet", path=path, image_size=16), tmp_path / "cache", on_progress)


def refused(path: str) -> str:
    """The one line that refuses a path."""
    with pytest.raises(UserError) as raised:
        parquet.locate(path)
    assert "\n" not in str(raised.value)
    assert str(raised.value).startswith("data.path: ")
    return str(raised.value)


def test_a_part_is_fetched_once_and_is_what_its_folder_is(server: Server, files: Path, tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    images = load(f"{DATASET}/train", tmp_path, lambda *words: told.append(words))
    assert (images.rows(np.arange(7)) == np.stack([picture(i) for i in range(7)])).all()
    assert (images.labels.tolist(), images.class_names) == (CLASSES, NAMES)
    assert images.digest == load(str(files / "plain_text" / "train"), tmp_path).digest
    assert server.downloads() == list(TRAIN), "neither another part nor anything else"
    size = sum(len(server.pictures[name]) for name in TRAIN) / 1e6
    assert [words for words in told if DATASET in words[0]] == [
        (f"files of {DATASET} ({size:.1f} MB)", number, 2) for number in (1, 2)
    ]
    asked = len(server.asked)
    outline = data.outline(DataConfig(name="parquet", path=f"{DATASET}/plain_text/train", image_size=16))
    assert outline.num_images == 7
    assert len(server.asked) == asked


def test_what_was_fetched_is_used_offline_and_stays_as_it_was(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = load(f"{DATASET}/test", tmp_path).digest
    server.pictures[TEST] = server.pictures[TRAIN[0]]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert load(f"{DATASET}/test", tmp_path).digest == first
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert load(f"{DATASET}/test", tmp_path).digest == first
    assert server.downloads() == [TEST]


def test_an_interrupted_fetch_goes_on_with_what_is_missing(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.gone.add(TRAIN[1])
    message = refused(f"{DATASET}/train")
    assert f"{DATASET}/train is no folder here, and {DATASET} cannot be had from the hub (" in message
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "not whole in" in refused(f"{DATASET}/train"), "half of it is here"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    server.gone.clear()
    assert len(load(f"{DATASET}/train", tmp_path)) == 7
    assert server.downloads() == list(TRAIN)


@pytest.mark.usefixtures("offline")
def test_offline_nothing_is_asked_and_the_folder_is_named(files: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert refused(f"{DATASET}/train") == (
        f"data.path: {DATASET}/train is no folder here, and not whole in {tmp_path}/hub/datasets--someone--pictures, "
        "where the hub's files are kept (HF_HOME moves it): run once without --offline, or name a folder of parquet "
        "files"
    )


def test_a_part_that_another_one_was_fetched_beside(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parquet.locate(f"{DATASET}/test")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "not whole in" in refused(f"{DATASET}/train")
    assert "has no part dev, but plain_text/test, plain_text/train" in refused(f"{DATASET}/dev")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    server.pictures["plain_text/dev-00000-of-00001.parquet"] = server.pictures[TEST]
    assert len(load(f"{DATASET}/dev", tmp_path)) == 2, "the hub has more than it had when the first part was fetched"


def test_several_parts_are_refused_before_anything_is_fetched(server: Server) -> None:
    assert refused(DATASET) == (
        f"data.path: {DATASET} has the parts plain_text/test, plain_text/train: give one of them, as "
        f"{DATASET}/plain_text/test"
    )
    assert server.downloads() == []


def test_a_set_without_parquet_files(server: Server) -> None:
    server.pictures = {"pictures.py": b"", "train/cat/0.png": b""}
    message = refused(f"{DATASET}/train")
    assert f"{DATASET} keeps no parquet files on the hub (a script or plain images)" in message
    assert f"`hf download {DATASET} --repo-type dataset --local-dir FOLDER`" in message


def test_gated_private_and_unreachable_sets(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    server.gated = True
    assert f"accept its terms at huggingface.co/datasets/{DATASET}, then log in" in refused(f"{DATASET}/train")
    server.private = True
    assert f"the hub has no data set {DATASET}, or it is private" in refused(f"{DATASET}/train")
    assert "a--b/c cannot be had from the hub" in refused("a--b/c")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # the port of "discard", which nobody serves
    assert f"{DATASET} cannot be had from the hub (" in refused(f"{DATASET}/train")


def test_a_full_disk_is_told_first(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "free_bytes", lambda folder: 100)
    with pytest.raises(UserError, match=r"^HF_HOME: .* needs 0\.0 MB for someone/pictures and the disk has 0\.0 MB"):
        parquet.locate(f"{DATASET}/test")
    assert server.downloads() == []


def test_a_set_that_changes_while_it_is_fetched(server: Server) -> None:
    """Part of a set is not taken for all of it."""
    seen: list[str] = []

    def change() -> None:
        seen.append(server.commit)
        if len(seen) == 2:
            server.pictures["plain_text/test-00001-of-00002.parquet"] = server.pictures.pop(TEST)

    server.before_listing = change
    assert f"{DATASET} changed on the hub while it was fetched, so try again" in refused(f"{DATASET}/test")
    assert server.downloads() == [TEST]


def test_names_from_the_hub_lead_nowhere_else(server: Server, tmp_path: Path) -> None:
    for name in ("../../train-00000-of-00001.parquet", f"{tmp_path}/train-00000-of-00001.parquet"):
        server.pictures[name] = server.pictures.pop(TEST) if TEST in server.pictures else b""
    assert not [name for name in hub.list_files(DATASET).sizes if name not in (*TRAIN, "README.md")]


def test_a_folder_here_wins(server: Server, files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(files.parent)
    for path in ("set/plain_text/train", "set/nothing", "./set/x", str(files)):
        assert parquet.locate(path) == Path(path)
    assert server.asked == []


@pytest.mark.parametrize(
    ("names", "part", "place", "chosen"),
    [
        (("data/train-00000-of-00294.parquet", "data/test-00000-of-00028.parquet"), "train", "data/train", [0]),
        (("data/train-00000-of-00001-1359597a978bc4fa.parquet", "README.md"), "", "data/train", [0]),
        (("default/train/0000.parquet", "default/train/0001.parquet", "default/test/0000.parquet"),
         "train", "default/train", [0, 1]),
        (("data/train.parquet", "data/test.parquet"), "test", "data/test.parquet", [1]),
        (("a/train-00000-of-00001.parquet", "b/train-00000-of-00001.parquet"), "b/train", "b/train", [1]),
        (("a/train-00000-of-00001.parquet", "b/train-00000-of-00001.parquet"), "b", "b/train", [1]),
        (("train-00000-of-00001.parquet", "train-small-00000-of-00001.parquet"), "train", "train", [0]),
        (("00000-of-00002.parquet", "00001-of-00002.parquet"), "", ".", [0, 1]),
    ],
)  # fmt: skip
def test_layouts(names: tuple[str, ...], part: str, place: str, chosen: list[int]) -> None:
    """As ILSVRC/imagenet-1k, zh-plus/tiny-imagenet, the hub's own conversions and others keep their files."""
    assert parquet.choose("a/b", part, names) == (place, [names[number] for number in chosen])
