"""Images and labels of any source, read once into uint8 arrays.

No augmentation, no flips: image i is the same square of uint8 numbers in every run.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from harness.config import DataConfig
from harness.data import digits, folders, parquet, preprocessed
from harness.data.image_set import ImageSet, Outline
from harness.machine.progress import OnProgress


class ImageSource(Protocol):
    """A module that reads one kind of data set."""

    def outline(self, config: DataConfig, on_progress: OnProgress | None) -> Outline:
        """Look at the data set without reading an image; `UserError` names a bad path."""

    def load(self, config: DataConfig, cache: Path, on_progress: OnProgress | None) -> ImageSet:
        """Read the images, through the cache where they have to be resized; `UserError` names a bad path or image."""


SOURCES: Mapping[str, ImageSource] = {
    "digits": digits,
    "imagefolder": folders,
    "preprocessed": preprocessed,
    "parquet": parquet,
}
"""What reads a data set, by `data.name`."""


def outline(config: DataConfig, on_progress: OnProgress | None = None) -> Outline:
    """Look at the data set without reading an image; `UserError` names a bad path.

    A data set that is named by its id on the hub is fetched first, which `on_progress` is told of.
    """
    return SOURCES[config.name].outline(config, on_progress)


def load_images(config: DataConfig, cache: Path, on_progress: OnProgress | None = None) -> ImageSet:
    """Read the images that `config` names, through the cache; `UserError` names a bad path or image."""
    return SOURCES[config.name].load(config, cache, on_progress)
