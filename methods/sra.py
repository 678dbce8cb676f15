"""SRA (arXiv 2505.02831): align an early block with a later block of the EMA teacher that sees less noise."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from harness.config import require, require_finite
from harness.flow import interpolate
from harness.method import BackboneShape, DataShape, Disclosure, Method, Needs, Progress, StepView, Term
from methods._losses import cosine, mean_over, smooth_l1
from methods._parts import default_block, load_renamed, mlp

BLOCKS = {"S": 3, "B": 3, "L": 6, "XL": 8}
TEACHER_BLOCKS = {"S": 8, "B": 8, "L": 16, "XL": 20}
"""XL from the authors' README, B and L from secondary sources; S is ours (it has B's depth)."""


@dataclass(frozen=True, kw_only=True)
class SraConfig:
    """SRA's settings; the defaults are the paper's, with a teacher that stops at its block (same target)."""

    block: int = 0
    """Student block, counted from 1; 0 = by size: 3 (S, B), 6 (L), 8 (XL), else 8/28 of the depth."""
    teacher_block: int = 0
    """Teacher block, counted from 1; 0 = by size: 8 (S, B), 16 (L), 20 (XL), else 20/28 of the depth."""
    weight: float = 0.2
    """Weight of the term before its decay; the authors use 0.5 with cosine_tokens."""
    loss: Literal["smooth_l1", "cosine_tokens"] = "smooth_l1"
    """smooth_l1 (the paper), or 1 - cosine along the token axis (the release's default since 2026-07-29)."""
    beta: float = 0.05
    """Width of smooth-L1's quadratic part."""
    noise_gap: float = 0.2
    """The teacher's time is t - noise_gap * r, r ~ U[0, 1), not below 0."""
    decay_start_images: int = 192_153_600
    """Images after which the weight falls (150 ImageNet epochs)."""
    decay_images: int = 1_281_024_000
    """Images over which it then falls to a tenth (1000 ImageNet epochs)."""
    head_width: int = 0
    """Width of the head's hidden layer; 0 = 2 times the backbone's."""
    teacher_full_pass: bool = False
    """Run all blocks of the teacher, as released: the same target at the released cost."""
    teacher_fp32: bool = False
    """Run the teacher in fp32, as released."""

    def __post_init__(self) -> None:
        require_finite(self, "sra")
        require(self.beta > 0, f"sra.beta is {self.beta}: give more than 0")
        require(0 <= self.noise_gap <= 1, f"sra.noise_gap is {self.noise_gap}: give 0 to 1")
        require(self.decay_images >= 1, f"sra.decay_images is {self.decay_images}: give 1 or more images")
        require(self.head_width >= 0, f"sra.head_width is {self.head_width}: give 0 or more")


class Sra(Method):
    """term = mean smoothL1(g(h_ks(x_t, t)) - sg(h_kt(x_t', t'))) (vvvvvjdy/SRA SiT-SRA/loss.py:16,98-127)."""

    Config = SraConfig
    disclosure = Disclosure(
        summary="Aligns block ks with block kt of the EMA teacher at less noise, through an MLP.",
        paper="SRA, arXiv 2505.02831",
        note="the EMA that is evaluated is also the teacher",
    )
    cost_variants: ClassVar = {"full teacher": {"teacher_full_pass": True}}
    config: SraConfig

    def __init__(self, config: SraConfig, backbone: BackboneShape, data: DataShape) -> None:
        super().__init__(config, backbone, data)
        self.heads["align"] = mlp([backbone.hidden_size, config.head_width, backbone.hidden_size])

    @classmethod
    def resolve(cls, config: SraConfig, backbone: BackboneShape) -> SraConfig:
        block = config.block or default_block(backbone, BLOCKS, 8 / 28)
        teacher_block = config.teacher_block or default_block(backbone, TEACHER_BLOCKS, 20 / 28)
        return replace(
            config,
            block=backbone.check_block("sra.block", block),
            teacher_block=backbone.check_block("sra.teacher_block", teacher_block),
            head_width=config.head_width or 2 * backbone.hidden_size,
        )

    def needs(self) -> Needs:
        return Needs(ema=True)

    def taps(self, progress: Progress) -> tuple[int, ...]:
        return (self.config.block,)

    def terms(self, view: StepView, hidden: Mapping[int, Tensor]) -> dict[str, Term]:
        student_NTD = self.heads["align"](hidden[self.config.block])
        teacher_NTD = self._target(view)
        if self.config.loss == "smooth_l1":
            value_N = smooth_l1(student_NTD, teacher_NTD, self.config.beta)
        else:
            value_N = 1 - cosine(student_NTD, teacher_NTD, dim=1)
        return {"sra": Term(mean_over(value_N), self._weight(view.progress))}

    def _target(self, view: StepView) -> Tensor:
        """The teacher's hidden states: the same x0 and noise at an earlier time, the student's dropped labels."""
        t_N = teacher_time(view.t_N, view.uniform("time_gap"), self.config.noise_gap)
        xt_NCHW = interpolate(view.x0_NCHW, view.noise_NCHW, t_N)
        config = self.config
        return view.teacher(
            xt_NCHW, t_N, view.labels_N, config.teacher_block, config.teacher_full_pass, config.teacher_fp32
        )

    def _weight(self, progress: Progress) -> float:
        late = max(0, progress.images - self.config.decay_start_images)
        return self.config.weight * 0.1 ** (late / self.config.decay_images)

    @torch.no_grad()
    def diagnostics(self, view: StepView, hidden: Mapping[int, Tensor]) -> dict[str, float]:
        student_NTD = self.heads["align"](hidden[self.config.block])
        return {
            "sra_student_norm": float(student_NTD.float().norm(dim=-1).mean()),
            "sra_teacher_norm": float(self._target(view).float().norm(dim=-1).mean()),
        }

    def load_released(self, heads: Mapping[str, Tensor]) -> None:
        """`ap_head` is the head, its two layers under names of their own (vvvvvjdy/SRA SiT-SRA/models/sit.py:20-29)."""
        load_renamed(self.heads["align"], heads, {"ap_head.linear1.": "0.", "ap_head.linear2.": "2."})

    def search_space(self) -> dict[str, Any]:
        blocks, width = list(range(1, self.backbone.depth + 1)), self.backbone.hidden_size
        return {
            "block": blocks,
            "teacher_block": blocks,
            "weight": [0.1, 0.2, 0.5],
            "loss": ["smooth_l1", "cosine_tokens"],
            "noise_gap": [0.0, 0.1, 0.2, 0.4],
            "head_width": [width, 2 * width, 4 * width],
        }


def teacher_time(t_N: Tensor, r_N: Tensor, noise_gap: float) -> Tensor:
    """t' = clamp(t - noise_gap * r, 0, 1): t = 0.9, r = 0.5, gap 0.2 -> 0.8."""
    return (t_N - noise_gap * r_N).clamp(0, 1)
