"""Cost to target in the report: sentences, tables and figures of what reports/costs/targets_costs.py works out."""

import math
from collections.abc import Sequence
from typing import Any

from harness.records.metrics import metric
from reports.costs import equal_cost
from reports.costs.targets_costs import CellCost, ClockCost, Target, cell_costs, final_target, targets
from reports.costs.targets_figure import cost_frame, costs_figure
from reports.figures.plans import Plan
from reports.sections import Part, Section, Table
from reports.statistics.intervals import Interval
from reports.study.load import Study
from reports.study.units import Unit, number_text
from reports.study.words import count, listed
from reports.tables import results
from reports.tables.cells import Cell
from reports.tables.results import MISSING

MOST_SENTENCES = 6
"""Cells that are spoken of one by one."""


def section(study: Study) -> Section | None:
    """The costs to every target; None where no cell is compared with a baseline and no target was asked for."""
    found = [(target, cell_costs(study, target)) for target in targets(study)]
    if not found or (len(study.cells) < 2 and not study.targets):
        return None
    return Section(
        name="targets",
        title="Cost to target",
        sentences=[_about(study, *found[0])],
        plans=[_plan(study, target, costs) for target, costs in found],
        parts=[Part(_table(study, target, costs), _sentences(study, target, costs)) for target, costs in found],
    )


# -- sentences --------------------------------------------------------------------------------------------------------


def sentences(study: Study) -> list[str]:
    """How every cell came to what the baseline ends with, for the summary of the page."""
    target = final_target(study)
    return _sentences(study, target, cell_costs(study, target)) if target else []


def asked_sentences(study: Study) -> list[str]:
    """How every cell came to each target that was asked for."""
    asked = [target for target in targets(study) if not target.is_final]
    return [sentence for target in asked for sentence in _sentences(study, target, cell_costs(study, target))]


def _sentences(study: Study, target: Target, costs: Sequence[CellCost]) -> list[str]:
    others = [cost for cost in costs if cost.cell != study.baseline or not target.is_final]
    found = [_sentence(study, target, cost) for cost in others[:MOST_SENTENCES]]
    more = len(others) - MOST_SENTENCES
    return [*found, f"{count(more, 'more cell')}: in the table of costs to target."] if more > 0 else found


def _sentence(study: Study, target: Target, cost: CellCost) -> str:
    """One cell. What is said of a mean is said of every run, or says of how many."""
    name, num, of = _name(study, target), cost.num("reached"), count(len(cost.outcomes), "seed")
    if cost.num("open"):
        return f"{cost.cell} reached {name} at {num} of {of} so far: {cost.open_text}."
    if num == len(cost.outcomes):
        return f"{cost.cell} reached {name} {_after(study, target, cost)}."
    text = f"{cost.cell} did not reach {name} within the budget at {cost.num('missed')} of {of}"
    if not num:
        return f"{text}."
    return f"{text}; at the {count(num, 'seed')} that reached it, {_after(study, target, cost)}."


def _name(study: Study, target: Target) -> str:
    """`sit's final fd_pixels_898 (14.20)`, or `fd_pixels_898 14.20`."""
    value = results.shared_digits_of([target.value])(target.value)
    return f"{study.baseline}'s final {target.metric} ({value})" if target.is_final else f"{target.metric} {value}"


def _after(study: Study, target: Target, cost: CellCost) -> str:
    """After which share of the baseline's cost, on the budget's clock and in training GFLOPs."""
    names = dict.fromkeys((study.unit.name, "train_gflops"))
    compared = [c for name in names if (c := cost.clocks.get(name)) and math.isfinite(c.speedup.mean)]
    whole = cost.num("reached") == len(cost.outcomes)
    seeds = f", {count(len(cost.outcomes), 'seed')}" if whole else ""
    if not compared or cost.cell == study.baseline:
        spent = dict.fromkeys(each.text(study.unit) for each in cost.outcomes.values() if each.line)
        return f"after {listed(list(spent))} {study.unit.words}{seeds}"
    whose = "its" if target.is_final else f"{study.baseline}'s"
    shares = listed([f"{_share_text(clock)} of {whose} {clock.unit.words}" for clock in compared])
    return f"after {shares}{seeds}{_reserve(compared) if whole else ''}"


