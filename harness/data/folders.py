"""Images in a folder that holds one folder a class."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from harness.config import DataConfig
from harness.data import cache as caches
from harness.data.file_digests import file_digests, reading
from harness.data.image_set import ImageSet, Outline
from harness.data.pictures import EXTENSIONS, PICTURE_TRANSFORM, read_image
from harness.errors import UserError
from harness.machine.progress import OnProgress
from harness.records.files import digest


def outline(config: DataConfig, on_progress: OnProgress | None) -> Outline:
    """Count classes and files; no image is opened."""
    root = Path(config.path)
    classes = _find_classes(root)
    num_images = sum(len(_find_images(root, name)) for name in classes)
    return Outline(num_images=num_images, num_classes=len(classes), is_cached=True, has_moments=False)


def load(config: DataConfig, cache: Path, on_progress: OnProgress | None) -> ImageSet:
    """Read the images of all class folders through the cache."""
    root, image_size = Path(config.path), config.image_size
    classes = _find_classes(root)
    files = [(label, path) for label, name in enumerate(classes) for path in _find_images(root, name)]
    names = [path for _, path in files]
    key = {
        "files": digest(file_digests(root, root, names, cache, on_progress)),
        "transform": PICTURE_TRANSFORM,
        "image_size": image_size,
    }

    def make_rows(start: int, stop: int) -> np.ndarray:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            return np.stack(list(pool.map(lambda name: read_image(root / name, image_size), names[start:stop])))

    shape = (image_size, image_size, 3)
    images = caches.build(caches.entry(cache, "images", key), key, len(names), shape, np.uint8, make_rows, on_progress)
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
    with reading(root):
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
