"""Stage 1, the frozen autoencoder: images to latents and back. Around diffusers' AutoencoderKL, always in fp32.

Posterior moments are cat(mean, **std**) here and in the caches; diffusers' own `parameters` are cat(mean, logvar).
A latent is `(z - shift) * scaling` with z = mean + std * noise: diffusers applies neither in encode nor in decode.

Shapes: N images, C latent channels, H W image height and width, h w latent height and width.
"""

import importlib.metadata
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from harness import rng
from harness.cache import Report
from harness.config import require
from harness.data import ImageSet
from harness.errors import UserError
from harness.records import digest, file_digest, read_json, replaced, write_json

ASSETS = Path(__file__).parent / "assets"
"""Shipped autoencoders lie in `<name>_autoencoder/`."""
WEIGHTS = "diffusion_pytorch_model.safetensors"
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
        """Load a shipped autoencoder by name, or a folder in diffusers' format; `UserError` when it does not fit.

        Args:
            path_or_name: such as `digits`, or a folder with config.json and safetensors weights, or with a `vae/`.
            device: where it runs.
        """
        folder = _find_folder(path_or_name)
        config = _read_config(folder)
        with rng.global_state_kept():
            network = _load_network(folder)
        # Names with an underscore say where the file came from, not what it computes.
        used = {name: value for name, value in config.items() if not name.startswith("_")}
        weights_digest = digest({"config": used, "weights": file_digest(folder / WEIGHTS)})
        return cls(network.to(device), weights_digest)

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

    def latents(self, moments: Tensor, noise: Tensor) -> Tensor:
        """((mean + std * noise) - shift) * scaling: a posterior sample, scaled. [N, 2C, h, w] -> [N, C, h, w]."""
        mean, std = moments.chunk(2, dim=1)
        return (mean + std * noise - self.shift) * self.scaling

    def latent_means(self, moments: Tensor) -> Tensor:
        """(mean - shift) * scaling. [N, 2C, h, w] -> [N, C, h, w]."""
        return (moments.chunk(2, dim=1)[0] - self.shift) * self.scaling

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


def _find_folder(path_or_name: str) -> Path:
    shipped = ASSETS / f"{path_or_name}_autoencoder"
    given = Path(path_or_name)
    folders = [given, given / "vae"] if given.name != path_or_name else [shipped, given, given / "vae"]
    for folder in folders:
        if (folder / "config.json").is_file():
            if not (folder / WEIGHTS).is_file():
                raise UserError(f"autoencoder.path: {folder} has no {WEIGHTS}: put the fp32 safetensors weights there")
            return folder
    names = ", ".join(sorted(path.name.removesuffix("_autoencoder") for path in ASSETS.glob("*_autoencoder")))
    raise UserError(
        f"autoencoder.path is {path_or_name!r}: give a folder with config.json and {WEIGHTS} (diffusers' format), "
        f"or a shipped name ({names})"
    )


def _read_config(folder: Path) -> dict[str, Any]:
    """The network's config, refused when it asks for something that is not done here."""
    config = read_json(folder / "config.json")
    require(
        isinstance(config, dict), f"autoencoder.path: {folder / 'config.json'} is no config of a network: replace it"
    )
    # diffusers would follow it to other files, which the digest does not cover.
    index = folder / f"{WEIGHTS}.index.json"
    require(not index.exists(), f"autoencoder.path: {index} splits the weights: put them into one {WEIGHTS}")
    kind = config.get("_class_name")
    require(kind == "AutoencoderKL", f"autoencoder.path: {folder} holds a {kind}: only AutoencoderKL is supported")
    for name in ("latents_mean", "latents_std"):
        require(
            config.get(name) is None,
            f"autoencoder.path: {folder} normalises latents by {name}: only scaling_factor and shift_factor will do",
        )
    channels = config.get("in_channels", 3)
    require(channels == 3, f"autoencoder.path: {folder} has {channels} image channels: only 3 are supported")
    return config


def _load_network(folder: Path) -> Network:
    """diffusers' own loader, because it also renames the attention weights of older files."""
    try:
        network, info = AutoencoderKL.from_pretrained(
            folder,
            local_files_only=True,
            use_safetensors=True,
            torch_dtype=torch.float32,
            low_cpu_mem_usage=False,
            output_loading_info=True,
        )
    except Exception as error:  # diffusers raises many types on broken files
        reason = str(error).splitlines()[0]
        raise UserError(f"autoencoder.path: {folder} cannot be loaded ({reason}): replace the files") from error
    # diffusers fills missing weights with random ones and only logs it.
    bad = [name for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for name in info[kind]]
    require(not bad, f"autoencoder.path: weights in {folder} do not fit its config.json ({bad[:1]}): replace the files")
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


