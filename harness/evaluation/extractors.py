"""Feature extractors for torch-fidelity, and the features of the classifier.

torch-fidelity builds an extractor by its registered name and caches features under that name, so the name holds all
that decides a feature: network, weights, input size. Under one name there is one extractor in a process.

Shapes: N images, C channels, H W image height and width in pixels, F features.
"""

import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch_fidelity import FeatureExtractorBase, register_feature_extractor
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

from harness.errors import UserError
from harness.frozen import encoders, weights
from harness.frozen.encoders import FrozenEncoder
from harness.frozen.weights import INCEPTION, WeightsFile
from harness.rng import global_state_kept

LAYER = "pooled"
"""The one layer that every extractor offers."""
PIXEL_SIDE = 8
"""Side of the pixel extractor's luminance picture."""
FAMILY = "efficientnet"
"""Family of encoders that serve as extractors: convolutional, so their last map has a spatial mean."""

POOLED, LOGITS, SPATIAL = "2048", "logits_unbiased", "spatial"
"""Layers of Inception: torch-fidelity's names for the two that it offers, and ours for the third."""
SPATIAL_CHANNELS, SPATIAL_SIDE = 7, 17
"""Channels that sFID reads of a map, and the map's side (openai/guided-diffusion evaluations/evaluator.py)."""
INCEPTION_WIDTH, SPATIAL_WIDTH = 2048, SPATIAL_CHANNELS * SPATIAL_SIDE**2
"""F of Inception's layers for FID and sFID."""

Normalisation = tuple[tuple[float, ...], tuple[float, ...]]


@dataclass(frozen=True, kw_only=True)
class Extractor:
    """A registered extractor, and what its layers are for."""

    name: str
    """Its name in torch-fidelity."""
    label: str
    """Its name inside metric names."""
    family: str
    """Methods that were trained towards features of the same family are favoured."""
    width: int
    """F of the layer that distances are computed on."""
    layer: str = LAYER
    """Layer whose features the Frechet and kernel distances, precision and recall are computed on."""
    spatial: str = ""
    """Layer of the spatial Frechet distance; "" = there is none."""
    spatial_width: int = 0
    """F of that layer."""
    logits: str = ""
    """Layer of class logits, for the Inception score; "" = there is none."""
    is_standard: bool = False
    """Whether this is the standard evaluator's extractor, so that its Frechet distance is called FID."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """The facts that decide its features; they stand in the evaluation protocol."""

    @property
    def compared(self) -> tuple[str, ...]:
        """Layers whose features are compared with the reference's."""
        return (self.layer, self.spatial) if self.spatial else (self.layer,)

    @property
    def layers(self) -> tuple[str, ...]:
        """All layers that metrics need of generated images."""
        return (*self.compared, self.logits) if self.logits else self.compared


class _Features(FeatureExtractorBase):
    """The methods that torch-fidelity calls on an extractor with one layer; it passes its own settings as keywords."""

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


