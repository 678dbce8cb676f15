"""The results of a study's cells: their numbers, the rows of their tables, and how to read these."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import stdev
from typing import Any

import pandas as pd

from harness.records.metrics import metric
from reports.statistics.intervals import PairedDifference, paired_difference
from reports.study.load import Study
from reports.study.units import Unit
from reports.tables.cells import Cell, Mark

BIAS_MARK = "†"
"""Stands beside a number whose extractor is of the family that the method was trained towards."""

SHARED_MARK = "‡"
"""Stands beside a run that shared its device with another while it trained."""

STATUSES = ("finished", "running", "diverged", "failed", "pruned")

MISSING = "–"
MINUS = "−"


@dataclass(frozen=True)
class MetricResult:
    """A metric of a cell at the study's last evaluation point."""

    values: Mapping[int, float]
    """By seed of the study; NaN where there is no run, it did not get there, or the value is not finite."""
    absent: Mapping[int, str]
    """Why a seed has no value, in a word, where it is known."""
    difference: PairedDifference | None
    """To the baseline; None for the baseline itself and where there is none."""
    favoured: bool
    """Whether the metric's extractor is of the family that the method was trained towards."""

    @property
    def finite(self) -> dict[int, float]:
        return {seed: value for seed, value in self.values.items() if math.isfinite(value)}

    @property
    def mean(self) -> float:
        finite = self.finite
        return math.fsum(finite.values()) / len(finite) if finite else math.nan

    @property
    def spread(self) -> float:
        """Sample standard deviation over the seeds; NaN with fewer than two."""
        finite = self.finite.values()
        return stdev(finite) if len(finite) > 1 else math.nan

    @property
    def over(self) -> str:
        """`1 of 2 seeds` where the mean leaves a seed out, else ""."""
        num, of = len(self.finite), len(self.values)
        return f"{num} of {of} seeds" if 0 < num < of else ""


@dataclass(frozen=True)
class CellResult:
    """A row of the final table."""

    cell: str
    method: str
    statuses: Mapping[str, int]
    metrics: Mapping[str, MetricResult]
    head_parameters: int | None
    num_shared: int
    """Runs that shared their device with another."""
    step: float
    """Steps of the run that made most of them until the compared point; NaN where no run of the cell got there."""
    train_gflops: float
    """Spent by that run."""

    @property
    def status(self) -> str:
        text = ", ".join(f"{num} {status}" for status, num in self.statuses.items())
        return f"{text} ({self.num_shared} {SHARED_MARK})" if self.num_shared else text


def results(study: Study) -> list[CellResult]:
    """A row for every cell, the baseline first."""
    baseline = {name: _values(study, study.baseline, name) for name in study.metrics} if study.baseline else {}
    return [_cell_result(study, cell, baseline) for cell in study.cells]


def _cell_result(study: Study, cell: str, baseline: Mapping[str, Mapping[int, float]]) -> CellResult:
    runs, first = study.of(cell), study.first(cell)
    metrics, absent = {}, absences(study, cell, study.unit)
    for name in study.metrics:
        values = _values(study, cell, name)
        paired = cell != study.baseline and name in baseline
        difference = paired_difference(values, baseline[name], metric(name).direction) if paired else None
        metrics[name] = MetricResult(values, absent, difference, is_favoured(study, cell, name))
    reached = [line for run in runs if (line := run.evaluation(study.point))]
    return CellResult(
        cell=cell,
        method=first.manifest["method"],
        statuses=Counter(run.status for run in runs),
        metrics=metrics,
        head_parameters=first.facts.get("head_parameters"),
        num_shared=sum(run.shared_device for run in runs),
        step=max((line["step"] for line in reached), default=math.nan),
        train_gflops=max((line["train_gflops"] for line in reached), default=math.nan),
    )


def _values(study: Study, cell: str, name: str) -> dict[int, float]:
    runs = {run.seed: run for run in study.of(cell) if run.counts(study.unit)}
    return {seed: runs[seed].value(name, study.point) if seed in runs else math.nan for seed in study.seeds}


def absences(study: Study, cell: str, unit: Unit) -> dict[int, str]:
    """Why runs of a cell may have no value, by seed: they stopped early, or do not count against the clock."""
    words: dict[int, str] = {}
    for run in study.of(cell):
        if run.status != "finished":
            words[run.seed] = "unfinished" if run.status == "running" else run.status
        elif not run.counts(unit):
            words[run.seed] = f"left out {SHARED_MARK}"
    return words


def is_favoured(study: Study, cell: str, name: str) -> bool:
    """Whether a metric's extractor is of the family that the cell's method was trained towards."""
    if not metric(name).on_features:
        return False
    families = study.first(cell).facts.get("encoder_families", [])
    return study.first(cell).manifest.get("extractor_family", "") in families


