"""The interpolant against hand values and its own derivative, and the draws of a step."""

import random

import numpy as np
import pytest
import torch

from harness import flow


def test_interpolate_by_hand() -> None:
    x0 = torch.tensor([[[[2.0]]], [[[2.0]]], [[[-1.0]]]])
    noise = torch.tensor([[[[6.0]]], [[[6.0]]], [[[4.0]]]])
    t = torch.tensor([0.25, 0.5, 0.75])
    # (1 - t) x0 + t noise: 1.5 + 1.5, 1 + 3, -0.25 + 3
    assert flow.interpolate(x0, noise, t).flatten().tolist() == [3.0, 4.0, 2.75]
    assert flow.velocity(x0, noise).flatten().tolist() == [4.0, 4.0, 5.0]


def test_t0_is_data_and_t1_is_noise() -> None:
    x0, noise = torch.arange(24.0).reshape(2, 3, 2, 2), -torch.arange(24.0).reshape(2, 3, 2, 2) - 1
    assert torch.equal(flow.interpolate(x0, noise, torch.zeros(2)), x0)
    assert torch.equal(flow.interpolate(x0, noise, torch.ones(2)), noise)


def test_velocity_is_the_derivative_of_the_path() -> None:
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 5, 3, 4, 4, generator=generator, dtype=torch.float64)
    t, step = torch.rand(5, generator=generator, dtype=torch.float64), 1e-4
    slope = (flow.interpolate(x0, noise, t + step) - flow.interpolate(x0, noise, t - step)) / (2 * step)
    torch.testing.assert_close(slope, flow.velocity(x0, noise), rtol=0, atol=1e-10)


def test_a_step_draws_the_same_again_and_other_steps_differ() -> None:
    shape = (6, 4, 2, 2)
    first, again, later, other = (flow.draw(*args, shape, 0.5) for args in ((0, 4), (0, 4), (0, 5), (1, 4)))
    for name in ("t_N", "noise_NCHW", "latent_noise_NCHW", "dropped_N"):
        assert torch.equal(getattr(first, name), getattr(again, name))
    for name in ("t_N", "noise_NCHW", "latent_noise_NCHW"):
        assert not torch.equal(getattr(first, name), getattr(later, name))
        assert not torch.equal(getattr(first, name), getattr(other, name))


def test_no_draw_shifts_another() -> None:
    """Larger latents and another drop rate leave the times as they were; the two normal draws are apart."""
    small, large = flow.draw(0, 1, (6, 1, 2, 2), 0.0), flow.draw(0, 1, (6, 4, 8, 8), 0.9)
    assert torch.equal(small.t_N, large.t_N)
    assert not torch.equal(large.noise_NCHW, large.latent_noise_NCHW)


def test_draws_have_the_stated_shapes_and_distributions() -> None:
    num, drop = 20_000, 0.1
    draw = flow.draw(0, 0, (num, 1, 2, 1), drop)
    assert draw.t_N.shape == draw.dropped_N.shape == (num,)
    assert draw.t_N.dtype == draw.noise_NCHW.dtype == draw.latent_noise_NCHW.dtype == torch.float32
    assert draw.dropped_N.dtype == torch.bool
    assert draw.t_N.min() >= 0 and draw.t_N.max() < 1
    # all bounds are 5 standard errors
    assert abs(draw.t_N.mean() - 0.5) < 5 * (1 / 12 / num) ** 0.5
    assert abs(draw.dropped_N.float().mean() - drop) < 5 * (drop * (1 - drop) / num) ** 0.5
    for noise in (draw.noise_NCHW, draw.latent_noise_NCHW):
        assert noise.shape == (num, 1, 2, 1)
        assert abs(noise.mean()) < 5 * (1 / noise.numel()) ** 0.5
        assert abs(noise.var() - 1) < 5 * (2 / noise.numel()) ** 0.5


@pytest.mark.parametrize(("drop", "share"), [(0.0, 0.0), (1.0, 1.0)])
def test_label_drop_at_its_ends(drop: float, share: float) -> None:
    assert flow.draw(0, 0, (500, 1, 1, 1), drop).dropped_N.float().mean() == share


def test_draws_leave_the_global_state_alone() -> None:
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # type: ignore[index]
    flow.draw(0, 0, (2, 1, 2, 2), 0.1)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert np.array_equal(np.random.get_state()[1], before[2])  # type: ignore[index]
