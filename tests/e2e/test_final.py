"""A final evaluation under a protocol of its own: at the end of a run, and on request."""

import json
from collections.abc import Callable

import pytest

from harness.records.run_folder import RunFolder
from reports.final.protocol import final_rows, terminal_tables
from reports.study.load import load_study
from reports.study.verify import verify
from tests.e2e.conftest import FinishedStudy, Place

Ditbench = Callable[..., tuple[int, str, str]]

FINAL = ("--final.num_samples", "40", "--final.sampler.kind", "ode-heun", "--final.sampler.num_steps", "2")


@pytest.fixture
def trained(place: Place, ditbench: Ditbench) -> RunFolder:
    words = place.words("train", "--study", "final", "--budget.amount", "2", "--evaluation.points", "1", *FINAL)
    status, out, err = ditbench(*words)
    assert (status, err) == (0, "")
    assert "step 2 of 2, final" in out
    return RunFolder(place.runs / "final" / "sit" / "seed0")


def test_the_two_protocols_have_records_and_digests_of_their_own(trained: RunFolder, ditbench: Ditbench) -> None:
    (line,), (last,), manifest = trained.lines("final"), trained.lines("eval"), trained.manifest()
    assert line["protocol"] == manifest["digests"]["final"] != manifest["digests"]["evaluation"] == last["protocol"]
    assert manifest["final"]["protocol"]["sampler"]["kind"] == "ode-heun"
    assert manifest["protocol"]["sampler"]["kind"] == "ode-euler"
    assert {name.rpartition("_")[2] for name in line["metrics"] if name.startswith("fd_")} == {"40"}
    assert {name.rpartition("_")[2] for name in last["metrics"] if name.startswith("fd_")} == {"48"}

    status, out, _ = ditbench("evaluate", str(trained.path), "--protocol", "final", "--format", "json")
    again = json.loads(out)
    assert (status, again["protocol"], again["metrics"]) == (0, line["protocol"], line["metrics"])

    study = load_study(trained.path.parents[1])
    assert "final digest" in [check.what for check in verify(study)]
    (row,) = final_rows(study)
    assert {name: row[name] for name in line["metrics"]} == pytest.approx(line["metrics"])
    ((title, _), _) = terminal_tables(study)
    assert title.startswith("final evaluation, 40 samples, ODE Heun, 2 steps, no guidance: fd_efficientnet_lite0_40 ")
    assert manifest["model"]["num_classes"] == 10


def test_a_protocol_that_is_not_there_cannot_be_asked_for(finished: FinishedStudy, ditbench: Ditbench) -> None:
    for command in ("evaluate", "sample"):
        status, out, err = ditbench(command, str(finished.run("sit")), "--protocol", "final")
        assert (status, out) == (2, "")
        assert "--protocol final: final.num_samples is 0" in err
