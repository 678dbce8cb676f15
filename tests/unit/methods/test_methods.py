"""Every method against slow loops, how methods are found and summed, and what they leave alone.

Shapes: N images, C channels, H W latent height and width, T tokens, D backbone width, P numbers of a token's patch,
Z encoder width.
"""

import importlib.metadata
import math
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import methods
from harness.backbones.sit import SiT
from harness.errors import UserError
from harness.method import BackboneShape, DataShape, Method, MethodDraws, Progress, StepView
from harness.rng import global_state_kept, stream
from methods import load, names
from methods._losses import REGRESSIONS, cosine, mean_over

Array = NDArray[np.float64]
ALL = [*names(), "repa+vae_repa", "repa+sra+vae_repa"]
THOSE = re.escape(", ".join(names()))
PROGRESS = Progress(step=3, images=12)
Given = tuple[Method, StepView, dict[int, Tensor]]


# -- slow references: float64, loops over images, tokens and features -----------------------------------------------


def head_by_hand(head: nn.Module, h_NTD: Tensor, activation: str = "silu") -> Array:
    """Linear layers with the activation between them, from the stored weights alone."""
    weights = [value.detach().double().numpy() for value in head.state_dict().values()]
    x = h_NTD.detach().double().numpy()
    for index in range(0, len(weights), 2):
        if index and activation == "silu":
            x = x / (1 + np.exp(-x))
        elif index:
            x = 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
        x = x @ weights[index].T + weights[index + 1]
    return x


def slow_smooth_l1(a: float, b: float, beta: float) -> float:
    d = abs(a - b)
    return d * d / (2 * beta) if d < beta else d - beta / 2


def slow_cosine(a: Array, b: Array) -> float:
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    return dot / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))


ELEMENTS: dict[str, Callable[[float, float], float]] = {
    "smooth_l1": lambda a, b: slow_smooth_l1(a, b, 0.05),
    "l1": lambda a, b: abs(a - b),
    "l2": lambda a, b: (a - b) ** 2,
}


def slow_regression(loss: str, a: Array, b: Array) -> float:
    """Of one image [T, F]: mean over all numbers, or over tokens for the cosine."""
    if loss == "cosine":
        return sum(1 - slow_cosine(x, y) for x, y in zip(a, b, strict=True)) / len(a)
    pairs = zip(a.flatten(), b.flatten(), strict=True)
    return sum(ELEMENTS[loss](x, y) for x, y in pairs) / a.size


def patches_by_hand(x_NCHW: Tensor, p: int) -> Array:
    """[N, T, P]: tokens row by row; inside a token row, column, then channel."""
    num, channels, height, width = x_NCHW.shape
    return np.array(
        [
            [
                [float(x_NCHW[n, c, i + a, j + b]) for a in range(p) for b in range(p) for c in range(channels)]
                for i in range(0, height, p)
                for j in range(0, width, p)
            ]
            for n in range(num)
        ]
    )


def hidden_states(shape: BackboneShape) -> dict[int, Tensor]:
    generator = torch.Generator().manual_seed(5)
    size = (4, shape.num_tokens, shape.hidden_size)
    return {k: torch.randn(size, generator=generator) for k in range(1, shape.depth + 1)}


def value_of(method: Method, view: StepView, hidden: dict[int, Tensor]) -> float:
    (term,) = method.terms(view, hidden).values()
    assert term.value.dtype == torch.float32 and term.value.ndim == 0
    return float(term.value.detach())


# -- REPA -----------------------------------------------------------------------------------------------------------


def test_repa_against_loops(
    shape: BackboneShape, make_method: Callable[..., Method], make_view: Callable[..., StepView]
) -> None:
    method = make_method(load("repa"), block=3, encoders="a,b", head_width=20)
    view, hidden = make_view(encoders=("a", "b")), hidden_states(shape)
    expected = 0.0
    for name in ("a", "b"):
        g_NTZ, z_NTZ = head_by_hand(method.heads[name], hidden[3]), view.tokens[name].double().numpy()
        for n in range(4):
            for token in range(4):
                expected -= slow_cosine(g_NTZ[n, token], z_NTZ[n, token]) / (2 * 4 * 4)
    assert value_of(method, view, hidden) == pytest.approx(expected, abs=1e-6)
    assert method.needs().encoders == ("a", "b")
    assert not method.needs().ema
    assert method.taps(PROGRESS) == (3,)


