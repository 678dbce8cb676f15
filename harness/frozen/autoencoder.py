"""Stage 1, the frozen autoencoder: images to latents and back. Around diffusers' AutoencoderKL, always in fp32.

Posterior moments are cat(mean, **std**) here and in the caches; diffusers' own `parameters` are cat(mean, logvar).
A latent is `(z - shift) * scaling` with z = mean + std * noise: diffusers applies neither in encode nor in decode.

Shapes: N images, C latent channels, H W image height and width, h w latent height and width.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
from torch import Tensor

from harness import rng
from harness.config import require
from harness.errors import UserError
from harness.frozen import hub, weights
from harness.records.files import digest, read_json

ASSETS = Path(__file__).parents[1] / "assets"
"""Shipped autoencoders lie in `<name>_autoencoder/`."""
CONFIG = "config.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"
FILES = (WEIGHTS, "diffusion_pytorch_model.bin")
"""Weights in diffusers' folders, the better first."""
PASS_IMAGES = 32
PASS_PIXELS = 4 * 256 * 256
"""Encoded or decoded together: at most this many images and pixels, but at least one image. Bounds memory, and is
fixed because the batch size changes the last bits."""


Network = Any
"""An AutoencoderKL: diffusers' import magic hides from type checkers that it is an nn.Module."""


def to_pixels(images: np.ndarray | Tensor) -> Tensor:
    """uint8 images, numpy [N, H, W, 3] or tensor [N, 3, H, W], to float32 [N, 3, H, W] in [-1, 1]."""
    if isinstance(images, np.ndarray):
        images = torch.tensor(images).permute(0, 3, 1, 2)
    assert images.dtype == torch.uint8, images.dtype
    return images.float() / 127.5 - 1


def to_uint8(pixels_NCHW: Tensor) -> np.ndarray:
    """Pixels in [-1, 1] to uint8 [N, H, W, 3]: the one place where pictures are rounded. NaN becomes black."""
    scaled = ((pixels_NCHW.float().nan_to_num(nan=-1.0) + 1) / 2 * 255).round().clamp(0, 255)
    return scaled.to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def latents(moments: Tensor, noise: Tensor, scaling: float, shift: float) -> Tensor:
    """((mean + std * noise) - shift) * scaling: a posterior sample, scaled. [N, 2C, h, w] -> [N, C, h, w]."""
    mean, std = moments.chunk(2, dim=1)
    return (mean + std * noise - shift) * scaling


def latent_means(moments: Tensor, scaling: float, shift: float) -> Tensor:
    """(mean - shift) * scaling. [N, 2C, h, w] -> [N, C, h, w]."""
    return (moments.chunk(2, dim=1)[0] - shift) * scaling


class Autoencoder:
    """A frozen AutoencoderKL with its scaling."""

    def __init__(self, network: Network, weights_digest: str) -> None:
        self.network = network.eval().requires_grad_(False)
        self.digest = weights_digest
        self.scaling = float(network.config.scaling_factor)
        self.shift = float(network.config.shift_factor or 0.0)
        self.latent_channels = int(network.config.latent_channels)
        self.downsampling = 2 ** (len(network.config.block_out_channels) - 1)

    @classmethod
    def load(cls, path_or_name: str, device: str | torch.device) -> "Autoencoder":
        """Load an autoencoder; `UserError` when it does not fit.

        Args:
            path_or_name: a shipped name such as `digits`; a folder with config.json and weights, or with a `vae/` that
                has them; one file of weights of Stable Diffusion's shapes, under diffusers' or Stability AI's names; or
                a repository of the hub, such as `stabilityai/sd-vae-ft-ema`.
            device: where it runs.
        """
        source = _find(path_or_name)
        config = _read_config(source)
        with rng.global_state_kept():
            network = _load_network(source, config)
        return cls(network.to(device), digest({"config": config, "weights": weights.sha256(source.weights)}))

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    def latent_shape(self, image_size: int) -> tuple[int, int, int]:
        """(C, h, w) for images of this size; `UserError` when they cannot be divided."""
        if image_size % self.downsampling:
            raise UserError(
                f"data.image_size is {image_size}: the autoencoder shrinks {self.downsampling} times, "
                f"so give a multiple of {self.downsampling}"
            )
        side = image_size // self.downsampling
        return self.latent_channels, side, side

    @torch.no_grad()
    def moments(self, images: np.ndarray | Tensor) -> Tensor:
        """Posterior cat(mean, std) of uint8 images ([N, H, W, 3] numpy or [N, 3, H, W] tensor), float32, on the CPU.

        Returns:
            [N, 2C, h, w].
        """
        pixels_NCHW = to_pixels(images)
        parts = []
        with torch.autocast(self.device.type, enabled=False):
            for part in _passes(pixels_NCHW, pixels_NCHW.shape[-2] * pixels_NCHW.shape[-1]):
                posterior = self.network.encode(part.to(self.device)).latent_dist
                parts.append(torch.cat([posterior.mean, posterior.std], dim=1).cpu())
        return torch.cat(parts)

    def latent_means(self, moments: Tensor) -> Tensor:
        """The function `latent_means` with this autoencoder's numbers."""
        return latent_means(moments, self.scaling, self.shift)

    @torch.no_grad()
    def decode(self, latents_NCHW: Tensor) -> np.ndarray:
        """Scaled latents [N, C, h, w] of any device to uint8 [N, H, W, 3], in fp32."""
        z_NCHW = latents_NCHW.float() / self.scaling + self.shift
        pixels = z_NCHW.shape[-2] * z_NCHW.shape[-1] * self.downsampling**2
        with torch.autocast(self.device.type, enabled=False):
            parts = [to_uint8(self.network.decode(part.to(self.device)).sample) for part in _passes(z_NCHW, pixels)]
        return np.concatenate(parts)


