"""The workers of an ablation: killed, failing, shared by two commands, and their runs in MLflow."""

import json
import os
import signal
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from mlflow import MlflowClient

from harness.records.run_folder import RunFolder
from harness.tracking.store import PARENT_TAG, STATUS_TAG
from harness.training.trainer import Event
from studies.agenda import Job
from studies.commands import report
from studies.commands.compare import command_parser
from studies.configs.cells import Comparison, comparison
from studies.configs.settings import parse
from studies.dispatch.execute import run_here
from tests.e2e.conftest import STUDY, Faults, Place
from tests.e2e.test_jobs import Start, begins, is_gone, same_records, start, until  # noqa: F401 - a fixture

Ditbench = Callable[..., tuple[int, str, str]]

ABLATION = (
    *("--study", "abl", "--method", "faulty", "--grid.weight", "1.0,2.0", "--seeds", "0"),
    *("--budget.amount", "6", "--evaluation.points", "2", "--output.log_every", "1"),
)
"""Three runs, of which the method's two do what a test asks for; the method itself adds nothing."""
CELLS = ("sit", "faulty", "faulty,weight=2.0")
WITHOUT_MLFLOW = ("--output.mlflow", "false")


def run_of(place: Place, cell: str) -> RunFolder:
    return RunFolder(place.runs / "abl" / cell / "seed0")


def record_of(place: Place) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((place.runs / "abl" / "ablation.json").read_text())
    return found


def states(place: Place) -> dict[str, str]:
    return {trial["cell"]: trial["state"] for trial in record_of(place)["trial_list"]}


def ends(place: Place) -> int:
    """Trials that Optuna's journal was told the end of."""
    lines = [json.loads(line) for line in (place.runs / "abl" / "optuna.journal").read_text().splitlines()]
    return sum("datetime_complete" in line for line in lines)


