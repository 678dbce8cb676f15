"""Times of steps and forward passes, taken in turns, and their ratios with intervals."""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from harness.data.batches import Batch
from harness.machine.progress import OnProgress
from harness.training.step import synchronize
from studies.costs.stands import LEAST_ROUNDS, Workload
from studies.terminal.display import duration

LEVEL = 0.95
"""Least confidence of a ratio's interval."""


@dataclass(frozen=True)
class Spread:
    """Median and range of the rounds."""

    median: float
    least: float
    most: float


@dataclass(frozen=True)
class Ratio:
    """Median over rounds of case / control in the same round, with an order-statistic interval of 95% or more.

    The interval says how well this median is known from this run on this machine, and nothing of other machines.
    """

    median: float
    low: float
    high: float


class Timed(Protocol):
    """A case that is ready to be timed."""

    name: str
    work: float
    """The work of a step, in a unit that is common to all cases."""

    def batch(self, number: int) -> Batch: ...

    def step(self, batch: Batch) -> None: ...

    def forward(self) -> None: ...


@dataclass
class Times:
    """Seconds of a case, a number for each round that counts."""

    steps: list[float] = field(default_factory=list)
    forwards: list[float] = field(default_factory=list)


def time_rounds(
    stands: Sequence[Timed], setting: Workload, clock: Callable[[], float], progress: "TimeLeft"
) -> list[Times]:
    """Time a step and a forward pass of each case in turn, round by round; warm-up rounds are dropped."""
    times = [Times() for _ in stands]
    for number in range(setting.warmup + setting.rounds):
        for stand, own in zip(stands, times, strict=True):
            batch = stand.batch(number)
            started = clock()
            stand.step(batch)
            stepped = clock()
            stand.forward()
            ended = clock()
            if number >= setting.warmup:
                own.steps.append(stepped - started)
                own.forwards.append(ended - stepped)
            progress.tell(f"timing {stand.name}", stand.work)
    return times


def synced_clock(device: torch.device) -> Callable[[], float]:
    """Seconds, read when the device has finished its work."""

    def read() -> float:
        synchronize(device)
        return time.perf_counter()

    return read


def spread_ms(seconds: Sequence[float]) -> Spread:
    """Median, least and most of times that are given in seconds, in milliseconds."""
    return Spread(*(1000 * value for value in (statistics.median(seconds), min(seconds), max(seconds))))


def paired_ratio(own: Sequence[float], control: Sequence[float]) -> Ratio:
    """The ratio of two cases' times, round by round: the median, and its interval."""
    ratios = [mine / theirs for mine, theirs in zip(own, control, strict=True)]
    return Ratio(statistics.median(ratios), *median_interval(ratios))


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """The k-th value from below and from above, k as large as a confidence of `LEVEL` allows.

    The median lies outside of them when fewer than k of n values fall on one side of it: 2 P(Binomial(n, 1/2) < k),
    whatever the distribution. No resampling: with so few values that would give intervals that are too short.
    """
    n = len(values)
    assert n >= LEAST_ROUNDS, f"{n} values are too few"
    outside = [2 * sum(math.comb(n, i) for i in range(k)) / 2**n for k in range(n // 2 + 1)]
    k = max(k for k, share in enumerate(outside) if share <= 1 - LEVEL)
    ordered = sorted(values)
    return ordered[k - 1], ordered[-k]


class TimeLeft:
    """Tells what was measured, how much of all, and how long the rest will take at the speed so far."""

    def __init__(
        self, on_progress: OnProgress, total: Sequence[float], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._on_progress, self._clock, self._started = on_progress, clock, clock()
        self._work, self._num = sum(total), len(total)
        self._done, self._count = 0.0, 0

    def tell(self, what: str, work: float) -> None:
        """Something that was `work` is measured."""
        self._done += work
        self._count += 1
        left = (self._clock() - self._started) / self._done * (self._work - self._done)
        self._on_progress(f"{what}, {duration(left)} left", self._count, self._num)
