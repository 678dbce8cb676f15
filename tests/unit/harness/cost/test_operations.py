"""Counted cost against closed formulas, to the integer, and against the table of methods.md section 9.

MACs of one image: matrix products and attention products. fvcore also counts 4 operations a number for a LayerNorm
without affine weights, which stand apart; `layer_norms` says how many of them there are.

Letters: T tokens, D width, P numbers of a token's patch, W width of a head's hidden layers, Z encoder width.
"""

import functools
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import methods
from harness.backbones.sit import SiT
from harness.cost import operations as costs
from harness.cost.operations import Passes, StepCost, cache_cost, cost_record, count, hollow, step_cost
from harness.errors import UserError
from harness.frozen.autoencoder import AutoencoderRecipe, build_network
from harness.frozen.encoders import FrozenEncoder
from harness.method import BackboneShape, DataShape, Disclosure, Method, MethodDraws, Progress, StepView, Term
from harness.rng import global_state_kept

FREQUENCIES = 256
ENCODER_WIDTH = 768
"""Z of DINOv2 ViT-B/14, as in the table."""


def shape_of(name: str, input_size: int = 32) -> BackboneShape:
    return BackboneShape.of(name, input_size=input_size, in_channels=4, num_classes=10)


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


DATA = DataShape(image_size=256, num_classes=10, encoder_width=lambda _: ENCODER_WIDTH)


def build_method(name: str, shape: BackboneShape, **fields: Any) -> Method:
    """A method, or a sum, with overrides of the method's own section."""
    method_type = methods.load(name)
    config = (
        {n: methods.load(n).Config(**fields) for n in name.split("+")} if "+" in name else method_type.Config(**fields)
    )
    with global_state_kept():
        return method_type(method_type.resolve(config, shape), shape, DATA)


def counted(name: str, shape: BackboneShape, **fields: Any) -> StepCost:
    """The cost of a method on a backbone."""
    return step_cost(passes_of(shape), build_method(name, shape, **fields))


@functools.cache
def passes_of(shape: BackboneShape) -> Passes:
    """A backbone whose passes are counted once for all tests."""
    return Passes(build(shape))


def build(shape: BackboneShape) -> SiT:
    with global_state_kept():
        return SiT.of(shape)


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
    assert macs(cost.backbone_forward_gmacs) == forward_macs(shape)
    # Two LayerNorms a block and one at the end.
    assert macs(cost.norm_forward_gmacs) == layer_norms(shape, 2 * shape.depth + 1)
    assert (cost.head_forward_gmacs, cost.teacher_forward_gmacs, cost.head_parameters) == (0, 0, 0)


@pytest.mark.parametrize("name", ["repa", "sra", "vae_repa"])
def test_heads_to_the_integer(name: str) -> None:
    shape = shape_of("SiT-S/2")
    cost = counted(name, shape)
    assert macs(cost.head_forward_gmacs) == head_macs(shape)[name]


def test_the_teacher_stops_at_its_block_or_runs_whole() -> None:
    shape = shape_of("SiT-pico/2", 8)
    block = 3
    stopped = counted("sra", shape, teacher_block=block)
    assert macs(stopped.teacher_forward_gmacs) == embed_macs(shape) + block * block_macs(shape)
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
    assert (teacher > 0) == (name == "sra")


@pytest.mark.parametrize("name", ["sit", "repa", "sra", "vae_repa"])
def test_a_training_image_costs_what_torch_counts(name: str) -> None:
    """Forward, heads, teacher and backward against torch's own counter, which sees every operation that runs.

    With attention as plain products, since fused attention counts as 0 there. It has no gradient with respect to the
    latent at the patch embedding, which is less than 0.1%.
    """
    shape = shape_of("SiT-micro/2", 16)
    backbone, method = build(shape), build_method(name, shape)
    backbone.initialize(torch.Generator().manual_seed(0))
    with torch.no_grad():
        for parameter in backbone.final_layer.parameters():
            parameter.add_(0.01)  # zero at first
    view = view_of(shape, backbone, method)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        velocity, hidden = backbone(view.xt_NCHW, view.t_N, view.labels_N, taps=method.taps(view.progress))
        terms = method.terms(view, hidden)
        sum([term.value for term in terms.values()], velocity.square().mean()).backward()
    counted = step_cost(Passes(backbone), method).train_gflops_per_image
    assert counted * 1e9 == pytest.approx(counter.get_total_flops(), rel=1e-3)
    assert counted * 1e9 - counter.get_total_flops() >= 2 * shape.num_tokens * shape.patch_numbers * shape.hidden_size


