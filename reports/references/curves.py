"""Reference curves: what runs of a shipped preset gave, at several seeds, so that a new run shows whether all works.

A reference is one JSON file: the settings and digests that its runs share, and for each seed the digests that a run at
that seed must have to the bit, and the metrics at every evaluated step. Another machine or number of threads rounds
otherwise, so metrics are held to a band around the seeds' mean, and nothing but the draws to the bit.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from scipy.special import stdtrit

from harness.records.files import digest, number, read_json
from harness.records.metrics import metric
from harness.records.run_folder import UserError
from reports.study.load import RecordedRun
from reports.study.verify import differing_fields, short_text

FOLDER = Path(__file__).parent
"""The references that come with the package."""

MIN_SEEDS = 3
"""With fewer, a band is too wide to say anything."""

FALSE_ALARMS = 0.01
"""Share of good runs that fall outside the band somewhere, if values are normal and the draws of seeds independent."""

SHARED = ("data", "autoencoder", "training", "evaluation")
"""Digests that a run must share with a reference; all that can decide its curve but the method's own section."""

FAMILIES = ("fid", "fd", "kid", "kd", "class_accuracy", "velocity_loss")
"""What is held to a band, by the families of metrics: each is enough to show a fault, and the rest follows them."""


@dataclass(frozen=True)
class ReferenceCurves:
    """The runs of one setting, at several seeds."""

    name: str
    """The name of its file, without the ending."""
    method: str
    section: Mapping[str, Any]
    """The method's own settings."""
    settings: Mapping[str, Any]
    """The shared settings, readable: they say what stands behind digests that differ."""
    digests: Mapping[str, str]
    seeds: Mapping[int, Mapping[str, Any]]
    """For each seed `initial_weights`, and `trace` by step."""
    curves: Mapping[str, Mapping[int, Mapping[int, float]]]
    """Metric -> step -> seed -> value."""
    environment: Mapping[str, Any]
    """The environment of the machine that made it."""


@dataclass(frozen=True)
class CheckedPoint:
    """A metric of a run after some steps, and the band of its reference there."""

    metric: str
    step: int
    value: float
    mean: float
    low: float
    high: float
    num_seeds: int

    @property
    def is_inside(self) -> bool:
        """False for a value that is not finite as well."""
        return self.low <= self.value <= self.high


@dataclass(frozen=True)
class Verdict:
    """How a run stands to a reference."""

    reference: ReferenceCurves
    places: Sequence[CheckedPoint]
    drawn: Mapping[str, bool]
    """What has to be equal to the bit at the run's seed, and is or is not; empty for a seed without a reference."""

    @property
    def is_good(self) -> bool:
        return all(place.is_inside for place in self.places) and all(self.drawn.values())


# -- the band -------------------------------------------------------------------------------------------------------


def band(values: Sequence[float], num_places: int) -> tuple[float, float]:
    """Where one more run is expected: mean +- t(n-1) s sqrt(1 + 1/n).

    That is the prediction interval of a normal variable (Student's t with n - 1 degrees of freedom). Its level is
    1 - FALSE_ALARMS / num_places (Bonferroni), so that a good run stays inside at all places with 1 - FALSE_ALARMS.

    Args:
        values: of n seeds, finite.
        num_places: how many bands a run is held to.
    """
    num = len(values)
    quantile = float(stdtrit(num - 1, 1 - FALSE_ALARMS / num_places / 2))
    half = quantile * stdev(values) * math.sqrt(1 + 1 / num)
    return fmean(values) - half, fmean(values) + half


def check(run: RecordedRun, reference: ReferenceCurves) -> Verdict:
    """Hold a run to a reference that it shares settings with, after all steps at which both were evaluated."""
    places = []
    points = {line["step"]: line["point"] for line in run.evaluations}
    wanted = [(name, step) for name, curve in reference.curves.items() for step in curve]
    for name, step in wanted:
        if step in points:
            values = list(reference.curves[name][step].values())
            low, high = band(values, len(wanted))
            value = run.value(name, points[step])
            places.append(CheckedPoint(name, step, value, fmean(values), low, high, len(values)))
    if not places:
        raise UserError(
            f"{run.folder} was evaluated after no step at which {reference.name} was: give it the evaluation points "
            "of the preset"
        )
    return Verdict(reference, places, _drawn(run, reference))


def _drawn(run: RecordedRun, reference: ReferenceCurves) -> dict[str, bool]:
    """Initial weights and batches of a run against those of the reference at its seed, as far as both go."""
    known = reference.seeds.get(run.seed)
    if known is None:
        return {}
    traces = {line["step"]: line["trace"] for line in run.train}
    both = [step for step in known["trace"] if step in traces]
    found = {"initial weights": run.digests.get("initial_weights") == known["initial_weights"]}
    if both:
        found[f"batches, times and noise to step {max(both)}"] = all(
            traces[step] == known["trace"][step] for step in both
        )
    return found


# -- finding the reference ------------------------------------------------------------------------------------------


def shipped() -> list[ReferenceCurves]:
    """The references of the package."""
    return [read(path) for path in sorted(FOLDER.glob("*.json"))]