def _share_text(clock: ClockCost) -> str:
    """The cell's cost over the baseline's, as `0.62x [0.55, 0.71]`."""
    found = clock.speedup
    bounds = f" [{_ratio(1 / found.high)}, {_ratio(1 / found.low)}]" if math.isfinite(found.low) else ""
    return f"{'at most ' if clock.is_bound else ''}{_ratio(1 / found.mean)}x{bounds}"


def _reserve(clocks: Sequence[ClockCost]) -> str:
    """What keeps the numbers from saying more."""
    first = clocks[0]
    if len(first.outcomes) == 1:
        return ": one seed, so there is no interval"
    if first.is_bound:
        return ", at the first evaluation at one of them or more"
    if first.at_one_evaluation:
        return ", all at the same evaluation, so there is no interval"
    held = [clock for clock in clocks if clock.speedup.low <= 1 <= clock.speedup.high]
    if not held:
        return ""
    return f"; not separated in {listed([clock.unit.words for clock in held])}"


def _ratio(value: float) -> str:
    """Two decimals, three digits at least."""
    return f"{value:.2f}" if value >= 0.1 else f"{value:.2g}"


# -- the section ------------------------------------------------------------------------------------------------------


def _about(study: Study, target: Target, costs: Sequence[CellCost]) -> str:
    """What the target is, and how the baseline itself stands to it."""
    if not target.is_final:
        return "Each target is a value that was asked for."
    value = results.shared_digits_of([target.value])(target.value)
    seeds = count(target.num_medians, "seed")
    source = f"the median of {study.baseline} over {seeds}" if target.num_medians > 1 else f"that of {study.baseline}"
    own = next(cost for cost in costs if cost.cell == study.baseline)
    return (
        f"The target is {target.metric} {value}, {source} {study.after}, which {study.baseline} itself reached at "
        f"{own.reached_text}."
    )


def _plan(study: Study, target: Target, costs: Sequence[CellCost]) -> Plan:
    name = _name(study, target)
    caption = (
        f"What was spent until {name}: a dot for every seed that reached it. An arrow at the right edge stands for the "
        "number of runs that came to their end without. "
    )
    if any(math.isfinite(clock.speedup.low) for cost in costs for clock in cost.clocks.values()):
        caption += (
            "Where every seed reached it, but not all at one evaluation: the geometric mean (tick) and its 95% "
            "Student-t interval (line). "
        )
    if any(math.isfinite(clock.reference) for clock in costs[0].clocks.values()):
        caption += f"Dashed: what {study.baseline}'s median curve takes. "
    caption += " ".join(equal_cost.seconds_remarks(study))
    frame = cost_frame(target.metric, target.value, costs)
    return Plan(target.stem, frame, costs_figure, f"Cost of every cell until {name}, on each clock", caption.strip())


def _table(study: Study, target: Target, costs: Sequence[CellCost]) -> Table:
    return Table(
        stem=target.stem,
        title=f"Until {_name(study, target)}",
        rows=[_texts(study, cost) for cost in costs],
        numbers=[_numbers(study, target, cost) for cost in costs],
        notes=notes(study, costs),
    )


def _texts(study: Study, cost: CellCost) -> dict[str, str]:
    """A row of text. Images cost what steps cost, as all runs have one batch size."""
    is_baseline = cost.cell == study.baseline
    counted = cost.clocks.get(study.unit.name)
    texts = {"cell": cost.cell, "reached": Cell(cost.reached_text, cost.num("reached"))}
    every = [each.text(study.unit) for each in cost.outcomes.values()]
    spent = [each.cost(study.unit) for each in cost.outcomes.values()]
    first = next((value for value in spent if not math.isnan(value)), None)
    texts[f"{study.unit.words} at every seed"] = Cell(", ".join(every), first)
    if not study.baseline:
        return texts
    for name, clock in cost.clocks.items():
        if name != "images":
            words = "steps and images" if name == "steps" else clock.unit.words
            texts[f"speed-up in {words} [95%]"] = (
                "baseline" if is_baseline else _speedup_text(clock, len(cost.outcomes))
            )
    paired = MISSING if is_baseline or counted is None else _interval_text(counted.paired)
    return texts | {f"paired by seed, in {study.unit.words}": paired}