def test_repa_takes_encoders_with_dots_in_their_names(make_method: Callable[..., Method]) -> None:
    method = make_method(load("repa"), encoders="timm/vit_base_patch16_224.mae", head_width=20)
    assert method.needs().encoders == ("timm/vit_base_patch16_224.mae",)
    assert [name.rpartition("/")[2] for name in method.heads] == ["vit_base_patch16_224_mae"]


def test_repa_head_has_three_layers(make_method: Callable[..., Method]) -> None:
    head = make_method(load("repa"), encoders="a", head_width=20).heads["a"]
    assert isinstance(head, nn.Sequential)
    assert [type(layer).__name__ for layer in head] == ["Linear", "SiLU", "Linear", "SiLU", "Linear"]
    assert [tuple(p.shape) for p in head.parameters() if p.ndim == 2] == [(20, 16), (20, 20), (12, 20)]


# -- SRA ------------------------------------------------------------------------------------------------------------


class RecordingTeacher:
    """Runs a backbone as the EMA teacher and keeps what it was asked."""

    def __init__(self, model: SiT) -> None:
        self.model = model
        self.calls: list[tuple[Any, ...]] = []

    @torch.no_grad()
    def __call__(
        self, x: Tensor, t: Tensor, y: Tensor, block: int, full_pass: bool = False, fp32: bool = False
    ) -> Tensor:
        self.calls.append((x, t, y, block, full_pass, fp32))
        return self.model.hidden(x, t, y, block)


@pytest.fixture
def teacher(make_backbone: Callable[..., SiT]) -> RecordingTeacher:
    return RecordingTeacher(make_backbone(randomise=0.2, seed=4))


def sra_view(make_view: Callable[..., StepView], teacher: RecordingTeacher) -> StepView:
    """Rows 4 to 7 of a global batch of 12."""
    draws = MethodDraws(seed=2, step=3, batch_size=12)
    return make_view(
        4, rows=slice(4, 8), draws=draws, method="sra", teacher=teacher, t_N=torch.tensor([0.9, 0.01, 0.5, 0.1])
    )


def test_sra_asks_the_teacher_for_less_noise_on_the_same_image(
    make_method: Callable[..., Method],
    make_view: Callable[..., StepView],
    shape: BackboneShape,
    teacher: RecordingTeacher,
) -> None:
    view = sra_view(make_view, teacher)
    make_method(load("sra"), block=2, teacher_block=5).terms(view, hidden_states(shape))
    ((x, t, y, block, full_pass, fp32),) = teacher.calls
    r = torch.rand(12, generator=stream(2, "method/sra/time_gap", 3))[4:8].tolist()
    times = [max(0.0, time - 0.2 * gap) for time, gap in zip([0.9, 0.01, 0.5, 0.1], r, strict=True)]
    assert 0.0 in times and len(set(times)) > 2  # both sides of the clamp
    assert t.tolist() == pytest.approx(times, abs=1e-6)
    for n, time in enumerate(times):
        expected = (1 - time) * view.x0_NCHW[n].double() + time * view.noise_NCHW[n].double()
        torch.testing.assert_close(x[n].double(), expected, rtol=0, atol=1e-6)
    assert torch.equal(y, view.labels_N)
    assert (block, full_pass, fp32) == (5, False, False)


@pytest.mark.parametrize("loss", ["smooth_l1", "cosine_tokens"])
def test_sra_against_loops(
    make_method: Callable[..., Method],
    make_view: Callable[..., StepView],
    shape: BackboneShape,
    teacher: RecordingTeacher,
    loss: str,
) -> None:
    method = make_method(load("sra"), block=2, teacher_block=5, loss=loss)
    hidden = hidden_states(shape)
    found = value_of(method, sra_view(make_view, teacher), hidden)
    x, t, y, block, *_ = teacher.calls[0]
    b_NTD = teacher.model.hidden(x, t, y, block).detach().double().numpy()
    a_NTD = head_by_hand(method.heads["align"], hidden[2])
    if loss == "smooth_l1":
        expected = sum(slow_regression("smooth_l1", a_NTD[n], b_NTD[n]) for n in range(4)) / 4
    else:  # per image and channel, the cosine between the two patterns over tokens
        expected = sum(1 - slow_cosine(a_NTD[n, :, d], b_NTD[n, :, d]) for n in range(4) for d in range(16)) / (4 * 16)
    assert found == pytest.approx(expected, rel=1e-5)


