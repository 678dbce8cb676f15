"""The 1,797 handwritten digits that scikit-learn ships."""

import hashlib

import numpy as np
from PIL import Image

from harness.data.image_set import ImageSet
from harness.machine.ram import check_images
from harness.records.files import digest

NUM_DIGITS = 1797
DIGITS_TRANSFORM = "0..16 to 0..255, bicubic, RGB"
"""What `_digits` does; part of the data's digest."""


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