def _passes(batch: Tensor, pixels: int) -> Iterator[Tensor]:
    """Split a batch of images of `pixels` pixels into forward passes."""
    return iter(batch.split(max(1, min(PASS_IMAGES, PASS_PIXELS // pixels))))


# -- loading --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Source:
    """Where an autoencoder lies."""

    weights: Path
    config: Path | None
    """None where the weights come alone, and are in the shapes of Stable Diffusion's."""

    @property
    def place(self) -> Path:
        """As people know it: the folder, or the file that comes alone."""
        return self.weights.parent if self.config else self.weights


def _find(path_or_name: str) -> _Source:
    """A shipped name, a folder, a file, or a repository of the hub, in this order."""
    shipped = ASSETS / f"{path_or_name}_autoencoder"
    given = Path(path_or_name)
    folders = [given, given / "vae"] if given.name != path_or_name else [shipped, given, given / "vae"]
    for folder in folders:
        if (folder / CONFIG).is_file():
            return _in_folder(folder)
    if given.is_file():
        return _Source(given, given.with_name(CONFIG) if given.with_name(CONFIG).is_file() else None)
    if not given.exists() and hub.REPOSITORY.fullmatch(path_or_name):
        try:
            config, weights_at = hub.fetch(path_or_name, (CONFIG,)), hub.fetch(path_or_name, FILES)
        except hub.Unavailable as error:
            raise UserError(f"autoencoder.path: {error}: look at the name and the network, or name a folder") from None
        if config is not None and weights_at is not None:
            return _Source(weights_at, config)
    names = ", ".join(sorted(path.name.removesuffix("_autoencoder") for path in ASSETS.glob("*_autoencoder")))
    raise UserError(
        f"autoencoder.path is {path_or_name!r}: give a folder with config.json and {WEIGHTS} (diffusers' format), "
        f"one file of weights of Stable Diffusion's autoencoder, a repository of the hub (not with --offline), "
        f"or a shipped name ({names})"
    )


def _in_folder(folder: Path) -> _Source:
    # diffusers would follow it to other files, which the digest does not cover.
    index = folder / f"{WEIGHTS}.index.json"
    require(not index.exists(), f"autoencoder.path: {index} splits the weights: put them into one {WEIGHTS}")
    for name in FILES:
        if (folder / name).is_file():
            return _Source(folder / name, folder / CONFIG)
    raise UserError(f"autoencoder.path: {folder} has no {WEIGHTS}: put the fp32 safetensors weights there")


def _read_config(source: _Source) -> dict[str, Any]:
    """The network's config, refused when it asks for something that is not done here."""
    if source.config is None:
        return _shapes_of(SD_RECIPE)
    config, folder = read_json(source.config), source.config.parent
    require(isinstance(config, dict), f"autoencoder.path: {source.config} is no config of a network: replace it")
    kind = config.get("_class_name")
    require(kind == "AutoencoderKL", f"autoencoder.path: {folder} holds a {kind}: only AutoencoderKL is supported")
    for name in ("latents_mean", "latents_std"):
        require(
            config.get(name) is None,
            f"autoencoder.path: {folder} normalises latents by {name}: only scaling_factor and shift_factor will do",
        )
    channels = config.get("in_channels", 3)
    require(channels == 3, f"autoencoder.path: {folder} has {channels} image channels: only 3 are supported")
    # Names with an underscore say where the file came from, not what it computes.
    return {name: value for name, value in config.items() if not name.startswith("_")}


def _network_of(config: dict[str, Any], source: _Source) -> Network:
    """diffusers' network of a config, its random weights from torch's global state."""
    try:
        return AutoencoderKL.from_config(config)
    except Exception as error:  # diffusers raises many types on broken configs
        reason = str(error).splitlines()[0]
        raise UserError(f"autoencoder.path: {source.place} cannot be loaded ({reason}): replace the files") from error


def is_here(path_or_name: str) -> bool:
    """Whether an autoencoder is shipped, or its path on this machine; else the hub alone may have it."""
    return (ASSETS / f"{path_or_name}_autoencoder").is_dir() or Path(path_or_name).exists()


def untrained_network(path_or_name: str) -> Network:
    """A network of an autoencoder's shapes with random weights from torch's global state, where only its cost matters.

    No weights are read and the hub is not asked: what it alone may have is taken to be of Stable Diffusion's shapes.
    """
    if not is_here(path_or_name) and hub.REPOSITORY.fullmatch(path_or_name):
        return build_network(SD_RECIPE)
    source = _find(path_or_name)
    return _network_of(_read_config(source), source)


def _load_network(source: _Source, config: dict[str, Any]) -> Network:
    """diffusers' network with the tensors of the file under diffusers' names."""
    network = _network_of(config, source)
    tensors = weights.load_tensors(source.weights)
    if any(name.endswith("encoder.down.0.block.0.conv1.weight") for name in tensors):
        # Stability AI's own names, alone or inside a whole model.
        tensors = convert_ldm_vae_checkpoint(tensors, network.config)
    network._fix_state_dict_keys_on_load(tensors)  # attention of older files: query, key, value, proj_attn
    expected = network.state_dict()
    bad = sorted(expected.keys() ^ tensors.keys()) or [
        name for name, tensor in tensors.items() if tensor.shape != expected[name].shape
    ]
    fits = f"its {CONFIG}" if source.config else "the shapes of Stable Diffusion's autoencoder"
    require(not bad, f"autoencoder.path: weights in {source.place} do not fit {fits} ({bad[:1]}): replace the files")
    network.load_state_dict(tensors)
    return network


# -- training -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class AutoencoderRecipe:
    """How a small autoencoder is trained; the defaults made the shipped `digits`."""

    block_channels: tuple[int, ...] = (16, 16, 32)
    """Channels at each resolution, the finest first; each but the last halves it: 3 of them make 32 px 8 x 8."""
    layers_per_block: int = 1
    """Residual layers a resolution."""
    norm_groups: int = 8
    """Groups of the group norms; divides every number of channels."""
    latent_channels: int = 4
    """C."""
    steps: int = 3000
    """Optimiser steps."""
    batch_size: int = 16
    """Images a step."""
    lr: float = 2e-3
    """Peak learning rate of AdamW; rises over the first 5%, then falls to 0 along a cosine."""
    kl_weight: float = 3e-4
    """Weight of the Kullback-Leibler term (mean over latent numbers) against the absolute error (mean over pixels)."""
    clip_norm: float = 1.0
    """Largest gradient norm."""
    seed: int = 0
    """Seed of weights, batches and posterior noise."""

    def __post_init__(self) -> None:
        for name in ("layers_per_block", "norm_groups", "latent_channels", "steps", "batch_size"):
            value = getattr(self, name)
            require(value >= 1, f"{name} is {value}: give 1 or more")
        groups = self.norm_groups
        require(len(self.block_channels) >= 1, "block_channels is empty: give one number of channels a resolution")
        require(
            all(channels > 0 and channels % groups == 0 for channels in self.block_channels),
            f"block_channels is {self.block_channels}: give multiples of norm_groups, {groups}",
        )
        require(self.lr > 0, f"lr is {self.lr}: give a rate above 0")
        require(self.kl_weight >= 0, f"kl_weight is {self.kl_weight}: give 0 or more")
        require(self.clip_norm > 0, f"clip_norm is {self.clip_norm}: give more than 0")


SD_RECIPE = AutoencoderRecipe(block_channels=(128, 256, 512, 512), layers_per_block=2, norm_groups=32)
"""Shapes of Stable Diffusion's autoencoder, which the papers use (config.json of stabilityai/sd-vae-ft-ema); its
training is not described here."""


def build_network(recipe: AutoencoderRecipe) -> Network:
    """A network of the recipe's shapes; its random weights come from torch's global state."""
    return AutoencoderKL(**_shapes_of(recipe))


def _shapes_of(recipe: AutoencoderRecipe) -> dict[str, Any]:
    """The recipe's shapes as diffusers' config has them; the scaling is diffusers' default, Stable Diffusion's."""
    levels = len(recipe.block_channels)
    return {
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": recipe.block_channels,
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "layers_per_block": recipe.layers_per_block,
        "norm_num_groups": recipe.norm_groups,
        "latent_channels": recipe.latent_channels,
    }
