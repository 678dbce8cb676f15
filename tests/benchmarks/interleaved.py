"""Timing in turns: A B C A B C ..., so that what slows the machine down for a while slows all of them."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Timing:
    """Seconds of each counted round."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """In seconds."""
        return statistics.median(self.seconds)

    def ratio(self, other: "Timing") -> "Ratio":
        """This over another, round by round."""
        ratios = [mine / theirs for mine, theirs in zip(self.seconds, other.seconds, strict=True)]
        return Ratio(statistics.median(ratios), min(ratios), max(ratios))


@dataclass(frozen=True)
class Ratio:
    """Median of the rounds' ratios, and their range."""

    median: float
    least: float
    most: float

    def __str__(self) -> str:
        return f"{self.median:.3g} [{self.least:.3g}, {self.most:.3g}]"


def timed(cases: Mapping[str, Callable[[], object]], rounds: int, warmup: int = 1) -> dict[str, Timing]:
    """Call every case once a round, in their order; rounds of warm-up are not counted.

    A case returns once its work is finished: on a GPU it waits for the device.
    """
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for number in range(warmup + rounds):
        for name, case in cases.items():
            started = time.perf_counter()
            case()
            spent = time.perf_counter() - started
            if number >= warmup:
                seconds[name].append(spent)
    return {name: Timing(tuple(values)) for name, values in seconds.items()}
