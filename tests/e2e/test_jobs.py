"""Cells in worker processes: shared between commands, side by side, killed, interrupted, and under launchers."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest

from harness.records.run_folder import RunFolder
from studies import cli
from studies.children import CONTEXT, start_server
from studies.commands import report
from studies.commands.compare import command_parser
from studies.configs.cells import comparison
from studies.configs.settings import parse
from studies.dispatch import leases
from studies.dispatch.execute import run_in_workers
from studies.dispatch.plan import WorkerPlan
from tests.e2e.conftest import ROOT, STUDY, TIMES, Faults, FinishedStudy, Place, draw_nothing, run_process

Ditbench = Callable[..., tuple[int, str, str]]

SHORT = (
    *("--study", "short", "--methods", "faulty,sit", "--seeds", "0", "--budget.amount", "6"),
    *("--evaluation.points", "2", "--output.log_every", "1", "--output.mlflow", "false"),
)


@dataclass(frozen=True)
class Command:
    """A running command, with its output in files."""

    process: ForkServerProcess
    folder: Path

    def out(self) -> str:
        return (self.folder / "out").read_text()

    def err(self) -> str:
        return (self.folder / "err").read_text()

    def status(self) -> int | None:
        """Its exit status, once it ended."""
        self.process.join(timeout=120)
        return self.process.exitcode


def run_command(words: Sequence[str], folder: Path, environment: Mapping[str, str]) -> None:
    """What the process of a command does: its output goes to files in a folder. Its report has no pictures."""
    os.environ.clear()
    os.environ.update(environment)
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / name, os.O_CREAT | os.O_WRONLY), number)
    draw_nothing(pytest.MonkeyPatch())
    sys.exit(cli.main(list(words)))


Start = Callable[..., Command]


@pytest.fixture
def start(place: Place, faults: Faults) -> Iterator[Start]:
    """`start(*words)`: a command in a process of its own, whose libraries are loaded already."""
    running: list[Command] = []
    start_server()

    def run(*words: str) -> Command:
        folder = place.folder / f"command{len(running)}"
        folder.mkdir()
        for name in ("out", "err"):
            (folder / name).touch()
        process = CONTEXT.Process(target=run_command, args=(words, folder, dict(os.environ)))
        process.start()
        running.append(Command(process, folder))
        return running[-1]

    yield run
    for one in running:
        one.process.kill()
        one.process.join()


def until(condition: Callable[[], Any], what: str, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def is_gone(pid: int) -> bool:
    """Whether a process has ended; one that nobody has waited for is over too."""
    try:
        return ") Z " in Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return True


def short_run(place: Place, cell: str) -> RunFolder:
    return RunFolder(place.runs / "short" / cell / "seed0")


def begins(folder: RunFolder) -> list[int]:
    """The processes that worked on a run, from its log."""
    return [int(pid) for pid in re.findall(r"process (\d+): begins$", (folder.path / "log.txt").read_text(), re.M)]


def same_records(folder: RunFolder, other: RunFolder, *ignored: str) -> bool:
    """Whether two runs recorded the same, times and the named fields apart."""

    def lines(run: RunFolder, name: Any) -> list[dict[str, Any]]:
        apart = {*TIMES, *ignored}
        return [{key: value for key, value in line.items() if key not in apart} for line in run.lines(name)]

    assert folder.lines("eval"), f"{folder.path} holds no evaluation"
    return all(lines(folder, name) == lines(other, name) for name in ("train", "eval"))


# -- two commands ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_commands_at_once_share_the_work(place: Place, faults: Faults, start: Start) -> None:
    """One waits within the first cell; the other trains the second, waits for the first, and both see all end."""
    faults.are("wait")
    commands = [start(*place.words("compare", *SHORT)) for _ in range(2)]
    faulty, sit = short_run(place, "faulty"), short_run(place, "sit")
    waiting = faults.waiting()
    until(lambda: sit.status() == "finished", "nobody trained the second cell")
    assert faulty.status() == "running"
    told = f"cell 1 of 2: faulty seed 0: trained by another command ({os.uname().nodename}, process {waiting})\n"
    until(lambda: any(told in command.out() for command in commands), "nobody said whom it waits for")
    faults.are("")
    assert [command.status() for command in commands] == [0, 0], [command.err() for command in commands]
    assert [told in command.out() for command in commands].count(True) == 1
    assert (begins(faulty), len(begins(sit))) == ([waiting], 1)
    assert begins(sit) != begins(faulty)
    for command in commands:
        assert command.err() == ""
        for number, cell in enumerate(("faulty", "sit"), start=1):
            assert f"cell {number} of 2: {cell} seed 0: finished" in command.out()
        assert command.out().splitlines()[-1].startswith("report: ")
    assert same_records(faulty, sit, "terms", "gradient_norms", "samples", "diagnostics")
    assert sit.manifest()["shared_device"], "the other command was within a cell all the time"


@pytest.mark.slow
def test_what_a_killed_command_leaves_is_taken_over(
    place: Place, faults: Faults, start: Start, ditbench: Ditbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "write_and_print", lambda study: None)
    faults.are("wait")
    first = start(*place.words("compare", *SHORT))
    worker = faults.waiting()
    first.process.kill()
    until(lambda: is_gone(worker), "the worker outlived its command", 10)
    faulty, sit = short_run(place, "faulty"), short_run(place, "sit")
    assert faulty.status() == "running"
    faults.are("")
    status, _, err = ditbench(*place.words("compare", *SHORT))
    assert (status, err) == (0, "")
    assert faults.steps() - {0} == {3, 4, 5}, "it went on from the evaluation after step 3"
    assert same_records(faulty, sit, "terms", "gradient_norms", "samples", "diagnostics")


@pytest.mark.slow
def test_ctrl_c_ends_the_workers_too(place: Place, faults: Faults) -> None:
    """A terminal sends it to the whole process group of the command that it started."""
    faults.are("wait")
    words = [sys.executable, "-m", "studies.cli", *place.words("compare", *SHORT)]
    path = os.pathsep.join([str(ROOT), str(faults.folder)])
    streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    environment = {**os.environ, "PYTHONPATH": path}
    # What a shell starts in the background ignores Ctrl-C, and so does all that is started from there.
    listen = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    start = {"cwd": place.folder, "env": environment, "start_new_session": True, "preexec_fn": listen}
    process = subprocess.Popen(words, **start, **streams)
    try:
        worker = faults.waiting()
        os.killpg(process.pid, signal.SIGINT)
        err = process.communicate(timeout=120)[1]
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 130
    assert err == "ditbench: interrupted; run again, train, compare, ablate go on from the last checkpoint\n"
    assert is_gone(worker)
    assert short_run(place, "faulty").status() == "running"


# -- side by side ---------------------------------------------------------------------------------------------------


def test_cells_side_by_side_give_the_same_records(
    place: Place, finished: FinishedStudy, ditbench: Ditbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "write_and_print", lambda study: None)
    words = place.words("compare", *STUDY, "--output.mlflow", "false", "--runtime.threads", "2", "--jobs", "2")
    status, out, err = ditbench(*words)
    assert (status, err) == (0, "")
    workers = set()
    for number, cell in enumerate(("sit", "vae_repa"), start=1):
        assert f"cell {number} of 2: {cell} seed 0: finished" in out
        folder, alone = RunFolder(place.runs / "small" / cell / "seed0"), RunFolder(finished.run(cell))
        assert same_records(folder, alone)
        manifest = folder.manifest()
        assert (manifest["config"]["runtime"]["threads"], manifest["environment"]["threads"]) == (1, 1)
        assert manifest["shared_device"]
        workers |= set(begins(folder))
    assert len(workers) == 2


def test_a_killed_worker_is_a_failed_cell_and_the_same_command_mends_it(
    place: Place, faults: Faults, ditbench: Ditbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "write_and_print", lambda study: None)
    faults.are("kill")
    status, out, err = ditbench(*place.words("compare", *SHORT))
    message = "its process was killed by SIGKILL (often: out of memory)"
    assert (status, err) == (1, f"failed: faulty/seed0: {message}\n")
    assert f"cell 1 of 2: faulty seed 0: failed: {message}" in out
    assert "cell 2 of 2: sit seed 0: finished" in out
    faulty, sit = short_run(place, "faulty"), short_run(place, "sit")
    detail = faulty.manifest()["status_detail"]
    assert (faulty.status(), detail["error"], detail["log"], detail["trace"]) == ("failed", message, "log.txt", "")
    assert len(begins(faulty)) == 1

    faults.are("")
    status, _, err = ditbench(*place.words("compare", *SHORT))
    assert (status, err) == (0, "")
    assert faults.steps() - {0} == {3, 4, 5}
    assert len(begins(faulty)) == 2
    assert same_records(faulty, sit, "terms", "gradient_norms", "samples", "diagnostics")


ONE = (
    *("--study", "one", "--budget.amount", "6", "--evaluation.points", "2", "--output.log_every", "1"),
    *("--output.mlflow", "false", "--method"),
)


def test_a_run_that_had_company_on_its_device_stays_marked(
    place: Place, faults: Faults, ditbench: Ditbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "registry", lambda: place.folder / "devices")
    words = place.words("train", "--runtime.device", "cpu", *ONE)
    faults.are("raise")
    with leases.presence("cpu", "another run"):
        status, _, err = ditbench(*words, "faulty")
    assert (status, err) == (1, "failed: faulty/seed0: RuntimeError: no space [left] on the device\n")
    run, alone = (RunFolder(place.runs / "one" / cell / "seed0") for cell in ("faulty", "sit"))
    assert (run.status(), run.manifest()["shared_device"]) == ("failed", True)
    assert "no space [left]" in (run.path / "log.txt").read_text()

    faults.are("")
    for method in ("faulty", "sit"):
        assert ditbench(*words, method)[::2] == (0, "")
    assert (run.status(), run.manifest()["shared_device"]) == ("finished", True)
    assert not alone.manifest()["shared_device"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--jobs", "-1"], "--jobs is -1: give the number of cells to run side by side"),
        (["--jobs", "two"], "jobs is two: give a whole number"),
        (["--gpus_per_cell", "0"], "--gpus_per_cell is 0: give 1 or more"),
        (["--gpus_per_cell", "2"], "--gpus_per_cell is 2: this command sees 0 CUDA devices"),
        (["--jobs", "2", "--budget.unit", "seconds"], "--jobs is 2 with budget.unit seconds: cells side by side slow"),
    ],
)
def test_wrong_numbers(place: Place, ditbench: Ditbench, words: list[str], expected: str) -> None:
    status, out, err = ditbench(*place.words("compare", *STUDY, "--runtime.device", "cpu"), *words)
    assert (status, out) == (2, "")
    assert err.startswith(f"ditbench: {expected}")
    assert not place.runs.exists()


def test_launchers_take_no_jobs(place: Place, ditbench: Ditbench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    status, _, err = ditbench(*place.words("compare", *STUDY, "--jobs", "2"))
    assert status == 2
    assert err.startswith("ditbench: --jobs is 2 and --gpus_per_cell is 1: under torchrun or accelerate launch ")


# -- several processes a cell -----------------------------------------------------------------------------------------

TOGETHER = (
    *("--study", "small", "--methods", "sit,vae_repa", "--seeds", "0", "--budget.amount", "6"),
    *("--evaluation.points", "2", "--output.log_every", "1", "--output.checkpoint_every", "2"),
    *("--output.mlflow", "false", "--runtime.device", "cpu"),
)
"""The study of `finished`."""


def assert_trained_together(place: Place, finished: FinishedStudy) -> None:
    """The records are those of one process, up to the order of sums, and were written once."""
    for cell in ("sit", "vae_repa"):
        folder, alone = RunFolder(place.runs / "small" / cell / "seed0"), RunFolder(finished.run(cell))
        assert folder.status() == "finished"
        for name in ("train", "eval"):
            ours, theirs = folder.lines(name), alone.lines(name)
            assert [line["step"] for line in ours] == [line["step"] for line in theirs]
            for mine, other in zip(ours, theirs, strict=True):
                assert mine.get("trace") == other.get("trace")
                assert mine.get("loss", 0) == pytest.approx(other.get("loss", 0), rel=1e-4)
        assert folder.manifest()["digests"] == alone.manifest()["digests"]


def test_a_worker_of_two_processes(place: Place, finished: FinishedStudy, capsys: pytest.CaptureFixture[str]) -> None:
    """As `--gpus_per_cell 2` has them, on the CPU."""
    parser = command_parser()
    asked = comparison(parser, parse(parser, place.words("compare", *TOGETHER)[1:]))
    assert run_in_workers(asked, WorkerPlan(workers=1, processes=2)) == []
    assert capsys.readouterr().out.count("cell 1 of 2: sit seed 0: finished") == 1
    assert_trained_together(place, finished)
    # Both processes of a cell note in its log that they begin.
    assert len(set(begins(RunFolder(place.runs / "small" / "sit" / "seed0")))) == 2


LAUNCHERS = {
    "torchrun": ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"],
    # On a machine without GPUs this means several processes on the CPU; with --cpu accelerate starts a single one.
    "accelerate": ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--main_process_port=0"],
}


def launched(launcher: str, place: Place, *words: str) -> "subprocess.CompletedProcess[str]":
    return run_process([sys.executable, *LAUNCHERS[launcher], "-m", "studies.cli", *words], place.folder)


@pytest.mark.full
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_launchers_start_the_command_unchanged(place: Place, finished: FinishedStudy, launcher: str) -> None:
    result = launched(launcher, place, *place.words("compare", *TOGETHER))
    assert result.returncode == 0, result.stderr
    for number, cell in enumerate(("sit", "vae_repa"), start=1):
        assert result.stdout.count(f"cell {number} of 2: {cell} seed 0: finished") == 1
    assert result.stdout.count("report: ") == 1
    assert_trained_together(place, finished)
    assert len(set(begins(RunFolder(place.runs / "small" / "vae_repa" / "seed0")))) == 2


@pytest.mark.full
def test_a_failed_process_ends_its_group(place: Place, faults: Faults) -> None:
    """One of two processes breaks; the other would wait for it for ever."""
    faults.are("raise on rank 1")
    result = launched("torchrun", place, *place.words("train", "--runtime.device", "cpu", *ONE, "faulty"))
    assert result.returncode == 1
    run = RunFolder(place.runs / "one" / "faulty" / "seed0")
    assert (run.status(), run.manifest()["status_detail"]["error"]) == (
        "failed",
        "RuntimeError: rank 1 is out of order",
    )
    assert "rank 1 is out of order" in (run.path / "log.txt").read_text()
