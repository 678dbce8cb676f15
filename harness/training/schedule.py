"""When a run is evaluated and when it is over, in the unit of its budget.

Evaluation points are numbered from 1 to `points` and lie at shares of the budget that are evenly apart or double from
one to the next, the last one at its end; those before a tenth of it are left out. A point is reached by the first step
that has spent its share or more, so cells whose steps cost differently reach the same point after different numbers of
steps.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from harness.config import RunConfig
from harness.records.run_folder import point_share
from harness.records.schema import Spacing


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The plan of one run."""

    amount: float
    """The budget."""
    points: int
    per_step: float
    """What a step spends of the budget's unit; 0 for seconds, which only the clock knows."""
    spacing: Spacing = "even"

    @property
    def by_clock(self) -> bool:
        """Whether only the clock knows what was spent."""
        return not self.per_step

    @property
    def last_step(self) -> int | None:
        """The step that ends the budget; None where only the clock knows."""
        if self.by_clock:
            return None
        step = max(1, math.ceil(self.amount / self.per_step) - 1)  # a quotient may round either way
        while step * self.per_step < self.amount:
            step += 1
        return step

    def spent(self, step: int, train_seconds: float) -> float:
        """What a run has spent after `step` updates and `train_seconds` of training."""
        return train_seconds if self.by_clock else step * self.per_step

    def is_over(self, spent: float) -> bool:
        """Whether the budget is spent."""
        return spent >= self.amount

    def point(self, before: float, spent: float) -> int:
        """The last evaluation point that lies above `before` and at or below `spent`; 0 when there is none."""
        for number in range(self.points, 0, -1):
            if before < self._share(number) <= spent:
                return number if self._is_kept(number) else 0
        return 0

    @property
    def num_evaluations(self) -> int:
        """Evaluations of a whole run: points that one step reaches together are one."""
        shares = [self._share(number) for number in range(1, self.points + 1) if self._is_kept(number)]
        return len(shares) if self.by_clock else len({math.ceil(share / self.per_step) for share in shares})

    def _share(self, number: int) -> float:
        """What is spent at a point."""
        share = point_share(number, self.points, self.spacing)
        return self.amount * share.numerator / share.denominator

    def _is_kept(self, number: int) -> bool:
        """Whether a point does not lie before a tenth of the budget."""
        return point_share(number, self.points, self.spacing) * 10 >= 1


def make_schedule(config: RunConfig, train_gflops_per_image: float) -> Schedule:
    """The schedule of a run whose images cost this much."""
    size = config.optimizer.batch_size
    per_step: Mapping[str, float] = {
        "steps": 1,
        "images": size,
        "train_gflops": size * train_gflops_per_image,
        "seconds": 0,
    }
    budget, evaluation = config.budget, config.evaluation
    return Schedule(
        amount=budget.amount,
        points=evaluation.points,
        per_step=per_step[budget.unit],
        spacing=evaluation.spacing,
    )
