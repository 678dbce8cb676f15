"""VAE-REPA (arXiv 2601.17830): align an inner block with the clean latent. A re-implementation from the paper."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from harness.backbones.sit import patchify
from harness.config import require, require_finite
from harness.method import BackboneShape, DataShape, Disclosure, Method, Progress, StepView, Term
from methods._losses import REGRESSIONS, mean_over
from methods._parts import default_block, mlp

BLOCKS = {"S": 2, "B": 2, "L": 8, "XL": 8}
"""B, L, XL from summaries of the paper; S is ours (it has B's depth)."""


@dataclass(frozen=True, kw_only=True)
class VaeRepaConfig:
    """VAE-REPA's settings; the defaults are the paper's where it states one."""

    block: int = 0
    """Block whose output is aligned, counted from 1; 0 = by size: 2 (S, B), 8 (L, XL), else 2/12 of the depth."""
    weight: float = 1.0
    """Weight of the term."""
    loss: Literal["smooth_l1", "cosine", "l1", "l2"] = "smooth_l1"
    """How the head's output is compared with the latent; cosine is 1 - cosine over a token's numbers."""
    beta: float = 0.05
    """Width of smooth-L1's quadratic part."""
    head_layers: int = 5
    """Linear layers of the head."""
    head_width: int = 0
    """Width of the head's hidden layers; 0 = 2 times the backbone's."""
    activation: Literal["silu", "gelu"] = "silu"
    """Between the head's layers; the paper does not state it, SiLU is ours."""
    t_min: float = 0.0
    """The term counts only images whose t is at least this."""
    t_max: float = 1.0
    """The term counts only images whose t is at most this; 0.5 is the low-noise half."""
    target: Literal["sample", "mean"] = "sample"
    """The latent that the step trains on, or the posterior's mean."""
    reduction: Literal["mean", "sum"] = "mean"
    """Mean over a latent's numbers, or their sum (printed in one summary; it drowns the velocity loss)."""

    def __post_init__(self) -> None:
        require_finite(self, "vae_repa")
        require(self.beta > 0, f"vae_repa.beta is {self.beta}: give more than 0")
        require(1 <= self.head_layers <= 64, f"vae_repa.head_layers is {self.head_layers}: give 1 to 64")
        require(self.head_width >= 0, f"vae_repa.head_width is {self.head_width}: give 0 or more")
        require(
            not (self.loss == "cosine" and self.reduction == "sum"),
            "vae_repa.reduction is 'sum' with loss 'cosine': a cosine has one value a token, so give reduction 'mean'",
        )
        ordered = 0 <= self.t_min <= self.t_max <= 1
        require(ordered, f"vae_repa.t_min {self.t_min} and t_max {self.t_max}: give 0 <= t_min <= t_max <= 1")


class VaeRepa(Method):
    """term = mean over images, tokens and numbers of smoothL1(g(h_k) - patchify(x0))."""

    Config = VaeRepaConfig
    disclosure = Disclosure(
        summary="Aligns block k with the patches of the clean latent, through an MLP.",
        paper="VAE-REPA, arXiv 2601.17830",
        note="re-implementation from the paper: no official code is public",
    )
    config: VaeRepaConfig

    def __init__(self, config: VaeRepaConfig, backbone: BackboneShape, data: DataShape) -> None:
        super().__init__(config, backbone, data)
        hidden = [config.head_width] * (config.head_layers - 1)
        self.heads["latent"] = mlp([backbone.hidden_size, *hidden, backbone.patch_numbers], config.activation)

    @classmethod
    def resolve(cls, config: VaeRepaConfig, backbone: BackboneShape) -> VaeRepaConfig:
        block = config.block or default_block(backbone, BLOCKS, 2 / 12)
        return replace(
            config,
            block=backbone.check_block("vae_repa.block", block),
            head_width=config.head_width or 2 * backbone.hidden_size,
        )

    def taps(self, progress: Progress) -> tuple[int, ...]:
        return (self.config.block,)

    def terms(self, view: StepView, hidden: Mapping[int, Tensor]) -> dict[str, Term]:
        prediction_NTP = self.heads["latent"](hidden[self.config.block])
        latent_NCHW = view.x0_NCHW if self.config.target == "sample" else view.x0_mean_NCHW
        target_NTP = patchify(latent_NCHW, self.backbone.patch_size)
        value_N = REGRESSIONS[self.config.loss](prediction_NTP, target_NTP, self.config.beta)
        if self.config.reduction == "sum":
            value_N = value_N * target_NTP[0].numel()
        return {"vae_repa": Term(mean_over(value_N, self._included(view.t_N)), self.config.weight)}

    def _included(self, t_N: Tensor) -> Tensor:
        """1 for images whose t lies in the range, else 0."""
        return ((t_N >= self.config.t_min) & (t_N <= self.config.t_max)).float()

    @torch.no_grad()
    def diagnostics(self, view: StepView, hidden: Mapping[int, Tensor]) -> dict[str, float]:
        return {"vae_repa_student_norm": float(hidden[self.config.block].float().norm(dim=-1).mean())}

    def search_space(self) -> dict[str, Any]:
        width = self.backbone.hidden_size
        return {
            "block": list(range(1, self.backbone.depth + 1)),
            "weight": [0.1, 0.5, 1.0],
            "head_layers": [2, 3, 5],
            "head_width": [width, 2 * width, 4 * width],
            "loss": ["smooth_l1", "cosine", "l1", "l2"],
            "t_max": [0.5, 1.0],
        }
