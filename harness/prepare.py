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
from harness.cache import Report, Rows, Sharded
from harness.config import RunConfig
from harness.data import ImageSet
from harness.encoders import FrozenEncoder, encoder_digest, encoder_width
from harness.errors import UserError
from harness.method import Needs
from harness.sit import parse_name


@dataclass(frozen=True, kw_only=True)
class Mirrored:
    """What the mirror image of every image gives, row by row: neither a latent nor its tokens can be flipped."""

    moments: Rows
    """As `PreparedData.moments`."""
    tokens: dict[str, Rows]
    """As `PreparedData.tokens`."""


@dataclass(frozen=True, kw_only=True)
class PreparedData:
    """What a run trains on and is evaluated with. Row i is the same image everywhere."""

    images: ImageSet
    train_rows: np.ndarray
    """int64, sorted."""
    holdout_rows: np.ndarray
    """int64, sorted; never trained on."""
    moments: Rows
    """cat(mean, std) of the posterior, float32 [M, 2C, h, w]."""
    tokens: dict[str, Rows]
    """Tokens by encoder, float16 [M, T, Z]; only those a method needs."""
    autoencoder: Autoencoder
    digests: dict[str, str]
    """Of `data`, `autoencoder` and `encoder/<name>`: what must agree between compared runs."""
    mirrored: Mirrored | None = None
    """With `data.flip`."""

    @property
    def num_encoded(self) -> int:
        """Images that each frozen network has to see."""
        return len(self.images) * (2 if self.mirrored else 1)


def prepare(config: RunConfig, needs: Needs, device: str | torch.device, report: Report | None = None) -> PreparedData:
    """Make or open all caches of a run; a second call only opens them.

    Raises:
        UserError: for bad images, sizes that do not fit each other, missing weights, or a disk that is full.
    """
    cache, size = caches.cache_folder(config.output), config.data.image_size
    autoencoder = Autoencoder.load(config.autoencoder.path, device)
    grid = token_grid(config, autoencoder)
    encoders = {name: encoder_digest(name, grid) for name in needs.encoders}
    images = data.load_images(config.data, cache, report)
    train_rows, holdout_rows = data.split(len(images), config.data.holdout, config.data.split_seed)
    maker = _Maker(cache, images, report)

    def tokens(mirror: bool) -> dict[str, Rows]:
        return {name: maker.tokens(name, encoders[name], grid, device, mirror) for name in encoders}

    return PreparedData(
        images=images,
        train_rows=train_rows,
        holdout_rows=holdout_rows,
        moments=maker.moments(autoencoder, size),
        tokens=tokens(mirror=False),
        mirrored=Mirrored(moments=maker.mirrored_moments(autoencoder, size), tokens=tokens(mirror=True))
        if config.data.flip
        else None,
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

    def moments(self, autoencoder: Autoencoder, image_size: int) -> Rows:
        """Those that came with the images, or the autoencoder's."""
        if self.images.moments is None:
            return self._encoded("moments", autoencoder, image_size, mirror=False)
        _check_given(self.images, autoencoder, image_size)
        return self.images.moments

    def mirrored_moments(self, autoencoder: Autoencoder, image_size: int) -> Rows:
        """The autoencoder's, of the mirror images."""
        return self._encoded("moments-mirrored", autoencoder, image_size, mirror=True)

    def _encoded(self, kind: str, autoencoder: Autoencoder, image_size: int, mirror: bool) -> Rows:
        channels, height, width = autoencoder.latent_shape(image_size)

        def make_rows(start: int, stop: int) -> np.ndarray:
            return autoencoder.moments(self._pictures(start, stop, mirror)).numpy()

        key = {"autoencoder": autoencoder.digest, "values": "mean, std", **_mirror_key(mirror)}
        return self._cached(kind, key, (2 * channels, height, width), np.float32, make_rows)

    def tokens(self, name: str, encoder: str, grid: int, device: str | torch.device, mirror: bool) -> Rows:
        """Tokens of the encoder `name`, whose digest is `encoder`; it is built only when tokens are missing."""
        loaded: list[FrozenEncoder] = []

        def make_rows(start: int, stop: int) -> np.ndarray:
            if not loaded:
                loaded.append(FrozenEncoder.load(name, grid, device))
            images_NCHW = torch.from_numpy(self._pictures(start, stop, mirror)).permute(0, 3, 1, 2)
            return loaded[0].tokens(images_NCHW).half().cpu().numpy()

        shape = (grid**2, encoder_width(name))
        kind = f"tokens-{name.replace('/', '-')}" + ("-mirrored" if mirror else "")
        return self._cached(kind, {"encoder": encoder, **_mirror_key(mirror)}, shape, np.float16, make_rows)

    def _pictures(self, start: int, stop: int, mirror: bool) -> np.ndarray:
        """Images or their mirror images, uint8 [stop - start, H, W, 3]."""
        images_NHWC = self.images.rows(np.arange(start, stop))
        return np.ascontiguousarray(images_NHWC[:, :, ::-1]) if mirror else images_NHWC

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


def _mirror_key(mirror: bool) -> dict[str, str]:
    return {"mirror": "left to right"} if mirror else {}


GIVEN_IMAGES = 3
"""Images that are encoded to see whether given moments are those of this autoencoder and of these images."""
GIVEN_TOLERANCE = 0.05
"""Root mean square of the difference allowed, over that of the moments: TF32 and other devices stay below 0.01, pixels
on the scale [0, 1], another autoencoder or another image lie far above."""


def _check_given(images: ImageSet, autoencoder: Autoencoder, image_size: int) -> None:
    """Refuse moments of another shape, of other images, or of another encoder or range of pixels."""
    moments = images.moments
    assert moments is not None
    channels, height, width = autoencoder.latent_shape(image_size)
    row_shape = (2 * channels, height, width)
    if moments.shape[1:] != row_shape:
        raise UserError(
            f"data.latents: moments are {moments.shape[1:]}, autoencoder.path makes {row_shape} of data.image_size: "
            "name the autoencoder that made them"
        )
    rows = np.unique(np.linspace(0, len(images) - 1, GIVEN_IMAGES).astype(np.int64))
    expected = autoencoder.moments(images.rows(rows)).numpy()
    for row, given, own in zip(rows, moments.rows(rows), expected, strict=True):
        apart = np.sqrt(np.square(given - own).mean() / np.square(own).mean())
        if apart > GIVEN_TOLERANCE:
            raise UserError(
                f"data.latents: moments of image {row} are {apart:.0%} away from what autoencoder.path makes of it: "
                "name the autoencoder that made them, with pixels from -1 to 1, or leave data.latents out and encode"
            )
