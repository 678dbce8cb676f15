"""Counted cost: what one training image costs, and what one image costs when the caches are made. By fvcore.

A cost is what runs: matrix products, convolutions and the two products of attention (fvcore leaves fused attention
out; a handler puts it in). fvcore counts multiply-accumulates (MACs) and calls them flops. One MAC is two FLOPs:
`train_gflops` = 2 x GMACs everywhere. Element-wise operations are not counted. Normalisations, for which fvcore adds
4 or 5 operations a number (0.06 of 118.7 GMACs in SiT-XL/2), stand apart, so that counts equal closed formulas.

What has a gradient costs three times its forward pass (torch's own counter gives 2.9997), a teacher once. The second
forward pass of checkpointed activations (`runtime.checkpoint_activations`) is in no count, as in the papers: it buys
memory, and no step learns more of it.
"""

import contextlib
import functools
import logging
import math
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from fvcore.nn import FlopCountAnalysis
from torch import Tensor, nn

from harness.backbones.sit import SiT
from harness.errors import UserError
from harness.frozen.encoders import FrozenEncoder
from harness.method import Method, MethodDraws, Progress, StepView
from harness.records.schema import CostRecord
from harness.rng import global_state_kept

PRODUCTS = re.compile(
    r"\w*(matmul|bmm|einsum|conv(?!ert)|attention|attn)\w*|\w*_mm|(add)?mm|addmm_\w+|(bi)?linear|(add)?mv|v?dot|inner|cdist"
    r"|tensordot|chain_matmul|linalg_(multi_dot|matrix_power|matrix_exp)|matrix_(power|exp)|cov|corrcoef"
    r"|(quantized_)?(lstm|gru|rnn)\w*|_transformer_encoder_layer_fwd"
)
"""Names of operators, without namespace, that multiply matrices: each must be counted."""

ModuleT = TypeVar("ModuleT", bound=nn.Module)


# -- one pass -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Count:
    """MACs of one forward pass of one image."""

    products: int
    """Matrix products, convolutions, attention: the cost."""
    norms: int
    """What fvcore adds for normalisations."""

    @property
    def gmacs(self) -> float:
        return self.products / 1e9


def count(module: nn.Module, inputs: tuple[Any, ...], what: str) -> Count:
    """Count one forward pass of `module` on `inputs`; `UserError` names `what` and a product that has no count."""
    analysis = FlopCountAnalysis(module, inputs).set_op_handle("aten::scaled_dot_product_attention", _attention_macs)
    for name in ("matmul", "mv", "dot", "inner", "cdist"):
        analysis.set_op_handle(f"aten::{name}", _product_macs)
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")
    logging.getLogger("fvcore.nn.jit_analysis").setLevel(logging.ERROR)
    with warnings.catch_warnings(), torch.no_grad(), _plain_modules(module):
        warnings.simplefilter("ignore")  # fvcore traces with torch.jit, which warns on every call
        counts = analysis.by_operator()
        uncounted = sorted(name for name in analysis.unsupported_ops() if may_multiply(name))
    if uncounted:
        raise UserError(
            f"{what}: no count for the operator {', '.join(uncounted)}, so its cost would be too low: "
            "write it with torch.matmul, linear layers, convolutions or scaled_dot_product_attention"
        )
    products = sum(value for name, value in counts.items() if PRODUCTS.fullmatch(name))
    return Count(round(products), round(sum(value for name, value in counts.items() if name.endswith("_norm"))))


def may_multiply(operator: str) -> bool:
    """Whether an operator such as `aten::baddbmm` multiplies matrices; whatever is not torch's own might."""
    namespace, _, name = operator.partition("::")
    return namespace not in ("aten", "prim") or name.startswith("PythonOp") or bool(PRODUCTS.fullmatch(name))


@contextlib.contextmanager
def _plain_modules(module: nn.Module) -> Iterator[None]:
    """Run in eval mode, which draws nothing and moves no running mean, and without the fused layers of that mode."""
    modes = {part: part.training for part in module.modules()}
    fused = torch.backends.mha.get_fastpath_enabled()
    module.eval()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        for part, mode in modes.items():
            part.training = mode


