"""Image data sets of Hugging Face as they lie on the hub: parquet files with a column of pictures and one of classes.

Read with pyarrow alone. A picture is a struct of `bytes` (the encoded file) and `path`; the names of the classes stand
in the schema's metadata, under `huggingface`.

Shapes: M images in all.
"""

import io
import json
import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from harness.config import DataConfig
from harness.data import cache as caches
from harness.data.file_digests import file_digests
from harness.data.image_set import ImageSet, Outline
from harness.data.pictures import PICTURE_TRANSFORM, read_square
from harness.errors import UserError
from harness.frozen import hub
from harness.machine.progress import OnProgress
from harness.records.files import digest

HUB_NAME = re.compile(r"(\w[\w.-]*/\w[\w.-]*)((?:/\w[\w.-]*)*)")
"""A data set on the hub, and which of its parts: `uoft-cs/cifar10/train`."""


def outline(config: DataConfig, on_progress: OnProgress | None) -> Outline:
    """Read everything but the pictures, after the files were fetched where they are on the hub alone."""
    table = open_table(locate(config.path, on_progress))
    num_classes = len(table.class_names)
    return Outline(num_images=len(table.labels), num_classes=num_classes, is_cached=True, has_moments=False)


def load(config: DataConfig, cache: Path, on_progress: OnProgress | None) -> ImageSet:
    """Read the pictures of all rows through the cache."""
    path, image_size = locate(config.path, on_progress), config.image_size
    table = open_table(path)
    # The files hold classes and their names as well.
    key = {
        "files": digest(file_digests(path, table.folder, table.names, cache, on_progress)),
        "transform": PICTURE_TRANSFORM,
        "image_size": image_size,
    }

    def make_rows(start: int, stop: int) -> np.ndarray:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            rows = table.pictures(start, stop)
            found = pool.map(lambda row: read_square(io.BytesIO(row[1]), row[0], image_size), rows)
            return np.stack(list(found))

    shape = (image_size, image_size, 3)
    images = caches.build(
        caches.entry(cache, "images", key), key, len(table.labels), shape, np.uint8, make_rows, on_progress
    )
    return ImageSet(images=images, labels=table.labels, class_names=table.class_names, digest=digest(key))


# -- the rows ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ImageTable:
    """The rows of all files, one after another."""

    folder: Path
    names: tuple[str, ...]
    """Files, sorted; relative to the folder."""
    picture: str
    """Column of the pictures."""
    labels: np.ndarray
    """int64 [M]."""
    class_names: tuple[str, ...]
    groups: tuple[tuple[int, str, int], ...]
    """First row, file and number of every row group."""
    _read: dict[tuple[str, int], Any] = field(default_factory=dict, repr=False, compare=False)
    """Pictures of the row group that was begun last: groups have more rows than are asked for at once."""

    def pictures(self, start: int, stop: int) -> Iterator[tuple[str, bytes]]:
        """Where each of the rows start ... stop - 1 lies, and its encoded picture."""
        for index, (first, name, number) in enumerate(self.groups):
            end = self.groups[index + 1][0] if index + 1 < len(self.groups) else len(self.labels)
            if end <= start or first >= stop:
                continue
            path = self.folder / name
            try:
                cells = self._cells(name, number)
                inside = range(max(start, first) - first, min(stop, end) - first)
                rows = [(cells[row].as_py() or {}).get("bytes") for row in inside]
            except (OSError, ValueError) as error:
                raise _broken(path, error) from None
            for row, content in zip(inside, rows, strict=True):
                if not content:
                    raise UserError(
                        f"data.path: row {first + row} of {self.folder} holds no picture: replace the files"
                    )
                yield f"{path} row {row} of group {number}", content
            if stop >= end:
                self._read.clear()

    def _cells(self, name: str, number: int) -> Any:
        """Pictures of one row group, read once for all its rows where they are asked for one after another."""
        if (name, number) not in self._read:
            self._read.clear()
            with _pyarrow().ParquetFile(self.folder / name) as file:
                self._read[name, number] = file.read_row_group(number, columns=[self.picture]).column(0)
        return self._read[name, number]