def view_of(shape: BackboneShape, backbone: SiT, method: Method) -> StepView:
    """One image of zeros, with the backbone itself as the teacher."""

    def teacher(x: Tensor, t: Tensor, y: Tensor, block: int, full_pass: bool = False, fp32: bool = False) -> Tensor:
        with torch.no_grad():
            return backbone.hidden(x, t, y, block)

    latent = torch.zeros(1, shape.in_channels, shape.input_size, shape.input_size)
    return StepView(
        x0_NCHW=latent, x0_mean_NCHW=latent, noise_NCHW=latent, t_N=torch.zeros(1), xt_NCHW=latent,
        labels_N=torch.zeros(1, dtype=torch.int64),
        tokens={name: torch.ones(1, shape.num_tokens, ENCODER_WIDTH) for name in method.needs().encoders},
        images_NCHW=None, progress=Progress(step=0, images=0), teacher=teacher, rows=slice(0, 1),
        draws=MethodDraws(seed=0, step=0, batch_size=1), method=method.name,
    )  # fmt: skip


# -- operations -----------------------------------------------------------------------------------------------------


class Operation(nn.Module):
    def __init__(self, compute: Callable[..., Tensor]) -> None:
        super().__init__()
        self._compute = compute

    def forward(self, *inputs: Tensor) -> Tensor:
        return self._compute(*inputs)


def operation_macs(compute: Callable[..., Tensor], *inputs: Tensor) -> int:
    return count(Operation(compute), inputs, "it").products


def test_fused_attention_counts_as_its_products() -> None:
    q, k, v = torch.ones(2, 3, 5, 8), torch.ones(2, 3, 7, 8), torch.ones(2, 3, 7, 4)
    fused = operation_macs(F.scaled_dot_product_attention, q, k, v)
    plain = operation_macs(lambda q, k, v: (q @ k.transpose(-2, -1)).softmax(-1) @ v, q, k, v)
    assert fused == plain == 2 * 3 * (5 * 7 * 8 + 5 * 7 * 4)


@pytest.mark.parametrize(
    ("compute", "expected"),
    [
        (lambda a, b: a @ b, 3 * 4 * 5),
        (lambda a, b: a @ b.expand(7, 4, 5), 7 * 3 * 4 * 5),
        (lambda a, b: a.expand(2, 1, 3, 4) @ b.expand(7, 4, 5), 2 * 7 * 3 * 4 * 5),
        (lambda a, b: a @ b[:, 0], 3 * 4),
        (lambda a, b: a[0] @ b, 4 * 5),
        (lambda a, b: torch.mv(a, b[:, 0]), 3 * 4),
        (lambda a, b: torch.dot(a[0], b[:, 0]), 4),
        (lambda a, b: torch.inner(a, b.t()), 3 * 4 * 5),
        (lambda a, b: torch.cdist(a, b.t()), 3 * 4 * 5),
        (lambda a, b: torch.einsum("ij,jk->ik", a, b), 3 * 4 * 5),
        (lambda a, b: F.conv1d(b[None], a[:, :, None]), 3 * 4 * 5),
    ],
)
def test_products_by_hand(compute: Callable[..., Tensor], expected: int) -> None:
    """a [3, 4], b [4, 5]; what both factors, or one alone, are a batch of multiplies."""
    assert operation_macs(compute, torch.ones(3, 4), torch.ones(4, 5)) == expected


