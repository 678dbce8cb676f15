"""Feature extractors for torch-fidelity, and the features of the classifier.

torch-fidelity builds an extractor by its registered name and caches features under that name, so the name holds all
that decides a feature: network, weights, input size. Under one name there is one extractor in a process.

Shapes: N images, C channels, H W image height and width in pixels, F features.
"""

from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch_fidelity import FeatureExtractorBase, register_feature_extractor
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

from harness import encoders, weights
from harness.encoders import FrozenEncoder
from harness.errors import UserError

LAYER = "pooled"
"""The one layer that every extractor offers."""
PIXEL_SIDE = 8
"""Side of the pixel extractor's luminance picture."""
FAMILY = "efficientnet"
"""Family of encoders that serve as extractors: convolutional, so their last map has a spatial mean."""

Normalisation = tuple[tuple[float, ...], tuple[float, ...]]


class _Features(FeatureExtractorBase):
    """What torch-fidelity asks of an extractor with one layer. It passes all its own settings as keywords."""

    def __init__(self, name: str, features_list: list[str], **_: Any) -> None:
        super().__init__(name, features_list)

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        return (LAYER,)

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        return LAYER


class EncoderFeatures(_Features):
    """Spatial mean of a frozen network's last feature map, [N, F], in float32."""

    size: ClassVar[int]
    normalisation: ClassVar[Normalisation]
    shared: ClassVar[nn.Module]
    """The network: torch-fidelity makes a new extractor at every call, and loading takes half a second."""

    def __init__(self, name: str, features_list: list[str], **settings: Any) -> None:
        super().__init__(name, features_list, **settings)
        self.network: Any = self.shared

    def forward(self, images_NCHW: Tensor) -> tuple[Tensor]:
        device = images_NCHW.device
        self.network.to(device)
        mean, std = (torch.tensor(value, device=device).reshape(1, 3, 1, 1) for value in self.normalisation)
        x_NCHW = (resize(images_NCHW.float() / 255, self.size) - mean) / std
        with torch.autocast(device.type, enabled=False):
            features = self.network.forward_features(x_NCHW.contiguous(memory_format=torch.channels_last))
        return (features.mean(dim=(2, 3)),)


class PixelFeatures(_Features):
    """Luminance averaged to 8 x 8, in 0..1: distances that no network takes part in."""

    def forward(self, images_NCHW: Tensor) -> tuple[Tensor]:
        return (luminance(images_NCHW),)


def resize(images_NCHW: Tensor, size: int) -> Tensor:
    """Bicubic to size x size; antialiased when it shrinks, else every generated pixel grid would alias anew."""
    return F.interpolate(images_NCHW, (size, size), mode="bicubic", antialias=images_NCHW.shape[-1] > size)


def luminance(images_NCHW: Tensor) -> Tensor:
    """uint8 images -> ITU-R BT.601 luminance averaged to 8 x 8, row by row, float32 [N, 64] in 0..1."""
    weight = torch.tensor([0.299, 0.587, 0.114], device=images_NCHW.device).reshape(1, 3, 1, 1)
    grey_NCHW = (images_NCHW.float() / 255 * weight).sum(dim=1, keepdim=True)
    return F.adaptive_avg_pool2d(grey_NCHW, PIXEL_SIDE).flatten(1)


def pixel_features(images_NHWC: np.ndarray) -> np.ndarray:
    """`luminance` of a uint8 array, float32 [N, 64]."""
    return luminance(torch.from_numpy(images_NHWC).permute(0, 3, 1, 2)).numpy()


def register_encoder(encoder: str, size: int) -> str:
    """Register an encoder as a torch-fidelity extractor for inputs of `size` pixels; returns its name there.

    Raises:
        UserError: for an encoder that is no extractor, or whose weights are missing.
    """
    names = [name for name in encoders.ENCODERS if encoders.family(name) == FAMILY]
    if encoder not in names:
        raise UserError(f"evaluation.extractor is {encoder!r}: give one of {', '.join(names)}")
    name = f"{encoder}-{size}-{weights.find(encoder).sha256[:12]}"
    if name not in FEATURE_EXTRACTORS_REGISTRY:
        # Depth-wise convolutions are nearly twice as fast on a CPU with channels last.
        network = FrozenEncoder.load(encoder, 1, "cpu").network.to(memory_format=torch.channels_last)
        facts = {"size": size, "normalisation": encoders.spec(encoder).normalisation, "shared": network}
        register_feature_extractor(name, type("EncoderFeatures", (EncoderFeatures,), facts))
    return name


def register_pixels() -> str:
    """Register the pixel extractor; returns its name in torch-fidelity."""
    name = f"pixels-{PIXEL_SIDE}"
    if name not in FEATURE_EXTRACTORS_REGISTRY:
        register_feature_extractor(name, PixelFeatures)
    return name


def describe(encoder: str, size: int) -> dict[str, Any]:
    """What decides an encoder's features, for the evaluation protocol."""
    mean, std = encoders.spec(encoder).normalisation
    return {
        "name": encoder,
        "weights": weights.find(encoder).sha256,
        "size": size,
        "resize": "bicubic, antialiased when it shrinks",
        "mean": list(mean),
        "std": list(std),
        "layer": "last feature map, spatial mean",
        "precision": "fp32",
    }
