"""Statistics for few seeds: Student-t intervals and differences to the baseline, paired by seed.

No p-values. With one value there is no interval. Values that are not finite (a diverged seed, a run that is not
finished) pair with nothing and are counted out loud by the caller.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Literal

from scipy.special import stdtrit

CONFIDENCE = 0.95
"""Coverage of every interval that is printed."""

Direction = Literal["lower", "higher"]
Reading = Literal["better", "worse", "not separated", "one seed", "no pair"]


@dataclass(frozen=True)
class Interval:
    """A mean and its Student-t interval; the bounds are NaN with fewer than two values, the mean with none."""

    num: int
    mean: float
    low: float
    high: float


def t_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> Interval:
    """mean +- t(n-1) s / sqrt(n) of finite values, s with n - 1 in the denominator."""
    num = len(values)
    mean = fmean(values) if num else math.nan
    if num < 2:
        return Interval(num, mean, math.nan, math.nan)
    quantile = float(stdtrit(num - 1, (1 + confidence) / 2))
    half = quantile * stdev(values) / math.sqrt(num)
    return Interval(num, mean, mean - half, mean + half)


@dataclass(frozen=True)
class PairedDifference:
    """Per-seed differences, cell minus baseline, over the seeds at which both have a finite value."""

    by_seed: Mapping[int, float]
    interval: Interval
    num_better: int
    """Seeds at which the cell is strictly better than the baseline."""
    direction: Direction

    @property
    def reading(self) -> Reading:
        """What the interval allows to say; `not separated` when it holds 0."""
        if self.interval.num < 2:
            return "one seed" if self.interval.num else "no pair"
        if self.interval.low <= 0 <= self.interval.high:
            return "not separated"
        is_better = (self.interval.mean < 0) == (self.direction == "lower")
        return "better" if is_better else "worse"


def paired_difference(
    cell: Mapping[int, float], baseline: Mapping[int, float], direction: Direction
) -> PairedDifference:
    """Pair the values of two cells by seed; `direction` is the better one."""
    differences = {seed: cell[seed] - baseline[seed] for seed in sorted(cell.keys() & baseline.keys())}
    finite = {seed: value for seed, value in differences.items() if math.isfinite(value)}
    num_better = sum(value < 0 if direction == "lower" else value > 0 for value in finite.values())
    return PairedDifference(finite, t_interval(list(finite.values())), num_better, direction)
