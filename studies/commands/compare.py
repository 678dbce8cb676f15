"""`ditbench compare`: several methods under one budget, and the report."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from jsonargparse import ArgumentParser

from harness.errors import UserError
from studies.commands.common import is_main_process, print_config, quiet_libraries
from studies.settings import Comparison, build_parser, comparison, parse

if TYPE_CHECKING:
    from studies.compare import Failure


def main(argv: Sequence[str]) -> int:
    """Run the comparison, write its report and print the result table."""
    quiet_libraries()
    parser = command_parser()
    namespace = parse(parser, [word for word in argv if word != "--print_config"])
    asked = comparison(parser, namespace)
    if "--print_config" in argv:
        return print_config(list(asked.cells))
    from studies.commands import report
    from studies.lease import held, study_lock
    from studies.tables import console

    failures = run(asked, namespace.jobs, namespace.gpus_per_cell)
    if not is_main_process():
        return 1 if failures else 0
    for failure in failures:
        console(stderr=True).print(f"failed: {failure.run}: {failure.message}")
    cell = asked.cells[0]
    try:
        # Two commands on one study come to its end at the same time.
        with held(study_lock(cell.output.runs, cell.study, "report")):
            report.write_and_print(Path(cell.output.runs) / cell.study)
    except UserError as error:
        if not failures:
            raise
        console(stderr=True).print(f"no report: {error}")
    return 1 if failures else 0


def command_parser() -> ArgumentParser:
    """Options of the command."""
    parser = build_parser("compare", "Train and evaluate cells under one budget. The same command again goes on.")
    parser.add_argument(
        "--jobs", type=int, default=0, help="cells side by side; 0 = one on the CPU, else as many as there are GPUs"
    )
    parser.add_argument("--gpus_per_cell", type=int, default=1, help="GPUs that train one cell together")
    return parser


def run(asked: Comparison, jobs: int, gpus_per_cell: int) -> "list[Failure]":
    """Run what is missing, in workers or in the process group that a launcher started."""
    from studies.fork_server import start_server
    from studies.plan import check_group, in_group, make_plan

    if in_group():
        check_group(jobs, gpus_per_cell)
        from studies.compare import run_here

        return run_here(asked)
    asked, plan = make_plan(asked, jobs, gpus_per_cell)
    start_server()
    from studies.compare import run_in_workers

    return run_in_workers(asked, plan)
