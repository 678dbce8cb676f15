"""Counted cost against closed formulas, to the integer, and against the table of methods.md section 9.

MACs of one image: matrix products and attention products. fvcore also counts 4 operations a number for a LayerNorm
without affine weights, which the table leaves out; `layer_norms` says how many of them there are.

Letters: T tokens, D width, P numbers of a token's patch, W width of a head's hidden layers, Z encoder width.
"""

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import methods
from harness.cost import StepCost, count_gmacs, step_cost
from harness.method import BackboneShape, DataShape, Disclosure, Method, StepView, Term
from harness.rng import global_state_kept
from harness.sit import SiT, parse_name

FREQUENCIES = 256
ENCODER_WIDTH = 768
"""Z of DINOv2 ViT-B/14, as in the table."""


def shape_of(name: str, input_size: int = 32) -> BackboneShape:
    size = name.removeprefix("SiT-").split("/")[0]
    return BackboneShape(size=size, input_size=input_size, in_channels=4, num_classes=10, **parse_name(name))


def embed_macs(shape: BackboneShape) -> int:
    """Patch embedding, and the MLP of the time embedding; the label embedding is a look-up."""
    d = shape.hidden_size
    return shape.num_tokens * shape.patch_numbers * d + FREQUENCIES * d + d * d


def block_macs(shape: BackboneShape) -> int:
    """Modulation once an image; qkv, attention's two products, projection and MLP for every token."""
    d, t = shape.hidden_size, shape.num_tokens
    return 6 * d * d + 3 * d * d * t + 2 * t * t * d + d * d * t + 8 * d * d * t


def forward_macs(shape: BackboneShape) -> int:
    d, t = shape.hidden_size, shape.num_tokens
    return embed_macs(shape) + shape.depth * block_macs(shape) + 2 * d * d + t * d * shape.patch_numbers


def layer_norms(shape: BackboneShape, number: int) -> int:
    return number * 4 * shape.num_tokens * shape.hidden_size


def mlp_macs(*widths: int) -> int:
    return sum(a * b for a, b in pairwise(widths))


def head_macs(shape: BackboneShape) -> dict[str, int]:
    """The heads of methods.md sections 3 to 5."""
    d, t = shape.hidden_size, shape.num_tokens
    w = 2048 if d >= 384 else 4 * d
    return {
        "sit": 0,
        "repa": t * mlp_macs(d, w, w, ENCODER_WIDTH),
        "sra": t * mlp_macs(d, 2 * d, d),
        "vae_repa": t * mlp_macs(d, *[2 * d] * 4, shape.patch_numbers),
    }


def counted(name: str, shape: BackboneShape, **fields: Any) -> StepCost:
    """The cost of a method on a backbone, with overrides of the method's own section."""
    method_type = methods.load(name)
    config = (
        {n: methods.load(n).Config(**fields) for n in name.split("+")} if "+" in name else method_type.Config(**fields)
    )
    data = DataShape(image_size=256, num_classes=10, encoder_width=lambda _: ENCODER_WIDTH)
    with global_state_kept():
        method = method_type(method_type.resolve(config, shape), shape, data)
        return step_cost(build(shape), method, data)


def build(shape: BackboneShape) -> SiT:
    with global_state_kept():
        return SiT(**{key: value for key, value in vars(shape).items() if key != "size"})


def macs(gmacs: float) -> int:
    whole = round(gmacs * 1e9)
    assert abs(gmacs * 1e9 - whole) < 0.01, f"{gmacs} GMACs are no whole number of MACs"
    return whole


