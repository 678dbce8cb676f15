"""Images and labels, read once into uint8 arrays, and their split into a training and a held-out half.

No augmentation, no flips: image i is the same square of uint8 numbers in every run.
Shapes: M images in all, H W image height and width in pixels.
"""

import contextlib
import hashlib
import io
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

from harness import cache as caches
from harness import parquet, preprocessed
from harness.cache import Report, Rows
from harness.config import DataConfig
from harness.errors import UserError
from harness.memory import check_images
from harness.preprocessed import Archive, Stored
from harness.records import digest, file_digest
from harness.rng import stream

EXTENSIONS = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
"""Endings of image files, in lower case; other files are passed over."""
FILES_QUEUED = 1024
"""Files that wait for a thread to read them; one takes 2 kB in the queue."""
NUM_DIGITS = 1797
FOLDER_TRANSFORM = "exif, white under alpha, RGB, box halving, bicubic short side, centre crop"
"""What `read_image` does; part of the data's digest, so change it when the pixels change."""
DIGITS_TRANSFORM = "0..16 to 0..255, bicubic, RGB"
"""What `_digits` does; part of the data's digest."""
STORED_TRANSFORM = "as stored, RGB"
"""What is done to preprocessed images; part of the data's digest."""


@dataclass(frozen=True)
class ImageSet:
    """All images of a data set, in a fixed order."""

    images: np.ndarray | Rows
    """uint8 [M, H, W, 3], in memory or on the disk."""
    labels: np.ndarray
    """int64 [M]."""
    class_names: tuple[str, ...]
    digest: str
    """Changes when any file, its name or the transform changes."""
    moments: Rows | None = None
    """Posterior moments that came with the images, cat(mean, std) float32 [M, 2C, h, w]."""

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def rows(self, indices: np.ndarray) -> np.ndarray:
        """Images in the order of `indices`, uint8 [len(indices), H, W, 3]."""
        if isinstance(self.images, np.ndarray):
            return self.images[np.asarray(indices, dtype=np.int64)]
        return self.images.rows(indices)


@dataclass(frozen=True, kw_only=True)
class Outline:
    """What the names of a data set's files say."""

    num_images: int
    num_classes: int
    is_cached: bool
    """Whether images are kept in a cache, as they are resized; others are read where they are."""
    has_moments: bool
    """Whether posterior moments came with them."""


def outline(config: DataConfig, report: Report | None = None) -> Outline:
    """Look at the data set without reading an image; `UserError` names a bad path.

    A data set that is named by its id on the hub is fetched first, which `report` is told of.
    """
    if config.name == "digits":
        return Outline(num_images=NUM_DIGITS, num_classes=10, is_cached=False, has_moments=False)
    if config.name == "preprocessed":
        pictures_at, moments_at = preprocessed.locate(Path(config.path), config.latents)
        pictures = Archive.open(pictures_at, EXTENSIONS)
        moments = None if moments_at is None else Archive.open(moments_at, frozenset({".npy"}))
        labels = preprocessed.labels_of(pictures, moments)
        return Outline(
            num_images=len(labels),
            num_classes=int(labels.max()) + 1,
            is_cached=False,
            has_moments=moments is not None,
        )
    if config.name == "parquet":
        table = parquet.open_table(parquet.locate(config.path, report))
        num_classes = len(table.class_names)
        return Outline(num_images=len(table.labels), num_classes=num_classes, is_cached=True, has_moments=False)
    root = Path(config.path)
    classes = _find_classes(root)
    num_images = sum(len(_find_images(root, name)) for name in classes)
    return Outline(num_images=num_images, num_classes=len(classes), is_cached=True, has_moments=False)


def load_images(config: DataConfig, cache: Path, report: Report | None = None) -> ImageSet:
    """Read the images that `config` names, through the cache; `UserError` names a bad path or image."""
    if config.name == "digits":
        return _digits(config.image_size)
    if config.name == "preprocessed":
        return _preprocessed(config, cache, report)
    if config.name == "parquet":
        return _parquet(parquet.locate(config.path, report), config.image_size, cache, report)
    return _image_folder(Path(config.path), config.image_size, cache, report)


