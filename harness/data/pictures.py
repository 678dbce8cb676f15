"""One picture from a file, or from bytes, to a square of uint8 numbers. No augmentation, no flips."""

import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from harness.errors import UserError

EXTENSIONS = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
"""Endings of image files, in lower case; other files are passed over."""
PICTURE_TRANSFORM = "exif, white under alpha, RGB, box halving, bicubic short side, centre crop"
"""What `read_image` does; part of the data's digest, so change it when the pixels change."""


def read_image(path: Path, image_size: int) -> np.ndarray:
    """One image file as uint8 [image_size, image_size, 3]; `UserError` names a file that cannot be read."""
    return read_square(path, str(path), image_size)


def read_square(file: Path | io.BytesIO, place: str, image_size: int) -> np.ndarray:
    """As `read_image`, of an encoded picture in a file or in memory; `place` says in errors where it lies."""
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
