"""`ditbench claims`: which claims of the papers the records of studies reproduce or contradict."""

import json
from collections.abc import Sequence
from pathlib import Path

from studies.commands.common import Parser


def main(argv: Sequence[str]) -> int:
    """Judge every claim, save the ledger and print it. Whatever the verdicts are, the exit status is 0."""
    parser = Parser(
        prog="ditbench claims",
        description="Judge the claims of the papers by the records of studies. Nothing is trained.",
    )
    parser.add_argument(
        *("studies",), type=Path, nargs="+", metavar="STUDY",
        help="study folder, such as runs/digits, or a folder that ditbench overhead saved",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=Path, default=Path("claims"), help="folder for JSON, CSV, Markdown and LaTeX (default: claims)"
    )
    parser.add_argument(
        "--format", choices=("table", "json", "markdown"), default="table", help="table (default), json or markdown"
    )
    arguments = parser.parse_args(argv)
    from reports.claims import ledger
    from studies.terminal.tables import console, print_fields

    judged = ledger.judge_paths(arguments.studies)
    paths = ledger.write(judged, arguments.out)
    if arguments.format == "json":
        files = [str(path) for path in paths]
        print(json.dumps({"claims": ledger.record(judged), "files": files}, indent=1, ensure_ascii=False))
    elif arguments.format == "markdown":
        print(ledger.markdown(judged), end="")
    else:
        for heading, fields in ledger.blocks(judged):
            print_fields(heading, fields)
        for text in (*ledger.summary(judged), *ledger.notes(judged)):
            console().print(text, soft_wrap=False)
        console().print(f"\nsaved in {arguments.out}: JSON, CSV, Markdown and LaTeX")
    return 0