# -- the formulas themselves ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "forward", "attention", "heads", "stopped"),
    [
        ("SiT-S/2", 6.05, 0.60, (1.68, 0.15, 0.53), 4.04),
        ("SiT-B/2", 23.00, 1.21, (1.88, 0.60, 2.12), 15.33),
        ("SiT-L/2", 80.69, 3.22, (2.01, 1.07, 3.77), 53.79),
        ("SiT-XL/2", 118.62, 4.23, (2.08, 1.36, 4.77), 84.72),
    ],
)
def test_the_formulas_give_the_table_of_the_papers_sizes(
    name: str, forward: float, attention: float, heads: tuple[float, ...], stopped: float
) -> None:
    shape = shape_of(name)
    teacher_block = {"S": 8, "B": 8, "L": 16, "XL": 20}[shape.size]
    assert forward_macs(shape) / 1e9 == pytest.approx(forward, abs=0.005)
    assert shape.depth * 2 * shape.num_tokens**2 * shape.hidden_size / 1e9 == pytest.approx(attention, abs=0.005)
    found = head_macs(shape)
    assert [found[method] / 1e9 for method in ("repa", "sra", "vae_repa")] == pytest.approx(heads, abs=0.0051)
    assert (embed_macs(shape) + teacher_block * block_macs(shape)) / 1e9 == pytest.approx(stopped, abs=0.011)


# -- what is counted ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "input_size"), [("SiT-pico/2", 8), ("SiT-nano/1", 8), ("SiT-micro/4", 32), ("SiT-S/2", 32)]
)
def test_the_backbone_to_the_integer(name: str, input_size: int) -> None:
    shape = shape_of(name, input_size)
    cost = counted("sit", shape)
    # Two LayerNorms a block and one at the end.
    assert macs(cost.backbone_forward_gmacs) == forward_macs(shape) + layer_norms(shape, 2 * shape.depth + 1)
    assert (cost.head_forward_gmacs, cost.teacher_forward_gmacs, cost.head_parameters) == (0, 0, 0)


@pytest.mark.parametrize("name", ["repa", "sra", "vae_repa"])
def test_heads_to_the_integer(name: str) -> None:
    shape = shape_of("SiT-S/2")
    cost = counted(name, shape)
    assert macs(cost.head_forward_gmacs) == head_macs(shape)[name]


def test_parameters_of_the_papers_small_model() -> None:
    """32.86M with 1000 classes (methods.md section 1), and the heads of sections 3 to 5 in millions."""
    shape = shape_of("SiT-S/2")
    million = {name: counted(name, shape).head_parameters / 1e6 for name in ("repa", "sra", "vae_repa")}
    assert million == {
        "repa": pytest.approx(6.56, abs=0.005),
        "sra": pytest.approx(0.59, abs=0.005),
        "vae_repa": pytest.approx(2.08, abs=0.005),
    }
    assert counted("sit", shape).backbone_parameters == pytest.approx(32.86e6 - 990 * 384, abs=5e3)


def test_the_teacher_stops_at_its_block_or_runs_whole() -> None:
    shape = shape_of("SiT-pico/2", 8)
    block = 3
    stopped = counted("sra", shape, teacher_block=block)
    assert macs(stopped.teacher_forward_gmacs) == (
        embed_macs(shape) + block * block_macs(shape) + layer_norms(shape, 2 * block)
    )
    full = counted("sra", shape, teacher_block=block, teacher_full_pass=True)
    assert full.teacher_forward_gmacs == full.backbone_forward_gmacs
    assert full.head_forward_gmacs == stopped.head_forward_gmacs


def test_a_sum_costs_its_parts() -> None:
    shape = shape_of("SiT-pico/2", 8)
    whole = counted("repa+vae_repa", shape)
    parts = [counted(name, shape) for name in ("repa", "vae_repa")]
    assert macs(whole.head_forward_gmacs) == sum(macs(part.head_forward_gmacs) for part in parts)
    assert whole.head_parameters == sum(part.head_parameters for part in parts)
    assert whole.term_weights == {"repa": 0.5, "vae_repa": 1.0}


@pytest.mark.parametrize("name", ["sit", "repa", "sra", "vae_repa"])
def test_training_gflops(name: str) -> None:
    """2 x (3 x (backbone + heads) + teacher): one MAC is two FLOPs, a backward pass costs two forward ones."""
    cost = counted(name, shape_of("SiT-pico/2", 8))
    trained, teacher = cost.backbone_forward_gmacs + cost.head_forward_gmacs, cost.teacher_forward_gmacs
    assert cost.train_gflops_per_image == pytest.approx(6 * trained + 2 * teacher, rel=1e-12)
    assert cost.record()["train_gflops_per_image"] == cost.train_gflops_per_image
    assert (teacher > 0) == (name == "sra")


