"""The exponential moving average of the backbone: what is evaluated, and what teaches."""

import copy

import torch
from torch import Tensor

from harness.backbones.sit import SiT
from harness.config import EmaConfig


class Ema:
    """e <- d e + (1 - d) w after every update, in float32, starting as a copy of the weights.

    With `warmup` w > 0 the decay at update s, counted from 1, is min(decay, s / (w + s)).
    """

    def __init__(self, backbone: SiT, config: EmaConfig) -> None:
        self.config = config
        self.backbone = copy.deepcopy(backbone).eval().requires_grad_(False)
        self._averages = [p for p, w in self._pairs(backbone)]
        self._weights = [w for p, w in self._pairs(backbone)]

    def _pairs(self, backbone: SiT) -> list[tuple[Tensor, Tensor]]:
        pairs = zip(self.backbone.parameters(), backbone.parameters(), strict=True)
        return [(average, weight) for average, weight in pairs if weight.requires_grad]

    def decay(self, update: int) -> float:
        """Decay at an update, counted from 1."""
        warmup = self.config.warmup
        return min(self.config.decay, update / (warmup + update)) if warmup else self.config.decay

    @torch.no_grad()
    def update(self, update: int, stopped: Tensor) -> None:
        """Average in the weights after `update`; nothing moves where the 0-dim flag `stopped` is 1.

        The flag stays on the device, so that a non-finite step is masked without waiting for the device: hence the
        list of weights, as one number would be read back. On the CPU reading is free, and one number much faster.
        """
        share = 1 - self.decay(update)
        if stopped.device.type == "cpu":
            torch._foreach_lerp_(self._averages, self._weights, share * (1 - stopped.item()))
            return
        masked = share * (1 - stopped)
        torch._foreach_lerp_(self._averages, self._weights, [masked] * len(self._averages))
