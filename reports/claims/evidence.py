"""Deciding claims: what each pair of cells says, by the 95% t interval of its paired differences or by exact counts.

Reproduced: the interval lies wholly on the claimed side. Contradicted: wholly on the other. Undecided: all else, and
whatever has fewer than `LEAST_SEEDS` pairs, runs that may not be compared, or runs that diverged.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any, Literal

from harness.records.files import number
from harness.records.metrics import main_metric, metric
from reports.claims.pairs import Candidate, Pair, cells_of, gaps, pairs, rows_of, unmet
from reports.claims.runs import PairedRuns, compared_lines, paired_runs, unequal_steps
from reports.claims.scale import ClaimScale, place_of_count, place_of_runs
from reports.claims.statements import Claim, Ledger
from reports.costs.equal_cost import unequal_timing
from reports.costs.targets_costs import Target
from reports.statistics.intervals import Interval, t_interval
from reports.study.contrast import contrast
from reports.study.load import RecordedRun, Study, final_study
from reports.study.units import UNITS
from reports.study.words import count, listed
from reports.tables.results import is_favoured

LEAST_SEEDS = 3
"""Pairs below which nothing is decided."""

FRECHET = ("fid", "fd")
"""Families of one kind: a study with the one in place of the other measures the same thing with another network."""

Verdict = Literal["reproduced", "contradicted", "undecided"]


# -- what is found ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What one pair of cells says about a claim."""

    claim: Claim
    study: str
    page: str
    """Where the numbers stand; "" while there is no report."""
    anchor: str
    """The place on a study's page."""
    cell: str
    against: str
    """"" for a claim of one cell."""
    metric: str
    """What was measured here."""
    verdict: Verdict
    interval: Interval
    """The interval of the paired differences, cell minus the other; for a speed-up that of its factor, with the
    geometric mean. For an exact count both bounds are the count."""
    border: float
    """Where the claimed side begins, in the same unit."""
    values: tuple[float, float]
    """Means of both cells over the pairs; of a speed-up steps, of a claim of one cell the second is NaN."""
    by_seed: Mapping[int, float]
    place: ClaimScale
    missing: Sequence[str] = ()
    """Why nothing is decided."""
    left_out: Sequence[str] = ()
    """Seeds that are no pair, and why."""
    favoured: Sequence[str] = ()
    """Cells that were trained towards features of the metric's own family of networks."""

    @property
    def has_data(self) -> bool:
        """Whether there is a number to show."""
        return math.isfinite(self.interval.mean)

    @property
    def num_claimed(self) -> int:
        """Pairs whose difference is on the claimed side."""
        is_above = self.claim.kind == "speed-up" or (
            self.claim.kind == "quality" and metric(self.metric).direction == "higher"
        )
        sign = 1 if is_above else -1
        return sum(sign * value > sign * self.border for value in self.by_seed.values())

    @property
    def words(self) -> str:
        """The verdict as it may be said at this scale."""
        if self.verdict == "undecided" or self.place.is_papers:
            return self.verdict
        return f"{'holds' if self.verdict == 'reproduced' else 'does not hold'} on {self.place.short}"


@dataclass(frozen=True)
class Judged:
    """A claim with all that the given studies say about it."""

    claim: Claim
    evidence: Sequence[Evidence]
    missing: Sequence[str]
    """What is missing where no study has the pair."""

    @property
    def is_contested(self) -> bool:
        """Whether it is decided both ways."""
        return {"reproduced", "contradicted"} <= {one.verdict for one in self.evidence}


@dataclass(frozen=True)
class CountedRows:
    """A folder with the record of `ditbench overhead`."""

    path: Path
    rows: Sequence[Mapping[str, Any]]
    shapes: Mapping[str, int]


Source = Study | CountedRows


def judge(ledger: Ledger, sources: Sequence[Source]) -> list[Judged]:
    """Every claim, in the ledger's order."""
    looked_at = [_looked_at(source) for source in sources]
    return [_judged(ledger, claim, looked_at) for claim in ledger.claims]


@dataclass(frozen=True)
class _LookedAt:
    """A source with its cells."""

    source: Source
    final: Study | None
    """The study under its final protocol, whose numbers are evidence in their own right."""
    candidates: Sequence[Candidate]


def _looked_at(source: Source) -> _LookedAt:
    if isinstance(source, Study):
        return _LookedAt(source, final_study(source), cells_of(source))
    return _LookedAt(source, None, rows_of(source.rows))


