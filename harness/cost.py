"""Counted cost of a training step: fvcore with a handler for fused attention.

fvcore counts multiply-accumulates (MACs) and calls them flops. One MAC is two FLOPs: `train_gflops` = 2 x GMACs
everywhere. Element-wise operations are not counted.
"""

import logging
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from fvcore.nn import FlopCountAnalysis
from torch import Tensor, nn

from harness.method import DataShape, Method, MethodDraws, Progress, StepView
from harness.sit import SiT

MATMUL_LIKE = ("matmul", "mm", "bmm", "addmm", "baddbmm", "linear", "einsum", "conv", "attention")
"""Parts of operator names that must never go uncounted."""


@dataclass(frozen=True, kw_only=True)
class StepCost:
    """Cost of one training image. Forward passes in GMACs; what has a gradient costs three times its forward."""

    backbone_forward_gmacs: float
    head_forward_gmacs: float
    teacher_forward_gmacs: float
    """Passes without gradient through the EMA backbone."""
    backbone_parameters: int
    head_parameters: int
    term_weights: dict[str, float]
    """Weight of each of the method's terms at the start of training."""

    @property
    def train_gflops_per_image(self) -> float:
        """2 x (3 x (backbone + heads) + teacher)."""
        trained = self.backbone_forward_gmacs + self.head_forward_gmacs
        return 2 * (3 * trained + self.teacher_forward_gmacs)

    def record(self) -> dict[str, Any]:
        """As it stands in `cost.json`."""
        return {**asdict(self), "train_gflops_per_image": self.train_gflops_per_image}


def count_gmacs(module: nn.Module, inputs: tuple[Any, ...]) -> float:
    """GMACs of one forward pass of `module`; an assertion fails when a matmul-like operation went uncounted."""
    analysis = FlopCountAnalysis(module, inputs).set_op_handle("aten::scaled_dot_product_attention", _attention_macs)
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")
    logging.getLogger("fvcore.nn.jit_analysis").setLevel(logging.ERROR)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # fvcore traces with torch.jit, which warns on every call
        total = analysis.total()
        uncounted = [op for op in analysis.unsupported_ops() if any(part in op for part in MATMUL_LIKE)]
    assert not uncounted, f"operations without a count: {uncounted}"
    return total / 1e9


def _attention_macs(inputs: list[Any], outputs: list[Any]) -> float:
    """Products q k^T and softmax(...) v: batch and heads x queries x keys x (q width + v width)."""
    q, k, v = (value.type().sizes() for value in inputs[:3])
    batch = 1
    for size in q[:-2]:
        batch *= size
    return batch * q[-2] * k[-2] * (q[-1] + v[-1])


class _Velocity(nn.Module):
    """The backbone with an output that can be traced (a dict with integer keys cannot)."""

    def __init__(self, backbone: SiT) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return self.backbone(x, t, y)[0]


class _Hidden(nn.Module):
    """The backbone up to a block, or all of it."""

    def __init__(self, backbone: SiT, block: int, full_pass: bool) -> None:
        super().__init__()
        self.backbone, self.block, self.full_pass = backbone, block, full_pass

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        if self.full_pass:
            return self.backbone(x, t, y)[0]
        return self.backbone.hidden(x, t, y, self.block)


class _Terms(nn.Module):
    """A method's terms as a module of its heads; records the teacher passes asked for instead of making them."""

    def __init__(self, method: Method, view: StepView, blocks: tuple[int, ...]) -> None:
        super().__init__()
        self.heads = method.heads
        self._method, self._view, self._blocks = method, view, blocks

    def forward(self, *hidden: Tensor) -> Tensor:
        terms = self._method.terms(self._view, dict(zip(self._blocks, hidden, strict=True)))
        return torch.stack([term.value for term in terms.values()]) if terms else torch.zeros(1)


def step_cost(backbone: SiT, method: Method, data: DataShape) -> StepCost:
    """Count one training image of `method` on `backbone`, on the backbone's device, at the start of training."""
    device = backbone.pos_embed.device
    size, channels = backbone.input_size, backbone.in_channels
    latent = torch.zeros(1, channels, size, size, device=device)
    t, y = torch.zeros(1, device=device), torch.zeros(1, dtype=torch.int64, device=device)
    passes: list[tuple[int, bool]] = []

    def teacher(x: Tensor, t: Tensor, y: Tensor, block: int, full_pass: bool = False, fp32: bool = False) -> Tensor:
        passes.append((block, full_pass))
        return torch.zeros(1, method.backbone.num_tokens, backbone.hidden_size, device=device)

    progress = Progress(step=0, images=0)
    blocks = tuple(method.taps(progress))
    hidden = [torch.ones(1, method.backbone.num_tokens, backbone.hidden_size, device=device) for _ in blocks]
    view = StepView(
        x0_NCHW=latent, x0_mean_NCHW=latent, noise_NCHW=latent, t_N=t, xt_NCHW=latent, labels_N=y,
        tokens=_zero_tokens(method, data, device),
        images_NCHW=torch.zeros(1, 3, data.image_size, data.image_size, dtype=torch.uint8, device=device),
        progress=progress, teacher=teacher, rows=slice(0, 1),
        draws=MethodDraws(seed=0, step=0, batch_size=1), method=method.name,
    )  # fmt: skip
    # Terms are run once untraced to learn which teacher passes they ask for; the tracer may run them again.
    with torch.no_grad():
        terms = method.terms(view, dict(zip(blocks, hidden, strict=True)))
    wanted = list(passes)
    heads = count_gmacs(_Terms(method, view, blocks), tuple(hidden)) if blocks else 0.0
    return StepCost(
        backbone_forward_gmacs=count_gmacs(_Velocity(backbone), (latent, t, y)),
        head_forward_gmacs=heads,
        teacher_forward_gmacs=sum((count_gmacs(_Hidden(backbone, *asked), (latent, t, y)) for asked in wanted), 0.0),
        backbone_parameters=sum(p.numel() for p in backbone.parameters() if p.requires_grad),
        head_parameters=sum(p.numel() for p in method.heads.parameters()),
        term_weights={name: term.weight for name, term in terms.items()},
    )


def _zero_tokens(method: Method, data: DataShape, device: torch.device) -> Mapping[str, Tensor]:
    tokens = method.backbone.num_tokens
    return {name: torch.zeros(1, tokens, data.encoder_width(name), device=device) for name in method.needs().encoders}