def matching(run: RecordedRun, references: Sequence[ReferenceCurves]) -> ReferenceCurves:
    """The reference of a run's settings.

    Raises:
        UserError: there is none; says which setting differs from the nearest one.
    """
    method, section = run.manifest["method"], run.config.get("sections", {})
    nearest = max(references, key=lambda one: _likeness(run, one))
    if nearest.method != method or digest(nearest.section) != digest(section):
        known = ", ".join(dict.fromkeys(one.method for one in references))
        raise UserError(
            f"{run.folder}: there is no reference of method {method} with these settings of its own; there are some "
            f"of {known}, each at its defaults: run one of those under --config digits"
        )
    if wrong := [name for name in SHARED if run.digests.get(name) != nearest.digests[name]]:
        fields = differing_fields(_settings(run), nearest.settings)
        why = "; ".join(f"{key} is {short_text(a)}, and {short_text(b)}" for key, (a, b) in list(fields.items())[:3])
        raise UserError(
            f"{run.folder}: no reference was made under its settings ({why or f'digest of {wrong[0]} differs'} in "
            f"{nearest.name}): run `ditbench train --config digits`, and check that"
        )
    return nearest


def _likeness(run: RecordedRun, reference: ReferenceCurves) -> tuple[bool, bool, int]:
    return (
        reference.method == run.manifest["method"],
        digest(reference.section) == digest(run.config.get("sections", {})),
        sum(run.digests.get(name) == reference.digests[name] for name in SHARED),
    )


def _settings(run: RecordedRun) -> dict[str, Any]:
    """The settings behind the digests, but for places of files and what decides no number."""
    config = run.config
    kept = ("model", "data", "autoencoder", "optimizer", "ema", "budget")
    runtime = {name: config["runtime"].get(name) for name in ("precision", "compile", "tf32")}
    return {**{name: config.get(name) for name in kept}, "runtime": runtime, "protocol": run.manifest.get("protocol")}


# -- files ----------------------------------------------------------------------------------------------------------


def read(path: Path) -> ReferenceCurves:
    """Read a file of `made`.

    Raises:
        UserError: it is none.
    """
    try:
        found = read_json(path)
        return ReferenceCurves(
            name=path.stem,
            method=found["method"],
            section=found["section"],
            settings=found["settings"],
            digests={name: found["digests"][name] for name in SHARED},
            seeds={
                int(seed): {**facts, "trace": {int(step): value for step, value in facts["trace"].items()}}
                for seed, facts in found["seeds"].items()
            },
            curves={
                name: {int(p): {int(s): float(v) for s, v in values.items()} for p, values in curve.items()}
                for name, curve in found["curves"].items()
            },
            environment=found["environment"],
        )
    except (KeyError, TypeError, ValueError, AttributeError):
        raise UserError(f"{path} is no reference: name a file that `check-reference --make` wrote") from None


def made(runs: Sequence[RecordedRun]) -> dict[str, Any]:
    """The content of a reference file.

    Raises:
        UserError: too few runs, or runs that differ in more than their seed, or did not finish.
    """
    if len({run.seed for run in runs}) < max(MIN_SEEDS, len(runs)):
        raise UserError(f"a reference needs {MIN_SEEDS} or more runs, each at a seed of its own; {len(runs)} are given")
    first = runs[0]
    for run in runs:
        if run.status != "finished":
            raise UserError(f"{run.folder} is {run.status}: a reference is made of finished runs")
        mine = {name: run.digests.get(name) for name in SHARED} | {"method": digest(run.config["sections"])}
        theirs = {name: first.digests.get(name) for name in SHARED} | {"method": digest(first.config["sections"])}
        if differs := [name for name in mine if mine[name] != theirs[name]]:
            raise UserError(f"{run.folder} and {first.folder} differ in {differs[0]}: a reference is of one setting")
    measured = first.evaluations[-1]["metrics"]
    wholes = [name for name in measured if not any(name.startswith(f"{whole}_") for whole in measured)]
    names = [name for name in wholes if metric(name).prefix in FAMILIES]
    return {
        "method": first.manifest["method"],
        "section": first.config["sections"],
        "settings": _settings(first),
        "digests": {name: first.digests[name] for name in SHARED},
        "seeds": {
            str(run.seed): {
                "initial_weights": run.digests["initial_weights"],
                "trace": {str(line["step"]): line["trace"] for line in (run.train[0], run.train[-1])},
            }
            for run in runs
        },
        "curves": {
            name: {
                str(line["step"]): {str(run.seed): run.value(name, line["point"]) for run in runs}
                for line in first.evaluations
            }
            for name in names
        },
        "environment": first.manifest["environment"],
    }


def text(content: Mapping[str, Any]) -> str:
    """A reference as it lies on disk; values keep six digits, which is far finer than any band."""

    def rounded(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: rounded(inner) for key, inner in value.items()}
        return float(f"{number(value):.6g}") if isinstance(value, float) else value

    return json.dumps({**content, "curves": rounded(content["curves"])}, indent=1, sort_keys=True) + "\n"
