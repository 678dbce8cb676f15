"""A study that ditbench 0.1.0 made (tests/data): read and reported as before, done where it is over, else refused."""

import json
import shutil
from pathlib import Path

import pytest

from tests.e2e.conftest import ROOT, Place, draw_nothing, say

NAME = "study-0.1.0"
ASKED = (
    *(
        "--study",
        NAME,
        "--methods",
        "sit,vae_repa",
        "--seeds",
        "0,1",
        "--budget.amount",
        "6",
        "--evaluation.points",
        "2",
    ),
    *("--output.log_every", "1", "--output.checkpoint_every", "2", "--output.mlflow", "false"),
)
"""The command that made it, as tests/data/study-0.1.0/README.md has it; the small settings come from `Place.words`."""


@pytest.fixture
def study(place: Place, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the study in the folder of runs; figures are not drawn."""
    draw_nothing(monkeypatch)
    shutil.copytree(ROOT / "tests" / "data" / NAME, place.runs / NAME)
    return place.runs / NAME


def edit(file: Path, **fields: object) -> None:
    """Change fields of a JSON file; a field that is None is taken out."""
    record = {**json.loads(file.read_text()), **fields}
    file.write_text(json.dumps({name: value for name, value in record.items() if value is not None}))


def test_it_is_reported_and_compared(study: Path) -> None:
    said = say("report", str(study))
    assert (said.status, said.err) == (0, "")
    values = [json.loads(line) for line in (study / "sit" / "seed0" / "eval.jsonl").read_text().splitlines()]
    last = values[-1]["metrics"]["fd_efficientnet_lite0_48"]
    assert f"{last:.0f}" in (study / "report" / "final.md").read_text().replace(",", "")
    said = say("diff", str(study / "sit" / "seed0"), str(study / "sit" / "seed1"))
    assert said.status == 0 and "seed" in said.out


def test_what_it_did_not_record_is_shown_as_such(study: Path) -> None:
    for run in study.glob("*/seed*"):
        edit(run / "cost.json", encoder_forward_gmacs=None, external_parameters=None)
    assert say("report", str(study)).status == 0
    with (study / "report" / "cost.csv").open() as file:
        head, *rows = [line.rstrip("\n").split(",") for line in file]
    assert rows and {row[head.index("external_parameters")] for row in rows} == {""}


def test_runs_that_are_over_are_done_and_others_are_refused(study: Path, place: Place) -> None:
    before = {path: path.read_bytes() for path in study.rglob("*.jsonl")}
    said = say(*place.words("compare", *ASKED))
    assert said.status == 0, said.err
    assert {path: path.read_bytes() for path in study.rglob("*.jsonl")} == before, "no run was trained again"
    edit(study / "sit" / "seed1" / "manifest.json", status="running")
    said = say(*place.words("compare", *ASKED))
    assert said.status == 2
    (line,) = said.err.splitlines()[-1:]
    assert "sit/seed1 was made by ditbench 0.1.0" in line and "--study" in line
