"""`ditbench compare`: several methods under one budget, and the report."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from jsonargparse import ArgumentParser

from harness.config import require
from studies.commands.common import add_side_by_side, is_main_process, print_config
from studies.configs.cells import Comparison, comparison
from studies.configs.settings import build_parser, parse
from studies.costs import dry_run
from studies.terminal.quiet import quiet_libraries

if TYPE_CHECKING:
    from studies.dispatch.board import Failure


def main(argv: Sequence[str]) -> int:
    """Run the comparison, write its report and print the result table."""
    quiet_libraries()
    parser = command_parser()
    words = [word for word in argv if word != "--print_config"]
    namespace = parse(parser, words)
    asked = tuned(parser, words, Path(namespace.tuned)) if namespace.tuned else comparison(parser, namespace)
    if "--print_config" in argv:
        return print_config(list(asked.cells))
    if dry_run.is_asked(namespace):
        return dry_run.show([(cell, len(asked.seeds)) for cell in asked.cells], namespace)
    from studies.commands.report import end_study

    study = Path(asked.cells[0].output.runs) / asked.cells[0].study
    refuse_ablation(study)
    failures = run(asked, namespace.jobs, namespace.gpus_per_cell, waits=not namespace.no_wait)
    if is_main_process():
        end_study(study, failures, is_over=not namespace.no_wait)
    return 1 if failures else 0


def command_parser() -> ArgumentParser:
    """Options of the command."""
    parser = build_parser("compare", "Train and evaluate cells under one budget. The same command again goes on.")
    add_side_by_side(parser, "--jobs")
    parser.add_argument("--gpus_per_cell", type=int, default=1, help="GPUs that train one cell together")
    parser.add_argument(
        "--tuned", type=str, default="",
        help="study of `ditbench ablate`, such as runs/digits-tuning: compare the best setting of each of its methods",
    )  # fmt: skip
    dry_run.add_options(parser)
    return parser


def tuned(parser: ArgumentParser, words: Sequence[str], folder: Path) -> Comparison:
    """The winners of a study of trials, under its shared settings where the command gives no others."""
    from studies.ablation.tuned import open_tuning, set_defaults, tuned_comparison

    tuning = open_tuning(folder)
    set_defaults(parser, tuning)
    return tuned_comparison(parser, parse(parser, words), words, tuning)


def refuse_ablation(study: Path) -> None:
    """Refuse a folder of trials: its report would take the cells of a comparison for settings."""
    from studies.ablation.plan import RECORD

    require(
        not (study / RECORD).exists(),
        f"{study} holds an ablation: give another --study, or compare its best settings with --tuned {study}",
    )


def run(asked: Comparison, jobs: int, gpus_per_cell: int, waits: bool) -> "list[Failure]":
    """Run what is missing, in workers or in the process group that a launcher started."""
    from studies.children import start_server
    from studies.dispatch.plan import check_group, in_group, make_plan

    if in_group():
        check_group(jobs, gpus_per_cell)
        from studies.dispatch.execute import run_here

        return run_here(asked, waits)
    asked, plan = make_plan(asked, jobs, gpus_per_cell)
    start_server()
    from studies.dispatch.execute import run_in_workers

    return run_in_workers(asked, replace(plan, waits=waits))