def _judged(ledger: Ledger, claim: Claim, looked_at: Sequence[_LookedAt]) -> Judged:
    evidence: list[Evidence] = []
    for one in looked_at:
        views = [one.source, *([one.final] if one.final and claim.kind == "quality" else [])]
        found = [_evidence(ledger, claim, view, pair) for view in views for pair in pairs(claim, one.candidates)]
        evidence += _merged([one for one in found if one])
    if evidence:
        return Judged(claim, tuple(evidence), ())
    lacking = [(gaps(claim, one.candidates) or [_unmeasured(claim)], one.source.path.name) for one in looked_at]
    least, name = min(lacking, key=lambda one: len(one[0]))
    return Judged(claim, (), tuple(f"{name}: {text}" if len(looked_at) > 1 else text for text in least))


def _unmeasured(claim: Claim) -> str:
    if claim.kind == "count":
        return "no counted cost of the pair"
    if claim.kind == "seconds":
        return "no training times: counts of `ditbench overhead` are none"
    return f"no metric of the kind of {claim.metric}"


def _evidence(ledger: Ledger, claim: Claim, view: Source, pair: Pair) -> Evidence | None:
    if claim.kind == "count":
        return _count(ledger, claim, view, pair)
    if not isinstance(view, Study) or pair.against is None:
        return None
    if claim.kind == "seconds":
        return _seconds(ledger, claim, view, pair)
    name = measured(claim, view.metrics)
    if not name:
        return None
    return (_quality if claim.kind == "quality" else _speed_up)(ledger, claim, view, pair, name)


def measured(claim: Claim, names: Sequence[str]) -> str:
    """The recorded metric that decides a claim: the paper's own, else the first of its kind; "" without any."""
    if claim.metric in names:
        return claim.metric
    family = metric(claim.metric).prefix
    kind = FRECHET if family in FRECHET else (family,)
    same = [name for name in names if metric(name).prefix in kind]
    return main_metric(same) if same else ""


def _merged(found: Sequence[Evidence]) -> list[Evidence]:
    """Equal counts of several cells as one, under all their names."""
    groups: dict[Any, list[Evidence]] = {}
    for index, one in enumerate(found):
        key = (one.place, one.interval) if one.claim.kind == "count" and not one.against else index
        groups.setdefault(key, []).append(one)
    return [dataclasses.replace(same[0], cell=listed([one.cell for one in same], 2)) for same in groups.values()]


# -- deciding ---------------------------------------------------------------------------------------------------------


def decided(interval: Interval, border: float, side: Literal["below", "above"]) -> Verdict:
    """The rule: on which side of the border the whole interval lies."""
    low, high = interval.low - border, interval.high - border
    if side == "above":
        low, high = -high, -low
    return "reproduced" if high < 0 else "contradicted" if low > 0 else "undecided"


def _blocked(runs: PairedRuns, num: int) -> list[str]:
    """What forbids a verdict, whatever the interval says."""
    found = [f"{listed(runs.diverged)} diverged: the others are survivors"] if runs.diverged else []
    if num < LEAST_SEEDS:
        found.append(f"{count(LEAST_SEEDS - num, 'more pair')} of seeds: {num} of at least {LEAST_SEEDS}")
        found += runs.left_out
    return found


def _verdict(
    interval: Interval, border: float, side: Literal["below", "above"], blocked: Sequence[str], border_text: str
) -> tuple[Verdict, Sequence[str]]:
    """The verdict, and why there is none."""
    if blocked:
        return "undecided", tuple(blocked)
    verdict = decided(interval, border, side)
    return verdict, (f"the interval holds {border_text}",) if verdict == "undecided" else ()


def _quality(ledger: Ledger, claim: Claim, study: Study, pair: Pair, name: str) -> Evidence:
    """A metric at equal steps."""
    assert pair.against is not None
    runs = paired_runs(study, pair.cell.label, pair.against.label)
    runs = runs.narrowed(lambda run: math.isfinite(run.value(name, study.point)), f"has no finite {name}")
    values = {seed: tuple(run.value(name, study.point) for run in both) for seed, both in runs.by_seed.items()}
    differences = {seed: a - b for seed, (a, b) in values.items()}
    interval = t_interval(list(differences.values()))
    is_lower = metric(name).direction == "lower"
    margin, lacking = _margin(ledger, claim, study, runs, name)
    border = margin if is_lower else -margin
    blocked = [*unequal_steps(study, runs), *_blocked(runs, interval.num), *lacking]
    text = "0" if not margin else f"the margin, {claim.margin:g}% of vanilla"
    verdict, missing = _verdict(interval, border, "below" if is_lower else "above", blocked, text)
    return Evidence(
        **_about(claim, study, pair, "result"),
        metric=name,
        verdict=verdict,
        interval=interval,
        border=border,
        values=_means(list(values.values())),
        by_seed=differences,
        place=place_of_runs(ledger.scale, claim, study, pair.labels, name),
        missing=missing,
        left_out=tuple(runs.left_out),
        favoured=_favoured(study, pair, name),
    )


