"""The sampler's orders of convergence, the SDE's variance, guidance and call counts, each against theory."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from harness.errors import UserError
from harness.rng import stream
from harness.sampler import SamplerConfig, forward_passes, network_calls, sample, times


class Field:
    """A velocity field `f(x, t)` that remembers how it was called."""

    num_classes = 10

    def __init__(self, field):
        self.field = field
        self.calls: list[tuple[float, Tensor]] = []

    def __call__(self, x: Tensor, t: Tensor, y: Tensor):
        assert x.dtype == t.dtype == torch.float32 and t.shape == y.shape == x.shape[:1]
        self.calls.append((t[0].item(), y))
        return self.field(x, t.reshape(-1, 1, 1, 1)), {}


class Labelled(Field):
    """Velocity = the label's number, everywhere."""

    def __init__(self):
        super().__init__(None)

    def __call__(self, x, t, y):
        self.calls.append((t[0].item(), y))
        return y.reshape(-1, 1, 1, 1).expand_as(x).float(), {}


def noise(num: int, *index: int, shape=(1, 2, 2)) -> Tensor:
    return torch.randn(num, *shape, generator=stream(5, "eval", *index), dtype=torch.float64)


def labels(num: int) -> Tensor:
    return torch.arange(num) % 10


# -- grid and calls -------------------------------------------------------------------------------------------------


def test_sde_times_are_the_reference_grid():
    grid = times(SamplerConfig(kind="sde-euler-maruyama", num_steps=250))
    assert len(grid) == 251 and grid[0] == 1 and grid[-2] == pytest.approx(0.04) and grid[-1] == 0
    assert np.diff(grid[:-1]) == pytest.approx(np.full(249, -0.96 / 249))


@pytest.mark.parametrize(
    ("kind", "calls"), [("ode-euler", 6), ("ode-heun", 11), ("sde-euler-maruyama", 6)], ids=["euler", "heun", "sde"]
)
def test_network_calls(kind, calls):
    config = SamplerConfig(kind=kind, num_steps=6)
    model = Field(lambda x, t: x)
    sample(model, noise(2), labels(2), config, step_noise=lambda i: noise(2, i))
    assert len(model.calls) == network_calls(config) == calls


@pytest.mark.parametrize(
    ("kind", "num_steps", "scale", "low", "high", "passes"),
    [
        ("ode-euler", 10, 1.0, 0.0, 1.0, 10),
        ("ode-euler", 10, 1.5, 0.0, 0.5, 15),  # starts 0.5, 0.4, 0.3, 0.2, 0.1 are guided
        ("ode-heun", 4, 1.5, 0.0, 0.5, 10),  # starts 1, 0.75: 2 calls each; 0.5: 2 calls, 0.25: 1 call, each for two
        ("ode-heun", 4, 1.0, 0.0, 0.5, 7),
        ("sde-euler-maruyama", 6, 2.0, 0.9, 1.0, 7),
        # Starts 1 - 0.96 i / 249 for i = 0..249 lie at or below 0.7 from i = 78 on: 172 of 250.
        ("sde-euler-maruyama", 250, 1.8, 0.0, 0.7, 422),
    ],
)
def test_forward_passes_of_an_image(kind, num_steps, scale, low, high, passes):
    config = SamplerConfig(kind=kind, num_steps=num_steps, cfg_scale=scale, guidance_low=low, guidance_high=high)
    model = Labelled()
    sample(model, noise(1), labels(1), config, step_noise=lambda i: noise(1, i))
    assert sum(len(y) for _, y in model.calls) == forward_passes(config) == passes


def test_network_sees_each_start_time_and_heun_the_ends():
    model = Field(lambda x, t: x)
    sample(model, noise(1), labels(1), SamplerConfig(kind="ode-heun", num_steps=4))
    assert [t for t, _ in model.calls] == [1, 0.75, 0.75, 0.5, 0.5, 0.25, 0.25]


def test_noise_is_asked_for_at_every_step_but_the_last():
    asked = []

    def step_noise(i: int) -> Tensor:
        asked.append(i)
        return noise(2, i)

    config = SamplerConfig(kind="sde-euler-maruyama", num_steps=5)
    assert sample(Field(lambda x, t: x), noise(2), labels(2), config, step_noise).dtype == torch.float64
    assert asked == [0, 1, 2, 3]


def test_sde_without_noise_is_refused():
    with pytest.raises(UserError, match="step_noise is missing"):
        sample(Field(lambda x, t: x), noise(2), labels(2), SamplerConfig(kind="sde-euler-maruyama", num_steps=5))


def test_state_stays_double_under_autocast():
    """A bf16 network moves a float64 state: x - v sums to the last bit of double, which bf16 could not hold."""
    start = noise(3)
    with torch.autocast("cpu", torch.bfloat16):
        end = sample(Field(lambda x, t: torch.ones_like(x, dtype=torch.bfloat16)), start, labels(3), euler(1))
    assert torch.equal(end, start - 1)


# -- orders of convergence ------------------------------------------------------------------------------------------


def euler(num_steps: int, **fields) -> SamplerConfig:
    return SamplerConfig(kind="ode-euler", num_steps=num_steps, **fields)


def heun(num_steps: int, **fields) -> SamplerConfig:
    return SamplerConfig(kind="ode-heun", num_steps=num_steps, **fields)


def slope(config, steps) -> float:
    """Order of convergence on dx/dt = x cos(3t), whose solution from 1 to 0 is x(0) = x(1) exp(-sin(3)/3)."""
    start = noise(4)
    exact = start * math.exp(-math.sin(3) / 3)
    model = Field(lambda x, t: x * torch.cos(3 * t))
    errors = [(sample(model, start, labels(4), config(n)) - exact).abs().max().item() for n in steps]
    return float(-np.polyfit(np.log(steps), np.log(errors), 1)[0])


