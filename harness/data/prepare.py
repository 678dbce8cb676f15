"""Everything a run reads, made once and cached: images, posterior moments, frozen-encoder tokens.

Shapes: M images in all, C latent channels, h w latent height and width, T tokens, Z encoder width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from harness.backbones.sit import parse_name
from harness.config import RunConfig
from harness.data import cache as caches
from harness.data import image_set
from harness.data import images as data
from harness.data.cache import Rows, Sharded
from harness.data.image_set import ImageSet, Outline
from harness.errors import UserError
from harness.frozen.autoencoder import Autoencoder
from harness.frozen.encoders import FrozenEncoder, encoder_digest, encoder_width
from harness.machine import disk
from harness.machine.progress import OnProgress
from harness.method import Needs


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """What the frozen networks make of every image, or of its mirror image: latents cannot be flipped, nor tokens."""

    moments: Rows
    """Moments as in `PreparedData.moments`."""
    tokens: dict[str, Rows]
    """Tokens as in `PreparedData.tokens`."""


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
    """Digests of `data`, `autoencoder` and each `encoder/<name>`; they must agree between compared runs."""
    mirrored: Encoded | None = None
    """The same for mirror images, where `data.flip` asks for them."""
    encodings: "Encodings | None" = None
    """The caches that tokens of further encoders come from; None for data that was made up."""

    @property
    def scaling(self) -> float:
        """What a latent is multiplied with, after the shift."""
        return self.autoencoder.scaling

    @property
    def shift(self) -> float:
        """What is taken from a latent, before the scaling."""
        return self.autoencoder.shift

    @property
    def num_encoded(self) -> int:
        """Images that each frozen network has to see."""
        return len(self.images) * (2 if self.mirrored else 1)

    def with_tokens(self, needs: Needs) -> "PreparedData":
        """The same data with the tokens that a method needs, and with no others.

        What was opened before is handed out again, so this costs nothing at the second time.

        Raises:
            UserError: for missing weights, or a disk that is full.
        """
        assert self.encodings is not None, "made-up data has no encoders"
        plain, mirrored = self.encodings.open(needs.encoders)
        digests = self.encodings.digests(needs.encoders)
        return replace(self, tokens=plain.tokens, mirrored=mirrored, digests=digests)


def prepare(
    config: RunConfig, needs: Needs, device: str | torch.device, on_progress: OnProgress | None = None
) -> PreparedData:
    """Make or open all caches of a run; a second call only opens them.

    A process calls this once: `with_tokens` of what it returns gives other runs on the same data what they read.

    Raises:
        UserError: for bad images, sizes that do not fit each other, missing weights, or a disk that is full.
    """
    autoencoder = Autoencoder.load(config.autoencoder.path, device)
    grid = token_grid(config, autoencoder)
    known = {name: encoder_digest(name, grid) for name in needs.encoders}  # missing weights are told of first
    images = data.load_images(config.data, caches.cache_folder(config.output), on_progress)
    train_rows, holdout_rows = image_set.split(len(images), config.data.holdout, config.data.split_seed)
    encodings = Encodings(
        config=config, images=images, autoencoder=autoencoder, device=device, on_progress=on_progress, _known=known
    )
    plain, mirrored = encodings.open(needs.encoders)
    return PreparedData(
        images=images,
        train_rows=train_rows,
        holdout_rows=holdout_rows,
        moments=plain.moments,
        tokens=plain.tokens,
        mirrored=mirrored,
        autoencoder=autoencoder,
        digests=encodings.digests(needs.encoders),
        encodings=encodings,
    )


def estimate(config: RunConfig, needs: Needs, on_progress: OnProgress | None = None) -> dict[str, int]:
    """Bytes of every cache that a run reads, by its name, whether it is there or not. No image is read."""
    autoencoder = Autoencoder.load(config.autoencoder.path, "cpu")
    return cache_sizes(config, needs, autoencoder, data.outline(config.data, on_progress))


def cache_sizes(config: RunConfig, needs: Needs, autoencoder: Autoencoder, found: Outline) -> dict[str, int]:
    """As `estimate`, of data that may not be there, and of an autoencoder whose shapes alone matter."""
    grid, side = token_grid(config, autoencoder), config.data.image_size
    of_one = {"images": 3 * side**2} if found.is_cached else {}
    for mirror in _mirrors(config):
        if mirror or not found.has_moments:
            of_one[_kind("moments", mirror)] = 4 * int(np.prod(_moments_shape(autoencoder, side)))
        for name in needs.encoders:
            of_one[_kind(f"tokens-{name}", mirror)] = 2 * int(np.prod(_tokens_shape(name, grid)))
    return {kind: found.num_images * num_bytes for kind, num_bytes in of_one.items()}


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


# -- caches with one row for each image -----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Cache:
    """A cache to be opened, and made before where it is not there."""

    kind: str
    """The first part of its folder's name."""
    folder: Path
    key: dict[str, str]
    shape: tuple[int, ...]
    """[M, ...]."""
    dtype: type[np.generic]
    make_rows: Callable[[int, int], np.ndarray]

    def missing_bytes(self) -> int:
        return caches.missing_bytes(self.folder, self.key, self.shape[0], self.shape[1:], self.dtype)

    def build(self, on_progress: OnProgress | None) -> Sharded:
        shape = self.shape
        return caches.build(self.folder, self.key, shape[0], shape[1:], self.dtype, self.make_rows, on_progress)


