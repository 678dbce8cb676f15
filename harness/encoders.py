"""Frozen image encoders whose tokens methods align with.

Every encoder is fed at the size at which its token grid is the backbone's, so token t of the encoder and token t of
the backbone look at the same part of the image.

Shapes: N images, C channels, H W image height and width, T tokens, Z encoder width.
"""

from dataclasses import dataclass
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from harness import rng, weights
from harness.errors import UserError
from harness.records import digest

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALVES = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
PASS_IMAGES = {True: 8, False: 64}
"""Images encoded together, on a CPU and elsewhere: 8 keep the activations in a CPU's cache, which halves the time."""


@dataclass(frozen=True, kw_only=True)
class EncoderSpec:
    """What has to be known about an encoder without loading it."""

    family: str
    """Networks of one family, seen by a metric and by a method, bias that metric in the method's favour."""
    timm_name: str
    width: int
    """Z."""
    stride: int
    """Pixels of the encoder's input along one token."""
    normalisation: tuple[tuple[float, ...], tuple[float, ...]]
    """Mean and standard deviation a channel, on the scale 0..1."""


def _efficientnet(size: int) -> EncoderSpec:
    return EncoderSpec(
        family="efficientnet",
        timm_name=f"tf_efficientnet_lite{size}",
        width=1280,
        stride=32,
        normalisation=HALVES,
    )


def _dinov2(size: str, width: int, registers: str) -> EncoderSpec:
    return EncoderSpec(
        family="dinov2",
        timm_name=f"vit_{size}_patch14{registers}_dinov2",
        width=width,
        stride=14,
        normalisation=IMAGENET,
    )


ENCODERS = {
    "efficientnet_lite0": _efficientnet(0),
    "efficientnet_lite2": _efficientnet(2),
    **{
        f"dinov2_vit{size[0]}14{suffix}": _dinov2(size, width, registers)
        for size, width in (("small", 384), ("base", 768), ("large", 1024), ("giant", 1536))
        for suffix, registers in (("", ""), ("_reg", "_reg4"))
    },
}
"""Every alignment encoder, by the name that methods use."""


def spec(name: str) -> EncoderSpec:
    """The table's line of a named encoder; `UserError` lists the known names."""
    if name not in ENCODERS:
        raise UserError(f"encoder {name!r} is not known: give one of {', '.join(ENCODERS)}")
    return ENCODERS[name]


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
        build = _load_dinov2 if family(name) == "dinov2" else _load_efficientnet
        with rng.global_state_kept():
            return cls(build(name, grid), name, grid, encoder_digest(name, grid)).to(device)

    @classmethod
    def untrained(cls, name: str, grid: int, device: str | torch.device) -> "FrozenEncoder":
        """The architecture of a named encoder with random weights, where only its cost matters; it has no digest."""
        build = _build_dinov2 if family(name) == "dinov2" else _build_efficientnet
        with rng.global_state_kept():
            return cls(build(name, grid), name, grid, "").to(device)

    @torch.no_grad()
    def forward(self, images_NCHW: Tensor) -> Tensor:
        """uint8 images on the encoder's device -> tokens row by row, float32 [N, T, Z]."""
        x_NCHW = (images_NCHW.float() / 255 - self.mean) / self.std
        side = spec(self.name).stride * self.grid
        # Normalise first, resize second, no antialias: the order of sihyun-yu/REPA train.py:47-49.
        x_NCHW = F.interpolate(x_NCHW, (side, side), mode="bicubic")
        features = self.network.forward_features(x_NCHW)
        if features.ndim == 4:
            tokens_NTZ = features.flatten(2).transpose(1, 2)
        else:
            tokens_NTZ = features[:, self.network.num_prefix_tokens :]
        if tokens_NTZ.shape[1] != self.grid**2:
            raise UserError(f"encoder {self.name} gives {tokens_NTZ.shape[1]} tokens, the backbone has {self.grid**2}")
        return tokens_NTZ.float()

    def tokens(self, images_NCHW: Tensor) -> Tensor:
        """uint8 images [N, 3, H, W] of any device -> float32 [N, T, Z] on the encoder's device, without autocast."""
        device = self.mean.device
        images_NCHW = images_NCHW.to(device)
        with torch.autocast(device.type, enabled=False):
            return torch.cat([self(part) for part in images_NCHW.split(PASS_IMAGES[device.type == "cpu"])])


def _build_efficientnet(name: str, grid: int) -> Any:
    """timm's network, which takes any grid."""
    network = timm.create_model(spec(name).timm_name, pretrained=False)
    return network.to(memory_format=torch.channels_last)  # depthwise convolutions on a CPU are faster so


def _load_efficientnet(name: str, grid: int) -> Any:
    """timm's network with the packaged tensors, which stand in the same order under other names."""
    network, file = _build_efficientnet(name, grid), weights.find(name)
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


def _build_dinov2(name: str, grid: int) -> Any:
    """timm's network for the grid."""
    line = spec(name)
    return timm.create_model(line.timm_name, pretrained=False, img_size=line.stride * grid, num_classes=0)


def _load_dinov2(name: str, grid: int) -> Any:
    """timm's network; timm resamples the position table to the grid as REPA does (bicubic, antialias)."""
    line, file = spec(name), weights.find(name)
    tensors = weights.load_tensors(file.path)
    try:
        network: Any = timm.create_model(
            line.timm_name,
            pretrained=True,
            pretrained_cfg_overlay={"state_dict": tensors},
            img_size=line.stride * grid,
            num_classes=0,
        )
        network.pretrained_cfg.pop("state_dict")  # timm keeps it: a second copy of the weights
        return network
    except (RuntimeError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{file.path} does not hold the weights of {name} ({reason}): replace it") from error
