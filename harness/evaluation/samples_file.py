"""Generated images on disk: written one chunk after another, so that memory stays flat, and read without copying.

The .npz is what the evaluator of OpenAI's ADM reads (openai/guided-diffusion evaluations/evaluator.py and
scripts/image_sample.py): `arr_0`, uint8 [N, H, W, 3], and `arr_1`, the labels; members are stored, not compressed.

Until all images are there, they lie under a hidden name that holds the digest of their recipe. The same command finds
what a killed one left behind and goes on; another recipe never does.

Shapes: N images, H W image height and width in pixels.
"""

import contextlib
import os
import shutil
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, Protocol

import numpy as np
from PIL import Image

from harness.data.pictures import to_rgb
from harness.errors import UserError
from harness.records.files import digest, file_digest, storing, sync_path, sync_tree
from harness.records.locks import locked

IMAGES, LABELS = "arr_0", "arr_1"
"""Names of the members, as `numpy.savez(path, images, labels)` gives them."""
COPY_BYTES = 2**24
"""Copied at once."""


# -- writing --------------------------------------------------------------------------------------------------------


class Writer(Protocol):
    """Takes images in their order. What `finish` has not yet put in its place can be continued."""

    @property
    def done(self) -> int:
        """Images that an earlier process wrote: whole chunks of them."""

    def add(self, images_NHWC: np.ndarray) -> None:
        """Write the next images, uint8 [N, H, W, 3]."""

    def finish(self, labels_N: np.ndarray) -> None:
        """Put all that was written in its place; the labels, int64 [N], go where the format has room for them."""


@dataclass(frozen=True, kw_only=True)
class Destination:
    """Where images go, and what they are."""

    out: Path
    """A .npz file, or a folder of PNG files 000000.png, ..."""
    is_npz: bool
    num: int
    """N."""
    side: int
    """H and W."""
    chunk: int
    """Images generated together: an interrupted writer goes on at the start of a chunk."""
    recipe: Mapping[str, Any]
    """All that decides the images."""

    @contextlib.contextmanager
    def writer(self) -> Iterator[Writer]:
        """A writer that goes on where an interrupted one of this recipe stopped. `out` is there after `finish` alone.

        Raises:
            UserError: when `out` is there already, when its folder cannot be written to, or has too little room.
            StorageError: when the disk takes no more; what it has is kept for the next try.
        """
        out = self.out
        with contextlib.ExitStack() as held:
            try:
                held.enter_context(locked(out.with_name(f".{out.name}.lock")))
            except OSError as error:
                reason = error.strerror
                raise UserError(f"--out: cannot write to {out} ({reason}): name a place you may write to") from None
            if out.exists():
                raise UserError(f"--out {out} exists already: name another place")
            part = out.with_name(f".{out.name}.{digest(self.recipe)[:12]}.part")
            yield NpzWriter(self, part) if self.is_npz else FolderWriter(self, part)


class NpzWriter:
    """Images go into a file of plain rows, from which the .npz is made at the end."""

    def __init__(self, to: Destination, part: Path) -> None:
        self._to, self._part, self._row = to, part, (to.side, to.side, 3)
        row_bytes = to.side * to.side * 3
        there = part.stat().st_size if part.exists() else 0
        self.done = there // row_bytes // to.chunk * to.chunk
        _check_room(to.out, (2 * to.num - self.done) * row_bytes)
        with storing(part), part.open("ab") as file:
            file.truncate(self.done * row_bytes)

    def add(self, images_NHWC: np.ndarray) -> None:
        assert images_NHWC.shape[1:] == self._row and images_NHWC.dtype == np.uint8, images_NHWC.shape
        with storing(self._part), self._part.open("ab") as file:
            file.write(np.ascontiguousarray(images_NHWC).data)
            file.flush()
            os.fsync(file.fileno())

    def finish(self, labels_N: np.ndarray) -> None:
        temporary = self._to.out.with_name(f".{self._to.out.name}.tmp")
        with storing(self._to.out):
            try:
                with zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as file:
                    shape = (self._to.num, *self._row)
                    with _member(file, IMAGES, np.uint8, shape) as member, self._part.open("rb") as rows:
                        shutil.copyfileobj(rows, member, COPY_BYTES)
                    with _member(file, LABELS, np.int64, labels_N.shape) as member:
                        member.write(labels_N.astype(np.int64).tobytes())
                sync_path(temporary)
                temporary.replace(self._to.out)
            finally:
                temporary.unlink(missing_ok=True)
            self._part.unlink()


class FolderWriter:
    """One PNG file an image, in a hidden folder that gets its name at the end."""

    def __init__(self, to: Destination, part: Path) -> None:
        self._out, self._part = to.out, part
        with storing(part):
            part.mkdir(exist_ok=True)
        # A file is renamed to its name once it is whole.
        self.done = len(list(part.glob("[0-9]*.png"))) // to.chunk * to.chunk
        self._next = self.done

    def add(self, images_NHWC: np.ndarray) -> None:
        with storing(self._part):
            for image in images_NHWC:
                temporary = self._part / ".next.png"
                Image.fromarray(image).save(temporary)
                temporary.replace(self._part / f"{self._next:06d}.png")
                self._next += 1

    def finish(self, labels_N: np.ndarray) -> None:
        with storing(self._out):
            sync_tree(self._part)
            self._part.rename(self._out)


