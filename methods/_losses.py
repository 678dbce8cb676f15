"""Losses that methods share. All compute in float32, outside autocast, and return one value an image, [N].

Shapes: N images, T tokens, and a last axis of features.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def smooth_l1(prediction: Tensor, target: Tensor, beta: float) -> Tensor:
    """Mean over an image of d^2 / (2 beta) where |d| < beta, else |d| - beta / 2, with d = prediction - target."""
    return _mean(F.smooth_l1_loss(prediction.float(), target.float(), beta=beta, reduction="none"))


def l1(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean absolute difference of an image."""
    return _mean((prediction.float() - target.float()).abs())


def l2(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared difference of an image."""
    return _mean((prediction.float() - target.float()).square())


def cosine(prediction: Tensor, target: Tensor, dim: int = -1) -> Tensor:
    """Mean over an image of the cosine between the two along `dim`: features (-1) or tokens (1)."""
    # Under autocast normalisation would run in bf16 (sihyun-yu/REPA#46 shows what lower precision does here).
    with torch.autocast(prediction.device.type, enabled=False):
        normalised = F.normalize(prediction.float(), dim=dim) * F.normalize(target.float(), dim=dim)
        return _mean(normalised.sum(dim=dim))


def mean_over(value_N: Tensor, included_N: Tensor | None = None) -> Tensor:
    """Mean over all images of the view; images outside `included_N` count as 0, and in the denominator."""
    return value_N.mean() if included_N is None else (value_N * included_N).mean()


def _mean(value: Tensor) -> Tensor:
    return value.flatten(1).mean(1)


REGRESSIONS: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "smooth_l1": smooth_l1,
    "l1": lambda prediction, target, beta: l1(prediction, target),
    "l2": lambda prediction, target, beta: l2(prediction, target),
    "cosine": lambda prediction, target, beta: 1 - cosine(prediction, target),
}
"""Ways to pull a prediction to a target of the same shape, by the name used in configs; beta is smooth-L1's."""
