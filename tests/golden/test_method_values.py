"""Values of the methods' losses and defaults worked out by hand (methods.md sections 3 to 5, 7 and 10).

Shapes: N images, T tokens, D backbone width, Z encoder width.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from harness.backbones.sit import SiT
from harness.flow import interpolate, velocity
from harness.method import BackboneShape, Method, Progress, StepView
from methods import load
from methods._losses import cosine, l1, l2, smooth_l1
from methods.sra import teacher_time


def one(value: float) -> Tensor:
    return torch.tensor([[value]])


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(("difference", "expected"), [(0.0, 0.0), (0.02, 0.004), (0.05, 0.025), (1.0, 0.975)])
def test_smooth_l1_by_hand(difference: float, sign: int, expected: float) -> None:
    """d^2 / 0.1 below 0.05: 0.0004 / 0.1; above: |d| - 0.025."""
    found = smooth_l1(one(3.0 + sign * difference), one(3.0), beta=0.05)
    assert found.tolist() == pytest.approx([expected], abs=1e-6)


def test_other_regressions_by_hand() -> None:
    prediction, target = torch.tensor([[1.0, -2.0], [0.0, 4.0]]), torch.tensor([[0.0, 2.0], [0.0, 1.0]])
    assert l1(prediction, target).tolist() == [2.5, 1.5]
    assert l2(prediction, target).tolist() == [8.5, 4.5]


def test_cosine_by_hand() -> None:
    """Two tokens of two features: features give 3/5 and 1; along tokens (1, 3).(3, 6) and (0, 0).(4, 0)."""
    a, b = torch.tensor([[[1.0, 0.0], [3.0, 0.0]]]), torch.tensor([[[3.0, 4.0], [6.0, 0.0]]])
    assert cosine(a, b).tolist() == pytest.approx([(0.6 + 1) / 2])
    assert cosine(a, b, dim=1).tolist() == pytest.approx([(21 / (10**0.5 * 45**0.5) + 0) / 2])


@pytest.mark.parametrize(
    ("t", "r", "expected"), [(0.1, 1.0, 0.0), (0.9, 0.5, 0.8), (0.2, 1.0, 0.0), (0.0, 0.7, 0.0), (0.6, 0.0, 0.6)]
)
def test_sra_teacher_time_by_hand(t: float, r: float, expected: float) -> None:
    found = teacher_time(torch.tensor([t]), torch.tensor([r]), 0.2)
    assert found.tolist() == pytest.approx([expected], abs=1e-6)
    assert 0 <= float(found) <= 1


@pytest.mark.parametrize(
    ("images", "weight"),
    [
        (0, 0.2),
        (750_600 * 256, 0.2),  # 192.15M images: 150 epochs
        (750_600 * 256 + 5_004_000 * 256 // 2, 0.2 / 10**0.5),
        (750_600 * 256 + 5_004_000 * 256, 0.02),  # one decade, 1.281G images, later
        (750_600 * 256 + 2 * 5_004_000 * 256, 0.002),
    ],
)
def test_sra_weight_schedule(
    make_method: Callable[..., Method], make_view: Callable[..., StepView], images: int, weight: float
) -> None:
    view = make_view(progress=Progress(step=images // 256, images=images), teacher=lambda *args: torch.zeros(4, 4, 16))
    term = make_method(load("sra")).terms(view, {2: torch.ones(4, 4, 16)})["sra"]
    assert term.weight == pytest.approx(weight, rel=1e-12)


# -- REPA's term ----------------------------------------------------------------------------------------------------


def repa_value(method: Method, view: StepView, h_NTD: Tensor, tokens: dict[str, Tensor]) -> float:
    (term,) = method.terms(replace(view, tokens=tokens), {2: h_NTD}).values()
    assert term.weight == 0.5
    return float(term.value.detach())


def test_repa_is_minus_one_when_aligned_and_zero_when_orthogonal(
    make_method: Callable[..., Method], make_view: Callable[..., StepView]
) -> None:
    method, view = make_method(load("repa"), encoders="a"), make_view()
    h_NTD = torch.randn(4, 4, 16, generator=torch.Generator().manual_seed(1))
    aligned_NTZ = method.heads["a"](h_NTD).detach()
    # swapping neighbours with a sign gives a vector at a right angle: (x, y) -> (-y, x)
    pairs = aligned_NTZ.unflatten(-1, (-1, 2))
    orthogonal_NTZ = torch.stack([-pairs[..., 1], pairs[..., 0]], -1).flatten(-2)
    for scale in (1.0, 1e-3, 1e4):
        assert repa_value(method, view, h_NTD, {"a": scale * aligned_NTZ}) == pytest.approx(-1, abs=1e-6)
        assert repa_value(method, view, h_NTD, {"a": -scale * aligned_NTZ}) == pytest.approx(1, abs=1e-6)
        assert repa_value(method, view, h_NTD, {"a": scale * orthogonal_NTZ}) == pytest.approx(0, abs=1e-6)


def test_repa_is_the_mean_over_encoders(make_method: Callable[..., Method], make_view: Callable[..., StepView]) -> None:
    """Aligned with one of two encoders and opposed to one in three quarters: (-1 + 1/2) / 2."""
    method, view = make_method(load("repa"), encoders="a,b"), make_view()
    h_NTD = torch.randn(4, 4, 16, generator=torch.Generator().manual_seed(1))
    tokens = {name: method.heads[name](h_NTD).detach() for name in ("a", "b")}
    tokens["b"][:3] *= -1
    assert repa_value(method, view, h_NTD, tokens) == pytest.approx((-1 + 0.5) / 2, abs=1e-6)


# -- defaults -------------------------------------------------------------------------------------------------------

PUBLISHED = {
    "S": {"repa": 4, "sra": (3, 8), "vae_repa": 2},
    "B": {"repa": 4, "sra": (3, 8), "vae_repa": 2},
    "L": {"repa": 8, "sra": (6, 16), "vae_repa": 8},
    "XL": {"repa": 8, "sra": (8, 20), "vae_repa": 8},
    # other depths by proportion, rounded: 8/28, 8/28 -> 20/28, 2/12 of 4, 6 and 8 blocks
    "pico": {"repa": 1, "sra": (1, 3), "vae_repa": 1},
    "nano": {"repa": 2, "sra": (2, 4), "vae_repa": 1},
    "micro": {"repa": 2, "sra": (2, 6), "vae_repa": 1},
}


@pytest.mark.parametrize("size", PUBLISHED)
def test_default_blocks_by_size(shape_of: Callable[[str], BackboneShape], size: str) -> None:
    backbone, expected = shape_of(f"SiT-{size}/2"), PUBLISHED[size]
    config = {name: load(name).resolve(load(name).Config(), backbone) for name in expected}
    assert config["repa"].block == expected["repa"]
    assert (config["sra"].block, config["sra"].teacher_block) == expected["sra"]
    assert config["vae_repa"].block == expected["vae_repa"]


@pytest.mark.parametrize(
    ("method", "size", "width"),
    [("repa", "XL", 2048), ("repa", "S", 2048), ("repa", "nano", 512), ("sra", "B", 1536), ("vae_repa", "XL", 2304)],
)
def test_default_head_widths(shape_of: Callable[[str], BackboneShape], method: str, size: str, width: int) -> None:
    cls = load(method)
    assert cls.resolve(cls.Config(), shape_of(f"SiT-{size}/2")).head_width == width


@pytest.mark.parametrize(
    ("method", "fields"),
    [
        ("repa", {"weight": 0.5, "encoders": "dinov2_vitb14"}),
        ("sra", {"weight": 0.2, "loss": "smooth_l1", "beta": 0.05, "noise_gap": 0.2, "teacher_full_pass": False}),
        (
            "vae_repa",
            {"weight": 1.0, "loss": "smooth_l1", "beta": 0.05, "head_layers": 5, "activation": "silu"}
            | {"t_min": 0.0, "t_max": 1.0, "target": "sample", "reduction": "mean"},
        ),
    ],
)
def test_default_settings_are_the_papers(method: str, fields: dict[str, Any]) -> None:
    config = load(method).Config()
    assert {name: getattr(config, name) for name in fields} == fields


# -- initialisation -------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_velocity_loss_at_initialisation_is_the_mean_square_of_the_target(
    make_backbone: Callable[..., SiT], make_view: Callable[..., StepView]
) -> None:
    view, model = make_view(), make_backbone()
    v_NCHW, _ = model(interpolate(view.x0_NCHW, view.noise_NCHW, view.t_N), view.t_N, view.labels_N)
    loss = (v_NCHW - velocity(view.x0_NCHW, view.noise_NCHW)).square().mean()
    pairs = zip(view.x0_NCHW.flatten().tolist(), view.noise_NCHW.flatten().tolist(), strict=True)
    squares = [(noise - x0) ** 2 for x0, noise in pairs]
    assert float(loss) == pytest.approx(sum(squares) / len(squares), rel=1e-6)
