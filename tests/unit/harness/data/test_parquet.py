"""Parquet files as Hugging Face's `datasets` writes them: rows, classes and their names, and what does not fit."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

from harness.config import DataConfig
from harness.data import cache
from harness.data import images as data
from harness.data.image_set import ImageSet
from harness.data.images import load_images
from harness.data.parquet import open_table
from harness.errors import UserError

CLASSES = [2, 0, 1, 1, 2, 0, 2]
NAMES = ("ant", "bee", "cat")


def picture(i: int) -> np.ndarray:
    return np.random.default_rng(i).integers(0, 256, (16, 16, 3), dtype=np.uint8)


def encoded(i: int) -> bytes:
    content = io.BytesIO()
    Image.fromarray(picture(i)).save(content, format="png")
    return content.getvalue()


def features(names: tuple[str, ...] = NAMES) -> dict[bytes, bytes]:
    """The schema's metadata of a data set with one image and one ClassLabel."""
    described = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
    return {b"huggingface": json.dumps({"info": {"features": described}}).encode()}


def write(path: Path, rows: range, metadata: dict[bytes, bytes] | None = None, **columns: Any) -> None:
    """Some of the rows in groups of 2."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pictures = [{"bytes": encoded(i), "path": f"{i}.png"} for i in rows]
    table = pyarrow.table({"image": pictures, "label": [CLASSES[i] for i in rows], **columns})
    parquet.write_table(table.replace_schema_metadata(metadata), path, row_group_size=2)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two files of one part, as the hub has them."""
    write(tmp_path / "set" / "data" / "train-00000-of-00002.parquet", range(5), features())
    write(tmp_path / "set" / "data" / "train-00001-of-00002.parquet", range(5, 7), features())
    return tmp_path / "set"


def load(path: Path, size: int = 16) -> ImageSet:
    return load_images(DataConfig(name="parquet", path=str(path), image_size=size), path.parent / "cache")


def test_rows_classes_and_names(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "ROWS_PER_CALL", 3)  # across row groups and files
    images = load(root)
    assert (images.rows(np.arange(7)) == np.stack([picture(i) for i in range(7)])).all()
    assert images.labels.tolist() == CLASSES and images.labels.dtype == np.int64
    assert images.class_names == NAMES
    for path in (root / "data", root / "data" / "train"):
        assert load(path).labels.tolist() == CLASSES
    outline = data.outline(DataConfig(name="parquet", path=str(root), image_size=16))
    assert (outline.num_images, outline.num_classes) == (7, len(NAMES))
    assert (outline.is_cached, outline.has_moments) == (True, False)