def test_sra_sends_no_gradient_to_its_teacher(
    make_method: Callable[..., Method],
    make_view: Callable[..., StepView],
    shape: BackboneShape,
    teacher: RecordingTeacher,
) -> None:
    method = make_method(load("sra"))
    hidden = {k: h.requires_grad_() for k, h in hidden_states(shape).items()}
    method.terms(sra_view(make_view, teacher), hidden)["sra"].value.backward()
    assert all(p.grad is None for p in teacher.model.parameters())
    assert {k for k, h in hidden.items() if h.grad is not None} == {2}
    assert all(p.grad is not None for p in method.heads.parameters())


def test_sra_passes_the_released_cost_options_on(
    make_method: Callable[..., Method],
    make_view: Callable[..., StepView],
    shape: BackboneShape,
    teacher: RecordingTeacher,
) -> None:
    hidden = hidden_states(shape)
    values = [
        value_of(make_method(load("sra"), **options), sra_view(make_view, teacher), hidden)
        for options in ({}, {"teacher_full_pass": True, "teacher_fp32": True})
    ]
    assert [call[4:] for call in teacher.calls] == [(False, False), (True, True)]
    assert values[0] == values[1]
    assert make_method(load("sra")).needs().ema


# -- VAE-REPA -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["sample", "mean"])
@pytest.mark.parametrize("loss", ["smooth_l1", "l1", "l2", "cosine"])
def test_vae_repa_against_loops(
    make_method: Callable[..., Method],
    make_view: Callable[..., StepView],
    shape: BackboneShape,
    loss: str,
    target: str,
) -> None:
    method = make_method(load("vae_repa"), block=4, loss=loss, target=target)
    view, hidden = make_view(), hidden_states(shape)
    target_NTP = patches_by_hand(view.x0_NCHW if target == "sample" else view.x0_mean_NCHW, 2)
    prediction_NTP = head_by_hand(method.heads["latent"], hidden[4])
    expected = sum(slow_regression(loss, prediction_NTP[n], target_NTP[n]) for n in range(4)) / 4
    assert value_of(method, view, hidden) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("layers", "activation"), [(5, "silu"), (5, "gelu"), (2, "gelu"), (1, "silu")])