def split(num_images: int, holdout: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the training and of the held-out images, both sorted int64; training gets the larger half.

    Args:
        num_images: M.
        holdout: share of held-out images, rounded down to whole images.
        seed: of the split; training seeds do not change it.
    """
    # The small number keeps products such as 100 * 0.29 = 28.999... from losing an image.
    num_holdout = int(num_images * holdout + 1e-9)
    if not 0 < num_holdout < num_images:
        raise UserError(
            f"data.holdout is {holdout}: of {num_images} images it leaves {num_images - num_holdout} to train on and "
            f"{num_holdout} held out; both must be 1 or more"
        )
    order = torch.randperm(num_images, generator=stream(seed, "split")).numpy()
    return np.sort(order[num_holdout:]), np.sort(order[:num_holdout])


# -- digits ---------------------------------------------------------------------------------------------------------


def _digits(image_size: int) -> ImageSet:
    """scikit-learn's 1,797 8x8 digits, values 0..16, enlarged to image_size."""
    from sklearn.datasets import load_digits  # here, because importing scikit-learn takes a second

    source = load_digits()
    check_images(len(source.images), image_size)
    small = np.round(source.images * (255 / 16)).astype(np.uint8)
    side = (image_size, image_size)
    grey = np.stack([np.asarray(Image.fromarray(image).resize(side, Image.Resampling.BICUBIC)) for image in small])
    labels = source.target.astype(np.int64)
    content = hashlib.sha256(source.images.tobytes() + labels.tobytes()).hexdigest()
    return ImageSet(
        images=np.repeat(grey[..., None], 3, axis=3),
        labels=labels,
        class_names=tuple(str(name) for name in source.target_names),
        digest=digest({"content": content, "transform": DIGITS_TRANSFORM, "image_size": image_size}),
    )


# -- what the tools of EDM2 and REPA write ---------------------------------------------------------------------------


def _preprocessed(config: DataConfig, cache: Path, report: Report | None) -> ImageSet:
    pictures_at, moments_at = preprocessed.locate(Path(config.path), config.latents)
    pictures = Archive.open(pictures_at, EXTENSIONS)
    archives, moments = [pictures], None
    if moments_at is not None:
        archives.append(Archive.open(moments_at, frozenset({".npy"})))
        preprocessed.check_pairs(*archives)
    labels = preprocessed.labels_of(pictures, archives[1] if moments_at else None)
    contents = [_file_digests(a.root, a.folder, a.files, cache, report) for a in archives]
    images = Stored(pictures, preprocessed.decode_image, contents[0])
    if images.shape[1] != config.image_size:
        raise UserError(
            f"data.image_size is {config.image_size}: the images in {pictures_at} are read as they are, "
            f"so give {images.shape[1]}"
        )
    if moments_at is not None:
        moments = Stored(archives[1], preprocessed.decode_moments, contents[1])
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
                "transform": STORED_TRANSFORM,
            }
        ),
        moments=moments,
    )


# -- data sets of Hugging Face --------------------------------------------------------------------------------------


def _parquet(path: Path, image_size: int, cache: Path, report: Report | None) -> ImageSet:
    table = parquet.open_table(path)
    # The files hold classes and their names as well.
    key = {
        "files": digest(_file_digests(path, table.folder, table.names, cache, report)),
        "transform": FOLDER_TRANSFORM,
        "image_size": image_size,
    }

    def make_rows(start: int, stop: int) -> np.ndarray:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            found = pool.map(lambda row: _squared(io.BytesIO(row[1]), row[0], image_size), table.pictures(start, stop))
            return np.stack(list(found))

    shape = (image_size, image_size, 3)
    images = caches.build(
        caches.entry(cache, "images", key), key, len(table.labels), shape, np.uint8, make_rows, report
    )
    return ImageSet(images=images, labels=table.labels, class_names=table.class_names, digest=digest(key))


# -- a folder of class folders --------------------------------------------------------------------------------------


def _image_folder(root: Path, image_size: int, cache: Path, report: Report | None) -> ImageSet:
    classes = _find_classes(root)
    files = [(label, path) for label, name in enumerate(classes) for path in _find_images(root, name)]
    names = [path for _, path in files]
    key = {
        "files": digest(_file_digests(root, root, names, cache, report)),
        "transform": FOLDER_TRANSFORM,
        "image_size": image_size,
    }

    def make_rows(start: int, stop: int) -> np.ndarray:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            return np.stack(list(pool.map(lambda name: read_image(root / name, image_size), names[start:stop])))

    shape = (image_size, image_size, 3)
    images = caches.build(caches.entry(cache, "images", key), key, len(names), shape, np.uint8, make_rows, report)
    return ImageSet(
        images=images,
        labels=np.array([label for label, _ in files], dtype=np.int64),
        class_names=tuple(classes),
        digest=digest(key),
    )


