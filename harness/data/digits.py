"""The 1,797 handwritten digits that scikit-learn ships."""

import hashlib
from pathlib import Path

import numpy as np
from PIL import Image

from harness.config import DataConfig
from harness.data.image_set import ImageSet, Outline
from harness.machine.progress import OnProgress
from harness.machine.ram import check_images
from harness.records.files import digest

NUM_DIGITS, NUM_CLASSES = 1797, 10
TRANSFORM = "0..16 to 0..255, bicubic, RGB"
"""What `load` does; part of the data's digest."""


def outline(config: DataConfig, on_progress: OnProgress | None) -> Outline:
    """What is known of them; nothing is read."""
    return Outline(num_images=NUM_DIGITS, num_classes=NUM_CLASSES, is_cached=False, has_moments=False)


def load(config: DataConfig, cache: Path, on_progress: OnProgress | None) -> ImageSet:
    """The 8x8 digits, values 0..16, enlarged to `data.image_size`; they are kept in memory and in no cache."""
    from sklearn.datasets import load_digits  # here, because importing scikit-learn takes a second

    source = load_digits()
    check_images(len(source.images), config.image_size)
    small = np.round(source.images * (255 / 16)).astype(np.uint8)
    side = (config.image_size, config.image_size)
    grey = np.stack([np.asarray(Image.fromarray(image).resize(side, Image.Resampling.BICUBIC)) for image in small])
    labels = source.target.astype(np.int64)
    content = hashlib.sha256(source.images.tobytes() + labels.tobytes()).hexdigest()
    return ImageSet(
        images=np.repeat(grey[..., None], 3, axis=3),
        labels=labels,
        class_names=tuple(str(name) for name in source.target_names),
        digest=digest({"content": content, "transform": TRANSFORM, "image_size": config.image_size}),
    )
