"""Reading a study: runs and their records, in one frozen object that everything else in `reports` reads.

Runs are compared at an evaluation point, which cells with a budget in training GFLOPs or seconds reach after
different numbers of steps.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

from harness.records.files import number
from harness.records.metrics import metric_rank
from harness.records.run_folder import RunFolder, UserError, find_runs, point_share
from harness.records.schema import (
    ConfigRecord,
    CostRecord,
    DetailRecord,
    FinalRecord,
    Manifest,
    MethodRecord,
    Status,
    TrainRecord,
)
from reports.study.units import UNITS, Unit

Published = Literal["main", "all", "none"]
"""Published rows that may be drawn beside a study: what authors print of their own runs, every row, or none."""


@dataclass(frozen=True)
class RecordedRun:
    """One cell at one seed: its manifest, its costs and its lines, oldest first.

    `final` holds the evaluation at the end under a protocol of its own, whose numbers are never set beside those of
    `evaluations`: `final_study` shows the one in the other's place.
    """

    folder: Path
    manifest: Manifest
    cost: CostRecord
    """Empty where the run did not get that far."""
    train: Sequence[TrainRecord]
    evaluations: Sequence[FinalRecord]
    final: Sequence[FinalRecord] = ()

    @property
    def cell(self) -> str:
        return self.manifest["cell"]

    @property
    def seed(self) -> int:
        return self.manifest["seed"]

    @property
    def status(self) -> Status:
        return self.manifest["status"]

    @property
    def config(self) -> ConfigRecord:
        return self.manifest["config"]

    @property
    def facts(self) -> MethodRecord:
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
    def detail(self) -> DetailRecord:
        """Why a run did not finish: step and parts of a diverged one, error and log of a failed one."""
        return self.manifest.get("status_detail", {})

    @property
    def shared_device(self) -> bool:
        """Whether another run used the device at the same time, so that seconds say little."""
        return self.manifest.get("shared_device", False)

    def counts(self, unit: Unit) -> bool:
        """Whether the run counts against a clock: against seconds, not if it shared its device."""
        return not (unit.name == "seconds" and self.shared_device)

    @property
    def ended_early(self) -> bool:
        """Whether the run came to an end before its budget did."""
        return self.status in ("diverged", "failed")

    def evaluation(self, point: int) -> FinalRecord | None:
        """The evaluation at a point, or None."""
        return next((line for line in self.evaluations if line["point"] == point), None)

    def value(self, name: str, point: int) -> float:
        """A metric at a point; NaN where it was not recorded or is not finite."""
        line = self.evaluation(point)
        value = number(line["metrics"].get(name, "nan")) if line else math.nan
        return value if math.isfinite(value) else math.nan


@dataclass(frozen=True)
class Study:
    """All runs of a study, sorted by cell (the baseline first) and seed."""

    path: Path
    baseline: str
    """Label of the control; "" where the study has none."""
    runs: tuple[RecordedRun, ...]
    published: Published = "main"
    targets: tuple[float, ...] = ()
    """Values of the main metric whose cost is shown besides that of the baseline's last one."""
    all_runs: tuple[RecordedRun, ...] = ()
    """Runs of every cell, where the study holds only some of the cells."""
    thinning: int = 1
    """Every how many of the logged training steps were read, besides each run's last."""

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
    def point(self) -> int:
        """The last evaluation point that any run reached: tables compare the runs there."""
        return max(line["point"] for run in self.timed for line in run.evaluations)

    @property
    def unit(self) -> Unit:
        """What the budget is counted in."""
        return UNITS[self.reference.config["budget"]["unit"]]

    @property
    def budget(self) -> float:
        return self.reference.config["budget"]["amount"]

    @property
    def spent(self) -> float:
        """What a run had spent of its budget at the compared point: that share of it, or the whole step after it."""
        if self.unit.is_whole:
            reached = [line for run in self.runs if (line := run.evaluation(self.point))]
            return max(line[self.unit.clock] for line in reached)
        return self.budget * self.share(self.point)

    def share(self, point: int) -> float:
        """The share of the budget, in (0, 1], at which an evaluation point lies."""
        evaluation = self.reference.config["evaluation"]
        return float(point_share(point, evaluation["points"], evaluation.get("spacing", "even")))  # older: no spacing

    @property
    def after(self) -> str:
        """Where the runs are compared, in words: `after 420 steps`."""
        return f"after {self.unit.amount(self.spent)}"

    @cached_property
    def timed(self) -> tuple[RecordedRun, ...]:
        """The runs that count against the budget's clock."""
        return self.counted(self.unit)

    def counted(self, unit: Unit) -> tuple[RecordedRun, ...]:
        """The runs that count against a clock."""
        return tuple(run for run in self.runs if run.counts(unit))

    @cached_property
    def metrics(self) -> tuple[str, ...]:
        """Every recorded metric, the main one first."""
        names = {name for run in self.runs for line in run.evaluations for name in line["metrics"]}
        return tuple(sorted(names, key=metric_rank))

    @property
    def main_metrics(self) -> tuple[str, ...]:
        """The metrics without the parts of others: `velocity_loss_t1` is a part where there is a `velocity_loss`."""
        return tuple(m for m in self.metrics if not any(m.startswith(f"{whole}_") for whole in self.metrics))

    @property
    def reference(self) -> RecordedRun:
        """The run whose settings the page shows as the study's: the first that got as far as a protocol."""
        return next((run for run in self.runs if run.manifest.get("protocol")), self.runs[0])

    def only(self, cells: Sequence[str]) -> "Study":
        """The study with the runs of these cells alone."""
        runs = tuple(run for run in self.runs if run.cell in cells)
        return replace(self, runs=runs, all_runs=self.all_runs or self.runs)

    @property
    def whole(self) -> "Study":
        """The study with all its cells."""
        return replace(self, runs=self.all_runs, all_runs=()) if self.all_runs else self

    def of(self, cell: str) -> tuple[RecordedRun, ...]:
        return self._by_cell.get(cell, ())

    @cached_property
    def _by_cell(self) -> dict[str, tuple[RecordedRun, ...]]:
        found: dict[str, tuple[RecordedRun, ...]] = {}
        for run in self.runs:
            found[run.cell] = (*found.get(run.cell, ()), run)
        return found

    def at(self, seed: int) -> tuple[RecordedRun, ...]:
        return tuple(run for run in self.runs if run.seed == seed)

    def first(self, cell: str) -> RecordedRun:
        """A run that speaks for its cell where seeds do not matter: one with method facts where there is one."""
        return next((run for run in self.of(cell) if run.facts), self.of(cell)[0])

    def cost(self, cell: str) -> CostRecord:
        """What was counted for a cell, which is the same at every seed; empty where no run got that far."""
        return next((run.cost for run in self.of(cell) if run.cost), CostRecord())

    def lines(self, name: str) -> dict[str, float]:
        """The reference lines of a metric, by label: what the floor half and its reconstructions score."""
        found: dict[str, float] = {}
        for run in self.runs:
            for label, values in run.manifest.get("lines", {}).items():
                if name in values and math.isfinite(number(values[name])):
                    found.setdefault(label, number(values[name]))
        return found


