"""What the numbers say, in plain sentences, and what a reader must know beside them."""

import math
from collections.abc import Sequence

from harness.records.metrics import metric
from reports.costs.equal_cost import unequal_timing
from reports.setup.methods import tuning_text
from reports.study.endings import endings
from reports.study.load import Study
from reports.study.units import number_text
from reports.study.verify import EnvironmentFact, environment
from reports.study.words import be, count, listed
from reports.tables.results import BIAS_MARK, SHARED_MARK, CellResult, difference_text, digits, results, seeds_text


def headline(study: Study) -> list[str]:
    """Two or three sentences: what was compared, which mean is best, and what the paired differences allow to say."""
    rows = results(study)
    return [sentence for sentence in (_setup(study), _best(study, rows), separated(study, rows)) if sentence]


def _setup(study: Study) -> str:
    config = study.reference.config
    seeds = f"{count(len(study.seeds), 'seed')} each" if len(study.cells) > 1 else count(len(study.seeds), "seed")
    is_plain = len({run.manifest["method"] for run in study.runs}) == len(study.cells)
    cells = count(len(study.cells), "training method" if is_plain else "cell")
    return (
        f"{cells} for {config['model']['name']} on {config['data']['name']}, "
        f"{seeds}, compared after {number_text(study.spent)} of {study.unit.amount(study.budget)}, "
        f"{config['optimizer']['batch_size']} images a step."
    )


def _best(study: Study, rows: Sequence[CellResult]) -> str:
    """The best mean of the main metric, beside the baseline's."""
    name = study.main_metrics[0]
    scored = [row for row in rows if math.isfinite(row.metrics[name].mean)]
    if not scored:
        return f"No run has a finite {name} there."
    sign = 1 if metric(name).direction == "lower" else -1
    best = min(scored, key=lambda row: sign * row.metrics[name].mean)
    show = digits(rows, name)
    superlative = "lowest" if sign == 1 else "highest"
    over = best.metrics[name].over
    text = f"The {superlative} mean {name} is that of {best.cell}, {show(best.metrics[name].mean)}"
    text += f" over {over}" if over else ""
    control = next((row for row in scored if row.cell == study.baseline), None)
    if control is None or best is control:
        return f"{text}."
    difference = best.metrics[name].difference
    text += f", against {show(control.metrics[name].mean)} for {study.baseline}"
    if difference is None or not difference.by_seed:
        return f"{text}; no seed has both values."
    return f"{text}: a paired difference of {difference_text(difference, show)}, {seeds_text(difference)}."


def separated(study: Study, rows: Sequence[CellResult]) -> str:
    """Which methods the intervals of the main metric tell from the baseline."""
    name = study.main_metrics[0]
    readings: dict[str, list[str]] = {}
    for row in rows:
        if difference := row.metrics[name].difference:
            readings.setdefault(difference.reading, []).append(row.cell)
    parts = [f"{listed(readings[key])} {key}" for key in ("better", "worse", "not separated") if key in readings]
    if parts and readings.keys().isdisjoint(("better", "worse")):
        return f"No 95% interval of a difference separates a method from {study.baseline}."
    if parts:
        return f"By the 95% intervals of the differences to {study.baseline}: {'; '.join(parts)}."
    if "no pair" in readings and study.baseline not in {row.cell for row in rows if row.metrics[name].finite}:
        return f"{study.baseline}, the baseline, has no value there, so there is nothing to compare the others to."
    if "one seed" in readings:
        return "With one pair of seeds there is no interval: a difference may be the seed's doing."
    return ""


def notes(study: Study) -> list[str]:
    """What stands beside the results: runs that did not finish, bias, warnings of the runs, unequal environments."""
    rows = results(study)
    found = [
        *_unfinished(study),
        *_shared(study),
        *_survivors(rows),
        *_bad_images(study),
        *_bias(study, rows),
        *_tuned(study),
        *_warnings(study),
    ]
    if not study.baseline:
        found.append("No cell is the baseline of the others, so there are no differences: a study is compared as one.")
    found += [_differs(setting) for setting in environment(study) if setting.differs]
    if unequal_timing(study):
        found.append("Seconds of runs on different devices or with different threads are not comparable.")
    return found