# -- where the files are ----------------------------------------------------------------------------------------------


def locate(path: str, on_progress: OnProgress | None = None) -> Path:
    """What `data.path` names, as `find_files` takes it; a part of a data set on the hub is fetched if it is not here.

    A folder here wins over a name on the hub.

    Raises:
        UserError: the hub has no such part, has several, or cannot be asked.
    """
    named = HUB_NAME.fullmatch(path)
    if not named or Path(Path(path).parts[0]).is_dir():
        return Path(path)
    dataset, part = named[1], named[2].removeprefix("/")
    kept = _in_cache(dataset, part)
    if kept is not None:
        return kept
    if hub.is_offline():
        raise UserError(
            f"data.path: {path} is no folder here, and not whole in {hub.cache_of(dataset)}, where the hub's files are "
            "kept (HF_HOME moves it): run once without --offline, or name a folder of parquet files"
        )
    try:
        listing = hub.list_files(dataset)
        place, files = choose(dataset, part, list(listing.sizes))
        return hub.fetch_all(dataset, listing, files, on_progress) / place
    except hub.Unavailable as error:
        raise UserError(
            f"data.path: {path} is no folder here, and {error}; or name a folder of parquet files"
        ) from None


def _in_cache(dataset: str, part: str) -> Path | None:
    """A part of a data set that was fetched before, and is taken as it was then."""
    names = hub.known_files(dataset)
    if not names:
        return None
    try:
        place, files = choose(dataset, part, names)
    except UserError:
        if hub.is_offline():
            raise
        return None  # the hub may have more than it had then
    folder = hub.find_all(dataset, files)
    return folder / place if folder else None


def choose(dataset: str, part: str, names: Sequence[str]) -> tuple[str, list[str]]:
    """Which files of a repository are meant: what `find_files` takes, relative to the repository, and their names.

    Args:
        dataset: its name, for messages.
        part: `train`, or with a folder before it `plain_text/train`, or a folder; "" = all there is.
        names: of all files in the repository.
    """
    parts: dict[str, list[str]] = {}
    for name in sorted(name for name in names if name.endswith(".parquet")):
        parts.setdefault(_part_of(name), []).append(name)
    if not parts:
        raise UserError(
            f"data.path: {dataset} keeps no parquet files on the hub (a script or plain images): run `hf download "
            f"{dataset} --repo-type dataset --local-dir FOLDER`, with `--revision refs/convert/parquet` where its page "
            "shows that branch, and name FOLDER (with data.name imagefolder where it holds class folders)"
        )
    meant = [place for place in parts if not part or f"/{place.removesuffix('.parquet')}".endswith(f"/{part}")]
    meant = meant or [place for place in parts if place.startswith(f"{part}/")]
    if len(meant) != 1:
        example = f"{dataset}/{min(meant or parts)}"
        raise UserError(
            f"data.path: {dataset} has {'the parts' if meant else f'no part {part}, but'} {', '.join(meant or parts)}: "
            f"give one of them, as {example}"
        )
    return meant[0], parts[meant[0]]


def _part_of(name: str) -> str:
    """The part that a file is of: `data/train` of `data/train-00000-of-00002.parquet`, `data/train` of
    `data/train/0000.parquet`, and `data/train.parquet` of itself."""
    path = PurePosixPath(name)
    prefix = _prefix(path.name)
    if prefix:
        return str(path.with_name(prefix))
    return str(path.parent) if path.stem.replace("-of-", "").isdigit() else name


def _prefix(file: str) -> str:
    """`train` of `train-00000-of-00002.parquet`; "" for files that are not numbered so."""
    return file.rpartition("-of-")[0].rpartition("-")[0]