def test_vae_repa_head(make_method: Callable[..., Method], shape: BackboneShape, layers: int, activation: str) -> None:
    method = make_method(load("vae_repa"), head_layers=layers, head_width=24, activation=activation)
    h_NTD = hidden_states(shape)[1]
    widths = [16, *[24] * (layers - 1), 12]
    shapes = [tuple(p.shape) for p in method.heads.parameters() if p.ndim == 2]
    assert shapes == [(out, into) for into, out in pairwise(widths)]
    expected = head_by_hand(method.heads["latent"], h_NTD, activation)
    np.testing.assert_allclose(method.heads["latent"](h_NTD).detach().numpy(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("t_min", "t_max", "inside"),
    [(0.0, 0.5, [0, 1]), (0.5, 1.0, [1, 2, 3]), (0.25, 0.25, [0]), (0.6, 0.7, []), (0.0, 1.0, [0, 1, 2, 3])],
)
def test_vae_repa_time_range_masks_images_and_divides_by_all(
    make_method: Callable[..., Method],
    make_view: Callable[..., StepView],
    shape: BackboneShape,
    t_min: float,
    t_max: float,
    inside: list[int],
) -> None:
    method = make_method(load("vae_repa"), t_min=t_min, t_max=t_max)
    view, hidden = make_view(t_N=torch.tensor([0.25, 0.5, 0.75, 0.99])), hidden_states(shape)
    target_NTP, prediction_NTP = patches_by_hand(view.x0_NCHW, 2), head_by_hand(method.heads["latent"], hidden[1])
    expected = sum(slow_regression("smooth_l1", prediction_NTP[n], target_NTP[n]) for n in inside) / 4
    assert value_of(method, view, hidden) == pytest.approx(expected, rel=1e-5, abs=1e-9)


def test_vae_repa_sum_is_over_a_latents_numbers_and_the_mean_over_images(
    make_method: Callable[..., Method], make_view: Callable[..., StepView], shape: BackboneShape
) -> None:
    method = make_method(load("vae_repa"), reduction="sum", loss="l2")
    view, hidden = make_view(), hidden_states(shape)
    difference = head_by_hand(method.heads["latent"], hidden[1]) - patches_by_hand(view.x0_NCHW, 2)
    expected = sum(d * d for d in difference.flatten()) / 4
    assert value_of(method, view, hidden) == pytest.approx(expected, rel=1e-5)


def test_the_control_adds_nothing(
    make_method: Callable[..., Method], make_view: Callable[..., StepView], shape: BackboneShape
) -> None:
    assert methods.control() == "sit"
    method = make_method(load("sit"))
    assert method.terms(make_view(), {}) == {}
    assert method.taps(PROGRESS) == ()
    assert len(method.heads) == 0


# -- numerics -------------------------------------------------------------------------------------------------------


def test_a_masked_mean_keeps_its_denominator() -> None:
    assert float(mean_over(torch.tensor([1.0, 2.0, 6.0]))) == 3.0
    assert float(mean_over(torch.tensor([1.0, 2.0, 6.0]), torch.tensor([1.0, 0.0, 1.0]))) == pytest.approx(7 / 3)


@pytest.mark.parametrize("loss", [*REGRESSIONS, "cosine of tokens"])
def test_losses_run_in_float32_under_autocast(loss: str) -> None:
    """bf16 inputs are exact numbers: the loss of their float64 values must come out, to float32 precision."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(3, 5, 7, generator=generator).bfloat16() for _ in range(2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = cosine(a, b, dim=1) if loss not in REGRESSIONS else REGRESSIONS[loss](a, b, 0.05)
        lossy = nn.functional.cosine_similarity(a, b, dim=1).mean(1)
    assert found.dtype == torch.float32
    a_NTD, b_NTD = a.double().numpy(), b.double().numpy()
    if loss in REGRESSIONS:
        expected = [slow_regression(loss, a_NTD[n], b_NTD[n]) for n in range(3)]
    else:
        expected = [sum(slow_cosine(a_NTD[n, :, d], b_NTD[n, :, d]) for d in range(7)) / 7 for n in range(3)]
        assert lossy.tolist() != pytest.approx(expected, abs=1e-4)  # what plain autocast would give
    assert found.tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("name", ["repa", "sra", "vae_repa"])
def test_heads_run_in_the_runs_precision_and_losses_in_float32(
    make_method: Callable[..., Method],
    make_view: Callable[..., StepView],
    shape: BackboneShape,
    teacher: RecordingTeacher,
    name: str,
) -> None:
    method = make_method(load(name), **({"encoders": "a"} if name == "repa" else {}))
    seen: list[torch.dtype] = []
    for head in method.heads.values():
        head.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    view = make_view(encoders=("a",), method=name, teacher=teacher)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        terms = method.terms(view, hidden_states(shape))
    assert seen == [torch.bfloat16]
    assert all(term.value.dtype == torch.float32 for term in terms.values())


# -- gradients at initialisation ------------------------------------------------------------------------------------


def reached(module: nn.Module) -> bool:
    """Whether any parameter has a gradient that is not zero."""
    return any(p.grad is not None and bool(p.grad.any()) for p in module.parameters())


@pytest.mark.parametrize("name", ["repa", "sra", "vae_repa"])
def test_gradients_at_initialisation(
    make_method: Callable[..., Method],
    make_view: Callable[..., StepView],
    make_backbone: Callable[..., SiT],
    teacher: RecordingTeacher,
    name: str,
) -> None:
    """Gates are 0: a term reaches its head, the patch embedding and the modulation of blocks 1..k, and nothing else."""
    method = make_method(load(name), block=3, **({"encoders": "a"} if name == "repa" else {}))
    model, view = make_backbone(), make_view(encoders=("a",), method=name, teacher=teacher)
    _, hidden = model(view.xt_NCHW, view.t_N, view.labels_N, taps=method.taps(view.progress))
    assert torch.equal(hidden[3], model.x_embedder(view.xt_NCHW) + model.pos_embed)
    (term,) = method.terms(view, hidden).values()
    term.value.backward()
    assert reached(method.heads)
    assert reached(model.x_embedder)
    modulated = [number for number, block in enumerate(model.blocks, start=1) if reached(block.adaLN_modulation)]  # type: ignore[arg-type]
    assert modulated == [1, 2, 3]
    assert not any(reached(block.attn) or reached(block.mlp) for block in model.blocks)  # type: ignore[arg-type]
    assert not any(reached(part) for part in (model.t_embedder, model.y_embedder, model.final_layer))


# -- sums -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def view_for(make_view: Callable[..., StepView], teacher: RecordingTeacher) -> Callable[..., StepView]:
    """`view_for(method)`: a view of 4 images with all that a method may ask for."""

    def build(method: Method) -> StepView:
        images = torch.zeros(4, 3, 32, 32, dtype=torch.uint8)
        encoders = method.needs().encoders
        return make_view(4, encoders, teacher=teacher, method=method.name, images_NCHW=images)

    return build


def configs(name: str) -> Any:
    """The default config of a method, or one a part for a sum."""
    parts = {part: load(part).Config() for part in name.split("+")}
    return parts if "+" in name else parts[name]


def built(name: str, shape: BackboneShape, data_shape: DataShape, seed: int = 0) -> Method:
    cls = load(name)
    with global_state_kept():
        method = cls(cls.resolve(configs(name), shape), shape, data_shape)
    method.initialize(seed)
    return method


@pytest.fixture
def given(shape: BackboneShape, data_shape: DataShape, view_for: Callable[..., StepView], name: str) -> Given:
    """The method that a test's parameter names, with a view and hidden states for it."""
    method = built(name, shape, data_shape)
    return method, view_for(method), hidden_states(shape)


@pytest.mark.parametrize("name", ["repa+vae_repa", "vae_repa+repa", "sra+repa", "repa+sra+vae_repa", "sit+repa"])
def test_a_sum_is_its_parts(
    shape: BackboneShape,
    data_shape: DataShape,
    view_for: Callable[..., StepView],
    name: str,
) -> None:
    together, parts = built(name, shape, data_shape), [built(part, shape, data_shape) for part in name.split("+")]
    view, hidden = view_for(together), hidden_states(shape)
    apart = {k: t for part in parts for k, t in part.terms(view.of(part.name), hidden).items()}
    terms = together.terms(view, hidden)
    assert terms.keys() == apart.keys()
    assert all(torch.equal(terms[k].value, apart[k].value) and terms[k].weight == apart[k].weight for k in apart)
    assert together.taps(PROGRESS) == tuple(sorted({tap for part in parts for tap in part.taps(PROGRESS)}))
    for part in parts:
        alone = part.heads.state_dict()
        assert all(torch.equal(together.heads[part.name].state_dict()[k], alone[k]) for k in alone)
    diagnostics = {k: v for part in parts for k, v in part.diagnostics(view.of(part.name), hidden).items()}
    assert together.diagnostics(view, hidden) == diagnostics


def test_a_sum_joins_needs_names_and_disclosures(shape: BackboneShape, data_shape: DataShape) -> None:
    method = built("sra+repa", shape, data_shape)
    assert method.name == "sra+repa"
    assert (method.needs().encoders, method.needs().ema, method.needs().images) == (("dinov2_vitb14",), True, False)
    assert not method.is_control
    assert "SRA" in method.disclosure.paper and "REPA" in method.disclosure.paper
    assert method.disclosure.pretrained == load("repa").disclosure.pretrained
    space = method.search_space()
    assert space["repa.weight"] == [0.25, 0.5, 0.75, 1.0] and space["sra.weight"] == [0.1, 0.2, 0.5]


def test_two_taps_on_one_block_are_read_once(shape: BackboneShape, data_shape: DataShape) -> None:
    cls = load("repa+vae_repa")
    sections = {"repa": load("repa").Config(block=2, encoders="a"), "vae_repa": load("vae_repa").Config(block=2)}
    with global_state_kept():
        method = cls(cls.resolve(sections, shape), shape, data_shape)
    assert method.taps(PROGRESS) == (2,)


@dataclass(frozen=True)
class Settings:
    """As much of a run's config as says how its method is set."""

    method: str
    sections: dict[str, Any]


def test_a_name_has_parts() -> None:
    assert methods.parts("repa") == ("repa",)
    assert methods.parts("repa+vae_repa") == ("repa", "vae_repa")


def test_a_single_method_is_built_with_its_own_section(shape: BackboneShape, data_shape: DataShape) -> None:
    own = load("sra").Config(block=1, teacher_block=2)
    sections = methods.resolve(Settings("sra", {"sra": own, "repa": None}), shape)
    assert sections == {"sra": load("sra").resolve(own, shape)}
    before = torch.get_rng_state()
    method = methods.build(Settings("sra", sections), shape, data_shape)
    assert method.config is sections["sra"] and isinstance(method, load("sra"))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_sum_is_built_with_the_section_of_each_part(shape: BackboneShape, data_shape: DataShape) -> None:
    sections = {"repa": load("repa").Config(block=3, encoders="a"), "vae_repa": load("vae_repa").Config(block=2)}
    sections = methods.resolve(Settings("repa+vae_repa", sections), shape)
    assert sections == {name: load(name).resolve(section, shape) for name, section in sections.items()}
    method = methods.build(Settings("repa+vae_repa", {**sections, "sra": None}), shape, data_shape)
    assert method.name == "repa+vae_repa" and method.config == sections and method.taps(PROGRESS) == (2, 3)


# -- contract -------------------------------------------------------------------------------------------------------


@pytest.fixture
def global_state_checked() -> Iterator[None]:
    """Fails a test that moves any of the three global random states."""
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # type: ignore[index]
    yield
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])  # type: ignore[index]
    assert random.getstate() == before[2]


