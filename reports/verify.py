"""Checks that compared runs may be compared, and what of their environments differs.

Must agree in a study: data, autoencoder, training and evaluation digest, the protocol of every evaluation. Must agree
at a seed: initial weights, and the batch trace at the last step that all its runs have logged. Anything else that
differs (commit, versions, device, threads) is shown with a warning.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from harness.records import UserError
from reports.load import Run, Study


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted keys."""
    if not isinstance(value, Mapping):
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat |= flatten(item, f"{prefix}.{key}" if prefix else str(key))
    return flat


NOT_TRAINING = ("study", "cell", "method", "seed", "sections.", "output.", "evaluation.", "runtime.")
NOT_IN_DIGEST = ("data.path", "optimizer.micro_batch")
RUNTIME_IN_DIGEST = ("runtime.precision", "runtime.compile", "runtime.tf32")
"""How the training digest picks its fields (harness/config.py): these never, or always, stand behind a difference."""


def _training_settings(run: Run) -> dict[str, Any]:
    settings = flatten(run.config)
    named = {k: v for k, v in settings.items() if not k.startswith(NOT_TRAINING) and k not in NOT_IN_DIGEST}
    return named | {k: settings.get(k) for k in RUNTIME_IN_DIGEST}


STUDY_DIGESTS: dict[str, Callable[[Run], Any]] = {
    "data": lambda run: run.config.get("data"),
    "autoencoder": lambda run: run.config.get("autoencoder"),
    "training": _training_settings,
    "evaluation": lambda run: run.manifest.get("protocol"),
}
"""Digests that must agree in a study, with the readable settings that explain a difference."""


@dataclass(frozen=True)
class Check:
    """Something that must agree, and does: `value` is what all runs share, "" when nothing could be compared yet."""

    what: str
    scope: str
    num_runs: int
    value: str


@dataclass(frozen=True)
class Setting:
    """A fact about the environment, and the runs that had each value."""

    name: str
    values: Mapping[str, Sequence[str]]

    @property
    def differs(self) -> bool:
        return len(self.values) > 1


def verify(study: Study) -> list[Check]:
    """Every check of the study.

    Raises:
        UserError: the first thing that does not agree, with the cells and the fields.
    """
    checks = [_check_digest(name, "study", study.runs, explain) for name, explain in STUDY_DIGESTS.items()]
    _check_protocol_of_lines(study)
    for seed in study.seeds:
        scope = f"seed {seed}"
        checks.append(_check_digest("initial_weights", scope, study.at(seed), lambda run: run.config.get("model")))
        checks.append(_check_trace(scope, study.at(seed)))
    return checks


def _check_digest(name: str, scope: str, runs: Sequence[Run], explain: Callable[[Run], Any]) -> Check:
    lacking = [run.label for run in runs if name not in run.digests and run.status == "finished"]
    if lacking:
        raise UserError(f"{lacking[0]}: the manifest has no {name} digest: run the cell again")
    known = [run for run in runs if name in run.digests]
    for run in known[1:]:
        if run.digests[name] != known[0].digests[name]:
            raise UserError(_mismatch(name, known[0], run, explain))
    return Check(f"{name.replace('_', ' ')} digest", scope, len(known), _short(known[0].digests[name]) if known else "")


def _mismatch(name: str, first: Run, second: Run, explain: Callable[[Run], Any]) -> str:
    fields = differing_fields(explain(first), explain(second))
    where = "; ".join(f"{field} is {a} against {b}" for field, (a, b) in fields.items())
    digests = f"{_short(first.digests[name])} against {_short(second.digests[name])}"
    return (
        f"{name} differs between {first.label} and {second.label} ({where or f'digest {digests}'}): "
        "compared runs must share it, so run one of them again or move it to a study of its own"
    )


def _check_protocol_of_lines(study: Study) -> None:
    for run in study.runs:
        for line in run.evaluations:
            if line["protocol"] != run.digests.get("evaluation"):
                raise UserError(
                    f"{run.label}: the evaluation at step {line['step']} was made under another protocol "
                    f"({_short(line['protocol'])}) than the manifest names: run the cell again"
                )


def _check_trace(scope: str, runs: Sequence[Run]) -> Check:
    """Traces are chains over all steps so far, so one common step is enough."""
    traces = [(run, {line["step"]: line["trace"] for line in run.train}) for run in runs if run.train]
    common = set.intersection(*(set(trace) for _, trace in traces)) if traces else set()
    if not common:
        return Check("batch trace", scope, 0, "")
    step = max(common)
    first, reference = traces[0]
    for run, trace in traces[1:]:
        if trace[step] != reference[step]:
            raise UserError(
                f"batch trace at step {step} differs between {first.label} and {run.label}: "
                "the two did not see the same batches, times and noise, so run one of them again"
            )
    return Check("batch trace", f"{scope}, step {step}", len(traces), _short(reference[step]))


def _short(digest: str) -> str:
    return digest[:12]


def short_text(value: Any) -> str:
    """A setting as text; digests and commits by their first 12 digits."""
    text = str(value)
    return _short(text) if re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", text) else text


# -- differences ----------------------------------------------------------------------------------------------------


def differing_fields(first: Any, second: Any) -> dict[str, tuple[Any, Any]]:
    """Dotted fields whose values differ, with both values; a field that one side lacks counts as None."""
    a, b = flatten(first), flatten(second)
    return {key: (a.get(key), b.get(key)) for key in sorted(a.keys() | b.keys()) if a.get(key) != b.get(key)}


def environment(study: Study) -> list[Setting]:
    """Every environment fact with its distinct values and the runs that had each."""
    flats = [(run, flatten(run.manifest.get("environment", {}))) for run in study.runs]
    names = dict.fromkeys(name for _, flat in flats for name in flat if name)
    settings = []
    for name in names:
        values: dict[str, list[str]] = {}
        for run, flat in flats:
            values.setdefault(short_text(flat.get(name, "not recorded")), []).append(run.label)
        settings.append(Setting(name, values))
    return settings
