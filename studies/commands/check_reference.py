"""`ditbench check-reference`: whether a run lies in the band of reference curves, so that its machine works."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from harness.config import require
from studies.commands.common import Parser

if TYPE_CHECKING:
    from reports.references.curves import Verdict
    from reports.study.load import RecordedRun

DESCRIPTION = (
    "Say whether a run of the preset digits lies where runs of other seeds and machines lie. Exit status 1 where it "
    "does not."
)


def main(argv: Sequence[str]) -> int:
    """Hold a run to its reference, or make a reference of runs."""
    parser = Parser(prog="ditbench check-reference", description=DESCRIPTION)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run folder, such as runs/digits/sit/seed0")
    parser.add_argument("--reference", type=Path, help="a reference of your own instead of those that are shipped")
    parser.add_argument("--make", type=Path, metavar="FILE", help="write the reference of these runs, 3 or more seeds")
    parser.add_argument("--format", choices=("table", "json"), default="table", help="table (default) or json")
    arguments = parser.parse_args(argv)
    from harness.records.run_folder import RunFolder
    from reports.study.load import load_run

    runs = [load_run(RunFolder(path)) for path in arguments.runs]
    if arguments.make:
        require(arguments.reference is None, "--make and --reference exclude each other: give one of them")
        return make(runs, arguments.make)
    verdicts = [check(run, arguments.reference) for run in runs]
    if arguments.format == "json":
        print(json.dumps([_plain(run, found) for run, found in zip(runs, verdicts, strict=True)], indent=1))
    else:
        for run, found in zip(runs, verdicts, strict=True):
            _print(run, found)
    return 0 if all(found.is_good for found in verdicts) else 1


def make(runs: "Sequence[RecordedRun]", file: Path) -> int:
    """Write the reference of runs."""
    from harness.records.files import write_atomic
    from reports.references.curves import made, text

    write_atomic(file, text(made(runs)).encode())
    print(f"{file}: {len(runs)} seeds")
    return 0


def check(run: "RecordedRun", file: Path | None) -> "Verdict":
    """The verdict on a run, held to the reference of its settings."""
    from reports.references import curves as reference_curves

    require(bool(run.evaluations), f"{run.folder} holds no evaluation yet: let it reach its first one")
    references = [reference_curves.read(file)] if file else reference_curves.shipped()
    return reference_curves.check(run, reference_curves.matching(run, references))


def _plain(run: "RecordedRun", found: "Verdict") -> dict[str, object]:
    places = [{**dataclasses.asdict(place), "inside": place.is_inside} for place in found.places]
    return {
        "run": str(run.folder),
        "reference": found.reference.name,
        "good": found.is_good,
        "equal": dict(found.drawn),
        "places": places,
    }


def _print(run: "RecordedRun", found: "Verdict") -> None:
    from studies.terminal.tables import console, print_table

    console().print(f"{run.folder} against {found.reference.name}, {len(found.reference.seeds)} seeds")
    rows = [
        {
            "metric": place.metric,
            "step": str(place.step),
            "value": f"{place.value:.4g}",
            "reference mean": f"{place.mean:.4g}",
            "band": f"{place.low:.4g} to {place.high:.4g}",
            "": "inside" if place.is_inside else "OUTSIDE",
        }
        for place in found.places
    ]
    print_table(rows)
    for what, is_equal in found.drawn.items():
        console().print(f"{what}: {'equal to the bit' if is_equal else 'DIFFERENT'}")
    outside = sum(not place.is_inside for place in found.places) + sum(not equal for equal in found.drawn.values())
    if not outside:
        console().print("all inside: this run is what it should be")
    else:
        console().print(f"{outside} of these are not as they should be; a run at status {run.status}")