def _speedup_text(clock: ClockCost, num_seeds: int) -> Cell:
    """`1.61x [1.41, 1.82]`, and over how many of the cell's seeds where not all reached the target or count."""
    text = _interval_text(clock.speedup)
    if text == MISSING:
        return text
    over = f", {clock.speedup.num} of {count(num_seeds, 'seed')}" if clock.speedup.num < num_seeds else ""
    return Cell(f"{'≥ ' if clock.is_bound else ''}{text}{over}", clock.speedup.mean)


def _interval_text(interval: Interval) -> Cell:
    if not math.isfinite(interval.mean):
        return Cell(MISSING)
    bounds = f" [{_ratio(interval.low)}, {_ratio(interval.high)}]" if math.isfinite(interval.low) else ""
    return Cell(f"{_ratio(interval.mean)}x{bounds}", interval.mean)


def numbers(study: Study) -> list[dict[str, Any]]:
    """The tables of all targets as numbers, a row a cell and target."""
    return [_numbers(study, target, cost) for target in targets(study) for cost in cell_costs(study, target)]


def _numbers(study: Study, target: Target, cost: CellCost) -> dict[str, Any]:
    """A row of numbers: a miss is `inf`, an open run empty."""
    numbers: dict[str, Any] = {
        "cell": cost.cell,
        "baseline": study.baseline,
        "metric": target.metric,
        "target": target.value,
        "num_seeds": len(cost.outcomes),
        **{f"num_{kind}": cost.num(kind) for kind in ("reached", "missed", "open")},
    }
    for name, clock in cost.clocks.items():
        outcomes = {seed: clock.outcomes.get(seed) for seed in study.seeds}
        numbers |= {f"{name}_seed{s}": each.cost(clock.unit) if each else math.nan for s, each in outcomes.items()}
        numbers[f"{name}_baseline"] = clock.reference
        is_other = cost.cell != study.baseline
        for kind, found in (("speedup", clock.speedup), ("paired_speedup", clock.paired)):
            values = (found.mean, found.low, found.high) if is_other else (math.nan,) * 3
            suffixed = (f"{name}_{kind}", f"{name}_{kind}_low", f"{name}_{kind}_high")
            numbers |= dict(zip(suffixed, values, strict=True))
            numbers[f"{name}_{kind}_seeds"] = found.num if is_other else 0
    return numbers


def notes(study: Study, costs: Sequence[CellCost]) -> list[str]:
    """How to read a table, in sentences."""
    direction = "below" if metric(study.main_metrics[0]).direction == "lower" else "above"
    found = [
        f"A run's cost is that of its first evaluation at the target or {direction} it. Nothing is read between "
        f"evaluations, so costs are rounded up to whole evaluations, {_spacing(study)}; at the first (≤) the "
        "true cost may be anything below.",
        "A run that finished without (>) or diverged is a miss: its cost is infinite and it is left out of no count. "
        "Where one misses, the speed-up is that over the seeds that reached the target and has no interval. Open: "
        "runs that go on, failed or were stopped.",
    ]
    if study.baseline and any(cost.cell != study.baseline for cost in costs):
        found.append(
            f"Speed-up: what {study.baseline}'s median curve takes over what the cell takes; geometric mean over seeds "
            f"with a 95% Student-t interval of its logarithm, which holds the spread of the cell's seeds and not that "
            f"of {study.baseline}'s. Paired by seed: {study.baseline}'s own cost at each seed in its place, where both "
            "reached the target at every seed. Above 1 is faster."
        )
    return [*found, *equal_cost.seconds_remarks(study), *results.marks(study, study.main_metrics[:1])]


def _spacing(study: Study) -> str:
    """Where evaluations lie, in the budget's unit."""
    unit: Unit = study.unit
    amount = study.budget * study.share(1)
    first = unit.amount(math.ceil(amount) if unit.is_whole else float(number_text(amount).replace(",", "")))
    is_doubling = study.reference.config["evaluation"].get("spacing") == "doubling"
    return f"after {first} and at each doubling" if is_doubling else f"one every {first}"
