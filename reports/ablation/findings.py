"""What an ablation says, in plain sentences: the best level of every axis and the best setting, with intervals."""

from collections.abc import Sequence

from harness.records.ablation import Axis, Subject
from harness.records.metrics import metric
from reports.ablation.tables import Level, levels, search_remarks
from reports.ablation.trials import Ablation, level_text, num_runs
from reports.study.units import number_text
from reports.study.words import be, count, listed
from reports.tables.results import MetricResult, difference_text, seeds_text

NUM_AXES = 4
"""Axes that have a sentence at the top of the page; the others have theirs beside their tables."""

KINDS = {"grid": "a grid over", "one_at_a_time": "one axis at a time over", "search": "a search over"}


def headline(ablation: Ablation) -> list[str]:
    """What was tried and how far it is, the best level of the first axes, the best setting and the control."""
    found = [_setup(ablation), _progress(ablation)]
    if not ablation.is_search:
        (subject,) = ablation.subjects
        found += [axis_sentence(ablation, subject, axis) for axis in subject.axes[:NUM_AXES]]
    for subject in ablation.subjects:
        found += [_best(ablation, subject), _against_control(ablation, subject)]
    return [sentence for sentence in found if sentence]


def _setup(ablation: Ablation) -> str:
    study = ablation.study
    config = study.reference.config
    parts = [
        f"{subject.method}, {KINDS[ablation.kind]} {listed([axis.name for axis in subject.axes], limit=10)}"
        for subject in ablation.subjects
    ]
    return (
        f"An ablation of {'; '.join(parts)}, beside {ablation.control}, for {config['model']['name']} on "
        f"{config['data']['name']}, {count(len(ablation.seeds), 'seed')} each, compared after "
        f"{number_text(study.spent)} of {study.unit.amount(study.budget)}, {config['optimizer']['batch_size']} images "
        "a step."
    )


def _progress(ablation: Ablation) -> str:
    """How much is there, for a study that is not complete."""
    parts = []
    if ablation.is_search:
        for subject in ablation.subjects:
            over = sum(trial.is_over for trial in ablation.of(subject))
            if over < ablation.num_asked:
                parts.append(f"{over} of {ablation.num_asked} trials of {subject.method}")
    else:
        over, of = num_runs(ablation)
        parts += [f"{over} of {of} runs"] if over < of else []
    return f"Not complete: {listed(parts)} are over." if parts else ""


# -- axes -----------------------------------------------------------------------------------------------------------


def axis_sentence(ablation: Ablation, subject: Subject, axis: Axis) -> str:
    """Which level of an axis has the best mean, the others at their default, and what its interval allows to say."""
    scored = [level for level in levels(ablation, subject, axis) if level.result.finite]
    if not scored:
        return f"{axis.name}: no level has a value yet."
    best = min(scored, key=lambda level: ablation.sign * level.result.mean)
    mean = f"{_superlative(ablation)} mean {ablation.objective}"
    value = ablation.show(best.result.mean) + _over(best.result)
    if best.is_default:
        others = [level for level in scored if level is not best]
        text = f"{axis.name}: the default {level_text(best.value)} has the {mean}, {value}"
        return f"{text}; {_readings(others)}." if others else f"{text}, and no other level has a value."
    text = f"{axis.name}: the {mean} is at {level_text(best.value)}, {value}"
    return f"{text}: {_difference(ablation, best.result, f'the default {level_text(axis.default)}')}."


def _superlative(ablation: Ablation) -> str:
    return "lowest" if ablation.sign == 1 else "highest"


def _over(result: MetricResult) -> str:
    return f" over {result.over}" if result.over else ""


def _difference(ablation: Ablation, result: MetricResult, other: str) -> str:
    """A paired difference and what it says, as `a paired difference of −3.1 [−5.0, −1.2] to the default 1, better`."""
    difference = result.difference
    if difference is None or not difference.by_seed:
        return f"no seed has a value for {other} as well"
    text = f"a paired difference of {difference_text(difference, ablation.show)} to {other}"
    if difference.reading == "one seed":
        return f"{text}, from one pair of seeds, which has no interval"
    return f"{text}, {difference.reading} ({seeds_text(difference)})"


def _readings(others: Sequence[Level]) -> str:
    """What the other levels' intervals say against the default, as `4 and 6 worse, 2 not separated`."""
    words = {"one seed": "without an interval, from one pair of seeds"}
    found: dict[str, list[str]] = {}
    for level in others:
        if level.result.difference:
            reading = level.result.difference.reading
            found.setdefault(words.get(reading, reading), []).append(level_text(level.value))
    parts = [f"{listed(values)} {be(values)} {reading}" for reading, values in found.items()]
    return f"against it, {', '.join(parts)}"


# -- settings -------------------------------------------------------------------------------------------------------


def _best(ablation: Ablation, subject: Subject) -> str:
    """The best of all settings, which is the best of many, against the default."""
    scored = ablation.scored(subject)
    if len(scored) < 2 or (len(subject.axes) == 1 and not ablation.is_search):
        return ""
    best = scored[0]
    result = ablation.result(best.cell, subject.default_cell)
    text = f"Of {len(scored)} settings of {subject.method}, "
    if best.cell == subject.default_cell:
        return f"{text}the default has the {_superlative(ablation)} mean {ablation.objective}."
    away = [axis.name for axis in subject.axes if best.setting[axis.name] != axis.default]
    setting = ", ".join(f"{name} {level_text(best.setting[name])}" for name in away)
    choice = f"the best of {len(scored)} is an optimistic choice."
    if len(away) == 1 and not ablation.is_search:  # its axis has a sentence with the numbers
        return f"{text}{setting} has the {_superlative(ablation)} mean; {choice}"
    text += f"{setting} has the {_superlative(ablation)} mean, {ablation.show(result.mean)}{_over(result)}"
    return f"{text}: {_difference(ablation, result, 'the default')}; {choice}"


def _against_control(ablation: Ablation, subject: Subject) -> str:
    """The default beside the control."""
    control = ablation.result(ablation.control, ablation.control)
    if not control.finite:
        return f"{ablation.control}, the control, has no value there yet."
    default = ablation.result(subject.default_cell, ablation.control)
    text = f"{ablation.control} has {ablation.show(control.mean)}{_over(control)}"
    if not default.finite:
        return f"{text}; the default of {subject.method} has no value there yet."
    value = f"{ablation.show(default.mean)}{_over(default)}"
    return f"{text}, the default of {subject.method} {value}: {_difference(ablation, default, ablation.control)}."


def notes(ablation: Ablation) -> list[str]:
    """What a reader must know beside the numbers."""
    family = metric(ablation.objective)
    main = ablation.study.main_metrics[0]
    found = []
    if ablation.objective != main:
        found.append(f"Settings are ranked by {ablation.objective} ({family.direction} is better), not by {main}.")
    return found + (search_remarks(ablation) if ablation.is_search else [])
