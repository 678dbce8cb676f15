"""`ditbench ablate`: a grid over the settings of a method, or a search, as a study of trials, and the report."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import yaml
from jsonargparse import ArgumentParser, Namespace

import methods
from harness.config import RunConfig, require
from harness.errors import UserError
from harness.machine import environment
from harness.records.metrics import metric
from studies.commands.common import add_side_by_side
from studies.configs import documents
from studies.configs.cells import checked_seeds, run_config
from studies.configs.sections import as_plain, nominal_shape, resolve_sections
from studies.configs.settings import build_parser, mapping, parse, was_given
from studies.costs import dry_run
from studies.terminal.quiet import quiet_libraries

if TYPE_CHECKING:
    from studies.ablation.plan import AblationPlan
    from studies.ablation.trials import AblationAgenda
    from studies.dispatch.board import Failure

HOW = "give a grid, such as --grid.block 1,2,3, or a search, such as --search tpe --trials 40"
MOST_TRIALS = 10_000


def main(argv: Sequence[str]) -> int:
    """Run the trials that are missing, write the report and print a table an axis."""
    quiet_libraries()
    parser = command_parser()
    words, grid = split_grid([word for word in argv if word != "--print_config"])
    namespace = parse(parser, words)
    ablation = plan(parser, namespace, words, grid)
    if "--print_config" in argv:
        print_plan(ablation)
        return 0
    if dry_run.is_asked(namespace):
        return dry_run.show(planned_cells(ablation), namespace)
    from studies.ablation.commands import finish, prepare, withdraw
    from studies.ablation.plan import refuse_other_study
    from studies.commands.report import end_study
    from studies.dispatch.leases import clear_away
    from studies.dispatch.plan import in_group
    from studies.terminal.tables import console

    require(not in_group(), "ablate runs under no launcher: start it alone, with --workers N for N runs side by side")
    environment.resolve_device(ablation.control.runtime.device)
    refuse_other_study(ablation.folder)
    try:
        agenda = prepare(ablation)
        console().print(summary(ablation, agenda))
        try:
            failures = run(agenda, ablation.workers, waits=not namespace.no_wait)
        except UserError:
            withdraw(agenda)
            raise
    except UserError:
        clear_away(ablation.folder)
        raise
    finish(agenda)
    end_study(ablation.folder, failures, is_over=not namespace.no_wait)
    return 1 if failures else 0


def command_parser() -> ArgumentParser:
    """Options of the command."""
    parser = build_parser(
        "ablate", "Try settings of a method, as a grid or as a search. The same command again goes on."
    )
    parser.add_argument(
        "--grid", type=mapping, default={},
        help="levels of each axis, as --grid.AXIS 1,2,3; an axis is a field of the method's section below, in a sum "
        "PART.FIELD; 'all' = the choices of the method's search space",
    )  # fmt: skip
    parser.add_argument(
        "--one_at_a_time", action="store_true", help="grid: all axes but one at their default, instead of all products"
    )
    parser.add_argument("--search", choices=("tpe",), default=None, help="search the methods' own search spaces")
    parser.add_argument("--trials", type=int, default=0, help="search: settings of each method to try")
    parser.add_argument(
        "--prune", choices=("none", "median", "hyperband"), default="none",
        help="search: stop trials early that do worse than others did (default none)",
    )  # fmt: skip
    parser.add_argument(
        "--objective", type=str, default="", help="metric that makes the best trial, in full or as a family such as fd"
    )
    parser.add_argument(
        "--storage", type=str, default="",
        help="URL of a database for the trials, such as postgresql://...; default: a journal in the study's folder",
    )  # fmt: skip
    add_side_by_side(parser, "--workers")
    dry_run.add_options(parser)
    return parser


# -- what is asked for ----------------------------------------------------------------------------------------------


def split_grid(argv: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """The words without `--grid.AXIS LEVELS`, and axis -> levels; the last of two for one axis counts."""
    words, grid = [], {}
    rest = iter(argv)
    for word in rest:
        if not word.startswith("--grid."):
            words.append(word)
            continue
        name, has_value, value = word.removeprefix("--grid.").partition("=")
        if not has_value:
            value = next(rest, "")
            require(value != "" and not value.startswith("--"), f"grid.{name} has no value: give its levels")
        documents.check_word(value, f"grid.{name}")
        grid[name] = value
    return words, grid


def plan(parser: ArgumentParser, namespace: Namespace, words: Sequence[str], grid: Mapping[str, str]) -> "AblationPlan":
    """All settings of what the command asks for, each checked.

    Args:
        words: the command line without the axes; it says what was given there, and not in a config.
        grid: the axes on the command line; they win over a config's.

    Raises:
        UserError: for options that make no sense together, and for axes, values and methods that are not there.
    """
    from studies.ablation import axes
    from studies.ablation.plan import AblationPlan

    asked = {**_flat(namespace.grid), **grid}
    _check_options(namespace, words, asked)
    seeds = checked_seeds(namespace.seeds)
    _check_objective(namespace.objective)
    names = _searched(namespace, words) if namespace.search else (namespace.method,)
    study = _study(namespace, words)
    subjects: list[Any] = []
    for name in names:
        config = _cell(parser, namespace, name, study)
        subjects.append(axes.search_subject(config) if namespace.search else axes.grid_subject(config, asked))
    control = _cell(parser, namespace, methods.control(), study)
    kind = "search" if namespace.search else "one_at_a_time" if namespace.one_at_a_time else "grid"
    return AblationPlan(
        kind=kind,  # type: ignore[arg-type]
        subjects=tuple(subjects),
        seeds=seeds,
        control=resolve_sections(control, nominal_shape(control)),
        settings=() if namespace.search else axes.grid_settings(subjects[0], namespace.one_at_a_time),
        trials=namespace.trials,
        pruner=namespace.prune,
        objective=namespace.objective,
        storage=namespace.storage,
        workers=namespace.workers,
    )


def _flat(grid: Mapping[str, Any], front: str = "") -> dict[str, Any]:
    """Axis -> levels; a sum's parts may be mappings of their own in YAML."""
    flat: dict[str, Any] = {}
    for key, value in grid.items():
        flat |= _flat(value, f"{front}{key}.") if isinstance(value, Mapping) else {f"{front}{key}": value}
    return flat


