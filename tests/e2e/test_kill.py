"""kill -9 at any moment, then the same command again: the same bits as a run that nobody killed."""

import functools
import hashlib
import importlib
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from harness.records.run_folder import RunFolder
from harness.training import checkpoint
from studies import cli
from studies.children import CONTEXT, start_server
from tests.e2e.conftest import ROOT, STUDY, TIMES, FinishedStudy, Place


def run_and_kill(target: str, count: int, when: str, words: Sequence[str]) -> None:
    """Run a command of ditbench in this process, and kill it at the n-th call of a function: before, after or within.

    Args:
        target: of the function, as module:name or module:Class.name.
    """
    module, _, path = target.partition(":")
    *owners, name = path.split(".")
    owner: Any = importlib.import_module(module)
    for part in owners:
        owner = getattr(owner, part)
    original, calls = getattr(owner, name), itertools.count(1)

    def killed(*arguments: Any, **options: Any) -> Any:
        if next(calls) < count:
            return original(*arguments, **options)
        if when == "after":
            original(*arguments, **options)
        if when == "within":  # half a line, as a machine that loses power leaves it
            folder, records, _ = arguments
            with (folder.path / f"{records}.jsonl").open("a") as lines:
                lines.write('{"step":')
        return os.kill(os.getpid(), signal.SIGKILL)

    setattr(owner, name, killed)
    cli.main(list(words))


def start_and_kill(target: str, count: int, when: str, words: Sequence[str]) -> None:
    """The above in a process of its own; its libraries are loaded already, or this would take half of all time."""
    start_server()
    process = CONTEXT.Process(target=run_and_kill, args=(target, count, when, words))
    process.start()
    process.join(timeout=250)
    assert process.exitcode == -signal.SIGKILL, f"it was not killed: {process.exitcode}"


BUDGETS = {
    "steps": ("--budget.unit", "steps", "--budget.amount", "6"),
    "images": ("--budget.unit", "images", "--budget.amount", "90"),
    "train_gflops": ("--budget.unit", "train_gflops", "--budget.amount", "{gflops}"),
}
"""Six steps of 16 images each, in every unit whose end is a step."""


@dataclass(frozen=True)
class Moment:
    """Where a run is killed: at the n-th call of a function, before or after it."""

    name: str
    target: str
    count: int
    when: str
    unit: str = "steps"


MOMENTS = (
    Moment("within a shard of a cache", "pathlib:Path.replace", 1, "before"),
    Moment("between a cache's shard and its index", "harness.data.cache:_write_shard", 1, "after", "images"),
    Moment("before the manifest is there", "harness.records.run_folder:RunFolder.write_manifest", 1, "before"),
    Moment("while MLflow opens a run", "harness.tracking.feed:open_experiment", 1, "after"),
    Moment("within a step", "harness.training.step:clip_gradients", 5, "after", "train_gflops"),
    Moment("within a line of train.jsonl", "harness.records.run_folder:RunFolder.append", 5, "within", "images"),
    Moment("between a line and its checkpoint", "harness.training.recorder:Recorder.line", 4, "after"),
    Moment("within a checkpoint", "harness.training.checkpoint:save_file", 15, "after", "train_gflops"),
    Moment("before a checkpoint has its name", "harness.records.files:sync_tree", 3, "after"),
    Moment("between a checkpoint and the removal of older ones", "harness.training.checkpoint:prune", 2, "before"),
    Moment("within the generation of samples", "harness.evaluation.generate:_sample_chunk", 2, "after", "images"),
    Moment("within the scores of an evaluation", "harness.evaluation.evaluate:Evaluator.velocity_loss", 2, "before"),
    Moment("between an evaluation's files", "harness.training.recorder:Recorder.ema", 2, "after", "train_gflops"),
    Moment("between an evaluation's line and its checkpoint", "harness.training.checkpoint:save", 2, "before"),
    Moment("between MLflow's points and the checkpoint", "harness.tracking.feed:Feed.flush", 2, "after"),
    Moment("between the last checkpoint and the end", "harness.training.recorder:Recorder.end", 1, "before", "images"),
)
QUICK = ("within a checkpoint",)
"""Moments of `make test`; with the report below, two."""


def cases() -> list[Any]:
    marks = {moment.name: () if moment.name in QUICK else (pytest.mark.full,) for moment in MOMENTS}
    return [pytest.param(moment, id=moment.name, marks=marks[moment.name]) for moment in MOMENTS]


def words(place: Place, unit: str, gflops: float) -> list[str]:
    budget = [word.format(gflops=gflops) for word in BUDGETS[unit]]
    training = ("--output.log_every", "1", "--output.checkpoint_every", "2", "--output.keep_checkpoints", "2")
    return place.words("train", "--method", "vae_repa", "--evaluation.points", "2", *budget, *training)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, shared_cache: Path) -> Callable[[str], RunFolder]:
    """`undisturbed(unit)`: a run of that budget that nobody kills, trained when it is first asked for."""
    place = Place(tmp_path_factory.mktemp("undisturbed"), shared_cache)

    @functools.cache
    def train(unit: str) -> RunFolder:
        gflops = 0.0 if unit == "steps" else gflops_of(train("steps"))
        assert cli.main([*words(place, unit, gflops), "--study", unit]) == 0
        return RunFolder(place.runs / unit / "vae_repa" / "seed0")

    return train