def _find_classes(root: Path) -> list[str]:
    """Names of the class folders, sorted; hidden ones are passed over."""
    if not root.is_dir():
        raise UserError(f"data.path: {root} is not a folder: name a folder that holds one folder of images a class")
    with _reading(root):
        classes = sorted(path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not classes:
        raise UserError(
            f"data.path: {root} has no class folders: put the images of each class into a folder of its own"
        )
    return classes


def _find_images(root: Path, name: str) -> list[str]:
    """Paths of a class's images at any depth, relative to `root` with forward slashes, sorted."""
    found = []
    for folder, inner, files in os.walk(root / name):
        inner[:] = [entry for entry in inner if not entry.startswith(".")]
        for file in files:
            if not file.startswith(".") and Path(file).suffix.lower() in EXTENSIONS:
                found.append((Path(folder) / file).relative_to(root).as_posix())
    if not found:
        raise UserError(
            f"data.path: class folder {root / name} has no images ({', '.join(sorted(EXTENSIONS))}): "
            "add some or remove the folder"
        )
    return sorted(found)


def _file_digests(whole: Path, root: Path, names: Sequence[str], cache: Path, report: Report | None) -> list[list[Any]]:
    """[path relative to `root`, size, SHA-256 of the content] of every file of the data set at `whole`.

    Contents are read once; a file whose size and modification time are as before keeps its stored digest. Of several
    processes that need the list at once one reads, while the others wait.
    """
    listing = cache / f"files-{digest(str(whole.resolve()))[:12]}.json"
    states = {name: _file_state(root / name) for name in names}
    stored = _stored_digests(listing, report)
    if _changed(states, stored):
        with caches.holding(listing.with_suffix(".lock"), waits=True):
            stored = _stored_digests(listing, None)
            if changed := _changed(states, stored):
                shas = {name: state[2] for name, state in stored.items()}
                shas |= _read_all(root, [name for name in changed if name in states], report)
                stored = {name: [*states[name], shas[name]] for name in names}
                caches.write_long(listing, [[name, *state] for name, state in stored.items()])
    return [[name, stored[name][0], stored[name][2]] for name in names]


def _stored_digests(listing: Path, report: Report | None) -> dict[str, list[Any]]:
    """Size, modification time and SHA-256 by path."""
    return {name: state for name, *state in caches.read_small(listing, report) or []}


def _changed(states: dict[str, list[int]], stored: dict[str, list[Any]]) -> list[str]:
    """Files that are not in the list as they are now, or are there no more."""
    changed = [name for name, state in states.items() if name not in stored or stored[name][:2] != state]
    return changed + [name for name in stored if name not in states]


def _read_all(root: Path, names: list[str], report: Report | None) -> dict[str, str]:
    """SHA-256 of files by path, read by as many threads as there are cores."""

    def read(name: str) -> str:
        with _reading(root / name):
            return file_digest(root / name)

    shas: dict[str, str] = {}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for first in range(0, len(names), FILES_QUEUED):
            together = names[first : first + FILES_QUEUED]
            for name, sha in zip(together, pool.map(read, together), strict=True):
                shas[name] = sha
                if report is not None:
                    report("reading files", len(shas), len(names))
    return shas


def _file_state(path: Path) -> list[int]:
    """Size in bytes and modification time in ns."""
    with _reading(path):
        state = path.stat()
    return [state.st_size, state.st_mtime_ns]


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn a file or folder that the system will not read into a `UserError` that names it."""
    try:
        yield
    except OSError as error:
        raise UserError(f"data.path: cannot read {path} ({error.strerror}): make it readable or remove it") from None


def read_image(path: Path, image_size: int) -> np.ndarray:
    """One image file as uint8 [image_size, image_size, 3]; `UserError` names a file that cannot be read."""
    return _squared(path, str(path), image_size)


def _squared(file: Path | io.BytesIO, place: str, image_size: int) -> np.ndarray:
    """An encoded picture that lies at `place`, as `read_image` gives it."""
    try:
        with Image.open(file) as image:
            rgb = to_rgb(ImageOps.exif_transpose(image))
            return np.asarray(centre_crop(rgb, image_size))
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, struct.error, ... on broken files
        raise UserError(f"data.path: cannot read image {place} ({error}): replace or remove it") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode to RGB: alpha is composited on white, 16-bit grey is scaled to 8 bits."""
    if image.mode.startswith("I"):
        return _from_16_bits(image).convert("RGB")
    if image.mode == "F":
        raise ValueError("floating-point pixels have no defined range: convert it to 8 or 16 bits")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def _from_16_bits(image: Image.Image) -> Image.Image:
    """0..65535 to 0..255, rounded; Pillow's own conversion cuts everything above 255 off."""
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError(f"grey values {values.min()} to {values.max()} do not fit 16 bits")
    return Image.fromarray(np.round(values / 257).astype(np.uint8))


def centre_crop(image: Image.Image, image_size: int) -> Image.Image:
    """Resize the short side to image_size and crop the centre square (openai/guided-diffusion image_datasets.py).

    Halving with a box filter while the short side is at least twice too long, then bicubic.
    """
    while min(image.size) >= 2 * image_size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = image_size / min(image.size)
    size = (round(image.width * scale), round(image.height * scale))
    image = image.resize(size, Image.Resampling.BICUBIC)
    left, top = (image.width - image_size) // 2, (image.height - image_size) // 2
    return image.crop((left, top, left + image_size, top + image_size))
