"""Images and labels, read once into uint8 arrays, and their split into a training and a held-out half.

No augmentation, no flips: image i is the same square of uint8 numbers in every run.
Shapes: M images in all, H W image height and width in pixels.
"""

from pathlib import Path

from harness.config import DataConfig
from harness.data import parquet, preprocessed
from harness.data.digits import NUM_DIGITS, _digits
from harness.data.folders import _find_classes, _find_images, _image_folder
from harness.data.image_set import ImageSet, Outline
from harness.data.parquet import _parquet
from harness.data.pictures import EXTENSIONS
from harness.data.preprocessed import Archive, _preprocessed
from harness.machine.progress import OnProgress


def outline(config: DataConfig, on_progress: OnProgress | None = None) -> Outline:
    """Look at the data set without reading an image; `UserError` names a bad path.

    A data set that is named by its id on the hub is fetched first, which `on_progress` is told of.
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
        table = parquet.open_table(parquet.locate(config.path, on_progress))
        num_classes = len(table.class_names)
        return Outline(num_images=len(table.labels), num_classes=num_classes, is_cached=True, has_moments=False)
    root = Path(config.path)
    classes = _find_classes(root)
    num_images = sum(len(_find_images(root, name)) for name in classes)
    return Outline(num_images=num_images, num_classes=len(classes), is_cached=True, has_moments=False)


def load_images(config: DataConfig, cache: Path, on_progress: OnProgress | None = None) -> ImageSet:
    """Read the images that `config` names, through the cache; `UserError` names a bad path or image."""
    if config.name == "digits":
        return _digits(config.image_size)
    if config.name == "preprocessed":
        return _preprocessed(config, cache, on_progress)
    if config.name == "parquet":
        return _parquet(parquet.locate(config.path, on_progress), config.image_size, cache, on_progress)
    return _image_folder(Path(config.path), config.image_size, cache, on_progress)
