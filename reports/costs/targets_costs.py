"""Cost to target: what a cell spends on each clock until the main metric is as good as a target, and the speed-up
over the baseline.

The target is the median over seeds of the baseline's last value, or a value that was asked for. A run reaches it at
its first evaluation there or better; nothing is read between evaluations. A run that came to its end without is a
miss: its cost is infinite, and it is never left out of a count. A run that goes on or crashed is neither.

The baseline's cost is that of its median curve, one number for a study and a clock: about half of the baseline's own
seeds lie above their median and miss it, so costs divided seed by seed would leave most studies without an interval.
Where both reach the target at every seed, the speed-up paired by seed stands beside that one.

Speed-ups are ratios: their mean is geometric, and a t interval is taken of the logarithms, so that nothing depends on
which cost is divided by which (Fleming and Wallace, 1986, doi 10.1145/5666.5673).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import median
from typing import Any, Literal

from harness.records.files import number
from harness.records.metrics import metric
from reports.costs import equal_cost
from reports.statistics.intervals import Interval, t_interval
from reports.study.load import RecordedRun, Study
from reports.study.units import UNITS, Unit, number_text
from reports.study.words import count, listed

NAN = Interval(0, math.nan, math.nan, math.nan)

Kind = Literal["reached", "missed", "open"]
"""How a run stands to a target. Missed by one that finished or diverged; open for one that goes on, crashed or was
stopped."""


# -- the target -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Target:
    """A value of the main metric that is to be reached."""

    metric: str
    value: float
    num_medians: int = 0
    """Runs of the baseline whose median it is; 0 for one that was asked for."""

    @property
    def is_final(self) -> bool:
        """Whether it is what the baseline ends with."""
        return self.num_medians > 0

    @property
    def stem(self) -> str:
        """Its place in file names."""
        return "target" if self.is_final else f"target_{self.value:.10g}"

    def is_reached_by(self, value: float) -> bool:
        """Whether a value is as good or better; one that is not finite never is."""
        if not math.isfinite(value):
            return False
        return value <= self.value if metric(self.metric).direction == "lower" else value >= self.value


def final_target(study: Study) -> Target | None:
    """The median over seeds of the baseline's value where the study is compared, a diverged run being the worst.

    None where there is no baseline, no run of it got there, or half of them diverged.
    """
    name = study.main_metrics[0]
    values = [_value(run, name, study.point) for run in _deciding(study, name)]
    value = median(values) if values else math.nan
    return Target(name, value, len(values)) if math.isfinite(value) else None


def targets(study: Study) -> list[Target]:
    """The final one, then those that were asked for."""
    final = final_target(study)
    asked = [Target(study.main_metrics[0], value) for value in dict.fromkeys(study.targets)]
    return [*([final] if final else []), *asked]


def _deciding(study: Study, name: str) -> list[RecordedRun]:
    """The runs of the baseline that count and came as far as the study is compared, or diverged before."""
    own = [run for run in study.timed if run.cell == study.baseline]
    return [run for run in own if math.isfinite(run.value(name, study.point)) or run.status == "diverged"]


def _value(run: RecordedRun, name: str, point: int) -> float:
    """A metric at a point, the worst there is where the run has none."""
    value = run.value(name, point)
    worst = math.inf if metric(name).direction == "lower" else -math.inf
    return worst if math.isnan(value) else value


def median_point(study: Study, target: Target) -> int | None:
    """The first evaluation at which the median over the baseline's seeds is as good as the target."""
    runs = _deciding(study, target.metric)
    points = sorted({line["point"] for run in runs for line in run.evaluations if line["point"] <= study.point})
    medians = ((point, median(_value(run, target.metric, point) for run in runs)) for point in points)
    return next((point for point, value in medians if target.is_reached_by(value)), None)


# -- what runs spend --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """One run and one target. `line` is the first evaluation there, None for a run that has not reached it."""

    run: RecordedRun
    line: Mapping[str, Any] | None
    kind: Kind

    @property
    def is_first(self) -> bool:
        """Whether it was there at its first evaluation already, so that the cost is only an upper bound."""
        return self.line is not None and self.line is self.run.evaluations[0]

    def cost(self, unit: Unit) -> float:
        """What had been spent there; infinite for a miss, NaN where that is open."""
        if self.line is not None:
            return float(self.line[unit.clock])
        return math.inf if self.kind == "missed" else math.nan

    def spent(self, unit: Unit) -> float:
        """What the run had spent at its last evaluation, in which it did not get there."""
        return float(self.run.evaluations[-1][unit.clock]) if self.run.evaluations else 0.0

    def text(self, unit: Unit) -> str:
        """Its cost: `500`, `≤ 100` at the first evaluation, `> 800`, or a word for a run that stopped early."""
        if self.line is not None:
            return f"{'≤ ' if self.is_first else ''}{_amount(self.cost(unit), unit)}"
        return f"> {_amount(self.spent(unit), unit)}" if self.run.status == "finished" else self.word

    @property
    def word(self) -> str:
        """How the run stands, in a word."""
        return "unfinished" if self.run.status == "running" else self.run.status


def _amount(value: float, unit: Unit) -> str:
    return number_text(value) if unit.is_whole else f"{value:,.{0 if value >= 100 else 1}f}"


def outcome(run: RecordedRun, target: Target) -> Outcome:
    """Where a run reached a target."""
    for line in run.evaluations:
        if target.is_reached_by(number(line["metrics"].get(target.metric, "nan"))):
            return Outcome(run, line, "reached")
    return Outcome(run, None, "missed" if run.status in ("finished", "diverged") else "open")