def _margin(ledger: Ledger, claim: Claim, study: Study, runs: PairedRuns, name: str) -> tuple[float, list[str]]:
    """What `at least as good` may lose: a share of vanilla's mean over the paired seeds; and why it is not known."""
    if not claim.margin:
        return 0.0, []
    labels = [cell.label for cell in cells_of(study) if not unmet(ledger.vanilla, cell)]
    controls = {run.seed: run for label in labels for run in study.of(label)}
    values = [
        controls[seed].value(name, study.point)
        for seed, (run, _) in runs.by_seed.items()
        if seed in controls and contrast(run, controls[seed]).is_comparable
    ]
    finite = [value for value in values if math.isfinite(value)]
    if len(finite) < len(runs.by_seed) or not finite:
        return math.nan, [f"vanilla at the same seeds: the margin is {claim.margin:g}% of its value"]
    return claim.margin / 100 * abs(fmean(finite)), []


def _speed_up(ledger: Ledger, claim: Claim, study: Study, pair: Pair, name: str) -> Evidence:
    """Steps until the median of the other cell's last values: those of its median curve over those of each run.

    A value is reached somewhere between the first evaluation that is as good and the one before, so a factor lies
    between two bounds: the claim is confirmed by the lower ones and contradicted by the upper ones alone.
    """
    assert pair.against is not None
    runs = paired_runs(study, pair.cell.label, pair.against.label)
    runs = runs.narrowed(lambda run: math.isfinite(run.value(name, study.point)), f"has no finite {name}")
    others = [b for _, b in runs.by_seed.values()]
    target = Target(name, median([b.value(name, study.point) for b in others]) if others else math.nan)
    reference = _reached(_median_curve(others, name), target) or Reached(0, 0)
    found = {seed: _reached(_curve(a, name), target) for seed, (a, _) in runs.by_seed.items()}
    reached = {seed: steps for seed, steps in found.items() if steps}
    factors = {seed: reference.at / own.at for seed, own in reached.items()}
    blocked = [*unequal_steps(study, runs), *_blocked(runs, len(runs.by_seed))]
    if misses := len(found) - len(reached):
        blocked.append(f"{misses} of {len(found)} seeds never reached vanilla's value within the budget")
    interval = _geometric(list(factors.values()))
    if len(reached) == len(found) and len({own.at for own in reached.values()}) == 1:
        interval = dataclasses.replace(interval, low=math.nan, high=math.nan)
        blocked.append("all seeds are there at the same evaluation, so their spread says nothing: evaluate more often")
    verdict, missing = _speed_verdict(reference, list(reached.values()), interval, claim.value, blocked)
    return Evidence(
        **_about(claim, study, pair, "result"),
        metric=name,
        verdict=verdict,
        interval=interval,
        border=claim.value,
        values=_means([(float(own.at), float(reference.at)) for own in reached.values()]),
        by_seed=factors,
        place=place_of_runs(ledger.scale, claim, study, pair.labels, name),
        missing=missing,
        left_out=tuple(runs.left_out),
        favoured=_favoured(study, pair, name),
    )


@dataclass(frozen=True)
class Reached:
    """Steps of the first evaluation that is as good as a target, and of the one before; 0 for none."""

    before: int
    at: int


def _curve(run: RecordedRun, name: str) -> list[tuple[int, float]]:
    """Steps and finite values of a run's evaluations."""
    values = [(line["step"], number(line["metrics"].get(name, "nan"))) for line in run.evaluations]
    return [(step, value) for step, value in values if math.isfinite(value)]


def _median_curve(runs: Sequence[RecordedRun], name: str) -> list[tuple[int, float]]:
    """The median over runs at every step at which all of them have a value."""
    curves = [dict(_curve(run, name)) for run in runs]
    steps = sorted(set[int].intersection(*(set(curve) for curve in curves))) if curves else []
    return [(step, median(curve[step] for curve in curves)) for step in steps]


def _reached(curve: Sequence[tuple[int, float]], target: Target) -> Reached | None:
    """Where a curve is as good as the target for the first time; None where it never is."""
    before = 0
    for step, value in curve:
        if target.is_reached_by(value):
            return Reached(before, step)
        before = step
    return None