# -- numbers --------------------------------------------------------------------------------------------------------


def final_table(study: Study) -> pd.DataFrame:
    """The final table as numbers, a row per cell: every metric's mean, single values and paired difference.

    Columns of a metric: `<m>` (mean), `<m>_seed<k>`, and against the baseline `<m>_difference`, `_low`, `_high` (95%
    Student-t), `_pairs`, `_seeds_better`, `_reading`.
    """
    return pd.DataFrame([_numbers(study, row) for row in results(study)])


def _numbers(study: Study, row: CellResult) -> dict[str, Any]:
    numbers: dict[str, Any] = {
        "cell": row.cell,
        "method": row.method,
        "baseline": study.baseline,
        "budget_unit": study.unit.name,
        "budget_spent": study.spent,
        "point": study.point,
        "step": row.step,
        "num_seeds": sum(row.statuses.values()),
        **{f"num_{status}": row.statuses.get(status, 0) for status in STATUSES},
        "num_shared_device": row.num_shared,
        "head_parameters": row.head_parameters,
        "train_gflops": row.train_gflops,
    }
    for name in study.metrics:
        numbers |= metric_numbers(name, row.metrics[name])
    return numbers


def metric_numbers(name: str, result: MetricResult) -> dict[str, Any]:
    """The columns of a metric."""
    difference = result.difference
    return {
        name: result.mean,
        **{f"{name}_seed{seed}": value for seed, value in result.values.items()},
        f"{name}_difference": difference.interval.mean if difference else math.nan,
        f"{name}_low": difference.interval.low if difference else math.nan,
        f"{name}_high": difference.interval.high if difference else math.nan,
        f"{name}_pairs": difference.interval.num if difference else 0,
        f"{name}_seeds_better": difference.num_better if difference else 0,
        f"{name}_reading": difference.reading if difference else "",
    }


# -- rows -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Digits:
    """Decimals of a metric's column: four significant figures of a typical value, and one decimal at least."""

    decimals: int

    def __call__(self, value: float, signed: bool = False) -> Cell:
        """The value with a true minus sign; a dash where there is none."""
        if not math.isfinite(value):
            return Cell(MISSING)
        return Cell(f"{value:{'+' if signed else ''}.{self.decimals}f}".replace("-", MINUS), value)


def digits(rows: Iterable[CellResult], name: str) -> Digits:
    """Decimals for a metric's column."""
    return shared_digits(row.metrics[name] for row in rows)


def shared_digits(results: Iterable[MetricResult]) -> Digits:
    """Decimals for a column of results."""
    return shared_digits_of(value for result in results for value in result.finite.values())


