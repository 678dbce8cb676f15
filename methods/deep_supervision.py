"""Deep supervision in a window of t: an inner block predicts the velocity (Self-Transcendence, arXiv 2601.07773)."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from harness.backbones.sit import patchify
from harness.config import require, require_finite
from harness.flow import velocity
from harness.method import BackboneShape, DataShape, Disclosure, Method, Progress, StepView, Term
from methods._losses import l2, mean_over
from methods._parts import default_block, default_width, mlp

BLOCKS = {"S": 2, "B": 2}
"""B as published; S is ours (it has B's depth)."""


@dataclass(frozen=True, kw_only=True)
class DeepSupervisionConfig:
    """Settings of Self-Transcendence's first stage; the defaults are the release's."""

    block: int = 0
    """Block that predicts the velocity, counted from 1; 0 = 2 for S and B, else 2/12 of the depth."""
    weight: float = 0.5
    """Weight of the term."""
    t_min: float = 0.4
    """Least time of an image that takes part; t = 0 is data."""
    t_max: float = 0.7
    """Greatest time of an image that takes part."""
    head_width: int = 0
    """Width of the head's hidden layers; 0 = 2048 from SiT-S up, below that 4 times the backbone's."""

    def __post_init__(self) -> None:
        require_finite(self, "deep_supervision")
        ordered = 0 <= self.t_min <= self.t_max <= 1
        require(ordered, f"deep_supervision.t_min {self.t_min} and t_max {self.t_max}: give 0 <= t_min <= t_max <= 1")
        require(self.head_width >= 0, f"deep_supervision.head_width is {self.head_width}: give 0 or more")


class DeepSupervision(Method):
    """term = mean over images of [t in window] mean (g(h_k) - patchify(noise - x0))^2."""

    Config = DeepSupervisionConfig
    disclosure = Disclosure(
        summary="Lets block k predict the velocity through an MLP, for images whose t lies in a window.",
        paper="Self-Transcendence, stage 1, arXiv 2601.07773",
        note="images are masked one by one, as the paper means it; in the release every t gets gradient",
    )
    config: DeepSupervisionConfig

    def __init__(self, config: DeepSupervisionConfig, backbone: BackboneShape, data: DataShape) -> None:
        super().__init__(config, backbone, data)
        width = backbone.hidden_size
        self.heads["velocity"] = nn.Sequential(
            mlp([width, config.head_width, config.head_width, width]),
            nn.LayerNorm(width, eps=1e-6, elementwise_affine=False),
            nn.Linear(width, backbone.patch_numbers),
        )

    @classmethod
    def resolve(cls, config: DeepSupervisionConfig, backbone: BackboneShape) -> DeepSupervisionConfig:
        block = config.block or default_block(backbone, BLOCKS, 2 / 12)
        return replace(
            config,
            block=backbone.check_block("deep_supervision.block", block),
            head_width=config.head_width or default_width(backbone),
        )

    def taps(self, progress: Progress) -> tuple[int, ...]:
        return (self.config.block,)

    def terms(self, view: StepView, hidden: Mapping[int, Tensor]) -> dict[str, Term]:
        prediction_NTP = self.heads["velocity"](hidden[self.config.block])
        target_NTP = patchify(velocity(view.x0_NCHW, view.noise_NCHW), self.backbone.patch_size)
        included_N = ((view.t_N >= self.config.t_min) & (view.t_N <= self.config.t_max)).float()
        return {"deep_supervision": Term(mean_over(l2(prediction_NTP, target_NTP), included_N), self.config.weight)}

    @torch.no_grad()
    def diagnostics(self, view: StepView, hidden: Mapping[int, Tensor]) -> dict[str, float]:
        return {"deep_supervision_student_norm": float(hidden[self.config.block].float().norm(dim=-1).mean())}

    def search_space(self) -> dict[str, Any]:
        width = default_width(self.backbone)
        return {
            "block": list(range(1, self.backbone.depth + 1)),
            "weight": [0.1, 0.25, 0.5, 1.0],
            "t_min": [0.0, 0.2, 0.4],
            "t_max": [0.7, 1.0],
            "head_width": [width // 4, width // 2, width],
        }