def train_autoencoder(
    images: ImageSet,
    rows: np.ndarray,
    out_folder: Path,
    recipe: AutoencoderRecipe,
    device: str | torch.device,
    report: Report | None = None,
) -> None:
    """Train a small autoencoder on `rows` of the images and save it in diffusers' format, with recipe.json.

    The same recipe and images give the same bytes on the same machine. All other rows are held out: they give the
    reconstruction error in recipe.json and are seen by nothing else.
    """
    network = _new_network(recipe).to(device)
    losses = _fit(network, images, rows, recipe, report)
    network.eval().requires_grad_(False)
    scaling = _unit_scaling(network, images, rows, recipe.seed)
    network.register_to_config(scaling_factor=scaling)
    held_out = np.setdiff1d(np.arange(len(images)), rows)
    try:
        with replaced(out_folder) as folder:
            network.save_pretrained(folder)
            facts = {
                "recipe": asdict(recipe),
                "data": images.digest,
                "rows": digest(rows.tolist()),
                "device": str(next(network.parameters()).device),
                "threads": torch.get_num_threads(),
                "versions": {name: importlib.metadata.version(name) for name in ("torch", "diffusers", "numpy")},
                "weights_sha256": file_digest(folder / WEIGHTS),
                "final": losses,
                "train_error": _reconstruction_error(network, images, rows),
                "held_out_error": _reconstruction_error(network, images, held_out) if len(held_out) else None,
            }
            write_json(folder / "recipe.json", facts)
    except OSError as error:
        raise UserError(f"cannot write to {out_folder} ({error.strerror}): name a folder you may write to") from None


SD_RECIPE = AutoencoderRecipe(block_channels=(128, 256, 512, 512), layers_per_block=2, norm_groups=32)
"""Shapes of Stable Diffusion's autoencoder, which the papers use (config.json of stabilityai/sd-vae-ft-ema); its
training is not described here."""


def _new_network(recipe: AutoencoderRecipe) -> Network:
    """An untrained network from the recipe's own stream; the global random state is left as it was."""
    seed = int(torch.randint(2**62, (), generator=rng.stream(recipe.seed, "autoencoder")))
    with rng.global_state_kept():
        torch.manual_seed(seed)
        return build_network(recipe)


def build_network(recipe: AutoencoderRecipe) -> Network:
    """A network of the recipe's shapes; its random weights come from torch's global state."""
    levels = len(recipe.block_channels)
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        block_out_channels=recipe.block_channels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=recipe.layers_per_block,
        norm_num_groups=recipe.norm_groups,
        latent_channels=recipe.latent_channels,
    )


def _learning_rate(recipe: AutoencoderRecipe, step: int) -> float:
    warmup = max(1, recipe.steps // 20)
    rise = min(1.0, (step + 1) / warmup)
    return recipe.lr * rise * 0.5 * (1 + math.cos(math.pi * step / recipe.steps))


def _fit(
    network: Network, images: ImageSet, rows: np.ndarray, recipe: AutoencoderRecipe, report: Report | None
) -> dict[str, float]:
    """Train; returns the mean absolute error and the KL of the last tenth of the steps."""
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=0.0)
    device = next(network.parameters()).device
    tail: list[tuple[float, float]] = []
    for step in range(recipe.steps):
        generator = rng.stream(recipe.seed, "autoencoder", step)
        chosen = rows[torch.randint(len(rows), (recipe.batch_size,), generator=generator).numpy()]
        pixels_NCHW = to_pixels(images.rows(chosen)).to(device)
        posterior = network.encode(pixels_NCHW).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator).to(device)
        decoded_NCHW = network.decode(posterior.mean + posterior.std * noise).sample
        error = (decoded_NCHW - pixels_NCHW).abs().mean()
        kl = posterior.kl().mean() / noise[0].numel()  # diffusers sums it over an image's latent numbers
        optimizer.zero_grad(set_to_none=True)
        (error + recipe.kl_weight * kl).backward()
        nn.utils.clip_grad_norm_(network.parameters(), recipe.clip_norm)
        for group in optimizer.param_groups:
            group["lr"] = _learning_rate(recipe, step)
        optimizer.step()
        if step >= recipe.steps * 9 // 10:
            tail.append((error.item(), kl.item()))
        if report is not None and (step + 1) % 10 == 0:
            report("training the autoencoder", step + 1, recipe.steps)
    absolute, kl_mean = np.mean(tail, axis=0)
    return {"absolute_error": float(absolute), "kl": float(kl_mean)}


def _unit_scaling(network: Network, images: ImageSet, rows: np.ndarray, seed: int) -> float:
    """1 / standard deviation of posterior samples of the training images, over all their numbers."""
    moments = Autoencoder(network, "").moments(images.rows(rows))
    mean, std = moments.chunk(2, dim=1)
    # The index lies behind the steps' and its length tells it apart from them.
    noise = torch.randn(mean.shape, generator=rng.stream(seed, "autoencoder", 0, 0))
    return 1 / float((mean + std * noise).double().std())


def _reconstruction_error(network: Network, images: ImageSet, rows: np.ndarray) -> float:
    """Root mean squared error, in grey levels 0..255, of decoded posterior means."""
    autoencoder = Autoencoder(network, "")
    original = images.rows(rows)
    decoded = autoencoder.decode(autoencoder.latent_means(autoencoder.moments(original)))
    return float(np.sqrt(np.square(decoded.astype(np.float64) - original).mean()))