def _sizes(value: Any) -> list[int]:
    return value.type().sizes()


def _attention_macs(inputs: list[Any], outputs: list[Any]) -> int:
    """Products q k^T and softmax(...) v: batch and heads x queries x keys x (q width + v width)."""
    q, k, v = map(_sizes, inputs[:3])
    return math.prod(q[:-1]) * k[-2] * (q[-1] + v[-1])


def _product_macs(inputs: list[Any], outputs: list[Any]) -> int:
    """Numbers of the result x the length that is summed over, which is the first factor's last axis.

    fvcore's own handler for matmul leaves out what the second factor alone is a batch of, and fails on vectors.
    """
    return math.prod(_sizes(outputs[0])) * _sizes(inputs[0])[-1]


def hollow(build: Callable[[], ModuleT]) -> ModuleT:
    """What `build` builds, its tensors zeros that share one number each: counting needs shapes, and no memory."""
    with global_state_kept(), torch.device("meta"):
        module = build()
    for part in module.modules():
        for name, value in part.named_parameters(recurse=False):
            zeros = torch.zeros((), dtype=value.dtype).expand(value.shape)
            setattr(part, name, nn.Parameter(zeros, requires_grad=value.requires_grad))
        for name, buffer in part.named_buffers(recurse=False):
            setattr(part, name, torch.zeros((), dtype=buffer.dtype).expand(buffer.shape))
    return module


class _Call(nn.Module):
    """A function of a module as a module of its own: fvcore traces `forward`, with tensors in and out."""

    def __init__(self, module: nn.Module, call: Callable[..., Tensor]) -> None:
        super().__init__()
        self.module, self._call = module, call

    def forward(self, *inputs: Tensor) -> Tensor:
        return self._call(*inputs)


# -- a training step ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class StepCost:
    """Cost of one training image as a run trains: latents and tokens come from caches. Forward passes in GMACs."""

    backbone_forward_gmacs: float
    head_forward_gmacs: float
    """All that the method computes in its terms, passes of teachers apart."""
    teacher_forward_gmacs: float
    """Passes without gradient through the EMA backbone."""
    norm_forward_gmacs: float
    """What fvcore would add to the backbone for LayerNorm; in no other number here."""
    backbone_parameters: int
    head_parameters: int
    term_weights: dict[str, float]
    """Weight of each of the method's terms at the start of training."""

    @property
    def train_gflops_per_image(self) -> float:
        """2 x (3 x (backbone + heads) + teacher)."""
        trained = self.backbone_forward_gmacs + self.head_forward_gmacs
        return 2 * (3 * trained + self.teacher_forward_gmacs)


class Passes:
    """Forward passes of one backbone, each kind counted once, so that methods on one backbone can share them."""

    def __init__(self, backbone: SiT) -> None:
        self.backbone = backbone
        self._counts: dict[int, Count] = {}

    @property
    def device(self) -> torch.device:
        return self.backbone.pos_embed.device

    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """One image: latent [1, C, H, W], time [1], label [1]."""
        size = (1, self.backbone.in_channels, self.backbone.input_size, self.backbone.input_size)
        label = torch.zeros(1, dtype=torch.int64, device=self.device)
        return torch.zeros(size, device=self.device), torch.zeros(1, device=self.device), label

    def whole(self) -> Count:
        """The pass from the latent to the velocity."""
        return self._count(0, lambda x, t, y: self.backbone(x, t, y)[0])

    def up_to(self, block: int) -> Count:
        """The pass from the latent to the output of `block`, counted from 1, and no further."""
        return self._count(block, lambda x, t, y: self.backbone.hidden(x, t, y, block))

    def _count(self, key: int, call: Callable[..., Tensor]) -> Count:
        if key not in self._counts:
            self._counts[key] = count(_Call(self.backbone, call), self.inputs(), "the backbone")
        return self._counts[key]


