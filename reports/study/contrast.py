"""What differs between two runs, and whether it keeps them from being compared. Free of pandas, so it is quick."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from reports.study.load import RecordedRun
from reports.study.verify import Rule, differing_fields, differing_pair, foreign_evaluation, rules


@dataclass(frozen=True)
class Difference:
    """A field whose values differ; None stands for a field that a run lacks."""

    group: str
    """config, environment, digests or method."""
    field: str
    a: Any
    b: Any
    must_agree: bool
    """Whether the two cannot be compared because of it."""


@dataclass(frozen=True)
class TraceComparison:
    """The batch traces at the last step that both runs have logged."""

    step: int
    agrees: bool
    first_different: int | None
    """The first common step at which they differ."""


@dataclass(frozen=True)
class Contrast:
    """Two runs side by side."""

    differences: Sequence[Difference]
    trace: TraceComparison | None
    """None where the two have logged no common step."""
    obstacles: Sequence[str]
    """What must agree and does not."""
    unknown: Sequence[str]
    """What must agree and was not recorded by both."""
    seeds: tuple[int, int]

    @property
    def is_comparable(self) -> bool:
        return not self.obstacles and not self.unknown

    @property
    def is_paired(self) -> bool:
        """Whether the two share a seed, and with it initial weights, batches, times and noise."""
        return self.seeds[0] == self.seeds[1]

    @property
    def verdict(self) -> str:
        """One line: whether the two may be compared."""
        if self.obstacles:
            return f"not comparable: {', '.join(self.obstacles)}"
        if self.unknown:
            return f"cannot be told: not recorded by both runs: {', '.join(self.unknown)}"
        if self.is_paired:
            return "comparable, paired by seed: all that must agree does"
        a, b = self.seeds
        return f"comparable, but not paired: the seeds are {a} and {b}, so weights, batches, times and noise differ"


def contrast(a: RecordedRun, b: RecordedRun) -> Contrast:
    """Compare two runs, of one study or of two."""
    is_paired = a.seed == b.seed
    applying = [rule for rule in rules((a, b)) if is_paired or not rule.is_for_seed]
    broken = [rule for rule in applying if differing_pair(rule, (a, b))]
    trace = _trace(a, b)
    return Contrast(
        differences=_differences(a, b, {place for rule in broken for place in _places(rule, a, b)}),
        trace=trace,
        obstacles=[f"{rule.what} differs" for rule in broken] + _other_obstacles(a, b, trace if is_paired else None),
        unknown=[rule.what for rule in applying if any(rule.applies(r) and rule.value(r) is None for r in (a, b))],
        seeds=(a.seed, b.seed),
    )


def _other_obstacles(a: RecordedRun, b: RecordedRun, trace: TraceComparison | None) -> list[str]:
    """What no digest of the manifest covers."""
    found = [f"batch trace differs from step {trace.first_different} on"] if trace and not trace.agrees else []
    for run in (a, b):
        if line := foreign_evaluation(run):
            found.append(f"{run.label} was evaluated at step {line['step']} under another protocol than its manifest's")
        if run.shared_device and run.config["budget"]["unit"] == "seconds":
            found.append(f"{run.label} shared its device, and the budget is in seconds")
    return found


def _places(rule: Rule, a: RecordedRun, b: RecordedRun) -> set[tuple[str, str]]:
    """Group and field of everything that stands behind a broken rule."""
    fields = differing_fields(rule.settings(a), rule.settings(b))
    places = {("digests" if field.startswith("protocol.") else "config", field) for field in fields}
    return places | ({("digests", rule.digest)} if rule.digest else set())


def _differences(a: RecordedRun, b: RecordedRun, broken: set[tuple[str, str]]) -> list[Difference]:
    first, second = _groups(a), _groups(b)
    return [
        Difference(group, field, x, y, (group, field) in broken)
        for group in first
        for field, (x, y) in differing_fields(first[group], second[group]).items()
    ]


def _groups(run: RecordedRun) -> dict[str, Mapping[str, Any]]:
    """What a manifest says, by the group in which a difference is shown."""
    manifest = run.manifest
    model = {**manifest["config"].get("model", {}), **manifest.get("model", {})}
    return {
        "config": {**manifest["config"], "model": model},
        "environment": {**manifest.get("environment", {}), "shared_device": run.shared_device},
        "digests": {**run.digests, "protocol": manifest.get("protocol", {})},
        "method": run.facts,
    }


def _trace(a: RecordedRun, b: RecordedRun) -> TraceComparison | None:
    first, second = ({line["step"]: line["trace"] for line in run.train} for run in (a, b))
    common = sorted(first.keys() & second.keys())
    if not common:
        return None
    different = [step for step in common if first[step] != second[step]]
    return TraceComparison(common[-1], common[-1] not in different, different[0] if different else None)
