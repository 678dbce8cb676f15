"""Frozen image encoders whose tokens methods align with.

Every encoder is fed at the size at which its token grid is the backbone's, so token t of the encoder and token t of
the backbone look at the same part of the image.

Shapes: N images, C channels, H W image height and width, T tokens, Z encoder width.
"""

import functools
from dataclasses import dataclass
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from harness import rng
from harness.errors import UserError
from harness.frozen import weights
from harness.records.files import digest

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALVES = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
PASS_IMAGES = {True: 8, False: 64}
"""Images encoded together, on a CPU and elsewhere: 8 keep the activations in a CPU's cache, which halves the time."""


@dataclass(frozen=True, kw_only=True)
class EncoderSpec:
    """The facts about an encoder that are known without loading it."""

    family: str
    """Networks of one family, seen by a metric and by a method, bias that metric in the method's favour."""
    timm_name: str
    width: int
    """Z, the numbers in one token."""
    stride: int
    """Pixels of the encoder's input along one token."""
    normalisation: tuple[tuple[float, ...], tuple[float, ...]]
    """Mean and standard deviation a channel, on the scale 0..1."""
    fixed_size: bool = False
    """Whether the network is built for one size of its input."""


def _efficientnet(size: int) -> EncoderSpec:
    return EncoderSpec(
        family="efficientnet",
        timm_name=f"tf_efficientnet_lite{size}",
        width=1280,
        stride=32,
        normalisation=HALVES,
    )


def _dinov2(timm_name: str, width: int) -> EncoderSpec:
    return EncoderSpec(
        family="dinov2",
        timm_name=timm_name,
        width=width,
        stride=14,
        normalisation=IMAGENET,
        fixed_size=True,
    )


WIDTHS = {"s": 384, "b": 768, "l": 1024, "g": 1536}
"""Z of DINOv2, by the letter of its size."""
ENCODERS = {
    "efficientnet_lite0": _efficientnet(0),
    "efficientnet_lite2": _efficientnet(2),
    **{name: _dinov2(weights.timm_name(name), WIDTHS[name[10]]) for name in weights.DINOV2},
}
"""Alignment encoders by the name that methods use; every other network of timm is `timm/<network>`."""


def spec(name: str) -> EncoderSpec:
    """The facts about a named encoder, from the table or from timm; `UserError` lists the known names."""
    if name.startswith(weights.TIMM):
        return _timm_spec(name)
    if name not in ENCODERS:
        raise UserError(f"encoder {name!r} is not known: give one of {', '.join(ENCODERS)}, or timm/<network>")
    return ENCODERS[name]


@functools.lru_cache(maxsize=64)
def _timm_spec(name: str) -> EncoderSpec:
    """Read off the network itself, built without numbers; `UserError` for a network that gives no grid of tokens."""
    network_name = name.removeprefix(weights.TIMM)
    config = timm.get_pretrained_cfg(network_name)
    if config is None:
        near = ", ".join(timm.list_models(f"*{network_name.split('.')[0].split('_')[0]}*")[:5])
        raise UserError(f"encoder {name!r} is not known to timm: it has {near or 'other networks'}, ...")
    with rng.global_state_kept(), torch.device("meta"):
        network: Any = timm.create_model(network_name, pretrained=False)
    if not getattr(network, "feature_info", None):
        raise UserError(
            f"encoder {name!r} says nothing of its grid of features: choose a ViT or a convolutional network"
        )
    module = type(network).__module__.rpartition(".")[2]
    return EncoderSpec(
        family="dinov2" if "dinov2" in network_name else module,
        timm_name=network_name,
        width=network.num_features,
        stride=network.feature_info[-1]["reduction"],
        normalisation=(tuple(config.mean), tuple(config.std)),
        fixed_size=bool(config.fixed_input_size),
    )


def encoder_width(name: str) -> int:
    """Width Z of a named encoder's tokens, without loading it."""
    return spec(name).width


def family(name: str) -> str:
    """The family a named encoder belongs to."""
    return spec(name).family


def encoder_digest(name: str, grid: int) -> str:
    """Digest of weights and preprocessing, without building the network: equal digests give equal tokens."""
    line = spec(name)
    return digest(
        {
            "weights": weights.find(name).sha256,
            "network": line.timm_name,
            "normalisation": line.normalisation,
            "resize": f"bicubic after normalisation, no antialias, to {line.stride * grid}",
        }
    )