def step_cost(passes: Passes, method: Method) -> StepCost:
    """Count one training image of `method`, on the backbone's device, at the start of training."""
    heads, asked, weights = _terms(passes, method)
    whole = passes.whole()
    teacher = [passes.whole() if full_pass else passes.up_to(block) for block, full_pass in asked]
    return StepCost(
        backbone_forward_gmacs=whole.gmacs,
        head_forward_gmacs=heads.gmacs,
        teacher_forward_gmacs=sum(one.products for one in teacher) / 1e9,
        norm_forward_gmacs=whole.norms / 1e9,
        backbone_parameters=num_parameters(passes.backbone, trained=True),
        head_parameters=num_parameters(method.heads),
        term_weights=weights,
    )


def num_parameters(module: nn.Module, trained: bool = False) -> int:
    """Numbers in a module's parameters; with `trained` only those that have a gradient."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trained)


def _terms(passes: Passes, method: Method) -> tuple[Count, list[tuple[int, bool]], dict[str, float]]:
    """The method's terms: their count, the teacher passes (block, whole) that they ask for, and their weights."""
    device, tokens, width = passes.device, method.backbone.num_tokens, method.backbone.hidden_size
    asked: list[tuple[int, bool]] = []

    def teacher(x: Tensor, t: Tensor, y: Tensor, block: int, full_pass: bool = False, fp32: bool = False) -> Tensor:
        asked.append((block, full_pass))
        return torch.zeros(1, tokens, width, device=device)

    view = _view(passes, method, teacher)
    blocks = tuple(method.taps(view.progress))
    hidden = tuple(torch.ones(1, tokens, width, device=device) for _ in blocks)
    # Terms are run once untraced to learn which teacher passes they ask for; the tracer may run them again.
    with torch.no_grad(), _plain_modules(method.heads):
        terms = method.terms(view, dict(zip(blocks, hidden, strict=True)))
    wanted, weights = list(asked), {name: term.weight for name, term in terms.items()}
    if not terms:
        return Count(0, 0), wanted, weights

    def values(latent_NCHW: Tensor, *hidden: Tensor) -> Tensor:
        again = method.terms(view, dict(zip(blocks, hidden, strict=True)))
        return torch.stack([term.value for term in again.values()])

    found = count(_Call(method.heads, values), (view.x0_NCHW, *hidden), f"method {method.name}")
    return found, wanted, weights


def _view(passes: Passes, method: Method, teacher: Callable[..., Tensor]) -> StepView:
    """The view that a method reads at one step, for a single image."""
    latent_NCHW, t_N, y_N = passes.inputs()
    image_size = method.data.image_size
    tokens = {
        name: torch.zeros(1, method.backbone.num_tokens, method.data.encoder_width(name), device=passes.device)
        for name in method.needs().encoders
    }
    return StepView(
        x0_NCHW=latent_NCHW, x0_mean_NCHW=latent_NCHW, noise_NCHW=latent_NCHW, t_N=t_N, xt_NCHW=latent_NCHW,
        labels_N=y_N, tokens=tokens,
        images_NCHW=torch.zeros(1, 3, image_size, image_size, dtype=torch.uint8, device=passes.device),
        progress=Progress(step=0, images=0), teacher=teacher, rows=slice(0, 1),
        draws=MethodDraws(seed=0, step=0, batch_size=1), method=method.name,
    )  # fmt: skip


# -- what runs once an image, before training -----------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class NetworkCost:
    """A frozen network: one forward pass in GMACs, and its parameters."""

    forward_gmacs: float
    parameters: int


@dataclass(frozen=True, kw_only=True)
class CacheCost:
    """Cost of what every image passes once when the caches are made, without gradient.

    With online targets the encoders run in every training step instead; latents are always cached, for every method
    alike, since encoding them in the step would add the same to each.
    """

    vae: NetworkCost
    """The autoencoder's encoder alone; the parameters are those of the whole."""
    encoders: dict[str, NetworkCost] = field(default_factory=dict)
    """Frozen encoders that the method reads tokens of."""

    @property
    def encoder_forward_gmacs(self) -> float:
        return sum(encoder.forward_gmacs for encoder in self.encoders.values())

    @property
    def external_parameters(self) -> int:
        """Parameters of the frozen encoders; the autoencoder is left out, as every method has it."""
        return sum(encoder.parameters for encoder in self.encoders.values())

    @property
    def gflops_per_image(self) -> float:
        """2 x (encoding by the autoencoder + encoders)."""
        return 2 * (self.vae.forward_gmacs + self.encoder_forward_gmacs)


