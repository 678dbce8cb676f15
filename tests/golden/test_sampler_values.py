"""Samples worked out by hand (docstrings hold the derivations)."""

import pytest
import torch

from harness.sampler import SamplerConfig, sample

POINT = torch.tensor([1.5, -0.5, 0.25, 2.0], dtype=torch.float64).reshape(1, 1, 2, 2)


class OnePoint:
    """Exact field of data that is the single point x*: x_t = (1-t) x* + t e, so v = e - x* = (x - x*) / t."""

    num_classes = 1

    def __call__(self, x, t, y):
        return (x - POINT.float()) / t.reshape(-1, 1, 1, 1), {}


class Linear:
    """v = x."""

    num_classes = 1

    def __call__(self, x, t, y):
        return x, {}


def start(value: float, num: int = 1) -> torch.Tensor:
    return torch.full((num, 1, 2, 2), value, dtype=torch.float64)


ZERO = torch.zeros(1, dtype=torch.int64)


@pytest.mark.parametrize("kind", ["ode-euler", "ode-heun"])
@pytest.mark.parametrize("num_steps", [1, 2, 7, 50])
def test_ode_lands_on_the_one_data_point(kind, num_steps):
    """The paths are straight lines that all end in x*: any number of steps is exact (to the network's float32)."""
    end = sample(OnePoint(), start(-0.7), ZERO, SamplerConfig(kind=kind, num_steps=num_steps))
    assert torch.allclose(end, POINT, atol=1e-5)


def test_last_sde_step_from_a_noised_point():
    """From x = 0.96 x* + 0.04 e: v = e - x*, drift = x + 1.96 v = 2 e - x*, and x - 0.04 drift = x* - 0.04 e.

    Two steps, and a first noise that puts the state on that x whatever the first drift was. With start 1 that drift
    is x + v = 1 + (1 - x*), so the mean after it is 1 - 0.96 (2 - x*), and the noise's factor is sqrt(2 * 0.96).
    """
    e = torch.tensor([0.3, -1.0, 2.0, 0.0], dtype=torch.float64).reshape(1, 1, 2, 2)
    wanted = 0.96 * POINT + 0.04 * e
    first = (wanted - (1 - 0.96 * (2 - POINT))) / (2 * 0.96) ** 0.5
    end = sample(OnePoint(), start(1.0), ZERO, SamplerConfig(kind="sde-euler-maruyama", num_steps=2), lambda i: first)
    assert torch.allclose(end, POINT - 0.04 * e, atol=1e-5)


def test_two_euler_steps():
    """v = x, dt = -1/2: 1 -> 1 - 1/2 -> 1/2 - 1/4 = 1/4."""
    assert sample(Linear(), start(1.0), ZERO, SamplerConfig(kind="ode-euler", num_steps=2)).unique().item() == 0.25


def test_two_heun_steps():
    """v = x: predictor 1/2, slope (1 + 1/2)/2 = 3/4, state 1 - 3/8 = 5/8; the last step is Euler: 5/8 - 5/16."""
    assert sample(Linear(), start(1.0), ZERO, SamplerConfig(kind="ode-heun", num_steps=2)).unique().item() == 0.3125


def test_three_sde_steps():
    """v = x, times 1, 0.52, 0.04, 0; noise 1, then -1; drift (3 - t) x.

    t=1:    x = 1,        drift 2,              x = 1 - 0.96       + sqrt(2 * 0.48)        = 0.04 + 0.9797959
    t=0.52: x = 1.0197959, drift 2.48 x,        x = x (1 - 1.1904) - sqrt(2 * 0.52 * 0.48) = -0.1941691 - 0.7065409
    t=0.04: x = -0.9007100, drift 2.96 x,       x = x (1 - 0.1184)                         = -0.7940660
    """
    config = SamplerConfig(kind="sde-euler-maruyama", num_steps=3)
    end = sample(Linear(), start(1.0), ZERO, config, lambda i: start(1.0 if i == 0 else -1.0))
    assert end.unique().item() == pytest.approx(-0.7940660, abs=1e-6)
