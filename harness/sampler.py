"""Samplers: from noise at t = 1 to data at t = 0 (convention in `harness.flow`).

The reference sampler is the reverse SDE with diffusion coefficient 2t, Euler-Maruyama (sihyun-yu/REPA
samplers.py:42-43,105-183; the `sigma` form of willisma/SiT transport/integrators.py:29-37). Its drift is v - t s with
score s = -(x + (1-t) v) / t, which simplifies to x + (2-t) v: nothing is divided by t.

Shapes: N images, C channels, H W latent height and width.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from harness.config import SamplerConfig
from harness.errors import UserError

__all__ = ["LAST_TIME", "SamplerConfig", "Velocity", "forward_passes", "network_calls", "sample", "times"]

LAST_TIME = 0.04
"""Start of the SDE's last step, which ends at 0 without noise (sihyun-yu/REPA samplers.py:123-124)."""

StepNoise = Callable[[int], Tensor]


class Velocity(Protocol):
    """What is sampled: SiT, or anything called alike. Label `num_classes` is the null class."""

    @property
    def num_classes(self) -> int: ...

    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, object]: ...


def times(config: SamplerConfig) -> list[float]:
    """The num_steps + 1 times from 1 to 0: uniform for the ODE kinds; 1 to `LAST_TIME`, then 0, for the SDE."""
    if config.kind == "sde-euler-maruyama":
        return [*torch.linspace(1, LAST_TIME, config.num_steps, dtype=torch.float64).tolist(), 0.0]
    return torch.linspace(1, 0, config.num_steps + 1, dtype=torch.float64).tolist()


def network_calls(config: SamplerConfig) -> int:
    """Network calls a batch needs; a call in a guided step holds every image twice."""
    return 2 * config.num_steps - 1 if config.kind == "ode-heun" else config.num_steps


def forward_passes(config: SamplerConfig) -> int:
    """How often an image goes through the network: twice in every call of a guided step, for its label and none."""
    passes = 0
    for t, t_next in pairwise(times(config)):
        calls = 2 if config.kind == "ode-heun" and t_next > 0 else 1
        passes += calls if _guidance(config, t) == 1 else 2 * calls
    return passes


@torch.no_grad()
def sample(
    model: Velocity, noise: Tensor, labels: Tensor, config: SamplerConfig, step_noise: StepNoise | None = None
) -> Tensor:
    """Integrate from noise to latents.

    The state is float64 on the noise's device; the network sees float32 on the labels' device, under whatever
    autocast the caller has entered.

    Args:
        model: `model(x, t, y) -> (velocity, hidden)`, with attribute `num_classes`.
        noise: start at t = 1, [N, C, H, W].
        labels: int64 [N].
        config: integrator, steps and guidance.
        step_noise: `step_noise(i)`, i = 0..num_steps-2, gives float64 N(0, 1) of the noise's shape. SDE only.

    Returns:
        float64 [N, C, H, W].

    Raises:
        UserError: when the SDE is asked for without `step_noise`.
    """
    if config.kind == "sde-euler-maruyama":
        if step_noise is None:
            raise UserError("step_noise is missing: sde-euler-maruyama needs it at every step but the last; pass it")
        return _sample_sde(model, noise.double(), labels, config, step_noise)
    return _sample_ode(model, noise.double(), labels, config)


def _sample_sde(
    model: Velocity, x_NCHW: Tensor, labels_N: Tensor, config: SamplerConfig, step_noise: StepNoise
) -> Tensor:
    for i, (t, t_next) in enumerate(pairwise(times(config))):
        v_NCHW = _velocity(model, x_NCHW, t, labels_N, _guidance(config, t))
        x_NCHW = x_NCHW + (x_NCHW + (2 - t) * v_NCHW) * (t_next - t)
        if t_next > 0:
            n_NCHW = step_noise(i)
            assert n_NCHW.shape == x_NCHW.shape and n_NCHW.dtype == torch.float64, (n_NCHW.shape, n_NCHW.dtype)
            x_NCHW = x_NCHW + (2 * t * (t - t_next)) ** 0.5 * n_NCHW
    return x_NCHW


def _sample_ode(model: Velocity, x_NCHW: Tensor, labels_N: Tensor, config: SamplerConfig) -> Tensor:
    for t, t_next in pairwise(times(config)):
        # Decided by the step's start: Heun's second call follows the first (sihyun-yu/REPA samplers.py:84,97).
        scale = _guidance(config, t)
        slope_NCHW = _velocity(model, x_NCHW, t, labels_N, scale)
        if config.kind == "ode-heun" and t_next > 0:
            end_NCHW = _velocity(model, x_NCHW + slope_NCHW * (t_next - t), t_next, labels_N, scale)
            slope_NCHW = (slope_NCHW + end_NCHW) / 2
        x_NCHW = x_NCHW + slope_NCHW * (t_next - t)
    return x_NCHW


def _guidance(config: SamplerConfig, t: float) -> float:
    """Guidance scale of the step that starts at t. A grid point such as 0.3 counts as inside despite its rounding."""
    inside = config.guidance_low - 1e-9 <= t <= config.guidance_high + 1e-9
    return config.cfg_scale if inside else 1.0


def _velocity(model: Velocity, x_NCHW: Tensor, t: float, labels_N: Tensor, scale: float) -> Tensor:
    """v_null + s (v_label - v_null), float64; both from one call. Scale 1 asks for the labels alone."""
    x_in, y_in = x_NCHW.float().to(labels_N.device), labels_N
    if scale != 1:
        x_in, y_in = x_in.repeat(2, 1, 1, 1), torch.cat([labels_N, torch.full_like(labels_N, model.num_classes)])
    t_in = torch.full((len(x_in),), t, dtype=torch.float32, device=x_in.device)
    v = model(x_in, t_in, y_in)[0].to(x_NCHW.device).double()
    if scale == 1:
        return v
    v_label, v_null = v.chunk(2)
    return v_null + scale * (v_label - v_null)