def test_row_groups_are_read_one_at_a_time(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A set of any size passes through memory group by group, and only the groups that are asked for."""
    read: list[tuple[int, list[str]]] = []
    whole = parquet.ParquetFile.read_row_group

    def note(file: parquet.ParquetFile, number: int, columns: list[str]) -> pyarrow.Table:
        read.append((number, columns))
        return whole(file, number, columns)

    table = open_table(root)
    monkeypatch.setattr(parquet.ParquetFile, "read_row_group", note)
    pictures = table.pictures(3, 7)
    assert read == []
    next(pictures)
    assert [number for number, _ in read] == [1]
    assert len(list(pictures)) == 3
    assert read == [(1, ["image"]), (2, ["image"]), (0, ["image"])]
    read.clear()
    one_by_one = [content for row in range(7) for _, content in table.pictures(row, row + 1)]
    assert one_by_one == [encoded(i) for i in range(7)]
    assert [number for number, _ in read] == [0, 1, 2, 0], "each group is read once"
    assert table._read == {}, "and none is kept after its last row"


def test_pictures_are_resized_as_those_of_folders_are(root: Path, tmp_path: Path) -> None:
    for i, number in enumerate(CLASSES):
        file = tmp_path / "folder" / NAMES[number] / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encoded(i))
    folder = load_images(DataConfig(path=str(tmp_path / "folder"), image_size=8), tmp_path / "cache")
    order = np.argsort(CLASSES, kind="stable")  # a folder is read class by class
    assert (load(root, 8).rows(order) == folder.rows(np.arange(7))).all()


def test_one_part_is_chosen_and_two_are_refused(root: Path) -> None:
    write(root / "data" / "test-00000-of-00001.parquet", range(2), features())
    with pytest.raises(UserError, match=r"holds the parts test, train: give one of them, as .*test"):
        load(root / "data")
    with pytest.raises(UserError, match=r"holds the parts data/test, data/train: give one of them, as .*data/test$"):
        load(root)
    assert len(load(root / "data" / "train")) == 7 and len(load(root / "data" / "test")) == 2
    assert len(load(root / "data" / "test-00000-of-00001.parquet")) == 2


def test_the_digest_follows_the_content(root: Path) -> None:
    first = load(root).digest
    moved = root.parent / "moved"
    root.rename(moved)
    assert load(moved).digest == first
    write(moved / "data" / "train-00001-of-00002.parquet", range(4, 6), features())
    assert load(moved).digest != first


def test_files_that_datasets_did_not_write(tmp_path: Path) -> None:
    write(tmp_path / "a" / "x.parquet", range(7))
    assert load(tmp_path / "a").class_names == ("0", "1", "2")


@pytest.mark.parametrize(
    ("metadata", "columns", "message"),
    [
        (features(("ant", "bee")), {}, "has class 2 and names of 2: mend the files"),
        (None, {"label": [None, 1]}, "holds rows without a class"),
        (None, {"label": [-1, 1]}, "holds rows without a class"),
        (None, {"label": ["a", "b"]}, "holds rows without a class"),
        (None, {"image": [b"a", b"b"]}, "has the columns image, label: wanted are one of pictures"),
        (None, {"other": [{"bytes": b"a"}, {"bytes": b"b"}]}, "has the columns image, label, other"),
        (None, {"image": [{"bytes": encoded(0)}, {"bytes": None}]}, "row 1 of .* holds no picture"),
        (
            None,
            {"image": [{"bytes": encoded(0)}, {"bytes": b"torn"}]},
            r"cannot read image .*x\.parquet row 1 of group 0",
        ),
    ],
)
def test_what_does_not_fit(
    tmp_path: Path, metadata: dict[bytes, bytes] | None, columns: dict[str, Any], message: str
) -> None:
    write(tmp_path / "a" / "x.parquet", range(2), metadata, **columns)
    with pytest.raises(UserError, match=message):
        load(tmp_path / "a")


def test_parts_that_are_folders(tmp_path: Path) -> None:
    """As the hub's own conversions lie in the branch refs/convert/parquet."""
    write(tmp_path / "set" / "default" / "train" / "0000.parquet", range(3), features())
    write(tmp_path / "set" / "default" / "train" / "0001.parquet", range(3, 7), features())
    assert len(load(tmp_path / "set")) == 7
    write(tmp_path / "set" / "default" / "test" / "0000.parquet", range(2), features())
    assert len(load(tmp_path / "set" / "default" / "train")) == 7
    with pytest.raises(UserError, match=r"holds the parts default/test, default/train: give one of them"):
        load(tmp_path / "set")


def test_a_part_whose_name_begins_another_ones(root: Path) -> None:
    write(root / "data" / "train-small-00000-of-00001.parquet", range(2), features())
    assert len(load(root / "data" / "train")) == 7
    assert len(load(root / "data" / "train-small")) == 2


def test_no_files_and_torn_files(root: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere names no parquet files"):
        load(root / "nowhere")
    torn = root / "data" / "train-00001-of-00002.parquet"
    torn.write_bytes(torn.read_bytes()[:-20])
    with pytest.raises(UserError, match=r"cannot read .*train-00001-of-00002\.parquet") as raised:
        load(root)
    assert "\n" not in str(raised.value)
