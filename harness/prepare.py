"""Everything a run reads, made once and cached: images, posterior moments, frozen-encoder tokens.

Shapes: M images in all, C latent channels, h w latent height and width, T tokens, Z encoder width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from harness import cache as caches
from harness import data
from harness.autoencoder import Autoencoder
from harness.cache import Report, Sharded
from harness.config import RunConfig
from harness.data import ImageSet
from harness.encoders import FrozenEncoder, encoder_digest, encoder_width
from harness.errors import UserError
from harness.method import Needs
from harness.sit import parse_name


@dataclass(frozen=True, kw_only=True)
class PreparedData:
    """What a run trains on and is evaluated with. Row i is the same image everywhere."""

    images: ImageSet
    train_rows: np.ndarray
    """int64, sorted."""
    holdout_rows: np.ndarray
    """int64, sorted; never trained on."""
    moments: Sharded
    """cat(mean, std) of the posterior, float32 [M, 2C, h, w]."""
    tokens: dict[str, Sharded]
    """Tokens by encoder, float16 [M, T, Z]; only those a method needs."""
    autoencoder: Autoencoder
    digests: dict[str, str]
    """Of `data`, `autoencoder` and `encoder/<name>`: what must agree between compared runs."""


def prepare(config: RunConfig, needs: Needs, device: str | torch.device, report: Report | None = None) -> PreparedData:
    """Make or open all caches of a run; a second call only opens them.

    Raises:
        UserError: for bad images, sizes that do not fit each other, missing weights, or a disk that is full.
    """
    cache = caches.cache_folder(config.output)
    autoencoder = Autoencoder.load(config.autoencoder.path, device)
    grid = token_grid(config, autoencoder)
    encoders = {name: encoder_digest(name, grid) for name in needs.encoders}
    images = data.load_images(config.data, cache, report)
    train_rows, holdout_rows = data.split(len(images), config.data.holdout, config.data.split_seed)
    maker = _Maker(cache, images, report)
    return PreparedData(
        images=images,
        train_rows=train_rows,
        holdout_rows=holdout_rows,
        moments=maker.moments(autoencoder, config.data.image_size),
        tokens={name: maker.tokens(name, encoders[name], grid, device) for name in encoders},
        autoencoder=autoencoder,
        digests={
            "data": images.digest,
            "autoencoder": autoencoder.digest,
            **{f"encoder/{name}": value for name, value in encoders.items()},
        },
    )


def token_grid(config: RunConfig, autoencoder: Autoencoder) -> int:
    """Tokens along one side of the backbone; `UserError` when image, autoencoder and patch sizes do not fit."""
    patch = parse_name(config.model.name)["patch_size"]
    side = autoencoder.latent_shape(config.data.image_size)[1]
    if side % patch:
        raise UserError(
            f"data.image_size is {config.data.image_size}: its latent of {side} x {side} cannot be cut into the "
            f"{patch} x {patch} patches of model.name {config.model.name}; give a multiple of "
            f"{autoencoder.downsampling * patch}"
        )
    return side // patch


@dataclass(frozen=True)
class _Maker:
    """Makes or opens the caches that hold one row for each image."""

    cache: Path
    images: ImageSet
    report: Report | None

    def moments(self, autoencoder: Autoencoder, image_size: int) -> Sharded:
        channels, height, width = autoencoder.latent_shape(image_size)

        def make_rows(start: int, stop: int) -> np.ndarray:
            return autoencoder.moments(self.images.rows(np.arange(start, stop))).numpy()

        key = {"autoencoder": autoencoder.digest, "values": "mean, std"}
        return self._cached("moments", key, (2 * channels, height, width), np.float32, make_rows)

    def tokens(self, name: str, encoder: str, grid: int, device: str | torch.device) -> Sharded:
        """Tokens of the encoder `name`, whose digest is `encoder`; it is built only when tokens are missing."""
        loaded: list[FrozenEncoder] = []

        def make_rows(start: int, stop: int) -> np.ndarray:
            if not loaded:
                loaded.append(FrozenEncoder.load(name, grid, device))
            images_NCHW = torch.from_numpy(self.images.rows(np.arange(start, stop))).permute(0, 3, 1, 2)
            return loaded[0].tokens(images_NCHW).half().cpu().numpy()

        shape = (grid**2, encoder_width(name))
        return self._cached(f"tokens-{name}", {"encoder": encoder}, shape, np.float16, make_rows)

    def _cached(
        self,
        kind: str,
        key: dict[str, str],
        row_shape: tuple[int, ...],
        dtype: type[np.generic],
        make_rows: Callable[[int, int], np.ndarray],
    ) -> Sharded:
        key = {"data": self.images.digest, **key, "dtype": np.dtype(dtype).name}
        folder = caches.entry(self.cache, kind, key)
        return caches.build(folder, key, len(self.images), row_shape, dtype, make_rows, self.report)