@pytest.mark.usefixtures("global_state_checked")
@pytest.mark.parametrize("name", ALL)
def test_no_method_touches_the_global_random_state(given: Given) -> None:
    method, view, hidden = given
    method.terms(view, hidden)
    method.diagnostics(view, hidden)
    method.load_state_dict(method.state_dict())
    method.needs(), method.search_space()


@pytest.mark.parametrize("name", ALL)
def test_terms_repeat_and_leave_the_view_as_it_was(given: Given) -> None:
    method, view, hidden = given
    tensors = [v for f in fields(view) if isinstance(v := getattr(view, f.name), Tensor)]
    tensors += [*view.tokens.values(), *hidden.values()]
    copies = [tensor.clone() for tensor in tensors]
    first, again = method.terms(view, hidden), method.terms(view, hidden)
    assert all(torch.equal(first[k].value, again[k].value) for k in first)
    assert all(torch.equal(a, b) for a, b in zip(tensors, copies, strict=True))


@pytest.mark.parametrize("name", ["repa", "sra", "vae_repa"])
def test_a_term_is_the_mean_of_its_views(given: Given) -> None:
    """Splitting a batch into equal views, as accumulation does, changes no more than roundings."""
    method, view, hidden = given
    values = []
    for rows in (slice(0, 2), slice(2, 4)):
        cut: dict[str, Any] = {f.name: v[rows] for f in fields(view) if isinstance(v := getattr(view, f.name), Tensor)}
        part = replace(view, **cut, rows=rows, tokens={k: v[rows] for k, v in view.tokens.items()})
        values.append(value_of(method, part, {k: h[rows] for k, h in hidden.items()}))
    assert sum(values) / 2 == pytest.approx(value_of(method, view, hidden), rel=1e-5)