def load_study(path: Path) -> Study:
    """Read every run of a study folder.

    Raises:
        UserError: the folder holds no runs, a record of one is wrong, or nothing was evaluated yet.
    """
    folders = find_runs(path)
    thinning = _thinning(max(folder.num_lines("train") for folder in folders))
    runs = [load_run(folder, thinning) for folder in folders]
    baseline = _baseline(runs)
    ordered = sorted(runs, key=lambda run: (run.cell != baseline, run.cell, run.seed))
    study = Study(path, baseline, tuple(ordered), thinning=thinning)
    if not any(run.evaluations for run in runs):
        failed = next((run for run in study.runs if run.status in ("failed", "diverged")), None)
        why = f" ({failed.label} {failed.status})" if failed else ""
        raise UserError(f"{path} holds no evaluation yet{why}: let a run reach its first evaluation, then report again")
    if not any(run.evaluations for run in study.timed):
        raise UserError(
            f"{path}: the budget is in seconds and every evaluated run shared its device: run the cells one by one"
        )
    return study


MOST_TRAINING_LINES = 400
"""Logged training steps of a run that a study is read with; a figure's panel has fewer pixels than twice as many."""


def _thinning(num_lines: int) -> int:
    """The least power of two that leaves few enough of the longest run's lines.

    Batch traces are chains, so that two which part anywhere differ in all steps that come later, the last one too.
    """
    return 1 << max(0, math.ceil(math.log2(max(num_lines, 1) / MOST_TRAINING_LINES)))


def load_run(folder: RunFolder, thinning: int = 1) -> RecordedRun:
    """Read one run; with `thinning`, every so many of its logged training steps, and the last.

    Raises:
        UserError: it is no run folder, or one of its records is wrong.
    """
    manifest = folder.manifest()
    return RecordedRun(
        folder=folder.path,
        manifest=manifest,
        cost=folder.cost(),
        train=folder.lines("train", _stride(manifest, thinning)),
        evaluations=folder.lines("eval"),
        final=folder.lines("final"),
    )


def final_study(study: Study) -> Study | None:
    """The study under its final protocol: final lines, protocol, digest and reference lines in place of the others.

    None where no run that counts has a final line.
    """
    if not any(run.final for run in study.timed):
        return None
    return replace(study, runs=tuple(_finally(run) for run in study.runs))


def _finally(run: RecordedRun) -> RecordedRun:
    """The run as its final evaluation shows it; without evaluations where it has none."""
    final = run.manifest.get("final") or {}
    digests = {name: value for name, value in run.digests.items() if name not in ("evaluation", "final")}
    if "final" in run.digests:
        digests["evaluation"] = run.digests["final"]
    own: Manifest = {
        **run.manifest,
        "digests": digests,
        "protocol": final.get("protocol", {}),
        "lines": final.get("lines", {}),
    }
    return replace(run, manifest=own, evaluations=run.final, final=())


def _stride(manifest: Manifest, thinning: int) -> int:
    """Steps between two that are read: the same for all runs of a study, so that their curves and traces meet."""
    return 1 if thinning == 1 else thinning * manifest["config"].get("output", {}).get("log_every", 1)


def _baseline(runs: Sequence[RecordedRun]) -> str:
    """The control that most runs of other cells name, if it is among the cells; "" where there is none.

    A cell that was trained by itself names itself, which says nothing about the others; runs that were added later
    may name another control.
    """
    cells = {run.cell for run in runs}
    labels = [(run.cell, str(run.manifest["baseline"])) for run in runs if run.manifest.get("baseline")]
    named = Counter(label for _, label in labels)
    by_others = Counter(label for cell, label in labels if label != cell)
    votes = by_others if len(cells) > 1 else named
    baseline = max(sorted(votes), key=lambda label: votes[label], default="")
    return baseline if baseline in cells else ""
