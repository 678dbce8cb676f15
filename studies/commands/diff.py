"""`ditbench diff`: what differs between two runs, and whether they may be compared."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from studies.commands.common import Parser

if TYPE_CHECKING:
    from reports.study.contrast import Contrast, Difference, TraceComparison


def main(argv: Sequence[str]) -> int:
    """Print the differences. A difference is no error: the exit status is 0."""
    parser = Parser(prog="ditbench diff", description="Show what differs between two runs, of one study or of two.")
    parser.add_argument("run_a", type=Path, help="run folder, such as runs/digits/sit/seed0")
    parser.add_argument("run_b", type=Path, help="another run folder")
    parser.add_argument("--format", choices=("table", "json"), default="table", help="table (default) or json")
    arguments = parser.parse_args(argv)
    from harness.records.run_folder import RunFolder
    from reports.study.contrast import contrast
    from reports.study.load import load_run

    paths = arguments.run_a, arguments.run_b
    found = contrast(*(load_run(RunFolder(path)) for path in paths))
    if arguments.format == "json":
        print(json.dumps(_plain(paths, found), indent=1, ensure_ascii=False))
    else:
        _print(paths, found)
    return 0


def _plain(paths: Sequence[Path], found: "Contrast") -> dict[str, Any]:
    runs = dict(zip("ab", map(str, paths), strict=True))
    verdict = {"comparable": found.is_comparable, "paired": found.is_paired, "verdict": found.verdict}
    return {"runs": runs, **dataclasses.asdict(found), **verdict}


def _print(paths: Sequence[Path], found: "Contrast") -> None:
    from studies.terminal.tables import console, print_table

    lines = [f"{letter}  {path}" for letter, path in zip("AB", paths, strict=True)]
    console().print("\n".join(lines))
    groups = dict.fromkeys(difference.group for difference in found.differences)
    for group in groups:
        print()
        print_table([_row(group, one) for one in found.differences if one.group == group], justify="left")
    console().print("\n" + _trace_text(found.trace))
    console().print(found.verdict)


def _row(group: str, difference: "Difference") -> dict[str, str]:
    mark = "must agree" if difference.must_agree else ""
    return {group: difference.field, "A": _text(difference.a), "B": _text(difference.b), "": mark}


def _text(value: Any) -> str:
    """A value on one line: digests short, a dash for a field that the run lacks."""
    from reports.study.endings import one_line
    from reports.study.verify import short_text

    return "–" if value is None else one_line(short_text(value)) or '""'


def _trace_text(trace: "TraceComparison | None") -> str:
    if trace is None:
        return "batch trace: no step that both logged"
    if trace.agrees:
        return f"batch trace: equal to step {trace.step}, the last that both logged"
    return f"batch trace: differs from step {trace.first_different} to step {trace.step}, the last that both logged"