@dataclass(frozen=True, kw_only=True)
class Encodings:
    """What the frozen networks make of the images and, with flips, of their mirror images.

    Each cache is opened when it is first asked for, and made before where it is not there; then it is kept open.
    """

    config: RunConfig
    images: ImageSet
    autoencoder: Autoencoder
    device: str | torch.device
    on_progress: OnProgress | None
    _known: dict[str, str]
    """Digests of encoders, by name."""
    _opened: dict[str, Rows] = field(default_factory=dict)
    """Caches, by kind."""
    _networks: dict[str, FrozenEncoder] = field(default_factory=dict)
    """Encoders, by name, while tokens are made."""

    def __post_init__(self) -> None:
        given = self.images.moments
        if given is not None:
            _check_given(self.images, given, self.autoencoder, self.config.data.image_size)
            self._opened[_kind("moments", mirror=False)] = given

    @property
    def grid(self) -> int:
        """Tokens along one side."""
        return token_grid(self.config, self.autoencoder)

    @property
    def root(self) -> Path:
        """Folder of all caches."""
        return caches.cache_folder(self.config.output)

    def open(self, encoders: Sequence[str]) -> tuple[Encoded, Encoded | None]:
        """What the autoencoder and these encoders make of the images, and of the mirror images where there are any.

        The disk is looked at before the first row is made.
        """
        mirrors = _mirrors(self.config)
        wanted = [
            each
            for mirror in mirrors
            for each in (self._moments(mirror), *(self._tokens(name, mirror) for name in encoders))
        ]
        missing = [each for each in wanted if each.kind not in self._opened]
        disk.check_room(self.root, sum(each.missing_bytes() for each in missing))
        try:
            for each in missing:
                self._opened[each.kind] = each.build(self.on_progress)
        finally:
            self._networks.clear()  # the memory of the device is for training
        plain, *mirrored = [
            Encoded(
                moments=self._opened[_kind("moments", mirror)],
                tokens={name: self._opened[_kind(f"tokens-{name}", mirror)] for name in encoders},
            )
            for mirror in mirrors
        ]
        return plain, mirrored[0] if mirrored else None

    def digests(self, encoders: Sequence[str]) -> dict[str, str]:
        """As `PreparedData.digests`, with those of these encoders."""
        found = {f"encoder/{name}": self._digest(name) for name in encoders}
        return {"data": self.images.digest, "autoencoder": self.autoencoder.digest, **found}

    def _digest(self, encoder: str) -> str:
        if encoder not in self._known:
            self._known[encoder] = encoder_digest(encoder, self.grid)
        return self._known[encoder]

    def _moments(self, mirror: bool) -> _Cache:
        def make_rows(start: int, stop: int) -> np.ndarray:
            return self.autoencoder.moments(self._pictures(start, stop, mirror)).numpy()

        key = {"autoencoder": self.autoencoder.digest, "values": "mean, std"}
        shape = _moments_shape(self.autoencoder, self.config.data.image_size)
        return self._cache("moments", mirror, key, shape, np.float32, make_rows)

    def _tokens(self, name: str, mirror: bool) -> _Cache:
        """Tokens of the encoder `name`, which is built only when tokens are missing."""

        def make_rows(start: int, stop: int) -> np.ndarray:
            if name not in self._networks:
                self._networks[name] = FrozenEncoder.load(name, self.grid, self.device)
            images_NCHW = torch.from_numpy(self._pictures(start, stop, mirror)).permute(0, 3, 1, 2)
            return self._networks[name].tokens(images_NCHW).half().cpu().numpy()

        key, shape = {"encoder": self._digest(name)}, _tokens_shape(name, self.grid)
        return self._cache(f"tokens-{name}", mirror, key, shape, np.float16, make_rows)

    def _pictures(self, start: int, stop: int, mirror: bool) -> np.ndarray:
        """Images or their mirror images, uint8 [stop - start, H, W, 3]."""
        images_NHWC = self.images.rows(np.arange(start, stop))
        return np.ascontiguousarray(images_NHWC[:, :, ::-1]) if mirror else images_NHWC

    def _cache(
        self,
        what: str,
        mirror: bool,
        key: dict[str, str],
        row_shape: tuple[int, ...],
        dtype: type[np.generic],
        make_rows: Callable[[int, int], np.ndarray],
    ) -> _Cache:
        mirrored = {"mirror": "left to right"} if mirror else {}
        key = {"data": self.images.digest, **key, **mirrored, "dtype": np.dtype(dtype).name}
        kind = _kind(what, mirror)
        return _Cache(kind, caches.entry(self.root, kind, key), key, (len(self.images), *row_shape), dtype, make_rows)


def _mirrors(config: RunConfig) -> tuple[bool, ...]:
    """Images, and with flips their mirror images as well."""
    return (False, True) if config.data.flip else (False,)


def _kind(what: str, mirror: bool) -> str:
    """Name of a cache; names of timm's encoders have a slash."""
    return what.replace("/", "-") + ("-mirrored" if mirror else "")


def _moments_shape(autoencoder: Autoencoder, image_size: int) -> tuple[int, int, int]:
    channels, height, width = autoencoder.latent_shape(image_size)
    return 2 * channels, height, width


def _tokens_shape(name: str, grid: int) -> tuple[int, int]:
    return grid**2, encoder_width(name)


GIVEN_IMAGES = 3
"""Images that are encoded to see whether given moments are those of this autoencoder and of these images."""
GIVEN_TOLERANCE = 0.05
"""Root mean square of the difference allowed, over that of the moments: TF32 and other devices stay below 0.01, pixels
on the scale [0, 1], another autoencoder or another image lie far above."""


def _check_given(images: ImageSet, moments: Rows, autoencoder: Autoencoder, image_size: int) -> None:
    """Refuse moments of another shape, of other images, or of another encoder or range of pixels."""
    row_shape = _moments_shape(autoencoder, image_size)
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
