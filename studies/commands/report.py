"""`ditbench report`: tables, figures and the page of a study, from its records alone."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from harness.errors import UserError
from studies.commands.common import Parser

if TYPE_CHECKING:
    from reports.load import Published
    from studies.compare import Failure


def main(argv: Sequence[str]) -> int:
    """Write the report of a study and print its path and the result table."""
    parser = Parser(prog="ditbench report", description="Write the report of a study.")
    parser.add_argument("study", type=Path, help="study folder, such as runs/digits")
    parser.add_argument("--format", choices=("table", "json"), default="table", help="table (default) or json")
    parser.add_argument(
        "--published",
        choices=("main", "all", "none"),
        default="main",
        help="published numbers drawn beside a study of ImageNet's size and pixels: what authors print of their own "
        "runs (default), all with ablations and unverified ones, or none",
    )
    arguments = parser.parse_args(argv)
    write_and_print(arguments.study, arguments.format, arguments.published)
    return 0


def write_and_print(study: Path, form: str = "table", published: "Published" = "main") -> None:
    """Write the report; print the result tables, what was checked to agree, then the path of the page."""
    from reports import final_protocol
    from reports.ablation import terminal_tables
    from reports.report import write_report
    from reports.tables import final_table, marks, means_rows, terminal_rows
    from reports.trials import RECORD
    from reports.verify import compact
    from studies.tables import console, print_table

    paths = write_report(study, published)
    found = paths.study
    if form == "json":
        rows = json.loads(final_table(found).to_json(orient="records"))
        checks = [dataclasses.asdict(check) for check in paths.checks]
        final = final_protocol.final_rows(found)
        whole = {"page": str(paths.page), "rows": rows, "final": final, "checks": checks}
        print(json.dumps(whole, indent=1, ensure_ascii=False))
        return
    print(f"{found.main_metrics[0]} {found.after}")
    if (study / RECORD).is_file():
        for title, lines in terminal_tables(study):
            console().print(f"\n{title}")
            print_table(lines)
        print()
    else:
        print_table(terminal_rows(found))
        print()
        print_table(means_rows(found))
    for title, lines in final_protocol.terminal_tables(found):
        console().print(f"\n{title}")
        print_table(lines)
    console().print("".join(f"{mark}\n" for mark in marks(found, found.main_metrics)))
    print_table(compact(paths.checks), justify="left")
    print(f"report: {paths.page}")


def end_study(study: Path, failures: "Sequence[Failure]") -> None:
    """Print the runs that failed and write the report; after a failure it is no further error that there is none."""
    from studies.lease import held, study_lock
    from studies.tables import console

    for failure in failures:
        console(stderr=True).print(f"failed: {failure.run}: {failure.message}")
    try:
        # Two commands on one study come to its end at the same time.
        with held(study_lock(study.parent, study.name, "report")):
            write_and_print(study)
    except UserError as error:
        if not failures:
            raise
        console(stderr=True).print(f"no report: {error}")
