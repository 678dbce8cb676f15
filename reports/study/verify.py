"""Checks that compared runs may be compared, and what of their environments differs.

Must agree in a study: data, autoencoder, encoders, size, training digest, precision, compile, TF32, the digests of the
evaluation and of the final one, and the protocol of every evaluation. Must agree at a seed: initial weights, and the
batch trace at every step that two of its runs have logged. Anything else that differs (commit, versions, device,
threads) is shown with a warning.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from harness.records.run_folder import UserError
from reports.study.load import RecordedRun, Study

AGREED = ("finished", "diverged", "pruned")
"""A run that came to its end has recorded everything that is checked; others may not have got that far."""


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted keys."""
    if not isinstance(value, Mapping):
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat |= flatten(item, f"{prefix}.{key}" if prefix else str(key))
    return flat


NOT_TRAINING = ("study", "cell", "method", "seed", "sections.", "output.", "evaluation.", "final.", "runtime.")
NOT_IN_DIGEST = ("data.path", "optimizer.micro_batch")
RUNTIME_IN_DIGEST = ("runtime.precision", "runtime.compile", "runtime.tf32")
"""How the training digest picks its fields (harness/config.py): these never, or always, stand behind a difference."""


def _training_settings(run: RecordedRun) -> dict[str, Any]:
    settings = flatten(run.config)
    named = {k: v for k, v in settings.items() if not k.startswith(NOT_TRAINING) and k not in NOT_IN_DIGEST}
    return named | {k: settings.get(k) for k in RUNTIME_IN_DIGEST}


# -- what must agree ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rule:
    """Something that compared runs must share."""

    what: str
    value: Callable[[RecordedRun], str | None]
    """None where the run has not recorded it."""
    settings: Callable[[RecordedRun], Any]
    """Readable settings by their place in the manifest; those that differ explain a difference."""
    digest: str = ""
    """Name of the digest in the manifest, where it is one."""
    is_for_seed: bool = False
    """Whether only runs at one seed share it, not all runs of a study."""
    applies: Callable[[RecordedRun], bool] = lambda run: True
    """Whether a run must have recorded it: one that reads no frozen encoder has none on record."""


def _digest(name: str, settings: Callable[[RecordedRun], Any], is_for_seed: bool = False) -> Rule:
    what = f"{name.replace('_', ' ')} digest"
    return Rule(what, lambda run: run.digests.get(name), settings, digest=name, is_for_seed=is_for_seed)


def _encoder(name: str) -> Rule:
    """The same frozen encoder must be the same file in all runs that read it."""
    return Rule(
        f"{name} digest",
        value=lambda run: run.digests.get(name),
        settings=lambda run: {},
        digest=name,
        applies=lambda run: name in _encoders_read(run),
    )


def _encoders_read(run: RecordedRun) -> set[str]:
    return {f"encoder/{name}" for name in run.facts.get("needs", {}).get("encoders", [])}


def _setting(what: str, field: str) -> Rule:
    def value(run: RecordedRun) -> str | None:
        found = flatten(run.config).get(field)
        return None if found is None or not run.digests else str(found)

    return Rule(what, value, lambda run: {field: value(run)})


def _size(run: RecordedRun) -> str | None:
    model = run.manifest.get("model", {})
    return f"{model['name']}, {model['parameters']:,} parameters" if {"name", "parameters"} <= model.keys() else None


def _config(section: str) -> Callable[[RecordedRun], Any]:
    return lambda run: {section: run.config.get(section)}


RULES = (
    _digest("data", _config("data")),
    _digest("autoencoder", _config("autoencoder")),
    Rule("size", _size, lambda run: {"model": run.manifest.get("model")}),
    _setting("precision", "runtime.precision"),
    _setting("compile", "runtime.compile"),
    _setting("TF32", "runtime.tf32"),
    _digest("training", _training_settings),
    _digest("evaluation", lambda run: {"protocol": run.manifest.get("protocol")}),
    _digest("initial_weights", _config("model"), is_for_seed=True),
)
"""What must agree besides encoders and traces; what is easy to read comes before the digest that covers it."""


FINAL = Rule(
    "final digest",
    value=lambda run: run.digests.get("final"),
    settings=_config("final"),
    digest="final",
    applies=lambda run: bool(run.final),
)
"""What runs must share that are evaluated once more at their end."""


def rules(runs: Sequence[RecordedRun]) -> list[Rule]:
    """What these runs must share: the same for all, a rule for every frozen encoder that one of them reads, and one
    for the final evaluation where there is any.
    """
    encoders = sorted(set[str]().union(*(_encoders_read(run) for run in runs)))
    final = [FINAL] if any(FINAL.value(run) or run.final for run in runs) else []
    return [*RULES[:2], *map(_encoder, encoders), *RULES[2:], *final]


def differing_pair(rule: Rule, runs: Sequence[RecordedRun]) -> tuple[RecordedRun, RecordedRun] | None:
    """The first two runs that do not agree; runs that have not recorded it are left out."""
    known = [run for run in runs if rule.value(run) is not None]
    return next(((known[0], run) for run in known[1:] if rule.value(run) != rule.value(known[0])), None)


def explain(rule: Rule, first: RecordedRun, second: RecordedRun) -> str:
    """Which settings stand behind a difference, or the two digests where none does."""
    fields = differing_fields(rule.settings(first), rule.settings(second))
    where = "; ".join(f"{field} is {short_text(a)} against {short_text(b)}" for field, (a, b) in fields.items())
    return where or f"{short_text(rule.value(first))} against {short_text(rule.value(second))}"


