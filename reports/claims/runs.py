"""Which runs of two cells are pairs: at one seed, comparable, and evaluated where the study is compared."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from reports.study.contrast import contrast
from reports.study.load import RecordedRun, Study
from reports.study.words import listed


@dataclass(frozen=True)
class PairedRuns:
    """The runs of two cells that may be compared, by seed, and why others may not."""

    by_seed: Mapping[int, tuple[RecordedRun, RecordedRun]]
    left_out: Sequence[str]
    diverged: Sequence[str]
    """Labels of runs that diverged: a difference over the others would be one of survivors."""

    @property
    def runs(self) -> tuple[RecordedRun, ...]:
        return tuple(run for both in self.by_seed.values() for run in both)

    def narrowed(self, keep: Callable[[RecordedRun], bool], why: str) -> "PairedRuns":
        """Without the seeds at which a run is not as it must be."""
        wrong = [run.label for run in self.runs if not keep(run)]
        kept = {seed: both for seed, both in self.by_seed.items() if all(map(keep, both))}
        told = [f"{listed(wrong)} {why}"] if wrong else []
        return PairedRuns(kept, [*self.left_out, *told], self.diverged)


def paired_runs(study: Study, cell: str, against: str) -> PairedRuns:
    """Pair the runs of two cells by seed, at the study's last evaluation point."""
    first, second = ({run.seed: run for run in study.of(label)} for label in (cell, against))
    runs = [run for side in (first, second) for run in side.values()]
    left_out = []
    for label, side, other in ((cell, first, second), (against, second, first)):
        if absent := sorted(other.keys() - side.keys()):
            left_out.append(f"{label} has no seed {listed([str(seed) for seed in absent])}")
    kept: dict[int, tuple[RecordedRun, RecordedRun]] = {}
    for seed in sorted(first.keys() & second.keys()):
        if why := _obstacle(study, first[seed], second[seed]):
            left_out.append(why)
        else:
            kept[seed] = first[seed], second[seed]
    return PairedRuns(kept, left_out, [run.label for run in runs if run.status == "diverged"])


def _obstacle(study: Study, a: RecordedRun, b: RecordedRun) -> str:
    """Why two runs at a seed are no pair; "" where they are."""
    for run in (a, b):
        if run.seed in run.manifest.get("tuning", {}).get("seeds", ()):
            return f"{run.label} was tuned on that seed"
        if run.evaluation(study.point) is None:
            return f"{run.label} ({run.status}) has no evaluation {study.after}"
    found = contrast(a, b)
    return "" if found.is_comparable else f"{a.label} and {b.label}: {found.verdict}"


def compared_lines(study: Study, both: tuple[RecordedRun, RecordedRun]) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """The evaluations of a pair at the compared point, which both have."""
    a, b = (run.evaluation(study.point) for run in both)
    assert a is not None and b is not None
    return a, b


def unequal_steps(study: Study, runs: PairedRuns) -> list[str]:
    """Why a claim at equal steps is not decided by these runs; empty where they made as many."""
    steps = {tuple(line["step"] for line in compared_lines(study, both)) for both in runs.by_seed.values()}
    unequal = [f"{a:,} and {b:,}" for a, b in sorted(steps) if a != b]
    if not unequal:
        return []
    return [f"the two made {unequal[0]} steps: the claim is of equal ones, so set budget.unit steps or images"]
