"""`ditbench compare`: several methods under one budget, and the report."""

from collections.abc import Sequence
from pathlib import Path

from harness.errors import UserError
from studies.commands.common import print_config, quiet_libraries
from studies.settings import build_parser, comparison, parse


def main(argv: Sequence[str]) -> int:
    """Run the comparison, write its report and print the result table."""
    quiet_libraries()
    parser = build_parser("compare", "Train and evaluate cells under one budget. The same command again goes on.")
    asked = comparison(parser, parse(parser, [word for word in argv if word != "--print_config"]))
    if "--print_config" in argv:
        return print_config(list(asked.cells))
    from studies.commands.report import write_and_print
    from studies.compare import run_comparison
    from studies.tables import console

    failures = run_comparison(asked)
    for failure in failures:
        console(stderr=True).print(f"failed: {failure.run}: {failure.message}")
    cell = asked.cells[0]
    try:
        write_and_print(Path(cell.output.runs) / cell.study)
    except UserError as error:
        if not failures:
            raise
        console(stderr=True).print(f"no report: {error}")
    return 1 if failures else 0
