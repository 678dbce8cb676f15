"""The preprocessed layout of the EDM2 and REPA tools, read in place: nothing is copied and nothing encoded again.

Images: a folder or zip of `00000/img00000000.png`, ... with `dataset.json`, `{"labels": [[name, class], ...]}`.
Posterior moments: a folder or zip of `00000/img-mean-std-00000000.npy`, ... with a `dataset.json` of its own. Each
file holds cat(mean, **std**) of one image, float32 [2C, h, w] (sihyun-yu/REPA preprocessing/encoders.py:77-79), which
is what our caches hold. REPA keeps them side by side as `images` and `vae-sd` (dataset.py:22-23).

Shapes: M images in all, N images asked for, H W image height and width, C latent channels, h w latent height and width.
"""

import hashlib
import io
import json
import os
import re
import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image

from harness.config import DataConfig
from harness.data.file_digests import file_digests
from harness.data.image_set import ImageSet, Outline
from harness.data.pictures import EXTENSIONS
from harness.errors import UserError
from harness.machine.progress import OnProgress
from harness.records.files import digest, file_digest

LABELS = "dataset.json"
IMAGES, MOMENTS = "images", "vae-sd"
"""Names of the two parts in one folder, as REPA wants them; each may be a zip of that name."""
MAX_CLASSES = 2**20
"""Labels above are taken for an error: each class has a row in the backbone's label table."""
MAX_MEMBER_BYTES = 2**30
"""Most bytes of one file in a zip: a few bytes of a zip may unpack to more than the memory there is."""
READERS = 8
"""Threads that read and decode files of one batch."""
MOMENTS_EXTENSIONS = frozenset({".npy"})
"""Endings of files of moments."""
TRANSFORM = "as stored, RGB"
"""What is done to preprocessed images; part of the data's digest."""


def outline(config: DataConfig, on_progress: OnProgress | None) -> Outline:
    """List the files and read their labels; no image is opened."""
    pictures_at, moments_at = locate(Path(config.path), config.latents)
    pictures = Archive.open(pictures_at, EXTENSIONS)
    moments = None if moments_at is None else Archive.open(moments_at, MOMENTS_EXTENSIONS)
    labels = labels_of(pictures, moments)
    return Outline(
        num_images=len(labels), num_classes=int(labels.max()) + 1, is_cached=False, has_moments=moments is not None
    )


def load(config: DataConfig, cache: Path, on_progress: OnProgress | None) -> ImageSet:
    """Open images and moments where they are."""
    pictures_at, moments_at = locate(Path(config.path), config.latents)
    pictures = Archive.open(pictures_at, EXTENSIONS)
    archives, moments = [pictures], None
    if moments_at is not None:
        archives.append(Archive.open(moments_at, MOMENTS_EXTENSIONS))
        check_pairs(*archives)
    labels = labels_of(pictures, archives[1] if moments_at else None)
    contents = [file_digests(a.root, a.folder, a.files, cache, on_progress) for a in archives]
    images = Stored(pictures, decode_image, contents[0])
    if images.shape[1] != config.image_size:
        raise UserError(
            f"data.image_size is {config.image_size}: the images in {pictures_at} are read as they are, "
            f"so give {images.shape[1]}"
        )
    if moments_at is not None:
        moments = Stored(archives[1], decode_moments, contents[1])
    return ImageSet(
        images=images,
        labels=labels,
        class_names=tuple(str(number) for number in range(labels.max() + 1)),
        digest=digest(
            {
                # The name of a zip says nothing of what is in it.
                "files": [
                    content[0][1:] if a.is_zip else content for a, content in zip(archives, contents, strict=True)
                ],
                "labels": hashlib.sha256(labels.tobytes()).hexdigest(),
                "transform": TRANSFORM,
            }
        ),
        moments=moments,
    )