class InceptionFeatures(FeatureExtractorBase):
    """torch-fidelity's Inception, and the spatial features that it does not offer."""

    shared: ClassVar[FeatureExtractorInceptionV3]

    def __init__(self, name: str, features_list: list[str], **_: Any) -> None:
        super().__init__(name, features_list)
        self.network = self.shared

    def forward(self, images_NCHW: Tensor) -> tuple[Tensor, ...]:
        maps: list[Tensor] = []
        self.network.to(images_NCHW.device)
        # mixed_6/conv of the original graph (toshas/torch-fidelity utils/util_convert_inception_weights.py).
        hook = self.network.Mixed_6d.branch1x1.register_forward_hook(lambda module, given, map_: maps.append(map_))
        try:
            with torch.autocast(images_NCHW.device.type, enabled=False):
                pooled, logits = self.network(images_NCHW)
        finally:
            hook.remove()
        # Row by row, then channel, as the original graph has it: stored statistics are in this order.
        spatial = maps[0][:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
        found = {POOLED: pooled, LOGITS: logits, SPATIAL: spatial}
        return tuple(found[layer] for layer in self.features_list)

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        return (POOLED, LOGITS, SPATIAL)

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        return LOGITS if metric == "isc" else POOLED


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


# -- registration ---------------------------------------------------------------------------------------------------


def family(extractor: str) -> str:
    """The family of networks that an extractor belongs to."""
    return extractor if extractor == INCEPTION else encoders.family(extractor)


def input_size(extractor: str, size: int) -> int:
    """Side in pixels to which an extractor resizes images: what is asked for, but Inception has its own."""
    return FeatureExtractorInceptionV3.INPUT_IMAGE_SIZE if extractor == INCEPTION else size


def compared_width(extractor: str) -> int:
    """Features of one image that distances are computed on, all layers together; the weights need not be there."""
    return INCEPTION_WIDTH + SPATIAL_WIDTH if extractor == INCEPTION else encoders.encoder_width(extractor)


def find(extractor: str, size: int) -> Extractor:
    """Register an extractor for images resized to `size` pixels, and say what it offers.

    Raises:
        UserError: for a name that is no extractor's, or weights that are missing or do not fit.
    """
    if extractor == INCEPTION:
        return _inception()
    return Extractor(
        name=register_encoder(extractor, size),
        label=extractor,
        family=family(extractor),
        width=encoders.encoder_width(extractor),
        facts=describe(extractor, size),
    )


def find_pixels() -> Extractor:
    """The pixel extractor."""
    return Extractor(name=register_pixels(), label="pixels", family="", width=PIXEL_SIDE**2)


def _inception() -> Extractor:
    file = weights.find(INCEPTION)
    is_standard = weights.is_released(file)
    name = f"{INCEPTION}-{file.sha256[:12]}"
    if name not in FEATURE_EXTRACTORS_REGISTRY:
        facts = {"shared": _load_inception(file)}
        register_feature_extractor(name, type("InceptionFeatures", (InceptionFeatures,), facts))
    return Extractor(
        name=name,
        label=INCEPTION if is_standard else f"{INCEPTION}_unverified",
        family=INCEPTION,
        width=INCEPTION_WIDTH,
        layer=POOLED,
        spatial=SPATIAL,
        spatial_width=SPATIAL_WIDTH,
        logits=LOGITS,
        is_standard=is_standard,
        facts={
            "name": INCEPTION,
            "weights": file.sha256,
            "size": FeatureExtractorInceptionV3.INPUT_IMAGE_SIZE,
            "resize": "bilinear as in TensorFlow 1, no antialias",
            "layer": "pool_3",
            "spatial": f"mixed_6/conv, first {SPATIAL_CHANNELS} channels",
            "logits": "without bias",
            "precision": "fp32",
        },
    )


def _load_inception(file: WeightsFile) -> FeatureExtractorInceptionV3:
    """torch-fidelity unpickles whatever a weights file holds, so it gets a copy of the plain tensors that are in it."""
    copy = io.BytesIO()
    torch.save(weights.load_tensors(file.path), copy)
    copy.seek(0)
    try:
        with global_state_kept():
            return FeatureExtractorInceptionV3(file.name, [POOLED, LOGITS], feature_extractor_weights_path=copy)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"{file.path} does not hold torch-fidelity's Inception ({reason}): replace it") from error


def register_encoder(encoder: str, size: int) -> str:
    """Register an encoder as a torch-fidelity extractor for inputs of `size` pixels; returns its name there.

    Raises:
        UserError: for an encoder that is no extractor, or whose weights are missing.
    """
    names = [name for name in encoders.ENCODERS if encoders.family(name) == FAMILY]
    if encoder not in names:
        raise UserError(f"evaluation.extractor is {encoder!r}: give one of {', '.join((*names, INCEPTION))}")
    name = f"{encoder}-{size}-{weights.find(encoder).sha256[:12]}"
    if name not in FEATURE_EXTRACTORS_REGISTRY:
        network = FrozenEncoder.load(encoder, 1, "cpu").network
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
    """The facts that decide an encoder's features; they stand in the evaluation protocol."""
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