def find_files(path: Path) -> tuple[Path, list[str]]:
    """Folder and names of the files: of a folder, one file, or `folder/train` for the files `folder/train-*`."""
    if path.is_dir():
        folder, found = path, sorted(path.rglob("*.parquet"))
    else:
        numbered = [
            file for file in path.parent.glob(f"{path.name}-*.parquet") if _prefix(file.name) in ("", path.name)
        ]
        folder, found = path.parent, [path] if path.is_file() else sorted(numbered)
    if not found:
        raise UserError(
            f"data.path: {path} names no parquet files: give their folder, folder/train for train-*, or a data set on "
            "the hub such as uoft-cs/cifar10/train"
        )
    names = [file.relative_to(folder).as_posix() for file in found]
    parts = {part for name in names if (part := _part_of(name)) != name}
    if len(parts) > 1:
        raise UserError(
            f"data.path: {path} holds the parts {', '.join(sorted(parts))}: give one of them, as {path / min(parts)}"
        )
    return folder, names


# -- what is in them --------------------------------------------------------------------------------------------------


def open_table(path: Path) -> ImageTable:
    """Read everything but the pictures; `UserError` names what is not as described above."""
    pyarrow, (folder, names) = _pyarrow(), find_files(path)
    labels: list[np.ndarray] = []
    groups: list[tuple[int, str, int]] = []
    first = 0
    picture = label = ""
    class_names: tuple[str, ...] = ()
    for name in names:
        try:
            with pyarrow.ParquetFile(folder / name) as file:
                if not groups:
                    picture, label, class_names = _columns(file.schema_arrow, folder / name)
                labels.append(file.read(columns=[label]).column(0).to_numpy())
                for number in range(file.num_row_groups):
                    groups.append((first, name, number))
                    first += file.metadata.row_group(number).num_rows
        except (OSError, ValueError, KeyError) as error:
            raise _broken(folder / name, error) from None
    joined = np.concatenate(labels)
    if joined.dtype.kind not in "iu" or len(joined) == 0 or joined.min() < 0:
        raise UserError(f"data.path: column {label} of {path} holds rows without a class: leave them out of the files")
    class_names = class_names or tuple(str(number) for number in range(int(joined.max()) + 1))
    if joined.max() >= len(class_names):
        raise UserError(f"data.path: {path} has class {joined.max()} and names of {len(class_names)}: mend the files")
    return ImageTable(folder, tuple(names), picture, joined.astype(np.int64), class_names, tuple(groups))


def _columns(schema: Any, path: Path) -> tuple[str, str, tuple[str, ...]]:
    """The columns of pictures and of classes, and the classes' names where the file has them."""
    features = _features(schema)
    pictures = [name for name, kind in zip(schema.names, schema.types, strict=True) if "bytes" in _fields(kind)]
    classes = [name for name, feature in features.items() if feature.get("_type") == "ClassLabel"]
    classes = classes or [name for name in ("label", "labels") if name in schema.names]
    if len(pictures) != 1 or len(classes) != 1:
        raise UserError(
            f"data.path: {path} has the columns {', '.join(schema.names)}: wanted are one of pictures (bytes and path) "
            "and one of classes (ClassLabel, or named label)"
        )
    return pictures[0], classes[0], tuple(str(name) for name in features.get(classes[0], {}).get("names", ()))


def _features(schema: Any) -> dict[str, dict[str, Any]]:
    """What the `datasets` package wrote of the columns; empty where something else wrote the file."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {name: feature for name, feature in features.items() if isinstance(feature, dict)}
    except (KeyError, ValueError, TypeError, AttributeError):
        return {}


def _fields(kind: Any) -> list[str]:
    return [kind.field(index).name for index in range(kind.num_fields)]


def _broken(path: Path, error: Exception) -> UserError:
    reason = (str(error) or type(error).__name__).splitlines()[0]
    return UserError(f"data.path: cannot read {path} ({reason}): replace it")


def _pyarrow() -> Any:
    try:
        from pyarrow import parquet  # here, because it takes half a second
    except ImportError:
        raise UserError("data.name is parquet, which needs pyarrow: pip install 'ditbench[hf]'") from None
    return parquet