@pytest.mark.parametrize("name", names())
def test_every_choice_of_a_search_space_is_accepted(shape: BackboneShape, data_shape: DataShape, name: str) -> None:
    method, cls = built(name, shape, data_shape), load(name)
    for field_name, choices in method.search_space().items():
        assert len(set(choices)) == len(choices) > 1
        assert getattr(method.config, field_name) in choices, f"the default {field_name} is not among its choices"
        for choice in choices:
            config = cls.resolve(replace(configs(name), **{field_name: choice}), shape)
            assert getattr(config, field_name) == choice
            with global_state_kept(), torch.device("meta"):
                cls(config, shape, data_shape)


@pytest.mark.parametrize("name", ["repa", "sra", "vae_repa"])
def test_student_norm_is_the_mean_length_of_a_token(given: Given, name: str) -> None:
    method, view, hidden = given
    (block,) = method.taps(PROGRESS)
    # SRA compares its head's output, the others log the hidden state that is aligned
    student = head_by_hand(method.heads["align"], hidden[block]) if name == "sra" else hidden[block].double().numpy()
    lengths = [math.sqrt(sum(x * x for x in token)) for image in student for token in image]
    found = method.diagnostics(view, hidden)[f"{name}_student_norm"]
    assert found == pytest.approx(sum(lengths) / len(lengths), rel=1e-5)