class Hidden(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        return a @ b


@torch.library.custom_op("ditbench_test::product", mutates_args=())
def own_product(a: Tensor, b: Tensor) -> Tensor:
    return a @ b


@pytest.mark.parametrize(
    ("compute", "named"),
    [
        (lambda a, b: torch.baddbmm(torch.zeros(2, 3, 3), a, b), "aten::baddbmm"),
        (lambda a, b: torch.addbmm(torch.zeros(3, 3), a, b), "aten::addbmm"),
        (lambda a, b: torch.tensordot(a[0], b[0], 1), "aten::tensordot"),
        (lambda a, b: torch.linalg.multi_dot([a[0], b[0], a[0]]), "aten::linalg_multi_dot"),
        (lambda a, b: Hidden.apply(a, b), "prim::PythonOp.Hidden"),
        (lambda a, b: own_product(a, b), "ditbench_test::product"),
    ],
)
def test_a_product_that_cannot_be_counted_is_refused(compute: Callable[..., Tensor], named: str) -> None:
    """A cost table that silently lacks a product would favour the method that uses it."""
    with pytest.raises(UserError, match=rf"^it: no count for the operator {named}, so"):
        operation_macs(compute, torch.ones(2, 3, 4), torch.ones(2, 4, 3))


def test_a_recurrent_layer_is_refused() -> None:
    with global_state_kept(), pytest.raises(UserError, match="aten::lstm"):
        operation_macs(lambda x: nn.LSTM(4, 3)(x)[0], torch.ones(2, 4))


def test_what_multiplies_nothing_is_not_counted() -> None:
    assert operation_macs(lambda x: F.silu(x).softmax(-1) + x.square().sqrt().lgamma(), torch.ones(4, 5)) == 0
    resized = operation_macs(lambda x: F.interpolate(x, scale_factor=2, mode="linear"), torch.ones(1, 4, 5))
    assert resized == 0


def test_norms_stand_apart() -> None:
    """fvcore: 4 operations a number for a LayerNorm without weights, 5 with weights."""
    with global_state_kept():
        layers = nn.Sequential(nn.LayerNorm(8, elementwise_affine=False), nn.Linear(8, 3), nn.LayerNorm(3))
    found = count(layers, (torch.ones(2, 8),), "it")
    assert (found.products, found.norms) == (2 * 8 * 3, 2 * 8 * 4 + 2 * 3 * 5)


def test_a_transformer_layer_counts_as_its_parts() -> None:
    """In eval mode torch would run it as one operator without a count; D = 8, 2 x 5 tokens, MLP 16."""
    with global_state_kept():
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    layer.train()
    state = torch.get_rng_state()
    assert count(layer, (torch.ones(2, 5, 8),), "it").products == 10 * (4 * 8 * 8 + 2 * 8 * 16) + 2 * 2 * 5 * 5 * 8
    assert layer.training and layer.self_attn.training
    assert torch.backends.mha.get_fastpath_enabled()
    assert torch.equal(torch.get_rng_state(), state), "dropout is off while counting"


# -- methods of third parties ---------------------------------------------------------------------------------------


class Probe(Method):
    """One linear layer on block 1, and what a test asks for on top."""

    Config = dict
    disclosure = Disclosure(summary="A probe.", paper="none")
    name = "probe"

    def __init__(self, config: Any, backbone: BackboneShape, data: DataShape) -> None:
        super().__init__(config, backbone, data)
        width = backbone.hidden_size
        self.heads["first"] = nn.Linear(width, 24)
        for name, layer in config.items():
            self.heads[name] = layer

    def taps(self, progress: Progress) -> tuple[int, ...]:
        return (1,)

    def terms(self, view: StepView, hidden: Mapping[int, Tensor]) -> dict[str, Term]:
        value = hidden[1]
        for layer in self.heads.values():
            value = layer(value)
        return {"probe": Term(value.mean(), 1.0)}


class OnLatents(Probe):
    """Reads no block at all."""

    def taps(self, progress: Progress) -> tuple[int, ...]:
        return ()

    def terms(self, view: StepView, hidden: Mapping[int, Tensor]) -> dict[str, Term]:
        pixels = view.x0_NCHW.flatten(2).transpose(1, 2)
        return {"probe": Term(F.linear(pixels, self.heads["first"].weight[:, :4]).mean(), 1.0)}


class Uncountable(Probe):
    def terms(self, view: StepView, hidden: Mapping[int, Tensor]) -> dict[str, Term]:
        return {"probe": Term(torch.addbmm(torch.zeros(1), hidden[1], hidden[1].transpose(1, 2)).mean(), 1.0)}


@pytest.fixture
def pico() -> BackboneShape:
    return shape_of("SiT-pico/2", 8)


def test_an_extra_layer_changes_the_count_by_that_layer(pico: BackboneShape) -> None:
    with global_state_kept():
        extra = {"second": nn.Linear(24, 40), "norm": nn.BatchNorm1d(pico.num_tokens)}
        plain, more = Probe({}, pico, DATA), Probe(extra, pico, DATA)
    passes = Passes(build(pico))
    before, after = step_cost(passes, plain), step_cost(passes, more)
    assert macs(before.head_forward_gmacs) == pico.num_tokens * pico.hidden_size * 24
    assert macs(after.head_forward_gmacs - before.head_forward_gmacs) == pico.num_tokens * 24 * 40
    assert after.head_parameters - before.head_parameters == 24 * 40 + 40 + 2 * pico.num_tokens
    extra_gflops = after.train_gflops_per_image - before.train_gflops_per_image
    assert extra_gflops * 1e9 == pytest.approx(6 * pico.num_tokens * 24 * 40)
    assert torch.equal(extra["norm"].running_mean, torch.zeros(pico.num_tokens)), "counting moves no running mean"
    assert extra["norm"].training


def test_terms_without_taps_are_counted(pico: BackboneShape) -> None:
    with global_state_kept():
        method = OnLatents({}, pico, DATA)
    assert macs(step_cost(Passes(build(pico)), method).head_forward_gmacs) == 8 * 8 * 4 * 24


def test_an_uncounted_product_names_method_and_operator(pico: BackboneShape) -> None:
    with global_state_kept():
        method = Uncountable({}, pico, DATA)
    with pytest.raises(UserError, match=r"^method probe: no count for the operator aten::addbmm, "):
        step_cost(Passes(build(pico)), method)


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


def test_every_teacher_pass_is_counted_once(pico: BackboneShape) -> None:
    cost = step_cost(Passes(build(pico)), TwoTeachers({}, pico, DATA))
    first = embed_macs(pico) + 2 * block_macs(pico)
    assert macs(cost.teacher_forward_gmacs) == first + macs(cost.backbone_forward_gmacs)
    assert cost.term_weights == {"two": 0.25}


def test_another_teacher_block_costs_its_blocks(pico: BackboneShape) -> None:
    second, fourth = (counted("sra", pico, teacher_block=block).teacher_forward_gmacs for block in (2, 4))
    assert macs(fourth - second) == 2 * block_macs(pico)


def test_methods_share_the_passes_of_a_backbone(pico: BackboneShape, monkeypatch: pytest.MonkeyPatch) -> None:
    passes, seen = Passes(build(pico)), []
    monkeypatch.setattr(costs, "count", lambda module, inputs, what: seen.append(what) or count(module, inputs, what))
    one, two = (step_cost(passes, build_method(name, pico)) for name in ("sra", "sra"))
    assert one == two
    assert sorted(seen) == ["method sra", "method sra", "the backbone", "the backbone"]


def test_counting_draws_nothing_and_changes_no_weight(pico: BackboneShape) -> None:
    backbone, method = build(pico), build_method("sra", pico)
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    state = torch.get_rng_state()
    step_cost(Passes(backbone), method)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], value) for name, value in backbone.state_dict().items())
    assert all(p.grad is None for p in backbone.parameters())
    assert backbone.training