@pytest.mark.full
def test_what_is_killed_or_fails_is_taken_up_again(
    place: Place,
    faults: Faults,
    start: Start,  # noqa: F811
    ditbench: Ditbench,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A killed worker is replaced in the same command; what a killed command leaves, and what fails, is taken up by the
    same command again. All runs are children of one run in MLflow, which `sync` knows too.
    """
    words = place.words("ablate", *ABLATION, *WITHOUT_MLFLOW)
    faults.are("wait")
    command = start(*words)
    first = faults.waiting()
    os.kill(first, signal.SIGKILL)
    until(lambda: is_gone(first), "it was not killed", 10)
    (faults.folder / "waits").unlink()
    second = faults.waiting()
    assert second != first
    died = "cell 2 of 3: faulty seed 0: its process was killed by SIGKILL (often: out of memory); it is taken up again"
    gone = f"cell 2 of 3: faulty seed 0: taken over from {os.uname().nodename}:{first}, which is gone"
    assert [line for line in command.out().splitlines() if line in (died, gone)] == [died, gone]
    command.process.kill()
    until(lambda: is_gone(second), "the worker outlived its command", 10)
    assert run_of(place, "faulty").status() == "running"
    assert states(place) == {"faulty": "running", "faulty,weight=2.0": "waiting"}

    monkeypatch.setattr(report, "write_and_print", lambda study: None)
    faults.are("raise")
    status, out, err = ditbench(*words)
    assert status == 1
    assert f"cell 2 of 3: faulty seed 0: taken over from {os.uname().nodename}:{second}, which is gone\n" in out
    assert "failed: faulty/seed0: RuntimeError: no space [left] on the device\n" in err
    assert states(place) == {"faulty": "waiting", "faulty,weight=2.0": "waiting"}
    assert ends(place) == 0

    faults.are("")
    status, out, err = ditbench(*place.words("ablate", *ABLATION))
    assert (status, err) == (0, "")
    assert "2 settings and sit, at 1 seed: 3 runs, 2 of them to be run\n" in out
    sit, faulty, other = (run_of(place, cell) for cell in CELLS)
    for run in (faulty, other):
        assert same_records(run, sit, "terms", "gradient_norms", "samples", "diagnostics")
    assert [len(begins(run)) for run in (sit, faulty, other)] == [1, 4, 2]
    assert {(trial["state"], trial["value"]) for trial in record_of(place)["trial_list"]} == {
        ("complete", sit.lines("eval")[-1]["metrics"]["fd_efficientnet_lite0_48"])
    }
    assert ends(place) == 2, "each trial was told once"
    assert record_of(place)["mlflow_run"] == assert_children_of_one_run(place, CELLS[1:])
    for action in ("added", "unchanged"):  # what was made while MLflow was off
        status, out, err = ditbench("sync", str(place.runs / "abl"), "--format", "json")
        assert (status, err) == (0, "")
        assert [row["action"] for row in json.loads(out)] == [action] * 3
    assert_children_of_one_run(place, CELLS)


def assert_children_of_one_run(place: Place, cells: Sequence[str]) -> str:
    """Returns the parent's id."""
    client = MlflowClient(f"sqlite:///{place.runs}/mlflow.db")
    experiment = client.get_experiment_by_name("abl")
    assert experiment is not None
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    assert runs.keys() == {"abl", *(f"{cell}/seed0" for cell in cells)}
    parent = runs.pop("abl")
    assert parent.info.status == "FINISHED"
    assert {run.data.tags[PARENT_TAG] for run in runs.values()} == {parent.info.run_id}
    return str(parent.info.run_id)


class Stopping(Comparison):
    """A comparison whose second cell is stopped after its first evaluation."""

    def watch(self, job: Job, event: Event) -> bool:
        assert event.kind == "eval"
        return job.number == 2


def test_a_run_that_is_stopped_ends_as_pruned(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    """For good: with its evaluation, and without the rest of its budget."""
    parser = command_parser()
    asked = comparison(parser, parse(parser, place.words("compare", *STUDY)[1:]))
    stopping = Stopping(cells=asked.cells, seeds=asked.seeds, baseline=asked.baseline)
    for _ in range(2):
        assert run_here(stopping) == []
        assert "cell 2 of 2: vae_repa seed 0: pruned\n" in capsys.readouterr().out
    sit, stopped = (RunFolder(place.runs / "small" / cell / "seed0") for cell in ("sit", "vae_repa"))
    assert (sit.status(), [line["point"] for line in sit.lines("eval")]) == ("finished", [1, 2])
    manifest = stopped.manifest()
    assert (manifest["status"], manifest["status_detail"]) == ("pruned", {"step": 3, "point": 1})
    assert [line["point"] for line in stopped.lines("eval")] == [1]
    assert [line["step"] for line in stopped.lines("train")] == [1, 2, 3]
    assert len(begins(stopped)) == 1
    run = MlflowClient(f"sqlite:///{place.runs}/mlflow.db").get_run(manifest["mlflow_run"])
    assert (run.info.status, run.data.tags[STATUS_TAG]) == ("FINISHED", "pruned")


@pytest.mark.full
def test_two_commands_at_once_share_one_study(place: Place, faults: Faults, start: Start) -> None:  # noqa: F811
    """Neither can end before both are there, as the one waits within a run."""
    words = place.words("ablate", *ABLATION, *WITHOUT_MLFLOW)
    faults.are("wait")
    commands = [start(*words) for _ in range(2)]
    faults.waiting()
    until(lambda: all("to be run" in command.out() for command in commands), "a command did not begin")
    faults.are("")
    assert [command.status() for command in commands] == [0, 0], [command.err() for command in commands]
    assert [len(begins(run_of(place, cell))) for cell in CELLS] == [1, 1, 1]
    assert states(place) == {"faulty": "complete", "faulty,weight=2.0": "complete"}
    assert ends(place) == 2
    workers = {worker for trial in record_of(place)["trial_list"] for worker in trial["workers"]}
    assert 1 <= len(workers) <= 2
    assert (place.runs / "abl" / "report" / "index.html").is_file()