@contextlib.contextmanager
def _member(file: zipfile.ZipFile, name: str, dtype: type[np.generic], shape: tuple[int, ...]) -> Iterator[IO[bytes]]:
    """A member of a .npz that waits for an array's bytes. It has no date, so that equal arrays make equal files."""
    with file.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as member:
        header = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(member, header)
        yield member


def _check_room(out: Path, num_bytes: int) -> None:
    """Refuse what the disk has no room for: while the .npz is made, the images are there twice."""
    free = shutil.disk_usage(out.parent).free
    if num_bytes > free:
        raise UserError(
            f"--out {out} needs {num_bytes / 1e9:.1f} GB while it is made and the disk has {free / 1e9:.1f} GB left: "
            "make room, name another place or lower --num"
        )


# -- reading --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class StoredSamples:
    """Images on the disk, read one at a time."""

    num: int
    get: Callable[[int], np.ndarray]
    """Image i, uint8 [H, W, 3]; all have one size."""
    labels_N: np.ndarray | None
    """int64, where the file has them."""
    digest: str
    """Changes with any number in the file, or with any file of a folder."""


def read_images(path: Path, key: str) -> StoredSamples:
    """Open a .npz in ADM's layout, or a folder of PNG files, which count in the order of their paths.

    Args:
        path: of the file or folder.
        key: of the config or command line, for error messages.

    Raises:
        UserError: when there are no images, or they are of another type or of several sizes.
    """
    if path.is_dir():
        return _read_folder(path, key)
    images, labels = read_array(path, IMAGES, key), read_array(path, LABELS, key)
    if images is None:
        raise UserError(f"{key}: {path} has no array {IMAGES}: give a .npz in ADM's layout")
    ok = images.dtype == np.uint8 and images.ndim == 4 and images.shape[-1] == 3 and min(images.shape) > 0
    if not ok:
        found = f"{images.dtype.name} {list(images.shape)}"
        raise UserError(f"{key}: {IMAGES} of {path} is {found}: it must be uint8 [N, H, W, 3]")
    has_labels = labels is not None and labels.shape == images.shape[:1] and labels.dtype.kind in "iu"
    return StoredSamples(
        num=len(images),
        get=lambda i: np.asarray(images[i]),
        labels_N=np.asarray(labels, dtype=np.int64) if has_labels else None,
        digest=file_digest(path),
    )


def read_array(path: Path, name: str, key: str) -> np.ndarray | None:
    """An array of a .npz, mapped from the disk where it is stored plainly; None where there is none of that name."""
    try:
        with zipfile.ZipFile(path) as file:
            if f"{name}.npy" not in file.namelist():
                return None
            info = file.getinfo(f"{name}.npy")
        return _mapped(path, info) if info.compress_type == zipfile.ZIP_STORED else _unpacked(path, name)
    except FileNotFoundError:
        raise UserError(f"{key}: {path} is not there: name a .npz file or a folder of images") from None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{key}: {path} is not a .npz of plain arrays ({reason}): replace it") from error


def _mapped(path: Path, info: zipfile.ZipInfo) -> np.ndarray:
    """The array of a stored member, mapped from the disk."""
    with path.open("rb") as file:
        file.seek(info.header_offset + 26)
        file.seek(info.header_offset + 30 + sum(struct.unpack("<HH", file.read(4))))  # past the name and extra fields
        version = np.lib.format.read_magic(file)
        read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        if version not in read_header:
            raise ValueError(f"array format {version} is not known")
        shape, fortran, dtype = read_header[version](file)
        if dtype.hasobject:
            raise ValueError("it holds Python objects")
        order: Literal["C", "F"] = "F" if fortran else "C"
        return np.memmap(path, dtype, "r", file.tell(), shape, order)


def _unpacked(path: Path, name: str) -> np.ndarray:
    with np.load(path, allow_pickle=False) as arrays:
        return arrays[name]


def _read_folder(root: Path, key: str) -> StoredSamples:
    files = sorted(path for path in root.rglob("*.png") if not path.name.startswith("."))
    if not files:
        raise UserError(f"{key}: {root} holds no PNG files: name a folder of them, or a .npz in ADM's layout")
    size = _read_png(files[0], key).shape

    def get(index: int) -> np.ndarray:
        image = _read_png(files[index], key)
        if image.shape != size:
            raise UserError(f"{key}: {files[index]} is not of the size of {files[0]}: give images of one size")
        return image

    content = [[path.relative_to(root).as_posix(), file_digest(path)] for path in files]
    return StoredSamples(num=len(files), get=get, labels_N=None, digest=digest(content))


def _read_png(path: Path, key: str) -> np.ndarray:
    """uint8 [H, W, 3]."""
    try:
        with Image.open(path) as image:
            return np.asarray(to_rgb(image))
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, struct.error, ... on broken files
        raise UserError(f"{key}: cannot read image {path} ({error}): replace or remove it") from error