# -- files, in a folder or a zip --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Archive:
    """A folder or a zip, and the files in it that count."""

    root: Path
    names: tuple[str, ...]
    """Sorted, with forward slashes, relative to the root."""
    _zips: dict[int, zipfile.ZipFile] = field(default_factory=dict, repr=False, compare=False)
    """The open zip of each process: processes that were forked share one position in the file."""

    @classmethod
    def open(cls, root: Path, suffixes: frozenset[str]) -> "Archive":
        """List the files with these suffixes; hidden ones are passed over. `UserError` names what cannot be read."""
        archive = cls(root, ())
        names = sorted(name for name in archive._all_names() if _counts(name, suffixes))
        if not names:
            raise UserError(
                f"data: {root} holds no files of {', '.join(sorted(suffixes))}: name a folder or zip of them"
            )
        return cls(root, tuple(names), archive._zips)

    def read(self, name: str) -> bytes:
        """Content of one file; `UserError` names a file that cannot be read or whose CRC is wrong."""
        try:
            if self.is_zip:
                if self._zip().getinfo(name).file_size > MAX_MEMBER_BYTES:
                    raise OSError(f"it unpacks to more than {MAX_MEMBER_BYTES // 2**20} MiB")
                return self._zip().read(name)
            return (self.root / name).read_bytes()
        # zipfile raises RuntimeError for a password and NotImplementedError for an unknown compression.
        except (OSError, zipfile.BadZipFile, KeyError, RuntimeError) as error:
            raise UserError(f"data: cannot read {self.root / name} ({error}): replace it") from None

    @property
    def is_zip(self) -> bool:
        return not self.root.is_dir()

    @property
    def files(self) -> list[str]:
        """Files on the disk that hold the content, relative to `folder`."""
        return [self.root.name] if self.is_zip else list(self.names)

    @property
    def folder(self) -> Path:
        return self.root.parent if self.is_zip else self.root

    def labels(self) -> dict[str, int] | None:
        """Class by file name from `dataset.json`; None where there is no such file or it has no labels."""
        there = LABELS in self._zip().namelist() if self.is_zip else (self.root / LABELS).is_file()
        if not there:
            return None
        try:
            pairs = json.loads(self.read(LABELS))["labels"]
            return None if pairs is None else {str(name): _class_number(value) for name, value in pairs}
        except (ValueError, TypeError, KeyError, RecursionError):
            raise UserError(
                f"data: {self.root / LABELS} is not of the form {{'labels': [['00000/img00000000.png', 3], ...]}} "
                f"with classes from 0 to {MAX_CLASSES - 1}: make it again"
            ) from None

    def _all_names(self) -> Iterator[str]:
        if self.is_zip:
            yield from self._zip().namelist()
            return
        for folder, inner, files in os.walk(self.root, followlinks=True):
            inner[:] = [entry for entry in inner if not entry.startswith(".")]
            yield from ((Path(folder) / file).relative_to(self.root).as_posix() for file in files)

    def _zip(self) -> zipfile.ZipFile:
        if os.getpid() not in self._zips:
            try:
                self._zips[os.getpid()] = zipfile.ZipFile(self.root)
            except (OSError, zipfile.BadZipFile) as error:
                raise UserError(f"data: {self.root} is neither a folder nor a zip ({error}): name one") from None
        return self._zips[os.getpid()]


class Stored:
    """An array whose rows are files of an archive, decoded when asked for; read-only."""

    def __init__(
        self,
        archive: Archive,
        decode: Callable[[bytes], np.ndarray],
        content: Sequence[Sequence[Any]],
    ) -> None:
        """Read the first file for the shape.

        Args:
            archive: one file a row.
            decode: makes a row; `ValueError` says what is wrong with a file.
            content: [path, size, SHA-256] of every file of the archive on the disk.
        """
        self.archive, self._decode, self._content = archive, decode, content
        first = self._row(0, None)
        self.shape: tuple[int, ...] = (len(archive.names), *first.shape)
        self.dtype = first.dtype

    def __len__(self) -> int:
        return self.shape[0]

    def rows(self, indices: np.ndarray) -> np.ndarray:
        """Rows in the order of `indices` (int64, 0 ... len - 1), [len(indices), ...]."""
        if len(indices) == 0:
            return np.empty((0, *self.shape[1:]), self.dtype)
        with ThreadPoolExecutor(READERS) as pool:
            return np.stack(list(pool.map(lambda i: self._row(int(i), self.shape[1:]), indices)))

    def verify(self, on_progress: OnProgress | None = None) -> None:
        """Compare every file with its checksum; `UserError` names one that has changed."""
        for done, (name, _, sha256) in enumerate(self._content, 1):
            path = self.archive.folder / name
            try:
                same = file_digest(path) == sha256
            except OSError as error:
                raise UserError(f"data: cannot read {path} ({error.strerror}): replace it") from None
            if not same:
                raise UserError(f"data: {path} is not what it was when it was first read: replace it")
            if on_progress is not None:
                on_progress(f"checking {self.archive.root.name}", done, len(self._content))

    def _row(self, index: int, shape: tuple[int, ...] | None) -> np.ndarray:
        name = self.archive.names[index]
        content = self.archive.read(name)
        try:
            row = self._decode(content)
            if shape is not None and row.shape != shape:
                raise ValueError(f"its shape is {row.shape}, that of the first file {shape}")
            return row
        except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, struct.error, ... on broken files
            raise UserError(f"data: cannot use {self.archive.root / name} ({error}): replace it") from error