# -- without weights ------------------------------------------------------------------------------------------------


def test_a_hollow_backbone_costs_the_same_and_takes_no_memory(pico: BackboneShape) -> None:
    state = torch.get_rng_state()
    backbone = hollow(lambda: build(pico))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(value.untyped_storage().nbytes() == 4 for value in backbone.state_dict().values())
    assert step_cost(Passes(backbone), build_method("sra", pico)) == counted("sra", pico)


# -- caches ---------------------------------------------------------------------------------------------------------


RECIPE = AutoencoderRecipe(block_channels=(8, 16), layers_per_block=1)


def encode_macs(side: int) -> int:
    """RECIPE's encoder on `side` x `side` pixels, layer by layer; convolutions are 3 x 3 but for shortcuts.

    8 channels at full size (image 3 -> 8, two convolutions, a halving one), 16 at half size (8 -> 16 with a
    shortcut, 16 -> 16), the middle (two blocks of two, attention of one head), and 16 -> 8 moments, then 1 x 1.
    """
    fine, coarse = side**2, (side // 2) ** 2
    high = fine * 9 * (3 * 8 + 2 * 8 * 8) + coarse * 9 * 8 * 8
    low = coarse * (9 * (8 * 16 + 16 * 16) + 8 * 16)
    middle = coarse * 9 * 4 * 16 * 16 + coarse * 4 * 16 * 16 + 2 * coarse * coarse * 16
    return high + low + middle + coarse * (9 * 16 * 8 + 8 * 8)


def test_the_cost_of_caches_by_hand(pico: BackboneShape) -> None:
    network = hollow(lambda: build_network(RECIPE))
    data = DataShape(image_size=32, num_classes=10, encoder_width=lambda _: ENCODER_WIDTH)
    with global_state_kept():
        method_type = methods.load("repa")
        config = method_type.resolve(method_type.Config(encoders="efficientnet_lite0,efficientnet_lite2"), pico)
        method = method_type(config, pico, data)
    cost = cache_cost(network, method)
    assert macs(cost.vae.forward_gmacs) == encode_macs(32)
    assert list(cost.encoders) == ["efficientnet_lite0", "efficientnet_lite2"]
    # timm's cards: 4.7 M and 6.1 M parameters.
    assert cost.external_parameters == pytest.approx((4.65 + 6.09) * 1e6, abs=1e4)
    encoders = sum(encoder.forward_gmacs for encoder in cost.encoders.values())
    assert cost.gflops_per_image * 1e9 == pytest.approx(2 * encode_macs(32) + 2e9 * encoders)


def test_an_encoder_costs_what_it_runs_at_the_backbones_grid() -> None:
    """EfficientNet's layers are convolutions but for its head, so four times the tokens cost four times as much."""
    small, large = (costs.encoder_cost("efficientnet_lite0", grid, 64).forward_gmacs for grid in (2, 4))
    assert macs(large) == 4 * macs(small)
    with global_state_kept():
        encoder = FrozenEncoder.untrained("efficientnet_lite0", 2, "cpu")
    with FlopCounterMode(display=False) as counter:
        encoder(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))
    assert macs(small) * 2 == counter.get_total_flops()