def shared_digits_of(values: Iterable[float]) -> Digits:
    """Decimals for finite values, from the median of their magnitudes."""
    magnitudes = sorted(abs(value) for value in values if value)
    if not magnitudes:
        return Digits(2)
    return Digits(min(max(3 - math.floor(math.log10(magnitudes[len(magnitudes) // 2])), 1), 8))


def mean_text(result: MetricResult, show: Digits) -> Cell:
    """The mean, marked where the metric favours the method."""
    is_marked = result.favoured and math.isfinite(result.mean)
    return Cell(f"{show(result.mean)}{f' {BIAS_MARK}' if is_marked else ''}", result.mean, mark="main")


def values_text(result: MetricResult, show: Digits) -> Cell:
    """Every seed's value, in the order of seeds, and how many the mean leaves out; sorted by the first value."""
    lines = [seeds_values(result, show), *([result.over] if result.over else [])]
    return Cell("; ".join(lines), next(iter(result.finite.values()), None), lines=lines)


def seeds_values(result: MetricResult, show: Digits) -> Cell:
    """Every seed's value, in the order of seeds; a word where a run has none because it stopped early."""
    values = result.values.items()
    texts = [show(v) if math.isfinite(v) else result.absent.get(seed, MISSING) for seed, v in values]
    return Cell(", ".join(texts), next(iter(result.finite.values()), None))


def difference_text(difference: PairedDifference | None, show: Digits) -> Cell:
    """The difference to the baseline with its interval, as `-3.1 [-5.0, -1.2]`."""
    if difference is None or not difference.interval.num:
        return Cell(MISSING)
    interval = difference.interval
    bounds = f" [{show(interval.low, True)}, {show(interval.high, True)}]" if interval.num > 1 else ""
    return Cell(show(interval.mean, True) + bounds, interval.mean)


def difference_and_reading(difference: PairedDifference | None, show: Digits) -> str:
    """Both, for tables of text."""
    text = difference_text(difference, show)
    return text if difference is None else f"{text}; {reading_text(difference)}"


def reading_text(difference: PairedDifference | None) -> Cell:
    """What the difference says: its reading and at how many seeds the cell is better."""
    if difference is None:
        return Cell(MISSING)
    if difference.reading == "no pair":
        return reading_cell(difference, "no pair of seeds")
    first = "one pair, no interval" if difference.reading == "one seed" else difference.reading
    return reading_cell(difference, f"{first}; {seeds_text(difference)}")


def short_reading(difference: PairedDifference | None) -> Cell:
    """The reading alone, of narrow tables; a page has room for the seeds."""
    return reading_cell(difference, difference.reading) if difference else Cell("baseline", mark="unclear")


def reading_cell(difference: PairedDifference, text: str) -> Cell:
    """A reading as a page sets it off: the word, and below it at how many seeds the cell is better."""
    reading = difference.reading
    mark: Mark = reading if reading in ("better", "worse") else "unclear"
    return Cell(text, mark=mark, lines=(reading, seeds_text(difference)) if difference.by_seed else ())


def seeds_text(difference: PairedDifference) -> str:
    """At how many of the paired seeds the cell is better."""
    num = difference.interval.num
    return f"better at {difference.num_better} of {num} {'seed' if num == 1 else 'seeds'}"


def display_rows(study: Study) -> list[dict[str, str]]:
    """The final table, a row per cell, with every main metric."""
    rows = results(study)
    return [_texts(study, rows, row) for row in rows]


def _texts(study: Study, rows: Sequence[CellResult], row: CellResult) -> dict[str, str]:
    texts = {"cell": row.cell, "runs": row.status}
    for name in study.main_metrics:
        show, result = digits(rows, name), row.metrics[name]
        texts[name] = f"{mean_text(result, show)} ({values_text(result, show)})"
        if study.baseline:
            texts[f"{name} minus {study.baseline}"] = difference_and_reading(result.difference, show)
    return texts | cost_texts(row)


def cost_texts(row: CellResult) -> dict[str, str]:
    """The cells that say what a row's runs took."""
    heads = row.head_parameters
    return {
        "head parameters": Cell(MISSING) if heads is None else Cell(f"{heads:,}", heads),
        "steps": whole_text(row.step),
        "train GFLOPs": whole_text(row.train_gflops),
    }


def terminal_rows(study: Study) -> list[dict[str, str]]:
    """The main metric, a row per cell: narrow enough for a terminal."""
    rows = results(study)
    name = study.main_metrics[0]
    show = digits(rows, name)
    return [result_texts(study, row, name, show) | {"runs": row.status} for row in rows]


def result_texts(study: Study, row: CellResult, name: str, show: Digits) -> dict[str, str]:
    """The cells of a row that say what one metric came to."""
    result = row.metrics[name]
    texts = {"cell": row.cell, "mean": mean_text(result, show), "every seed": values_text(result, show)}
    if study.baseline:
        texts[f"minus {study.baseline} [95%]"] = difference_text(result.difference, show)
        texts["reading"] = short_reading(result.difference)
    return texts


def means_rows(study: Study) -> list[dict[str, str]]:
    """Means of all main metrics, a row per metric and a column per cell: narrow enough for a terminal."""
    rows = results(study)
    shown = {name: digits(rows, name) for name in study.main_metrics}
    return [
        {"mean over seeds": name} | {row.cell: mean_text(row.metrics[name], show) for row in rows}
        for name, show in shown.items()
    ]


def whole_text(value: float) -> Cell:
    """A count or a cost without decimals, with thousands separators."""
    return Cell(f"{value:,.0f}" if math.isfinite(value) else MISSING, value)


# -- how to read it -------------------------------------------------------------------------------------------------


def footnotes(study: Study, metrics: Sequence[str]) -> list[str]:
    """How to read a table of these metrics, in sentences."""
    directions = "; ".join(f"{name}: {metric(name).direction} is better" for name in metrics)
    notes = [f"Means over seeds {study.after}, and every seed's value. {directions}."]
    if study.baseline:
        notes.append(
            f"Differences to {study.baseline} are paired by seed, with a 95% Student-t interval; "
            "an interval that holds 0 reads “not separated”, and one pair has no interval."
        )
    return notes + marks(study, metrics)


def marks(study: Study, metrics: Sequence[str]) -> list[str]:
    """What the marks beside numbers mean, those that a table of these metrics has."""
    found = []
    if any(is_favoured(study, cell, name) for cell in study.cells for name in metrics):
        found.append(
            f"{BIAS_MARK} The method was trained towards features of the metric's own family "
            "of networks: the metric favours it."
        )
    if any(run.shared_device for run in study.runs):
        left_out = "" if len(study.timed) == len(study.runs) else ", and it is left out here"
        found.append(f"{SHARED_MARK} Shared its device with another run: its seconds do not count{left_out}.")
    return found
