"""iREPA (arXiv 2512.10794): REPA with a convolution as its head and a target without most of its mean over tokens."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from harness.config import require, require_finite
from harness.method import BackboneShape, DataShape, Disclosure, Method, Needs, Progress, StepView, Term
from methods._losses import cosine, mean_over
from methods._parts import default_block, encoder_names, head_name

BLOCKS = {"S": 4, "B": 4, "L": 8, "XL": 8}
"""B, L, XL as published; S is ours (it has B's depth)."""
EPS = 1e-6
"""Added to the standard deviation of a channel over tokens (End2End-Diffusion/iREPA ldm/utils.py:113-127)."""


@dataclass(frozen=True, kw_only=True)
class IrepaConfig:
    """iREPA's settings; the defaults are the paper's."""

    block: int = 0
    """Block whose output is aligned, counted from 1; 0 = by size: 4 (S, B), 8 (L, XL), else 8/28 of the depth."""
    weight: float = 1.0
    """Weight of the term."""
    encoders: str = "dinov2_vitb14"
    """Frozen encoders, separated by commas; the term is the mean over them."""
    kernel: int = 3
    """Side of the head's convolution, odd. The paper has 3; the documented command of the release trains 1."""
    gamma: float = 0.6
    """Share of a channel's mean over tokens that is taken from the target, 0 to 1."""

    def __post_init__(self) -> None:
        require_finite(self, "irepa")
        encoder_names("irepa", self.encoders)
        require(self.kernel >= 1 and self.kernel % 2 == 1, f"irepa.kernel is {self.kernel}: give an odd number")
        require(0 <= self.gamma <= 1, f"irepa.gamma is {self.gamma}: give 0 to 1")


class Irepa(Method):
    """term = - mean over images and tokens of cos(n(z), g(h_k)), g one convolution, n the spatial normalisation."""

    Config = IrepaConfig
    disclosure = Disclosure(
        summary="Aligns block k with spatially normalised patch tokens of a frozen image encoder, by a convolution.",
        paper="iREPA, arXiv 2512.10794",
        pretrained=(
            "the frozen encoder: DINOv2 ViT-B/14 (Apache-2.0) as published, another where irepa.encoders says so",
        ),
        outside_data=("the encoder's training data: LVD-142M for DINOv2, ImageNet-1k with labels for EfficientNet",),
    )
    config: IrepaConfig

    def __init__(self, config: IrepaConfig, backbone: BackboneShape, data: DataShape) -> None:
        super().__init__(config, backbone, data)
        for name in self.encoders:
            self.heads[head_name(name)] = nn.Conv2d(
                backbone.hidden_size, data.encoder_width(name), config.kernel, padding=config.kernel // 2
            )

    @classmethod
    def resolve(cls, config: IrepaConfig, backbone: BackboneShape) -> IrepaConfig:
        require(backbone.num_tokens > 1, "irepa normalises over tokens, and this backbone has one: choose more of them")
        block = config.block or default_block(backbone, BLOCKS, 8 / 28)
        return replace(config, block=backbone.check_block("irepa.block", block))

    @property
    def encoders(self) -> tuple[str, ...]:
        return encoder_names("irepa", self.config.encoders)

    def needs(self) -> Needs:
        return Needs(encoders=self.encoders)

    def taps(self, progress: Progress) -> tuple[int, ...]:
        return (self.config.block,)

    def terms(self, view: StepView, hidden: Mapping[int, Tensor]) -> dict[str, Term]:
        h_NTD = hidden[self.config.block]
        similarities = [
            cosine(self._project(name, h_NTD), normalise_over_tokens(view.tokens[name], self.config.gamma))
            for name in self.encoders
        ]
        return {"irepa": Term(-mean_over(torch.stack(similarities).mean(0)), self.config.weight)}

    def _project(self, encoder: str, h_NTD: Tensor) -> Tensor:
        """The head's output on the grid of tokens, [N, T, Z]; tokens lie row by row."""
        map_NDHW = h_NTD.transpose(1, 2).unflatten(2, (self.backbone.grid, self.backbone.grid))
        return self.heads[head_name(encoder)](map_NDHW).flatten(2).transpose(1, 2)

    @torch.no_grad()
    def diagnostics(self, view: StepView, hidden: Mapping[int, Tensor]) -> dict[str, float]:
        return {"irepa_student_norm": float(hidden[self.config.block].float().norm(dim=-1).mean())}

    def search_space(self) -> dict[str, Any]:
        return {
            "block": list(range(1, self.backbone.depth + 1)),
            "weight": [0.25, 0.5, 1.0],
            "kernel": [1, 3, 5],
            "gamma": [0.0, 0.3, 0.6, 0.9],
        }


def normalise_over_tokens(tokens_NTZ: Tensor, gamma: float) -> Tensor:
    """(f - gamma mean_T f) / (std_T f + EPS) for each image and channel, with the unbiased standard deviation.

    It is computed in float32: a channel that is constant over the tokens is divided by EPS and overflows fp16.
    """
    tokens_NTZ = tokens_NTZ.float()
    return (tokens_NTZ - gamma * tokens_NTZ.mean(1, keepdim=True)) / (tokens_NTZ.std(1, keepdim=True) + EPS)