def test_the_record_of_a_run(pico: BackboneShape) -> None:
    """Cached targets are what a run spends, online ones have the encoder in the step; the caches stand apart."""
    step = counted("repa", pico)
    vae = costs.NetworkCost(forward_gmacs=0.5, parameters=7)
    encoders = {
        "a": costs.NetworkCost(forward_gmacs=2.0, parameters=3),
        "b": costs.NetworkCost(forward_gmacs=1.0, parameters=4),
    }
    record = cost_record(step, costs.CacheCost(vae=vae, encoders=encoders), num_images=10)
    trained = step.backbone_forward_gmacs + step.head_forward_gmacs
    assert record["train_gflops_per_image"] == pytest.approx(6 * trained, rel=1e-12)
    assert record["train_gflops_per_image_online"] == pytest.approx(6 * trained + 2 * 3.0, rel=1e-12)
    assert record["encoder_forward_gmacs"] == 3.0
    assert record["encoders"]["b"] == {"forward_gmacs": 1.0, "parameters": 4}
    assert record["external_parameters"] == 7
    assert record["vae_encode_gmacs"] == 0.5
    assert (record["cache_images"], record["cache_gflops_per_image"], record["cache_gflops"]) == (10, 7.0, 70.0)
    assert record["term_weights"] == {"repa": 0.5}
