"""Image data sets of Hugging Face as they lie on the hub: parquet files with a column of pictures and one of classes.

Read with pyarrow alone. A picture is a struct of `bytes` (the encoded file) and `path`; the names of the classes stand
in the schema's metadata, under `huggingface`.

Shapes: M images in all.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from harness.errors import UserError


@dataclass(frozen=True)
class Table:
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

    def pictures(self, start: int, stop: int) -> Iterator[tuple[str, bytes]]:
        """Where each of the rows start ... stop - 1 lies, and its encoded picture."""
        pyarrow = _pyarrow()
        for index, (first, name, number) in enumerate(self.groups):
            end = self.groups[index + 1][0] if index + 1 < len(self.groups) else len(self.labels)
            if end <= start or first >= stop:
                continue
            path = self.folder / name
            try:
                with pyarrow.ParquetFile(path) as file:
                    cells = file.read_row_group(number, columns=[self.picture]).column(0)
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


def find_files(path: Path) -> tuple[Path, list[str]]:
    """Folder and names of the files: of a folder, one file, or `folder/train` for the files `folder/train-*`."""
    if path.is_dir():
        folder, found = path, sorted(path.rglob("*.parquet"))
    else:
        folder, found = path.parent, [path] if path.is_file() else sorted(path.parent.glob(f"{path.name}-*.parquet"))
    if not found:
        raise UserError(f"data.path: {path} names no parquet files: give their folder, or folder/train for train-*")
    parts = {file.name.rpartition("-of-")[0].rpartition("-")[0] for file in found} - {""}
    if len(parts) > 1:
        raise UserError(
            f"data.path: {path} holds the parts {', '.join(sorted(parts))}: give one of them, as {path / min(parts)}"
        )
    return folder, [file.relative_to(folder).as_posix() for file in found]


def open_table(path: Path) -> Table:
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
    return Table(folder, tuple(names), picture, joined.astype(np.int64), class_names, tuple(groups))


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
