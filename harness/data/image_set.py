"""The images of a data set with their labels, and the split into a training and a held-out half.

Shapes: M images in all, H W image height and width in pixels.
"""

from dataclasses import dataclass

import numpy as np
import torch

from harness.data.cache import Rows
from harness.errors import UserError
from harness.rng import stream


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


def evenly_spaced_rows(rows: np.ndarray, num: int) -> np.ndarray:
    """At most `num` of the rows, evenly spaced: folders are sorted by class, so the first ones are of one class."""
    num = min(num, len(rows))
    return rows[np.arange(num) * len(rows) // num]
