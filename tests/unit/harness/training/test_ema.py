"""The moving average against a slow loop in float64, its warm-up, and the flag that freezes it."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from harness.backbones.sit import SiT
from harness.config import EmaConfig
from harness.training.ema import Ema


def perturb(backbone: SiT, update: int) -> None:
    """Other weights after every update, as training would leave them."""
    generator = torch.Generator().manual_seed(update)
    with torch.no_grad():
        for parameter in backbone.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator))


def trained_part(backbone: SiT) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in backbone.named_parameters() if p.requires_grad}


def slow_decay(decay: float, warmup: int, update: int) -> float:
    return min(decay, update / (warmup + update)) if warmup > 0 else decay


class OnDevice(Tensor):
    """A flag that says it lies on a GPU, where it may not be read back."""

    device = torch.device("cuda")

    def item(self) -> float:
        raise AssertionError("the flag was read back")


@pytest.fixture(params=["cpu", "device"])
def flag(request: pytest.FixtureRequest) -> Callable[[float], Tensor]:
    """`flag(1.0)`: as on the CPU, and as on a device."""
    return lambda value: torch.tensor(value) if request.param == "cpu" else torch.tensor(value).as_subclass(OnDevice)


@pytest.mark.parametrize(("decay", "warmup"), [(0.9999, 0), (0.9, 0), (0.99, 10), (0.5, 3), (0.0, 0)])
def test_against_a_slow_loop(
    make_backbone: Callable[..., SiT], flag: Callable[[float], Tensor], decay: float, warmup: int
) -> None:
    backbone = make_backbone(randomise=0.5)
    ema = Ema(backbone, EmaConfig(decay=decay, warmup=warmup))
    slow = {name: value.double() for name, value in trained_part(backbone).items()}
    for update in range(1, 9):
        perturb(backbone, update)
        ema.update(update, flag(0.0))
        d = slow_decay(decay, warmup, update)
        for name, weight in trained_part(backbone).items():
            slow[name] = d * slow[name] + (1 - d) * weight.double()
    for name, value in trained_part_of_ema(ema).items():
        torch.testing.assert_close(value.double(), slow[name], rtol=1e-5, atol=1e-6)


def trained_part_of_ema(ema: Ema) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in ema.backbone.named_parameters() if name != "pos_embed"}


@pytest.mark.parametrize(
    ("warmup", "update", "expected"),
    # s / (w + s): 1/11, 10/20, 90/100, and from 990 on the constant decay 0.99
    [(10, 1, 1 / 11), (10, 10, 0.5), (10, 90, 0.9), (10, 990, 0.99), (10, 5000, 0.99), (0, 1, 0.99)],
)
def test_decay_by_hand(make_backbone: Callable[..., SiT], warmup: int, update: int, expected: float) -> None:
    ema = Ema(make_backbone(), EmaConfig(decay=0.99, warmup=warmup))
    assert ema.decay(update) == pytest.approx(expected, rel=1e-12)


def test_it_starts_as_a_copy_of_its_own(make_backbone: Callable[..., SiT]) -> None:
    backbone = make_backbone(randomise=0.5)
    ema = Ema(backbone, EmaConfig(decay=0.9))
    before = trained_part_of_ema(ema)
    assert all(torch.equal(before[name], value) for name, value in trained_part(backbone).items())
    perturb(backbone, 1)
    assert all(torch.equal(before[name], value) for name, value in trained_part_of_ema(ema).items())
    assert not ema.backbone.training
    assert not any(p.requires_grad for p in ema.backbone.parameters())


def test_the_flag_freezes_it_to_the_bit(make_backbone: Callable[..., SiT], flag: Callable[[float], Tensor]) -> None:
    backbone = make_backbone(randomise=0.5)
    ema = Ema(backbone, EmaConfig(decay=0.9))
    perturb(backbone, 1)
    ema.update(1, torch.zeros(()))
    before = trained_part_of_ema(ema)
    perturb(backbone, 2)
    ema.update(2, flag(1.0))
    assert all(torch.equal(before[name], value) for name, value in trained_part_of_ema(ema).items())
    ema.update(2, flag(0.0))
    assert any(not torch.equal(before[name], value) for name, value in trained_part_of_ema(ema).items())


def test_it_stays_float32_and_moves_at_the_papers_decay(make_backbone: Callable[..., SiT]) -> None:
    """In bf16 an average at decay 0.9999 does not move at all."""
    backbone = make_backbone(randomise=0.5)
    ema = Ema(backbone, EmaConfig(decay=0.9999))
    before = trained_part_of_ema(ema)
    perturb(backbone, 1)
    ema.update(1, torch.zeros(()))
    for name, value in trained_part_of_ema(ema).items():
        assert value.dtype == torch.float32
        assert not torch.equal(value, before[name]), name


def test_the_fixed_position_table_is_left_alone(make_backbone: Callable[..., SiT]) -> None:
    backbone = make_backbone(randomise=0.5)
    ema = Ema(backbone, EmaConfig(decay=0.9))
    perturb(backbone, 1)
    ema.update(1, torch.zeros(()))
    assert torch.equal(ema.backbone.pos_embed, backbone.pos_embed)