@dataclass(frozen=True)
class ClockCost:
    """What a cell spends of one clock until a target, beside what the baseline spends."""

    unit: Unit
    outcomes: Mapping[int, Outcome]
    """Outcomes of the runs that count against the clock, by seed."""
    baseline: Mapping[int, Outcome]
    """Outcomes of the baseline's runs, by seed."""
    reference: float
    """Cost of the baseline's median curve; NaN where it has none or was there at its first evaluation."""

    @property
    def is_whole(self) -> bool:
        """Whether every run reached the target, and more than one."""
        return len(self.outcomes) > 1 and all(each.kind == "reached" for each in self.outcomes.values())

    @property
    def is_bound(self) -> bool:
        """Whether a run was there at its first evaluation: the speed-up is then no less than what is shown."""
        return any(each.is_first for each in self.outcomes.values())

    @property
    def at_one_evaluation(self) -> bool:
        """Whether all runs reached it at the same evaluation: then their spread says nothing."""
        return len({each.line["point"] for each in self.outcomes.values() if each.line}) == 1

    @cached_property
    def speedup(self) -> Interval:
        """The baseline's cost over that of the runs that reached the target.

        The interval is NaN unless every run did, at evaluations that are not all the same or the first.
        """
        costs = [each.cost(self.unit) for each in self.outcomes.values() if each.kind == "reached"]
        found = _geometric([self.reference / cost for cost in costs if cost > 0 and self.reference > 0])
        return found if self.is_whole and not (self.is_bound or self.at_one_evaluation) else _without_bounds(found)

    @cached_property
    def paired(self) -> Interval:
        """The speed-up paired by seed; NaN unless both cells reached the target at every seed, after the first
        evaluation.
        """
        seeds = self.outcomes.keys() | self.baseline.keys()
        pairs = [(self.baseline.get(seed), self.outcomes.get(seed)) for seed in sorted(seeds)]
        whole = [(a, b) for a, b in pairs if a and b and a.line and b.line and not (a.is_first or b.is_first)]
        if len(whole) < max(len(pairs), 1):
            return NAN
        found = _geometric([a.cost(self.unit) / b.cost(self.unit) for a, b in whole])
        points = {(a.line["point"], b.line["point"]) for a, b in whole if a.line and b.line}
        return found if len(points) > 1 else _without_bounds(found)


def _geometric(ratios: Sequence[float]) -> Interval:
    """Geometric mean of ratios, with the t interval of their logarithms."""
    logs = t_interval([math.log(ratio) for ratio in ratios])
    return Interval(logs.num, math.exp(logs.mean), math.exp(logs.low), math.exp(logs.high))


def _without_bounds(interval: Interval) -> Interval:
    return Interval(interval.num, interval.mean, math.nan, math.nan)


@dataclass(frozen=True)
class CellCost:
    """A cell and a target: all its runs, and each clock's costs."""

    cell: str
    outcomes: Mapping[int, Outcome]
    clocks: Mapping[str, ClockCost]
    """By the unit's name."""

    def num(self, kind: Kind) -> int:
        return sum(each.kind == kind for each in self.outcomes.values())

    @property
    def reached_text(self) -> str:
        """`2 of 3 seeds`, and how the runs stand whose outcome is open."""
        text = f"{self.num('reached')} of {count(len(self.outcomes), 'seed')}"
        return f"{text}; {self.open_text}" if self.num("open") else text

    @property
    def open_text(self) -> str:
        """`1 unfinished`, of the runs whose outcome is open."""
        words = [each.word for each in self.outcomes.values() if each.kind == "open"]
        return listed([f"{words.count(word)} {word}" for word in dict.fromkeys(words)])


def clocks(study: Study) -> list[Unit]:
    """The clocks on which costs may be compared: seconds only where some run of the baseline counts, on equal terms."""
    has_seconds = any(run.cell == study.baseline for run in study.counted(UNITS["seconds"]))
    left_out = [] if has_seconds and not equal_cost.unequal_timing(study) else ["seconds"]
    return [unit for name, unit in UNITS.items() if name not in left_out]


def cell_costs(study: Study, target: Target) -> list[CellCost]:
    """Every cell of the study, the baseline first."""
    found = {cell: {run.seed: outcome(run, target) for run in study.of(cell)} for cell in study.cells}
    point = median_point(study, target)
    costs: dict[str, dict[str, ClockCost]] = {cell: {} for cell in study.cells}
    for unit in clocks(study):
        counted = {(run.cell, run.seed) for run in study.counted(unit)}
        own = {cell: {s: o for s, o in each.items() if (cell, s) in counted} for cell, each in found.items()}
        reference = _reference(study, unit, point)
        for cell in study.cells:
            costs[cell][unit.name] = ClockCost(unit, own[cell], own.get(study.baseline, {}), reference)
    return [CellCost(cell, found[cell], costs[cell]) for cell in study.cells]


def _reference(study: Study, unit: Unit, point: int | None) -> float:
    """What the baseline's runs have spent at a point, their median; NaN without one, and at the first evaluation."""
    runs = [run for run in study.counted(unit) if run.cell == study.baseline and run.evaluations]
    lines = [line for run in runs if point and (line := run.evaluation(point)) and line is not run.evaluations[0]]
    return median(line[unit.clock] for line in lines) if lines else math.nan
