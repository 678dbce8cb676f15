"""Curve frames: what figures are drawn from, and the CSV beside each of them.

A row is a value of one quantity. `series` says what it is: `seed`, a run's value; `mean`, over the seeds of a cell at
one evaluation point (or one step of training), of values and clocks alike, with the mean's 95% Student-t interval from
`low` to `high`, where `num_seeds` < `of_seeds` is a mean over survivors or over the seeds that got that far; `line`, a
reference line; `stop`, where a run ended before its time, with its last value. Against seconds, runs that shared their
device are left out.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pandas as pd

from harness.records.files import number
from harness.records.schema import CLOCKS, Clocks
from reports.statistics.intervals import half_width
from reports.study.endings import stopped_at
from reports.study.load import RecordedRun, Study
from reports.study.units import UNITS, Unit

CURVE_COLUMNS = [
    *("quantity", "series", "cell", "seed", "point", *CLOCKS),
    *("value", "low", "high", "num_seeds", "of_seeds"),
]
"""Columns of a curve frame."""


def metric_curves(study: Study, name: str, unit: Unit | None = None) -> pd.DataFrame:
    """A metric at every evaluation, as a curve frame with means, reference lines and stops.

    Args:
        study: where from.
        name: of the metric.
        unit: against whose clock the curves will be drawn, which decides the runs that count; the budget's by default.
    """
    runs = study.counted(unit or study.unit)
    points = [
        _point(name, run, line, number(line["metrics"][name])) | {"point": line["point"]}
        for run in runs
        for line in run.evaluations
        if name in line["metrics"]
    ]
    lines = [{"quantity": name, "series": "line", "cell": k, "value": v} for k, v in study.lines(name).items()]
    stops = [_point(name, run, stopped_at(run), math.nan) for run in runs if run.ended_early]
    return _curve_frame(study, points, stops, "point", lines)


def clock_curves(study: Study, name: str) -> pd.DataFrame:
    """A metric for every clock but the budget's: curve frames with a column `unit` in front, without reference lines.

    A clock against which no evaluated run counts is left out.
    """
    frames = []
    for unit in UNITS.values():
        if unit is not study.unit and any(run.evaluations for run in study.counted(unit)):
            frame = metric_curves(study, name, unit)
            frame.insert(0, "unit", unit.name)
            frames.append(frame[frame["series"] != "line"])
    return pd.concat(frames, ignore_index=True)


def training_curves(study: Study) -> pd.DataFrame:
    """Velocity loss, each term before its weight, and the gradient norm at every logged step, as a curve frame."""
    points = [
        _point(name, run, line, number(value))
        for run in study.timed
        for line in run.train
        for name, value in _training_values(line)
    ]
    stops = [
        _point(name, run, stopped_at(run), math.nan)
        for run in study.timed
        if run.ended_early and run.train
        for name, _ in _training_values(run.train[-1])
    ]
    return _curve_frame(study, points, stops, "step", [])


def gradient_curves(study: Study) -> pd.DataFrame:
    """Norms of the backbone's gradient at every evaluation, from each part of the loss, as a curve frame."""
    points = [
        _point(name, run, line, value) | {"point": line["point"]}
        for run in study.timed
        for line in run.evaluations
        for name, value in _gradient_norms(line)
    ]
    stops = [
        _point(name, run, stopped_at(run), math.nan)
        for run in study.timed
        if run.ended_early and run.evaluations
        for name, _ in _gradient_norms(run.evaluations[-1])
    ]
    return _curve_frame(study, points, stops, "point", [])


def _gradient_norms(line: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for name, value in line.get("gradient_norms", {}).items():
        yield "velocity loss" if name == "velocity" else f"weighted term {name}", number(value)


def _training_values(line: Mapping[str, Any]) -> Iterator[tuple[str, float | str]]:
    yield "velocity loss", line["base"]
    yield "gradient norm", line["grad_norm"]
    for name, term in line["terms"].items():
        yield f"term {name}", term["value"]


def _point(quantity: str, run: RecordedRun, line: Clocks, value: float) -> dict[str, Any]:
    clocks: dict[str, float] = {name: line[name] for name in CLOCKS}
    return {"quantity": quantity, "series": "seed", "cell": run.cell, "seed": run.seed, "value": value, **clocks}


def _curve_frame(
    study: Study,
    points: Sequence[Mapping[str, Any]],
    stops: Sequence[Mapping[str, Any]],
    aligned_by: str,
    lines: Sequence[Mapping[str, Any]],
) -> pd.DataFrame:
    """The whole frame; means are taken over the seeds of a cell that share `aligned_by`, a point or a step."""
    seeds = pd.DataFrame(points, columns=CURVE_COLUMNS)
    seeds["value"] = seeds["value"].where(seeds["value"].abs() < math.inf)
    finite = seeds.dropna(subset=["value"])
    clocks = {name: (name, "mean") for name in CLOCKS if name != aligned_by}
    means = finite.groupby(["quantity", "cell", aligned_by], sort=False, as_index=False).agg(
        **clocks, value=("value", "mean"), spread=("value", "std"), num_seeds=("seed", "size")
    )
    half = half_width(means["spread"].to_numpy(), means["num_seeds"].to_numpy())
    means = means.assign(low=means["value"] - half, high=means["value"] + half)
    means["series"] = "mean"
    means["of_seeds"] = len(study.seeds)
    last = finite.groupby(["quantity", "cell", "seed"])["value"].last()
    ends = [
        {**stop, "series": "stop", "value": last.get((stop["quantity"], stop["cell"], stop["seed"]), math.nan)}
        for stop in stops
    ]
    means = means.sort_values(aligned_by, kind="stable")
    frame = pd.concat([seeds, means, *(pd.DataFrame(rows) for rows in (ends, lines) if rows)], ignore_index=True)
    frame = frame.reindex(columns=CURVE_COLUMNS)
    whole = ["seed", "point", "num_seeds", "of_seeds"]
    whole += [name for name in ("step", "images") if (frame[name].dropna() % 1 == 0).all()]
    return frame.astype(dict.fromkeys(whole, "Int64"))