def _speed_verdict(
    reference: Reached, reached: Sequence[Reached], interval: Interval, border: float, blocked: Sequence[str]
) -> tuple[Verdict, Sequence[str]]:
    """The verdict on factors that are known to lie between two bounds, and why there is none."""
    if blocked:
        return "undecided", tuple(blocked)
    # A cell that is as good at its first evaluation has no bound on that side.
    if reference.before:
        least = _geometric([reference.before / own.at for own in reached])
        if decided(least, border, "above") == "reproduced":
            return "reproduced", ()
    if all(own.before for own in reached):
        most = _geometric([reference.at / own.before for own in reached])
        if decided(most, border, "above") == "contradicted":
            return "contradicted", ()
    holds = decided(interval, border, "above") == "undecided"
    return "undecided", (
        f"the interval holds {border:g}" if holds else "the evaluations are too far apart: evaluate more often",
    )


def _geometric(factors: Sequence[float]) -> Interval:
    """The t interval of the logarithms, as factors."""
    found = t_interval([math.log(factor) for factor in factors])
    return Interval(found.num, *(math.exp(value) for value in (found.mean, found.low, found.high)))


def _seconds(ledger: Ledger, claim: Claim, study: Study, pair: Pair) -> Evidence:
    """Milliseconds of a training step, from runs that had their device for themselves."""
    assert pair.against is not None
    runs = paired_runs(study, pair.cell.label, pair.against.label)
    counted = study.counted(UNITS["seconds"])
    runs = runs.narrowed(lambda run: run in counted, "shared the device, so the seconds do not count")
    times = {
        seed: tuple(1000 * line["train_seconds"] / line["step"] for line in compared_lines(study, both))
        for seed, both in runs.by_seed.items()
    }
    differences = {seed: a - b for seed, (a, b) in times.items()}
    interval = t_interval(list(differences.values()))
    unequal = unequal_timing(dataclasses.replace(study, runs=runs.runs)) if runs.runs else []
    blocked = [*_blocked(runs, interval.num), *(f"the runs differ in {text}" for text in unequal)]
    verdict, missing = _verdict(interval, 0.0, "below", blocked, "0")
    return Evidence(
        **_about(claim, study, pair, "cost"),
        metric="milliseconds a step",
        verdict=verdict,
        interval=interval,
        border=0.0,
        values=_means(list(times.values())),
        by_seed=differences,
        place=place_of_runs(ledger.scale, claim, study, pair.labels),
        missing=missing,
        left_out=tuple(runs.left_out),
    )


def _count(ledger: Ledger, claim: Claim, view: Source, pair: Pair) -> Evidence | None:
    """An exact count, or its change in percent: needs no seeds."""
    cells = [pair.cell, pair.against] if pair.against else [pair.cell]
    own, *other = [float(cell.cost.get(claim.metric, math.nan)) for cell in cells]
    value = 100 * (own / other[0] - 1) if other else own
    if not math.isfinite(value):
        return None
    holds = abs(value - claim.value) <= claim.margin
    shapes = view.shapes if isinstance(view, CountedRows) else {}
    place = (
        place_of_runs(ledger.scale, claim, view, pair.labels)
        if isinstance(view, Study)
        else place_of_count(ledger.scale, claim, pair.cell.model, shapes)
    )
    return Evidence(
        **_about(claim, view, pair, "cost"),
        metric=claim.metric,
        verdict="reproduced" if holds else "contradicted",
        interval=Interval(1, value, value, value),
        border=claim.value,
        values=(own, other[0] if other else math.nan),
        by_seed={},
        place=place,
    )


# -- what all have in common ------------------------------------------------------------------------------------------


def _about(claim: Claim, source: Source, pair: Pair, anchor: str) -> dict[str, Any]:
    if isinstance(source, CountedRows):
        page, link = source.path / "overhead.md", str(source.path / "overhead.md")
    else:
        page = source.path / "report" / "index.html"
        link = f"{page}#{anchor}"
    return {
        "claim": claim,
        "study": source.path.resolve().name,
        "page": link if page.is_file() else "",
        "anchor": anchor,
        "cell": pair.cell.label,
        "against": pair.against.label if pair.against else "",
    }


def _means(values: Sequence[tuple[float, ...]]) -> tuple[float, float]:
    if not values:
        return math.nan, math.nan
    first, second = zip(*values, strict=True)
    return fmean(first), fmean(second)


def _favoured(study: Study, pair: Pair, name: str) -> tuple[str, ...]:
    return tuple(label for label in pair.labels if is_favoured(study, label, name))