def gflops_of(run: RunFolder) -> float:
    """Between five and six steps' worth of a run of six, as the images of `BUDGETS` are."""
    return run.lines("train")[-1]["train_gflops"] * 90 / 96


def fingerprint(run: RunFolder) -> dict[str, Any]:
    """All that must come out the same: records without times, and the content of every tensor file that is kept."""
    found: dict[str, Any] = {}
    for name in ("train", "eval"):
        lines = [json.loads(line) for line in (run.path / f"{name}.jsonl").read_text().splitlines()]
        found[name] = [{key: value for key, value in line.items() if key not in TIMES} for line in lines]
    for path in sorted(run.path.rglob("*")):
        if path.suffix in (".safetensors", ".png"):
            found[str(path.relative_to(run.path))] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


@pytest.mark.parametrize("moment", cases())
def test_a_run_killed_at_a_moment(moment: Moment, undisturbed: Callable[[str], RunFolder], place: Place) -> None:
    expected, gflops = undisturbed(moment.unit), gflops_of(undisturbed("steps"))
    if "cache" in moment.name:
        place = Place(place.folder, place.folder / "cache")
    command = words(place, moment.unit, gflops)

    start_and_kill(moment.target, moment.count, moment.when, command)
    assert cli.main(command) == 0

    run = RunFolder(place.runs / "digits" / "vae_repa" / "seed0")
    assert run.status() == "finished"
    assert fingerprint(run) == fingerprint(expected)
    assert len(fingerprint(run)) == 2 + 2 * len(checkpoint.GROUPS) + 2 + 2, "records, checkpoints, EMA and pictures"
    assert not list(run.path.rglob(".*")), "nothing is left of the interruption"
    assert_points_once(place, run)


def assert_points_once(place: Place, run: RunFolder) -> None:
    """MLflow holds each point of the records once."""
    client = MlflowClient(f"sqlite:///{place.runs}/mlflow.db")
    for name, key in (("train", "loss"), ("eval", "metrics/velocity_loss")):
        points = client.get_metric_history(run.manifest()["mlflow_run"], key)
        wanted = [
            (line["step"], line["loss"] if name == "train" else line["metrics"]["velocity_loss"])
            for line in run.lines(name)
        ]  # type: ignore[arg-type]
        assert [(point.step, point.value) for point in points] == wanted


# -- a comparison: its workers die with it --------------------------------------------------------------------------


def assert_same_study(place: Place, expected: FinishedStudy) -> None:
    for cell in ("sit", "vae_repa"):
        run, other = (RunFolder(study / cell / "seed0") for study in (place.runs / "small", expected.path))
        assert run.status() == "finished"
        assert fingerprint(run) == fingerprint(other), cell
    pages = [study / "report" / "index.html" for study in (place.runs / "small", expected.path)]
    assert all(page.is_file() for page in pages)
    left, right = (sorted(path.name for path in page.parent.rglob("*")) for page in pages)
    assert left == right, "the report is whole"
    hidden = {path.name for path in (place.runs / "small").glob(".*")}
    assert hidden <= {".leases", ".report.lock"}, "nothing is left of the interruption"


@pytest.mark.full
def test_a_comparison_killed_while_it_writes_its_report(finished: FinishedStudy, place: Place) -> None:
    """In the middle of the figures, all cells being over."""
    command = place.words("compare", *STUDY)
    start_and_kill("reports.figures.files:save", 2, "after", command)
    assert cli.main(command) == 0
    assert_same_study(place, finished)


@pytest.fixture(scope="module")
def usual_seconds(tmp_path_factory: pytest.TempPathFactory, shared_cache: Path) -> float:
    """How long the comparison takes that nobody kills."""
    place = Place(tmp_path_factory.mktemp("timed"), shared_cache)
    began = time.monotonic()
    assert place.process(*place.words("compare", *STUDY)).returncode == 0
    return time.monotonic() - began


@pytest.mark.full
@pytest.mark.parametrize("number", range(6))
def test_a_comparison_killed_at_a_random_time(
    finished: FinishedStudy, usual_seconds: float, place: Place, number: int
) -> None:
    """The command is killed once or twice, and its workers end with it; the same command then ends the same."""
    command = [sys.executable, "-m", "studies.cli", *place.words("compare", *STUDY)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    chance = random.Random(number)
    for _ in range(1 + number % 2):
        process = subprocess.Popen(command, cwd=place.folder, env=environment, stdout=subprocess.DEVNULL)
        try:
            process.wait(timeout=chance.uniform(0.3, 1.0) * usual_seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    again = place.process(*command[3:])
    assert again.returncode == 0, again.stderr
    assert_same_study(place, finished)
