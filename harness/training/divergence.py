"""The guard that stops a run at its first non-finite loss or gradient, before the update, without device syncs."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Divergence:
    """Where a run stopped being finite: a result of the run, not a crash."""

    step: int
    """The number of updates that were made before the step that was not finite."""
    parts: tuple[str, ...]
    """The names of the losses and norms that were not finite at that step."""


class Guard:
    """Keeps on the device whether any step was not finite, which was the first, and which of its parts.

    `stopped` is 0 or 1 and stays 1: the optimiser and the EMA skip every update from the first bad one on.
    """

    def __init__(self, device: torch.device) -> None:
        self.stopped = torch.zeros((), device=device)
        self._first_step = torch.full((), -1, dtype=torch.int64, device=device)
        self._bad_parts: dict[str, Tensor] = {}

    def check(self, step: int, parts: dict[str, Tensor]) -> Tensor:
        """Look at a step's 0-dim losses and norms; returns the flag `stopped`."""
        bad = {name: ~torch.isfinite(value.detach()) for name, value in parts.items()}
        is_first = torch.stack(list(bad.values())).any() & (self.stopped == 0)
        # Parts may differ between steps (a term can end), so what an earlier step found is kept.
        for name, flag in bad.items():
            first = is_first & flag
            self._bad_parts[name] = self._bad_parts[name] | first if name in self._bad_parts else first
        self._first_step = torch.where(is_first, step, self._first_step)
        self.stopped = torch.maximum(self.stopped, is_first.float())
        return self.stopped

    def found(self) -> Divergence | None:
        """The first bad step, if any. Waits for the device: ask at logged points only."""
        if not bool(self.stopped):
            return None
        parts: list[Any] = [name for name, flag in self._bad_parts.items() if bool(flag)]
        return Divergence(step=int(self._first_step), parts=tuple(parts))
