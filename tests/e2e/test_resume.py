"""A comparison killed in the middle of a write, and the same command again."""

import json
import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from safetensors.torch import load_file

from harness.records.run_folder import RunFolder
from harness.training import checkpoint
from studies import cli
from studies.children import CONTEXT, start_server
from studies.commands import report
from studies.dispatch import execute
from tests.e2e.conftest import STUDY, TIMES, FinishedStudy, Place, contents


def killed_within_a_checkpoint(words: Sequence[str]) -> None:
    """A command that trains its cells itself: the first writes four checkpoints, the second dies at that of step 4."""
    write_json, written = checkpoint.write_json, []

    def killing(path: Path, value: Any) -> None:
        written.append(path)
        if len(written) == 7:
            os.kill(os.getpid(), signal.SIGKILL)
        write_json(path, value)

    execute.run_in_workers = lambda comparison, plan: execute.run_here(comparison)
    checkpoint.write_json = killing
    cli.main(list(words))


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory, shared_cache: Path) -> Place:
    """The study of `finished`, killed with SIGKILL in its second cell, between two files of a checkpoint."""
    place = Place(tmp_path_factory.mktemp("killed"), shared_cache)
    start_server()  # whose processes have their libraries loaded
    process = CONTEXT.Process(target=killed_within_a_checkpoint, args=(place.words("compare", *STUDY),))
    process.start()
    process.join(timeout=250)
    assert process.exitcode == -signal.SIGKILL, f"it was not killed: {process.exitcode}"
    return place


def records(run: Path, name: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / f"{name}.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


def test_a_killed_comparison_goes_on_to_the_same_records(
    killed: Place,
    finished: FinishedStudy,
    ditbench: Callable[..., tuple[int, str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    study = killed.runs / "small"
    run = study / "vae_repa" / "seed0"
    folder = RunFolder(run)
    assert folder.status() == "running"
    assert [line["step"] for line in folder.lines("train")] == [1, 2, 3, 4]
    assert [path.name for path in checkpoint.whole(folder.checkpoints)] == ["step_00000003"]
    assert list(folder.checkpoints.glob(".step_00000004*.tmp")), "it was not killed within a write"
    mlflow_run, first_cell = folder.manifest()["mlflow_run"], contents(study / "sit")
    with (run / "train.jsonl").open("a") as lines:
        lines.write('{"step":5,"lo')

    monkeypatch.setattr(report, "write_and_print", lambda study: None)
    status, out, err = ditbench(*killed.words("compare", *STUDY))

    assert (status, err) == (0, "")
    assert "cell 2 of 2: vae_repa seed 0: finished" in out
    assert "step 3 of 6" not in out, "the evaluation after step 3 is not made again"
    assert contents(study / "sit") == first_cell, "a finished cell is left alone"
    for cell in ("sit", "vae_repa"):
        for name in ("train", "eval"):
            assert records(study / cell / "seed0", name) == records(finished.run(cell), name), (cell, name)
    assert_same_weights(run, finished.run("vae_repa"))
    assert not list(folder.checkpoints.glob(".*"))
    assert folder.manifest()["mlflow_run"] == mlflow_run
    assert_points_once(killed, mlflow_run)


def assert_same_weights(run: Path, other: Path) -> None:
    files = sorted(str(path.relative_to(run)) for path in (run / "checkpoints").rglob("*.safetensors"))
    assert len(files) == len(checkpoint.GROUPS) + 2, "one whole checkpoint, and the EMA of two evaluations"
    for file in files:
        ours, theirs = load_file(run / file), load_file(other / file)
        assert ours.keys() == theirs.keys()
        assert all(ours[name].equal(theirs[name]) for name in ours), file


def assert_points_once(place: Place, mlflow_run: str) -> None:
    client = MlflowClient(f"sqlite:///{place.runs}/mlflow.db")
    for key in ("loss", "terms/vae_repa/value", "grad_norm"):
        assert [point.step for point in client.get_metric_history(mlflow_run, key)] == [1, 2, 3, 4, 5, 6], key
    run = client.get_run(mlflow_run)
    assert (run.info.status, run.data.tags["ditbench.status"]) == ("FINISHED", "finished")