def cache_cost(network: Any, method: Method) -> CacheCost:
    """Cost of the caches of `method`.

    Args:
        network: the autoencoder, an AutoencoderKL.
        method: its needs name the encoders, which are counted without their weights.
    """
    grid, image_size = method.backbone.grid, method.data.image_size
    encoders = {name: encoder_cost(name, grid, image_size) for name in method.needs().encoders}
    return CacheCost(vae=vae_cost(network, image_size), encoders=encoders)


@functools.lru_cache(maxsize=16)
def encoder_cost(name: str, grid: int, image_size: int) -> NetworkCost:
    """A named encoder that gives `grid` x `grid` tokens. Kept, because the cells of a study share it."""
    encoder = hollow(lambda: FrozenEncoder.untrained(name, grid, "meta"))
    images_NCHW = torch.zeros(1, 3, image_size, image_size, dtype=torch.uint8)
    return NetworkCost(
        forward_gmacs=count(encoder, (images_NCHW,), f"encoder {name}").gmacs,
        parameters=num_parameters(encoder),
    )


@functools.lru_cache(maxsize=4)
def vae_cost(network: Any, image_size: int) -> NetworkCost:
    """Encoding of one image to posterior moments. Kept, because the cells of a study share it."""
    weight = next(network.parameters())
    pixels_NCHW = torch.zeros(1, 3, image_size, image_size, dtype=weight.dtype, device=weight.device)
    encode = _Call(network, lambda x: network.encode(x).latent_dist.parameters)
    return NetworkCost(
        forward_gmacs=count(encode, (pixels_NCHW,), "the autoencoder").gmacs,
        parameters=num_parameters(network),
    )


def decoder_gmacs(network: Any, latent_shape: tuple[int, int, int]) -> float:
    """Decoding of one latent [C, h, w] to pixels by an AutoencoderKL."""
    weight = next(network.parameters())
    latent_NCHW = torch.zeros(1, *latent_shape, dtype=weight.dtype, device=weight.device)
    return count(_Call(network, lambda z: network.decode(z).sample), (latent_NCHW,), "the autoencoder").gmacs


def cost_record(step: StepCost, cache: CacheCost, num_images: int = 0) -> CostRecord:
    """As it stands in `cost.json`.

    `train_gflops_per_image` is what a run spends, with cached targets; `_online` has the encoders in every step.
    The caches of `num_images` images are reported apart, as their own GFLOPs an image and in all.
    """
    return {
        "backbone_forward_gmacs": step.backbone_forward_gmacs,
        "head_forward_gmacs": step.head_forward_gmacs,
        "teacher_forward_gmacs": step.teacher_forward_gmacs,
        "norm_forward_gmacs": step.norm_forward_gmacs,
        "backbone_parameters": step.backbone_parameters,
        "head_parameters": step.head_parameters,
        "term_weights": step.term_weights,
        "train_gflops_per_image": step.train_gflops_per_image,
        "train_gflops_per_image_online": step.train_gflops_per_image + 2 * cache.encoder_forward_gmacs,
        "encoder_forward_gmacs": cache.encoder_forward_gmacs,
        "encoders": {
            name: {"forward_gmacs": encoder.forward_gmacs, "parameters": encoder.parameters}
            for name, encoder in cache.encoders.items()
        },
        "vae_encode_gmacs": cache.vae.forward_gmacs,
        "external_parameters": cache.external_parameters,
        "cache_images": num_images,
        "cache_gflops_per_image": cache.gflops_per_image,
        "cache_gflops": num_images * cache.gflops_per_image,
    }