class FrozenEncoder(nn.Module):
    """An encoder in eval mode without gradient, giving `grid * grid` tokens an image."""

    mean: Tensor
    std: Tensor

    def __init__(self, network: Any, name: str, grid: int, digest: str) -> None:
        super().__init__()
        self.network = network
        self.name = name
        self.grid = grid
        self.digest = digest
        mean, std = spec(name).normalisation
        self.register_buffer("mean", torch.tensor(mean).reshape(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).reshape(3, 1, 1), persistent=False)
        self.eval().requires_grad_(False)

    @classmethod
    def load(cls, name: str, grid: int, device: str | torch.device) -> "FrozenEncoder":
        """Load a named encoder for a grid of `grid` x `grid` tokens; `UserError` for weights that do not fit."""
        if grid < 1:
            raise UserError(f"encoder {name}: a grid of {grid} x {grid} tokens cannot be matched; give 1 or more")
        build = _load_packaged if name in weights.PACKAGES else _load_timm
        with rng.global_state_kept():
            return cls(build(name, grid), name, grid, encoder_digest(name, grid)).to(device)

    @classmethod
    def untrained(cls, name: str, grid: int, device: str | torch.device) -> "FrozenEncoder":
        """The architecture of a named encoder with random weights, where only its cost matters; it has no digest."""
        with rng.global_state_kept():
            return cls(_build(name, grid), name, grid, "").to(device)

    @torch.no_grad()
    def forward(self, images_NCHW: Tensor) -> Tensor:
        """uint8 images on the encoder's device -> tokens row by row, float32 [N, T, Z]."""
        x_NCHW = (images_NCHW.float() / 255 - self.mean) / self.std
        side = spec(self.name).stride * self.grid
        # Normalise first, resize second, no antialias: the order of sihyun-yu/REPA train.py:47-49.
        x_NCHW = F.interpolate(x_NCHW, (side, side), mode="bicubic")
        features = self.network.forward_features(x_NCHW)
        if features.ndim == 4:
            is_last = getattr(self.network, "output_fmt", "NCHW") == "NHWC"
            tokens_NTZ = features.flatten(1, 2) if is_last else features.flatten(2).transpose(1, 2)
        else:
            tokens_NTZ = features[:, getattr(self.network, "num_prefix_tokens", 0) :]
        if tokens_NTZ.shape[1:] != (self.grid**2, spec(self.name).width):
            raise UserError(
                f"encoder {self.name} gives {tokens_NTZ.shape[1]} tokens of width {tokens_NTZ.shape[2]}, "
                f"wanted are the backbone's {self.grid**2} of {spec(self.name).width}: choose another encoder"
            )
        return tokens_NTZ.float()

    def tokens(self, images_NCHW: Tensor) -> Tensor:
        """uint8 images [N, 3, H, W] of any device -> float32 [N, T, Z] on the encoder's device, without autocast."""
        device = self.mean.device
        images_NCHW = images_NCHW.to(device)
        with torch.autocast(device.type, enabled=False):
            return torch.cat([self(part) for part in images_NCHW.split(PASS_IMAGES[device.type == "cpu"])])


def _build(name: str, grid: int, **options: Any) -> Any:
    """timm's network for the grid; without a classifier only where its weights come without one."""
    line = spec(name)
    sized = {"img_size": line.stride * grid} if line.fixed_size else {}
    network = timm.create_model(line.timm_name, **{"pretrained": False, **sized, **options})
    if hasattr(network, "num_prefix_tokens"):
        return network
    return network.to(memory_format=torch.channels_last)  # depthwise convolutions on a CPU are faster so


def _load_packaged(name: str, grid: int) -> Any:
    """timm's network with the packaged tensors, which stand in the same order under other names."""
    network, file = _build(name, grid), weights.find(name)
    network.load_state_dict(_renamed(weights.load_tensors(file.path), network.state_dict(), file))
    return network


def _renamed(tensors: dict[str, Tensor], names: dict[str, Tensor], file: weights.WeightsFile) -> dict[str, Tensor]:
    """The tensors under timm's names, matched by order; every shape and every last name part must agree."""
    pairs = list(zip(tensors.items(), names.items(), strict=False))
    fits = len(tensors) == len(names) and all(
        theirs.shape == ours.shape and old.rpartition(".")[2] == new.rpartition(".")[2]
        for (old, theirs), (new, ours) in pairs
    )
    if not fits:
        raise UserError(f"{file.path} does not hold the weights of {file.name}: replace it by the packaged file")
    return {new: theirs for (_, theirs), (new, _) in pairs}


def _load_timm(name: str, grid: int) -> Any:
    """timm's network. timm renames what other releases call otherwise, and resamples a position table to the grid as
    REPA does (bicubic, antialias); with the number of classes of the weights it takes no file with a hole."""
    file = weights.find(name)
    tensors = weights.load_tensors(file.path)
    try:
        network = _build(name, grid, pretrained=True, pretrained_cfg_overlay={"state_dict": tensors})
    except (RuntimeError, KeyError, ValueError, AssertionError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{file.path} does not hold the weights of {name} ({reason}): replace it") from error
    network.pretrained_cfg.pop("state_dict")  # timm keeps it: a second copy of the weights
    return network
