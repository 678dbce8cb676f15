"""REPA (arXiv 2410.06940): align an inner block with patch tokens of a frozen image encoder."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from harness.config import require, require_finite
from harness.method import BackboneShape, DataShape, Disclosure, Method, Needs, Progress, StepView, Term
from methods._losses import cosine, mean_over
from methods._parts import default_block, default_width, encoder_names, head_name, load_renamed, mlp

BLOCKS = {"S": 4, "B": 4, "L": 8, "XL": 8}
"""B, L, XL as published; S is ours (it has B's depth)."""


@dataclass(frozen=True, kw_only=True)
class RepaConfig:
    """REPA's settings; the defaults are the paper's."""

    block: int = 0
    """Block whose output is aligned, counted from 1; 0 = by size: 4 (S, B), 8 (L, XL), else 8/28 of the depth."""
    weight: float = 0.5
    """Weight of the term."""
    encoders: str = "dinov2_vitb14"
    """Frozen encoders, separated by commas; the term is the mean over them."""
    head_width: int = 0
    """Width of each head's hidden layers; 0 = 2048 from SiT-S up, below that 4 times the backbone's."""

    def __post_init__(self) -> None:
        require_finite(self, "repa")
        encoder_names("repa", self.encoders)
        require(self.head_width >= 0, f"repa.head_width is {self.head_width}: give 0 or more")


class Repa(Method):
    """term = - mean over images and tokens of cos(z, g(h_k)), the mean over encoders (sihyun-yu/REPA loss.py:80-88)."""

    Config = RepaConfig
    disclosure = Disclosure(
        summary="Aligns block k with the patch tokens of a frozen image encoder, through an MLP.",
        paper="REPA, arXiv 2410.06940",
        pretrained=(
            "the frozen encoder: DINOv2 ViT-B/14 (Apache-2.0) as published, another where repa.encoders says so",
        ),
        outside_data=("the encoder's training data: LVD-142M for DINOv2, ImageNet-1k with labels for EfficientNet",),
    )
    config: RepaConfig

    def __init__(self, config: RepaConfig, backbone: BackboneShape, data: DataShape) -> None:
        super().__init__(config, backbone, data)
        width, hidden = backbone.hidden_size, config.head_width
        for name in self.encoders:
            self.heads[head_name(name)] = mlp([width, hidden, hidden, data.encoder_width(name)])

    @classmethod
    def resolve(cls, config: RepaConfig, backbone: BackboneShape) -> RepaConfig:
        block = config.block or default_block(backbone, BLOCKS, 8 / 28)
        return replace(
            config,
            block=backbone.check_block("repa.block", block),
            head_width=config.head_width or default_width(backbone),
        )

    @property
    def encoders(self) -> tuple[str, ...]:
        return encoder_names("repa", self.config.encoders)

    def needs(self) -> Needs:
        return Needs(encoders=self.encoders)

    def taps(self, progress: Progress) -> tuple[int, ...]:
        return (self.config.block,)

    def terms(self, view: StepView, hidden: Mapping[int, Tensor]) -> dict[str, Term]:
        h_NTD = hidden[self.config.block]
        similarities = [cosine(self._project(name, h_NTD), view.tokens[name]) for name in self.encoders]
        return {"repa": Term(-mean_over(torch.stack(similarities).mean(0)), self.config.weight)}

    def _project(self, encoder: str, h_NTD: Tensor) -> Tensor:
        return self.heads[head_name(encoder)](h_NTD)

    @torch.no_grad()
    def diagnostics(self, view: StepView, hidden: Mapping[int, Tensor]) -> dict[str, float]:
        h_NTD = hidden[self.config.block]
        return {"repa_student_norm": float(h_NTD.float().norm(dim=-1).mean())}

    def load_released(self, heads: Mapping[str, Tensor]) -> None:
        """`projectors.<i>` is the i-th encoder's head, with our layers (sihyun-yu/REPA models/sit.py:16-23)."""
        num = len({name.split(".")[1] for name in heads if name.startswith("projectors.")})
        require(num == len(self.encoders), f"repa.encoders is {self.config.encoders!r}: the release has {num} heads")
        for index, name in enumerate(self.encoders):
            load_renamed(self.heads[head_name(name)], heads, {f"projectors.{index}.": ""})

    def search_space(self) -> dict[str, Any]:
        width = default_width(self.backbone)
        return {
            "block": list(range(1, self.backbone.depth + 1)),
            "weight": [0.25, 0.5, 0.75, 1.0],
            "head_width": [width // 4, width // 2, width],
        }