def test_euler_is_of_order_1_and_heun_of_order_2():
    assert slope(euler, (32, 64, 128, 256)) == pytest.approx(1, abs=0.1)
    assert slope(heun, (16, 32, 64, 128)) == pytest.approx(2, abs=0.15)


def test_heun_beats_euler_at_equal_calls():
    start = noise(4)
    exact = start * math.exp(-math.sin(3) / 3)
    model = Field(lambda x, t: x * torch.cos(3 * t))
    error = {c.kind: (sample(model, start, labels(4), c) - exact).abs().max() for c in (euler(19), heun(10))}
    assert error["ode-heun"] < error["ode-euler"] / 5


# -- the SDE on Gaussian data ---------------------------------------------------------------------------------------


def gaussian_gain(t: float, var: float) -> float:
    """Exact velocity of data N(0, var) is `gain * x`.

    E[noise - x0 | x_t] with x_t = (1-t) x0 + t noise: cov(noise - x0, x_t) / var(x_t) = (t - (1-t) var) / s(t).
    """
    return (t - (1 - t) * var) / ((1 - t) ** 2 * var + t**2)


def test_euler_maruyama_reproduces_the_variance_of_a_linear_sde():
    """On data N(0, 0.25): variance by the recursion of the linear SDE, and near the data's."""
    var, config = 0.25, SamplerConfig(kind="sde-euler-maruyama", num_steps=250)
    grid = np.append(np.linspace(1, 0.04, 250), 0)
    expected = 1.0
    for i in range(250):
        t, dt = grid[i], grid[i + 1] - grid[i]
        factor = 1 + dt * (1 + (2 - t) * gaussian_gain(t, var))
        expected = factor**2 * expected + (2 * t * abs(dt) if i < 249 else 0)
    model = Field(lambda x, t: x * gaussian_gain(t, var))
    num, shape = 2000, (1, 5, 5)
    end = sample(model, noise(num, shape=shape), labels(num), config, lambda i: noise(num, i, 1, shape=shape))
    # 50,000 values: the standard error of a variance is sqrt(2/50000) = 0.6%.
    assert end.var().item() == pytest.approx(expected, rel=0.025)
    assert end.mean().item() == pytest.approx(0, abs=0.01)
    assert expected == pytest.approx(var, rel=0.05)


def test_ode_carries_gaussian_noise_to_the_data_variance():
    """The exact flow maps x(1) to sqrt(var) x(1)."""
    start = noise(8)
    end = sample(Field(lambda x, t: x * gaussian_gain(t, 0.25)), start, labels(8), heun(400))
    assert torch.allclose(end, 0.5 * start, atol=1e-4)


# -- guidance -------------------------------------------------------------------------------------------------------


def test_guidance_extrapolates_from_the_null_label():
    """Velocity = label, null = 10: 10 + 3 (2 - 10) = -14 over unit time takes x to x + 14."""
    model = Labelled()
    start = torch.zeros(1, 1, 2, 2, dtype=torch.float64)
    end = sample(model, start, torch.tensor([2]), euler(4, cfg_scale=3.0))
    assert torch.equal(end, torch.full_like(start, 14.0))
    assert all(y.tolist() == [2, 10] for _, y in model.calls)


def test_scale_1_asks_for_the_labels_alone():
    model = Labelled()
    end = sample(model, torch.zeros(2, 1, 2, 2), torch.tensor([2, 3]), euler(4))
    assert all(y.tolist() == [2, 3] for _, y in model.calls)
    assert end[:, 0, 0, 0].tolist() == [-2, -3]


def test_scale_0_is_the_null_label():
    end = sample(Labelled(), torch.zeros(1, 1, 2, 2), torch.tensor([2]), euler(4, cfg_scale=0.0))
    assert end[0, 0, 0, 0].item() == -10


def test_guidance_acts_in_its_interval_alone():
    """Ten steps, [0.05, 0.3]: starts 0.3, 0.2, 0.1 are guided, although the grid holds 0.30000000000000004."""
    model = Labelled()
    config = euler(10, cfg_scale=2.0, guidance_low=0.05, guidance_high=0.3)
    sample(model, torch.zeros(1, 1, 2, 2), torch.tensor([2]), config)
    guided = [round(t, 3) for t, y in model.calls if len(y) == 2]
    assert guided == [0.3, 0.2, 0.1] and len(model.calls) == 10


def test_heun_decides_by_the_start_of_the_step():
    """Two steps, [0.4, 0.9]: the first starts at 1 and is not guided, not even in its second call at 0.5."""
    model = Labelled()
    config = heun(2, cfg_scale=2.0, guidance_low=0.4, guidance_high=0.9)
    sample(model, torch.zeros(1, 1, 2, 2), torch.tensor([2]), config)
    assert [(t, len(y)) for t, y in model.calls] == [(1, 1), (0.5, 1), (0.5, 2)]


def test_sde_is_guided_too():
    """Two steps, noise 0. Guided v = 10 + 2 (0 - 10) = -10. By hand from 1: step to .04 adds (1 + 1 v)(-0.96)."""
    config = SamplerConfig(kind="sde-euler-maruyama", num_steps=2, cfg_scale=2.0)
    start = torch.ones(1, 1, 2, 2, dtype=torch.float64)
    end = sample(Labelled(), start, torch.tensor([0]), config, lambda i: torch.zeros_like(start))
    middle = 1 + (1 - 10) * -0.96
    assert end[0, 0, 0, 0].item() == pytest.approx(middle + (middle + 1.96 * -10) * -0.04, rel=1e-6)
