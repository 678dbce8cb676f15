"""Runs on made-up data of real shapes, where only time and memory matter: nothing is read, and nothing is learnt.

Shapes: M images in all, C latent channels, h w latent height and width, T tokens, Z encoder width.
"""

from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

import methods
from harness.config import RunConfig
from harness.data.prepare import PreparedData
from harness.method import BackboneShape, DataShape, Needs
from harness.rng import stream
from harness.training.step import Run, set_up


@dataclass(frozen=True)
class ArrayRows:
    """An array in memory that is read as a cache is."""

    values: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    def rows(self, indices: np.ndarray) -> np.ndarray:
        return self.values[indices]


@dataclass(frozen=True)
class MadeUpImages:
    """uint8 images [M, H, W, 3] and their labels."""

    pixels: ArrayRows
    labels: np.ndarray
    num_classes: int

    def rows(self, indices: np.ndarray) -> np.ndarray:
        return self.pixels.rows(indices)


@dataclass(frozen=True)
class _Prepared:
    """The part of `PreparedData` that a trainer reads."""

    moments: ArrayRows
    images: MadeUpImages
    tokens: dict[str, ArrayRows]
    train_rows: np.ndarray
    scaling: float = 1.0
    shift: float = 0.0
    mirrored: None = None


def prepared_data(shape: BackboneShape, data: DataShape, needs: Needs, num_images: int) -> PreparedData:
    """Random moments (float32 [M, 2C, h, w]), tokens (float16 [M, T, Z]) and images; the same at every call."""
    generator = stream(0, "data")

    def uniform(*size: int) -> Tensor:
        return torch.rand((num_images, *size), generator=generator)

    moments = uniform(2 * shape.in_channels, shape.input_size, shape.input_size)
    widths = {name: data.encoder_width(name) for name in needs.encoders}
    tokens = {name: ArrayRows(uniform(shape.num_tokens, width).half().numpy()) for name, width in widths.items()}
    side = data.image_size if needs.images else 0
    made = _Prepared(
        moments=ArrayRows(moments.numpy()),
        images=MadeUpImages(
            random_images(num_images, side), np.arange(num_images) % shape.num_classes, shape.num_classes
        ),
        tokens=tokens,
        train_rows=np.arange(num_images),
    )
    return cast(PreparedData, made)


def random_images(num: int, side: int) -> ArrayRows:
    """Noise, uint8 [num, side, side, 3]."""
    size = (num, side, side, 3)
    return ArrayRows(torch.randint(256, size, dtype=torch.uint8, generator=stream(0, "data", 1)).numpy())


def synthetic_run(
    config: RunConfig, shape: BackboneShape, data: DataShape, accelerator: Accelerator, num_images: int
) -> Run:
    """A run at step 0, as the trainer sets it up. `config` is resolved."""
    method = methods.build(config, shape, data)
    return set_up(config, method, prepared_data(shape, data, method.needs(), num_images), accelerator)
