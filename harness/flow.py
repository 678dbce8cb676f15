"""The linear interpolant, and the one place where its convention is stated.

**t = 0 is data, t = 1 is noise.** x_t = (1 - t) x0 + t noise, and the velocity that the backbone learns is
d x_t / d t = noise - x0 (sihyun-yu/REPA loss.py:37-41,56-74).

Shapes: N images, C channels, H W latent height and width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from harness.rng import stream


def interpolate(x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_t = (1 - t) x0 + t noise.

    Args:
        x0, noise: [N, ...], the same shape.
        t: [N], in [0, 1].
    """
    t = t.reshape(-1, *[1] * (x0.ndim - 1))
    return (1 - t) * x0 + t * noise


def velocity(x0: Tensor, noise: Tensor) -> Tensor:
    """The target d x_t / d t = noise - x0, the same at every t."""
    return noise - x0


@dataclass(frozen=True)
class Draw:
    """What the trainer draws for the global batch of one step. No method draws or changes any of it."""

    t_N: Tensor
    """Times in [0, 1), float32."""
    noise_NCHW: Tensor
    """Standard normal noise, float32."""
    latent_noise_NCHW: Tensor
    """Standard normal noise of the autoencoder's posterior sample, float32."""
    dropped_N: Tensor
    """Whether the label is replaced by the null class, bool."""


def draw(seed: int, step: int, shape: tuple[int, int, int, int], label_drop: float) -> Draw:
    """Draw one step's times, noise and label drops for the global batch, on the CPU.

    Args:
        seed: the run's seed.
        step: updates made so far.
        shape: (N, C, H, W) of the global batch of latents.
        label_drop: probability of the null class.
    """
    num = shape[0]
    return Draw(
        t_N=torch.rand(num, generator=stream(seed, "time", step)),
        noise_NCHW=torch.randn(shape, generator=stream(seed, "noise", step)),
        latent_noise_NCHW=torch.randn(shape, generator=stream(seed, "latent", step)),
        dropped_N=torch.rand(num, generator=stream(seed, "label_drop", step)) < label_drop,
    )