def _check_options(namespace: Namespace, words: Sequence[str], grid: Mapping[str, Any]) -> None:
    """Refuse options that contradict each other or have no effect."""
    is_search = bool(namespace.search)
    require(bool(grid) or is_search, f"ablate has nothing to vary: {HOW}")
    require(not (grid and is_search), f"grid and --search tpe exclude each other: {HOW}")
    for name in ("seed", "cell", "cells", "baseline"):
        require(not was_given(words, name), f"--{name} has no effect here: leave it out")
    workers: int = namespace.workers
    require(workers >= 0, f"workers is {workers}: give how many runs go side by side, or 0 for the machine's own")
    require(
        workers < 2 or namespace.budget.unit != "seconds",
        f"workers is {workers} with budget.unit seconds: runs side by side slow each other; give 1",
    )
    if is_search:
        _check_search(namespace, words)
        return
    for name in ("trials", "prune", "methods"):
        require(not was_given(words, name), f"--{name} belongs to a search: leave it out, or give --search tpe")


def _check_search(namespace: Namespace, words: Sequence[str]) -> None:
    require(not namespace.one_at_a_time, "--one_at_a_time belongs to a grid: leave it out, or give --grid.AXIS")
    require(
        1 <= namespace.trials <= MOST_TRIALS,
        f"trials is {namespace.trials}: give how many settings of each method to try, 1 to {MOST_TRIALS}",
    )
    require(
        namespace.prune == "none" or namespace.evaluation.points > 1,
        f"prune is {namespace.prune!r} with evaluation.points 1: nothing is known of a run before its end, "
        "so leave it out or give more points",
    )
    require(
        not (was_given(words, "method") and was_given(words, "methods")),
        "--method and --methods exclude each other: give one of them",
    )


