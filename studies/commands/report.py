"""`ditbench report`: tables, figures and the page of a study, from its records alone; of several, also what they say
together.
"""

import argparse
import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.errors import UserError
from studies.commands.common import Parser

if TYPE_CHECKING:
    from reports.report import ReportPaths
    from reports.study.load import Published, Study
    from studies.dispatch.board import Failure


def main(argv: Sequence[str]) -> int:
    """Write the reports of studies and print their paths and the result tables."""
    arguments = command_parser().parse_args(argv)
    studies, out = arguments.study, arguments.out
    if out is None and len(studies) > 1:
        raise UserError("report: several studies need a folder for what they say together: add --out FOLDER")
    if out is not None and len(studies) == 1:
        raise UserError(f"report: --out is for several studies; the report of one lies in it, {studies[0]}/report")
    chosen = (arguments.published, [value for values in arguments.target for value in values])
    if out is None:
        write_and_print(studies[0], arguments.format, *chosen)
    else:
        write_joint_and_print(studies, out, arguments.format, *chosen)
    return 0


def command_parser() -> Parser:
    """Options of the command."""
    parser = Parser(prog="ditbench report", description="Write the report of a study, or of several together.")
    parser.add_argument("study", type=Path, nargs="+", help="study folder, such as runs/digits")
    parser.add_argument("--format", choices=("table", "json"), default="table", help="table (default) or json")
    parser.add_argument(
        "--target",
        type=target_values,
        action="append",
        default=[],
        metavar="VALUE[,VALUE...]",
        help="values of the main metric: show what each cell spends until it reaches them, besides until the "
        "baseline's final value",
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="with several studies of the same cells in different settings: folder for their joint report",
    )
    parser.add_argument(
        "--published",
        choices=("main", "all", "none"),
        default="main",
        help="published numbers drawn beside a study of ImageNet's size and pixels: what authors print of their own "
        "runs (default), all with ablations and unverified ones, or none",
    )
    return parser


def target_values(text: str) -> list[float]:
    """`520` or `520,480` as numbers."""
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = [math.nan]
    if not all(map(math.isfinite, values)):
        raise argparse.ArgumentTypeError(f"{text!r} is no number or list of numbers such as 520 or 520,480")
    return values


def write_and_print(
    study: Path, form: str = "table", published: "Published" = "main", target_values: Sequence[float] = ()
) -> None:
    """Write the report; print the result tables, what was checked to agree, then the path of the page."""
    from reports.report import write_report

    paths = write_report(study, published, target_values)
    if form == "json":
        print(json.dumps(plain(paths), indent=1, ensure_ascii=False))
    else:
        show(paths)


def write_joint_and_print(
    studies: Sequence[Path], out: Path, form: str, published: "Published", target_values: Sequence[float]
) -> None:
    """Write every study's report and the joint one; print each, then what they say together."""
    from reports.joint import report as joint
    from reports.report import write_report
    from reports.study.load import load_study

    # Refused before the first report is written, not after all of them.
    joint.check([load_study(study) for study in studies], out)
    written = [write_report(study, published, target_values) for study in studies]
    page = joint.write_joint([paths.study for paths in written], [paths.page for paths in written], out)
    if form == "json":
        whole = {"page": str(page), "studies": [plain(paths) for paths in written]}
        print(json.dumps(whole, indent=1, ensure_ascii=False))
        return
    for paths in written:
        show(paths)
        print()
    show_joint([paths.study for paths in written], page)


def plain(paths: "ReportPaths") -> dict[str, Any]:
    """A report's numbers, for programs."""
    from harness.records.files import canonical
    from reports.costs import targets
    from reports.final import protocol as final_protocol
    from reports.tables.results import final_table

    found = paths.study
    return {
        "page": str(paths.page),
        "rows": json.loads(final_table(found).to_json(orient="records")),
        "final": final_protocol.final_rows(found),
        "targets": json.loads(canonical(targets.numbers(found))),
        "checks": [dataclasses.asdict(check) for check in paths.checks],
    }


def show(paths: "ReportPaths") -> None:
    """Print a report's tables, what was checked to agree, then the path of the page."""
    from harness.records.ablation import ABLATION_RECORD
    from reports.ablation.tables import terminal_tables
    from reports.costs import targets
    from reports.final import protocol as final_protocol
    from reports.study.verify import compact
    from reports.tables.results import marks, means_rows, terminal_rows
    from studies.terminal.tables import console, print_table

    found = paths.study
    print(f"{found.main_metrics[0]} {found.after}")
    if (found.path / ABLATION_RECORD).is_file():
        for title, lines in terminal_tables(found.path):
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
    for sentence in targets.asked_sentences(found):
        console().print(sentence)
    console().print("".join(f"{mark}\n" for mark in marks(found, found.main_metrics)))
    print_table(compact(paths.checks), justify="left")
    print(f"report: {paths.page}")


def show_joint(studies: "Sequence[Study]", page: Path) -> None:
    """Print what the studies say together, then the path of the page."""
    from reports.joint import profiles
    from studies.terminal.tables import console, print_table

    for sentence in profiles.headline(studies):
        console().print(sentence)
    overall = profiles.sections(studies)[0].parts[0].table
    assert overall is not None
    print_table([dict(row) for row in overall.rows])
    print(f"joint report: {page}")


def end_study(study: Path, failures: "Sequence[Failure]", is_over: bool = True) -> None:
    """Print the runs that failed and write the report.

    After a failure, or where others may still be at runs (not `is_over`), it is no further error that there is none.
    """
    from studies.dispatch.leases import held
    from studies.runs.folders import study_lock
    from studies.terminal.tables import console

    for failure in failures:
        console(stderr=True).print(f"failed: {failure.run}: {failure.message}")
    try:
        # Two commands on one study come to its end at the same time.
        with held(study_lock(study.parent, study.name, "report")):
            write_and_print(study)
    except UserError as error:
        if is_over and not failures:
            raise
        console(stderr=True).print(f"no report: {error}")
