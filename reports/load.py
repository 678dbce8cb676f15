"""Reading a study: runs and their records, in one frozen object that everything else in `reports` reads."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from harness.records import FORMAT, RunFolder, UserError, find_runs, metric, number, read_json

METRIC_ORDER = ("fid", "fd", "kid", "kd", "class_accuracy", "velocity_loss", "fd_pixels", "precision", "recall")
"""Families of metrics in the order in which they are shown; the first one recorded is the main metric."""

REQUIRED = ("cell", "method", "seed", "status", "config")
"""Fields without which a manifest says nothing."""


@dataclass(frozen=True)
class Run:
    """One cell at one seed: its manifest, its costs and its lines, oldest first."""

    folder: Path
    manifest: Mapping[str, Any]
    cost: Mapping[str, Any]
    train: Sequence[Mapping[str, Any]]
    evaluations: Sequence[Mapping[str, Any]]

    @property
    def cell(self) -> str:
        return self.manifest["cell"]

    @property
    def seed(self) -> int:
        return self.manifest["seed"]

    @property
    def status(self) -> str:
        return self.manifest["status"]

    @property
    def config(self) -> Mapping[str, Any]:
        return self.manifest["config"]

    @property
    def facts(self) -> Mapping[str, Any]:
        """What the method says about itself: heads, taps, terms, pretrained models."""
        return self.manifest.get("method_facts", {})

    @property
    def digests(self) -> Mapping[str, str]:
        return self.manifest.get("digests", {})

    @property
    def label(self) -> str:
        """How a message names the run."""
        return f"{self.cell} seed {self.seed}"

    @property
    def last_step(self) -> int:
        """The last step on record, 0 before the first."""
        return max((line["step"] for line in (*self.train[-1:], *self.evaluations[-1:])), default=0)

    def evaluation(self, step: int) -> Mapping[str, Any] | None:
        """The evaluation after `step`, or None."""
        return next((line for line in self.evaluations if line["step"] == step), None)

    def value(self, name: str, step: int) -> float:
        """A metric after `step`; NaN where it was not recorded or is not finite."""
        line = self.evaluation(step)
        value = number(line["metrics"].get(name, "nan")) if line else math.nan
        return value if math.isfinite(value) else math.nan


@dataclass(frozen=True)
class Study:
    """All runs of a study, sorted by cell (the baseline first) and seed."""

    path: Path
    baseline: str
    """Label of the control; "" where the study has none."""
    runs: tuple[Run, ...]

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @cached_property
    def cells(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(run.cell for run in self.runs))

    @cached_property
    def seeds(self) -> tuple[int, ...]:
        return tuple(sorted({run.seed for run in self.runs}))

    @cached_property
    def step(self) -> int:
        """The last step that any run was evaluated at: tables compare the runs there."""
        return max(line["step"] for run in self.runs for line in run.evaluations)

    @cached_property
    def metrics(self) -> tuple[str, ...]:
        """Every recorded metric, the main one first."""
        names = {name for run in self.runs for line in run.evaluations for name in line["metrics"]}
        return tuple(sorted(names, key=_rank))

    @property
    def main_metrics(self) -> tuple[str, ...]:
        """The metrics without the parts of others: `velocity_loss_t1` is a part where there is a `velocity_loss`."""
        return tuple(m for m in self.metrics if not any(m.startswith(f"{whole}_") for whole in self.metrics))

    @property
    def reference(self) -> Run:
        """The run whose settings the page shows as the study's: the baseline's first."""
        return self.runs[0]

    def of(self, cell: str) -> tuple[Run, ...]:
        return tuple(run for run in self.runs if run.cell == cell)

    def at(self, seed: int) -> tuple[Run, ...]:
        return tuple(run for run in self.runs if run.seed == seed)

    def first(self, cell: str) -> Run:
        """A run that speaks for its cell where seeds do not matter: one with method facts where there is one."""
        return next((run for run in self.of(cell) if run.facts), self.of(cell)[0])

    def lines(self, name: str) -> dict[str, float]:
        """The reference lines of a metric, by label: what the floor half and its reconstructions score."""
        found: dict[str, float] = {}
        for run in self.runs:
            for label, values in run.manifest.get("lines", {}).items():
                if name in values and math.isfinite(number(values[name])):
                    found.setdefault(label, number(values[name]))
        return found


def _rank(name: str) -> tuple[int, str]:
    family = metric(name).prefix
    return (METRIC_ORDER.index(family) if family in METRIC_ORDER else len(METRIC_ORDER)), name


def load_study(path: Path) -> Study:
    """Read every run of a study folder.

    Raises:
        UserError: the folder holds no runs, a manifest is of a newer format or lacks a field, or nothing was
            evaluated yet.
    """
    runs = [_load_run(folder) for folder in find_runs(path)]
    baseline = _baseline(runs)
    ordered = sorted(runs, key=lambda run: (run.cell != baseline, run.cell, run.seed))
    study = Study(path, baseline, tuple(ordered))
    if not any(run.evaluations for run in runs):
        raise UserError(f"{path} holds no evaluation yet: let a run reach its first evaluation, then report again")
    return study


def _load_run(folder: RunFolder) -> Run:
    manifest = folder.manifest()
    if manifest.get("format") != FORMAT:
        raise UserError(
            f"{folder.manifest_path} has format {manifest.get('format')} and this version reads {FORMAT}: "
            "report with the version of ditbench that trained the study"
        )
    missing = [name for name in REQUIRED if name not in manifest]
    if missing:
        raise UserError(f"{folder.manifest_path} lacks {', '.join(missing)}: remove the folder and run the cell again")
    cost = folder.path / "cost.json"
    return Run(
        folder=folder.path,
        manifest=manifest,
        cost=read_json(cost) if cost.is_file() else {},
        train=folder.lines("train"),
        evaluations=folder.lines("eval"),
    )


def _baseline(runs: Sequence[Run]) -> str:
    """The control that most runs of other cells name, if it is among the cells; "" where there is none.

    A cell that was trained by itself names itself, which says nothing about the others; runs that were added later
    may name another control.
    """
    cells = {run.cell for run in runs}
    named = Counter(str(run.manifest.get("baseline", "")) for run in runs)
    by_others = Counter(label for run in runs if (label := str(run.manifest.get("baseline", ""))) != run.cell)
    votes = by_others if len(cells) > 1 else named
    baseline = max(sorted(votes), key=lambda label: votes[label], default="")
    return baseline if baseline in cells else ""


# -- curves ---------------------------------------------------------------------------------------------------------

CURVE_COLUMNS = [
    "quantity",
    "series",
    "cell",
    "seed",
    "step",
    "images",
    "train_gflops",
    "value",
    "num_seeds",
    "of_seeds",
]
"""Columns of a curve frame. `series` is `seed`, `mean` or `line`; a mean over `num_seeds` < `of_seeds` seeds is one
over survivors, or over the seeds that got that far."""


def metric_curves(study: Study, name: str) -> pd.DataFrame:
    """A metric at every evaluation, as a curve frame with means and reference lines."""
    points = [
        _point(name, run, line, number(line["metrics"][name]))
        for run in study.runs
        for line in run.evaluations
        if name in line["metrics"]
    ]
    lines = [{"quantity": name, "series": "line", "cell": k, "value": v} for k, v in study.lines(name).items()]
    return _curve_frame(study, points, lines)


def training_curves(study: Study) -> pd.DataFrame:
    """Velocity loss, each term before its weight, and the gradient norm at every logged step, as a curve frame."""
    points = [
        _point(name, run, line, number(value))
        for run in study.runs
        for line in run.train
        for name, value in _training_values(line)
    ]
    return _curve_frame(study, points, [])


def _training_values(line: Mapping[str, Any]) -> Iterator[tuple[str, float | str]]:
    yield "velocity loss", line["base"]
    yield "gradient norm", line["grad_norm"]
    for name, term in line["terms"].items():
        yield f"term {name}", term["value"]


def _point(quantity: str, run: Run, line: Mapping[str, Any], value: float) -> dict[str, Any]:
    clocks = {name: line[name] for name in ("step", "images", "train_gflops")}
    return {"quantity": quantity, "series": "seed", "cell": run.cell, "seed": run.seed, "value": value, **clocks}


def _curve_frame(study: Study, points: Sequence[Mapping[str, Any]], lines: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    seeds = pd.DataFrame(points, columns=CURVE_COLUMNS)
    seeds["value"] = seeds["value"].where(seeds["value"].abs() < math.inf)
    finite = seeds.dropna(subset=["value"])
    means = finite.groupby(["quantity", "cell", "step"], sort=False, as_index=False).agg(
        images=("images", "first"),
        train_gflops=("train_gflops", "first"),
        value=("value", "mean"),
        num_seeds=("seed", "size"),
    )
    means["series"] = "mean"
    means["of_seeds"] = len(study.seeds)
    frame = pd.concat([seeds, means.sort_values("step", kind="stable"), pd.DataFrame(lines)], ignore_index=True)
    whole = dict.fromkeys(("seed", "step", "images", "num_seeds", "of_seeds"), "Int64")
    return frame.reindex(columns=CURVE_COLUMNS).astype(whole)