def _check_objective(name: str) -> None:
    """Refuse what is neither a metric's name nor a family's, before any data is read."""
    if not name:
        return
    rest = name.removeprefix(metric(name).prefix)
    require(
        not rest or rest[0] in "_0123456789",
        f"objective is {name!r}: give a metric in full, or its family, such as {metric(name).prefix}",
    )


def _searched(namespace: Namespace, words: Sequence[str]) -> tuple[str, ...]:
    """The methods of a search: those on the command line, else those of the config, which may list the control."""
    if was_given(words, "method"):
        return (namespace.method,)
    names = tuple(name for name in namespace.methods if was_given(words, "methods") or name != methods.control())
    require(len(set(names)) == len(names), f"methods {', '.join(names)} name one twice")
    return names or (namespace.method,)


def _study(namespace: Namespace, words: Sequence[str]) -> str:
    """The study's name. Commands that differ in axes alone go on with one study, unless they name another."""
    if was_given(words, "study"):
        return str(namespace.study)
    return f"{namespace.study}-tuning" if namespace.search else f"{namespace.study}-{namespace.method}-ablation"


def _cell(parser: ArgumentParser, namespace: Namespace, method: str, study: str) -> RunConfig:
    """A method's cell as `compare` would run it."""
    changed = namespace.clone()
    changed.method, changed.cell, changed.seed, changed.study = method, "", 0, study
    return replace(run_config(parser, changed), cell=method)


# -- what is shown --------------------------------------------------------------------------------------------------


def summary(ablation: "AblationPlan", agenda: "AblationAgenda | None" = None) -> str:
    """What is to be run, in one line; with an agenda also how much of it is left."""
    names = ", ".join(subject.method for subject in ablation.subjects)
    number = ablation.trials or len(ablation.settings)
    what = (
        "trials each" if len(ablation.subjects) > 1 else "trials" if ablation.trials else f"setting{'s'[: number != 1]}"
    )
    seeds = len(ablation.seeds)
    total = (number * len(ablation.subjects) + 1) * seeds
    line = f"{names}: {number} {what} and {ablation.control.label}, at {seeds} seed{'s'[: seeds > 1]}: {total} runs"
    return line if agenda is None else f"{line}, {_left(agenda)} of them to be run"


def _left(agenda: "AblationAgenda") -> int:
    """Runs that are neither over nor found to be needless."""
    from studies.runs.folders import folder_of, is_done

    return sum(job is None or not (agenda.settled(job) or is_done(folder_of(job.config))) for job in agenda.jobs())


def planned_cells(ablation: "AblationPlan") -> list[tuple[RunConfig, int]]:
    """The cells, and how often each is run; the default setting stands for all trials of a search."""
    seeds = len(ablation.seeds)
    cells = [(ablation.control, seeds)]
    for subject in ablation.subjects:
        settings = ablation.settings or (subject.default(),)
        cells += [(subject.cell(setting), seeds * (ablation.trials or 1)) for setting in settings]
    return cells


def print_plan(ablation: "AblationPlan") -> None:
    """Print the cells with what they share, as a YAML config that `compare` reads too, and what will run."""
    cells = [cell for cell, _ in planned_cells(ablation)]
    shared = {key: value for key, value in as_plain(ablation.control).items() if key not in ("cell", "method", "seed")}
    del shared["sections"]
    own = {cell.label: {"method": cell.method, **as_plain(cell)["sections"]} for cell in cells}
    print(f"# {summary(ablation)}")
    for subject in ablation.subjects:
        for axis in subject.axes:
            levels = ", ".join(str(level) for level in axis.levels)
            print(f"# {subject.method}, {axis.name}: {levels} (default {axis.default})")
    document = {"seeds": list(ablation.seeds), **shared, "cells": own}
    print(yaml.safe_dump(document, sort_keys=False, default_flow_style=None, width=120).rstrip())


def run(agenda: "AblationAgenda", workers: int, waits: bool) -> "list[Failure]":
    """Run what is missing, in workers."""
    from studies.children import start_server
    from studies.dispatch.plan import make_plan

    agenda, plan = make_plan(agenda, workers, 1, "--workers")
    start_server()
    from studies.dispatch.execute import run_in_workers

    return run_in_workers(agenda, replace(plan, waits=waits))