# -- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("repa", {"encoders": "a", "block": 7}, "repa.block is 7: the backbone has blocks 1 to 6"),
        ("repa", {"encoders": "a", "block": -1}, "repa.block is -1: the backbone has blocks 1 to 6"),
        ("repa", {"encoders": ""}, "repa.encoders is '': name at least one"),
        ("repa", {"encoders": "a,"}, "repa.encoders is 'a,': name at least one"),
        ("repa", {"encoders": "a,a"}, "repa.encoders is 'a,a': name each encoder once"),
        ("repa", {"encoders": "a", "head_width": -1}, "repa.head_width is -1"),
        ("repa", {"encoders": "a", "weight": math.nan}, "repa.weight is nan: give a finite number"),
        ("sra", {"block": 7}, "sra.block is 7: the backbone has blocks 1 to 6"),
        ("sra", {"teacher_block": 7}, "sra.teacher_block is 7: the backbone has blocks 1 to 6"),
        ("sra", {"beta": 0.0}, "sra.beta is 0.0: give more than 0"),
        ("sra", {"noise_gap": 1.1}, "sra.noise_gap is 1.1: give 0 to 1"),
        ("sra", {"decay_images": 0}, "sra.decay_images is 0"),
        ("sra", {"head_width": -1}, "sra.head_width is -1"),
        ("sra", {"weight": math.inf}, "sra.weight is inf: give a finite number"),
        ("vae_repa", {"block": 7}, "vae_repa.block is 7: the backbone has blocks 1 to 6"),
        ("vae_repa", {"beta": -1.0}, "vae_repa.beta is -1.0"),
        ("vae_repa", {"head_layers": 0}, "vae_repa.head_layers is 0: give 1 to 64"),
        ("vae_repa", {"head_width": -1}, "vae_repa.head_width is -1"),
        ("vae_repa", {"t_min": 0.6, "t_max": 0.5}, "vae_repa.t_min 0.6 and t_max 0.5: give 0 <= t_min <= t_max <= 1"),
        ("vae_repa", {"t_max": 1.5}, "vae_repa.t_min 0.0 and t_max 1.5"),
        ("vae_repa", {"beta": math.inf}, "vae_repa.beta is inf: give a finite number"),
    ],
)
def test_bad_settings_are_refused_in_one_line(
    shape: BackboneShape, name: str, values: dict[str, Any], message: str
) -> None:
    cls = load(name)
    with pytest.raises(UserError) as caught:
        cls.resolve(cls.Config(**values), shape)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_bad_part_of_a_sum_is_refused(shape: BackboneShape) -> None:
    sections = {"repa": load("repa").Config(encoders="a"), "vae_repa": load("vae_repa").Config(block=9)}
    with pytest.raises(UserError, match=r"vae_repa\.block is 9"):
        load("repa+vae_repa").resolve(sections, shape)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("repaa", rf"method 'repaa' is not known \(did you mean repa\?\): there are {THOSE}, and sums such as a\+b"),
        ("zzz", rf"method 'zzz' is not known: there are {THOSE}, and sums such as a\+b"),
        ("repa+vaerepa", r"method 'vaerepa' is not known \(did you mean vae_repa\?\)"),
        ("", r"method '' is not known"),
        ("repa+", r"method '' is not known"),
        ("_losses", r"method '_losses' is not known"),
        ("repa+repa", r"method 'repa\+repa' names a part twice"),
        ("repa+sra+repa", r"names a part twice"),
    ],
)
def test_unknown_methods_are_refused(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load(name)


# -- discovery ------------------------------------------------------------------------------------------------------

OUTSIDE = '''
from dataclasses import dataclass
import torch
from harness.method import Disclosure, Method, Term

@dataclass(frozen=True, kw_only=True)
class {name}Config:
    """Nothing."""

class {name}(Method):
    Config = {name}Config
    disclosure = Disclosure(summary="{name}.", paper="none", note="{name}")

    def __init__(self, config, backbone, data):
        super().__init__(config, backbone, data)
        self.seen = torch.zeros(1)

    def terms(self, view, hidden):
        return {{"same": Term(view.uniform("draw").mean(), 1.0)}}

    def state_dict(self):
        return {{"seen": self.seen}}

    def load_state_dict(self, state):
        self.seen = state["seen"]
'''


@pytest.fixture
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two methods of a third party, installed under the entry-point group."""
    (tmp_path / "third_party.py").write_text(OUTSIDE.format(name="Left") + OUTSIDE.format(name="Right"))
    monkeypatch.syspath_prepend(tmp_path)
    points = [
        importlib.metadata.EntryPoint(name, f"third_party:{name.title()}", "ditbench.methods")
        for name in ("left", "right")
    ]
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: points if group == "ditbench.methods" else [])


def test_own_methods_are_the_files_of_the_folder() -> None:
    folder = Path(methods.__file__).parent
    assert set(names()) >= {path.stem for path in folder.glob("[a-z]*.py")} >= {"repa", "sit", "sra", "vae_repa"}
    assert names() == sorted(names())
    assert all(load(name).name == name for name in names())


@pytest.mark.usefixtures("outside")
def test_methods_of_third_parties_are_found(shape: BackboneShape, data_shape: DataShape) -> None:
    assert {"left", "right", "repa"} <= set(names())
    assert load("left").disclosure.summary == "Left."
    method = built("left+repa", shape, data_shape)
    method.load_state_dict({"left.seen": torch.ones(1)})
    assert {k: v.tolist() for k, v in method.state_dict().items()} == {"left.seen": [1.0]}
    assert method.disclosure.note == "Left"


@pytest.mark.usefixtures("outside")
def test_parts_that_share_a_term_name_are_a_bug(
    shape: BackboneShape, data_shape: DataShape, make_view: Callable[..., StepView]
) -> None:
    with pytest.raises(AssertionError, match=r"two parts of left\+right share a term name"):
        built("left+right", shape, data_shape).terms(make_view(), {})


@pytest.mark.usefixtures("outside")
def test_parts_of_a_sum_draw_as_they_do_alone(
    shape: BackboneShape, data_shape: DataShape, make_view: Callable[..., StepView]
) -> None:
    draws = [
        float(built(name, shape, data_shape).terms(make_view(method=name), {})["same"].value)
        for name in ("left", "right")
    ]
    together = built("right+sit", shape, data_shape).terms(make_view(method="right+sit"), {})
    assert float(together["same"].value) == draws[1] != draws[0]


@pytest.mark.parametrize(("classes", "num"), [("", 0), ("LeftRight", 2)])
def test_a_file_must_define_one_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, classes: str, num: int) -> None:
    source = OUTSIDE.format(name="Left") + OUTSIDE.format(name="Right") if classes else "x = 1\n"
    (tmp_path / f"toy_{num}.py").write_text(source)
    monkeypatch.setattr(methods, "__file__", str(tmp_path / "__init__.py"))
    monkeypatch.setattr(methods, "__path__", [str(tmp_path)])
    with pytest.raises(UserError, match=rf"methods/toy_{num}\.py defines {num} methods: define one subclass"):
        load(f"toy_{num}")