def test_backward_costs_twice_the_forward() -> None:
    """The factor 3 against torch's own counter, with attention as plain products (it counts fused attention as 0)."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    shape = shape_of("SiT-pico/2", 8)
    cost = counted("sit", shape)
    backbone = build(shape)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        backbone(torch.randn(1, 4, 8, 8), torch.rand(1), torch.zeros(1, dtype=torch.int64))[0].sum().backward()
    # No gradient with respect to the image at the patch embedding.
    own = 6 * forward_macs(shape) - 2 * shape.num_tokens * shape.patch_numbers * shape.hidden_size
    assert counter.get_total_flops() == pytest.approx(own, rel=0.02)
    assert cost.train_gflops_per_image * 1e9 == pytest.approx(counter.get_total_flops(), rel=0.03)


# -- operations -----------------------------------------------------------------------------------------------------


class Operation(nn.Module):
    def __init__(self, compute: Callable[..., Tensor]) -> None:
        super().__init__()
        self._compute = compute

    def forward(self, *inputs: Tensor) -> Tensor:
        return self._compute(*inputs)


def test_fused_attention_counts_as_its_products() -> None:
    q, k, v = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 7, 8), torch.randn(2, 3, 7, 4)
    fused = count_gmacs(Operation(F.scaled_dot_product_attention), (q, k, v))
    plain = count_gmacs(Operation(lambda q, k, v: (q @ k.transpose(-2, -1)).softmax(-1) @ v), (q, k, v))
    assert macs(fused) == macs(plain) == 2 * 3 * (5 * 7 * 8 + 5 * 7 * 4)


@pytest.mark.parametrize(
    "compute",
    [
        lambda a, b: torch.baddbmm(torch.zeros(2, 3, 3), a, b),
        lambda a, b: torch.addbmm(torch.zeros(3, 3), a, b),
    ],
)
def test_a_product_that_cannot_be_counted_is_refused(compute: Callable[..., Tensor]) -> None:
    """A cost table that silently lacks a product would favour the method that uses it."""
    with pytest.raises(AssertionError, match="operations without a count"):
        count_gmacs(Operation(compute), (torch.randn(2, 3, 4), torch.randn(2, 4, 3)))


def test_elementwise_operations_are_not_counted() -> None:
    assert count_gmacs(Operation(lambda x: F.silu(x).softmax(-1) + x.square().sqrt()), (torch.rand(4, 5),)) == 0


class TwoTeachers(Method):
    """Asks for two passes of the teacher, one of them whole, and draws."""

    Config = dict
    disclosure = Disclosure(summary="Two passes.", paper="none")
    name = "two_teachers"

    def taps(self, progress: Any) -> tuple[int, ...]:
        return (1,)

    def terms(self, view: StepView, hidden: Mapping[int, Tensor]) -> dict[str, Term]:
        assert view.images_NCHW is not None
        a = view.teacher(view.xt_NCHW, view.uniform("gap"), view.labels_N, 2)
        b = view.teacher(view.xt_NCHW, view.t_N, view.labels_N, 3, full_pass=True)
        return {"two": Term((hidden[1] - a - b).square().mean(), 0.25)}


def test_every_teacher_pass_is_counted_once() -> None:
    shape = shape_of("SiT-pico/2", 8)
    data = DataShape(image_size=32, num_classes=10, encoder_width=lambda _: 1)
    cost = step_cost(build(shape), TwoTeachers({}, shape, data), data)
    first = embed_macs(shape) + 2 * block_macs(shape) + layer_norms(shape, 4)
    assert macs(cost.teacher_forward_gmacs) == first + macs(cost.backbone_forward_gmacs)
    assert cost.term_weights == {"two": 0.25}


def test_counting_draws_nothing_and_changes_no_weight() -> None:
    shape = shape_of("SiT-pico/2", 8)
    data = DataShape(image_size=32, num_classes=10, encoder_width=lambda _: ENCODER_WIDTH)
    method_type = methods.load("sra")
    with global_state_kept():
        backbone = build(shape)
        method = method_type(method_type.resolve(method_type.Config(), shape), shape, data)
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    state = torch.get_rng_state()
    step_cost(backbone, method, data)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], value) for name, value in backbone.state_dict().items())
    assert all(p.grad is None for p in backbone.parameters())