@dataclass(frozen=True)
class Check:
    """Something that must agree, and does: `value` is what all runs share, "" when nothing could be compared yet."""

    what: str
    scope: str
    num_runs: int
    value: str

    @property
    def short(self) -> str:
        return short_text(self.value)


@dataclass(frozen=True)
class EnvironmentFact:
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
    _check_tuning(study)
    checks = [_check(rule, "study", study.runs) for rule in rules(study.runs) if not rule.is_for_seed]
    _check_protocol_of_lines(study)
    for seed in study.seeds:
        scope, runs = f"seed {seed}", study.at(seed)
        checks += [_check(rule, scope, runs) for rule in rules(runs) if rule.is_for_seed]
        checks.append(_check_trace(scope, runs))
    return checks


def _check_tuning(study: Study) -> None:
    """Refuse a run at a seed by which its settings were chosen: its value there is a winner's, not an estimate."""
    for run in study.runs:
        tuning = run.manifest.get("tuning", {})
        if run.seed in tuning.get("seeds", ()):
            raise UserError(
                f"{run.label}: its settings were tuned on seed {run.seed} in study {tuning['study']}, so its value "
                "there may not be reported: remove the run, and compare on other seeds"
            )


def _check(rule: Rule, scope: str, runs: Sequence[RecordedRun]) -> Check:
    known = [run for run in runs if rule.value(run) is not None]
    lacking = [run.label for run in runs if run.status in AGREED and run not in known and rule.applies(run)]
    if lacking:
        raise UserError(f"{lacking[0]}: the manifest has no {rule.what}: run the cell again")
    if pair := differing_pair(rule, runs):
        first, second = pair
        raise UserError(
            f"{rule.what} differs between {first.label} and {second.label} ({explain(rule, first, second)}): "
            "compared runs must share it, so run one of them again or move it to a study of its own"
        )
    return Check(rule.what, scope, len(known), str(rule.value(known[0])) if known else "")


def _check_protocol_of_lines(study: Study) -> None:
    for run in study.runs:
        if line := foreign_evaluation(run):
            which = "final evaluation" if line in run.final else "evaluation"
            raise UserError(
                f"{run.label}: the {which} at step {line['step']} was made under another protocol "
                f"({short_text(line['protocol'])}) than the manifest names: run the cell again"
            )


def foreign_evaluation(run: RecordedRun) -> Mapping[str, Any] | None:
    """The run's first evaluation under another protocol than its manifest names for it, if there is any."""
    named = [(line, "evaluation") for line in run.evaluations] + [(line, "final") for line in run.final]
    return next((line for line, name in named if line["protocol"] != run.digests.get(name)), None)


def _check_trace(scope: str, runs: Sequence[RecordedRun]) -> Check:
    """Compare the traces at every step that two runs have logged, not at those of a run that stopped early alone."""
    lacking = [run.label for run in runs if run.status == "finished" and not run.train]
    if lacking and len(runs) > 1:
        raise UserError(f"{lacking[0]} is finished, and its train.jsonl holds no batch trace: run the cell again")
    seen: dict[int, list[tuple[RecordedRun, str]]] = {}
    for run in runs:
        for line in run.train:
            seen.setdefault(line["step"], []).append((run, line["trace"]))
    shared = {step: found for step, found in sorted(seen.items()) if len(found) > 1}
    for step, ((first, trace), *others) in shared.items():
        for second, other in others:
            if other != trace:
                raise UserError(
                    f"batch trace at step {step} differs between {first.label} and {second.label}: "
                    "the two did not see the same batches, times and noise, so run one of them again"
                )
    compared = {run.label for found in shared.values() for run, _ in found}
    if not shared:
        return Check("batch trace", scope, 0, "")
    step = max(shared)
    return Check("batch trace", f"{scope}, to step {step}", len(compared), shared[step][0][1])


def short_text(value: Any) -> str:
    """A setting as text; digests and commits by their first 12 digits."""
    text = str(value)
    return text[:12] if re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", text) else text


def compact(checks: Sequence[Check]) -> list[dict[str, str]]:
    """The checks for a terminal: what is checked at every seed in one row."""
    rows: dict[str, list[Check]] = {}
    for check in checks:
        rows.setdefault(check.what, []).append(check)
    return [_compact(what, found) for what, found in rows.items()]


def _compact(what: str, found: Sequence[Check]) -> dict[str, str]:
    compared = [check for check in found if check.value]
    if len(found) == 1:
        where, value = found[0].scope, found[0].short
    else:
        where, value = f"at each of {len(found)} seeds", "one value a seed"
    runs = sum(check.num_runs for check in found)
    return {"agrees": what, "in": where, "runs": str(runs), "value": value if compared else "nothing to compare yet"}


# -- differences ----------------------------------------------------------------------------------------------------


def differing_fields(first: Any, second: Any) -> dict[str, tuple[Any, Any]]:
    """Dotted fields whose values differ, with both values; a field that one side lacks counts as None."""
    a, b = flatten(first), flatten(second)
    return {key: (a.get(key), b.get(key)) for key in sorted(a.keys() | b.keys()) if a.get(key) != b.get(key)}


def environment(study: Study) -> list[EnvironmentFact]:
    """Every environment fact with its distinct values and the runs that had each; runs that recorded none aside."""
    flats = [(run, flatten(facts)) for run in study.runs if (facts := run.manifest.get("environment"))]
    names = dict.fromkeys(name for _, flat in flats for name in flat if name)
    settings = []
    for name in names:
        values: dict[str, list[str]] = {}
        for run, flat in flats:
            values.setdefault(short_text(flat.get(name, "not recorded")), []).append(run.label)
        settings.append(EnvironmentFact(name, values))
    return settings