def _unfinished(study: Study) -> list[str]:
    """Runs that are not finished, those of a cell together that ended in the same way; files stand in a table."""
    alike: dict[tuple[str, str], list[str]] = {}
    for ending in endings(study):
        verb = "not finished yet" if ending.status == "running" else ending.status
        how = f"{verb} at {ending.where}: {ending.why}" if ending.why else f"{verb} at {ending.where}"
        alike.setdefault((ending.cell, how), []).append(str(ending.seed))
    return [
        f"{cell} {'seed' if len(seeds) == 1 else 'seeds'} {listed(seeds)} {how}."
        for (cell, how), seeds in alike.items()
    ]


def _shared(study: Study) -> list[str]:
    """Runs whose seconds count for nothing."""
    labels = [run.label for run in study.runs if run.shared_device]
    if not labels:
        return []
    left_out = "" if len(study.timed) == len(study.runs) else ", nor are the results at that time, which are left out"
    whose = "its" if len(labels) == 1 else "their"
    who = f"All {len(labels)} runs" if 1 < len(labels) == len(study.runs) else listed(labels)
    return [
        f"{who} shared {whose} device with another run: {whose} seconds ({SHARED_MARK}) are no measure of "
        f"cost{left_out}."
    ]


def _survivors(rows: Sequence[CellResult]) -> list[str]:
    """Cells whose means leave seeds out; the same for all metrics in almost every study, so named once."""
    alike: dict[str, list[str]] = {}
    for row in rows:
        if over := next((result.over for result in row.metrics.values() if result.over), ""):
            alike.setdefault(over, []).append(row.cell)
    return [
        f"Means of {listed(cells)} are over {over}: the others have no value there that counts."
        for over, cells in alike.items()
    ]


def _bad_images(study: Study) -> list[str]:
    """Runs whose compared samples held images that were not finite."""
    counted = {run.label: line.get("bad_images", 0) for run in study.runs if (line := run.evaluation(study.point))}
    return [f"{label}: {count(num, 'sample')} had non-finite latents." for label, num in counted.items() if num]


def _bias(study: Study, rows: Sequence[CellResult]) -> list[str]:
    cells = [row.cell for row in rows if any(result.favoured for result in row.metrics.values())]
    if not cells:
        return []
    metrics = [name for name in study.main_metrics if any(row.metrics[name].favoured for row in rows)]
    family = study.first(cells[0]).manifest["extractor_family"]
    methods = list(dict.fromkeys(row.method for row in rows if row.cell in cells))
    is_short = len(cells) <= MOST_CELLS
    named = listed(cells) if is_short else f"{len(cells)} cells of {listed(methods)}"
    them = named if is_short else "them"
    return [
        f"{named} {be(cells)} trained towards features of the {family} family, and {listed(metrics)} "
        f"{be(metrics)} measured with a network of that family: the bias favours {them} ({BIAS_MARK})."
    ]


MOST_CELLS = 4
"""Cells that a note names one by one."""


def _tuned(study: Study) -> list[str]:
    """Cells whose settings were searched for, with what was spent on that; the others have their default settings."""
    texts = {cell: tuning_text(study.first(cell).manifest.get("tuning", {})) for cell in study.cells}
    return [f"{cell} was tuned {text}." for cell, text in texts.items() if text]


def _warnings(study: Study) -> list[str]:
    """Every warning once, with the runs that gave it where not all did; those that failed early had no say."""
    given: dict[str, list[str]] = {}
    asked = [run for run in study.runs if "warnings" in run.manifest]
    for run in asked:
        for warning in run.manifest["warnings"]:
            given.setdefault(warning, []).append(run.label)
    return [w if len(labels) == len(asked) else f"{w} ({listed(labels)})" for w, labels in given.items()]


def _differs(setting: EnvironmentFact) -> str:
    values = "; ".join(f"{value}: {listed(labels)}" for value, labels in setting.values.items())
    return f"Runs differ in {setting.name} ({values})."