def locate(path: Path, latents: str) -> tuple[Path, Path | None]:
    """Where images and moments lie; None for moments that are not there.

    Args:
        path: folder or zip of images, or a folder that holds both parts under REPA's names.
        latents: folder or zip of moments; "" = beside the images, in REPA's layout.
    """
    both = path.is_dir() and _part(path, IMAGES)
    images = _part(path, IMAGES) if both else path
    moments = Path(latents) if latents else _part(path, MOMENTS) if both else None
    for key, part in (("data.path", images), ("data.latents", moments)):
        if part is not None and not part.exists():
            raise UserError(f"{key}: {part} is not there: name a folder or a zip")
    assert images is not None
    return images, moments


def _part(folder: Path, name: str) -> Path | None:
    return next((part for part in (folder / name, folder / f"{name}.zip") if part.exists()), None)


def labels_of(images: Archive, moments: Archive | None) -> np.ndarray:
    """Classes of the images in order, int64 [M]; `UserError` where they are missing or the two parts disagree."""
    found = []
    for archive in filter(None, (moments, images)):
        labels = archive.labels()
        if labels is None:
            continue
        missing = next((name for name in archive.names if name not in labels), None)
        if missing is not None:
            raise UserError(f"data: {archive.root / LABELS} has no label of {missing}: make it again")
        found.append(np.array([labels[name] for name in archive.names], dtype=np.int64))
    if not found:
        raise UserError(f"data: {images.root} has no labels in {LABELS}: name the class of every image there")
    different = np.flatnonzero(found[0] != found[-1])
    if len(different):
        name = images.names[different[0]]
        raise UserError(f"data: the labels of {name} differ between {LABELS} of images and moments: make them again")
    return found[0]


def check_pairs(images: Archive, moments: Archive) -> None:
    """Refuse moments that are not, number by number, those of the images."""
    ours, theirs = ([_number(name) for name in archive.names] for archive in (images, moments))
    if ours != theirs:
        lone = sorted(set(ours) ^ set(theirs)) or ["(their order differs)"]
        raise UserError(
            f"data: {images.root} has {len(ours)} images and {moments.root} moments of {len(theirs)}; "
            f"{lone[0]} is in one of them only: encode all images"
        )


def _number(name: str) -> str:
    """What image and moments have in common: `00000/img00000007.png` and `00000/img-mean-std-00000007.npy`."""
    return str(PurePosixPath(re.sub(r"img-mean-std-(?=[^/]*$)", "img", name)).with_suffix(""))


def _counts(name: str, suffixes: frozenset[str]) -> bool:
    path = PurePosixPath(name)
    return path.suffix.lower() in suffixes and not any(part.startswith(".") for part in path.parts)


def _class_number(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < MAX_CLASSES:
        raise ValueError(value)
    return value


def decode_image(content: bytes) -> np.ndarray:
    """A square picture as uint8 [H, H, 3], as it is: it was cropped and resized when it was stored."""
    with Image.open(io.BytesIO(content)) as image:
        pixels = np.asarray(image.convert("RGB"))
    if pixels.shape[0] != pixels.shape[1]:
        raise ValueError(f"it has {pixels.shape[1]} x {pixels.shape[0]} pixels, which is no square")
    return pixels


def decode_moments(content: bytes) -> np.ndarray:
    """cat(mean, std) as float32 [2C, h, w]."""
    moments = np.lib.format.read_array(io.BytesIO(content), allow_pickle=False)
    if moments.ndim != 3 or moments.shape[0] % 2 or moments.dtype.kind != "f":
        raise ValueError(f"it holds {moments.dtype} {moments.shape}, not the mean and std of one image")
    moments = moments.astype(np.float32)
    if not np.isfinite(moments).all() or (moments[len(moments) // 2 :] < 0).any():
        raise ValueError("its second half holds no standard deviations: mean and std are wanted, not mean and logvar")
    return moments
