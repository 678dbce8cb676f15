"""Whose turn a run is, what a worker says of runs that others ended, and how failures are put on record."""

import os
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from harness.config import DataConfig, OutputConfig, RunConfig
from harness.errors import StorageError, UserError
from harness.records.locks import holder
from harness.records.run_folder import RunFolder
from harness.training.trainer import Event
from studies.agenda import Context, Job
from studies.configs.cells import Comparison
from studies.dispatch.board import Board, Failure
from studies.dispatch.leases import claim
from studies.dispatch.logs import logged, one_line, record_failure
from studies.dispatch.messages import Begins, Failed, Happened, Message, Over, Waits
from studies.dispatch.turns import NoJob, Task, Turns
from studies.runs.folders import folder_of, lease_of
from studies.runs.manifest import first_manifest
from studies.terminal.display import Display

NOW = datetime.now(UTC)


@pytest.fixture
def asked(tmp_path: Path) -> Comparison:
    config = RunConfig(data=DataConfig(name="digits"), output=OutputConfig(runs=str(tmp_path), mlflow=False))
    return Comparison(cells=tuple(replace(config, cell=cell) for cell in "abc"), seeds=(0,), baseline="a")


@pytest.fixture
def told() -> list[Message]:
    return []


@pytest.fixture
def turns(asked: Comparison, told: list[Message]) -> Callable[..., Turns]:
    """`turns(**fields)`: a worker's turns, that says what it does to `told`."""
    return lambda **fields: Turns(Task(agenda=asked, started=NOW, tell=told.append, **fields))


def record(config: RunConfig, **fields: Any) -> RunFolder:
    """Put a run on record."""
    folder = folder_of(config)
    folder.create()
    folder.write_manifest({**first_manifest(config, Context(baseline="a")), **fields})
    return folder


def failure(ended: datetime, error: str = "RuntimeError: boom") -> dict[str, Any]:
    return {"status": "failed", "status_detail": {"error": error, "ended": ended.isoformat()}}


def finish(worker: Turns, job: Job) -> None:
    with worker.finishing(job):
        record(job.config, status="finished")


# -- turns ----------------------------------------------------------------------------------------------------------


def test_runs_come_in_order_and_are_let_go(asked: Comparison, turns: Callable[..., Turns], told: list[Message]) -> None:
    worker = turns()
    for number, config in enumerate(asked.runs(), start=1):
        assert worker.take() == asked.job(number)
        assert claim(lease_of(config)) is None, "held while it is trained"
        finish(worker, asked.job(number))
        lease = claim(lease_of(config))
        assert lease is not None
        lease.release()
    assert worker.take() == NoJob.ALL_OVER
    assert told == [Begins(1), Begins(2), Begins(3)]


def test_a_run_is_let_go_when_it_breaks(asked: Comparison, turns: Callable[..., Turns]) -> None:
    worker = turns()
    assert worker.take() == asked.job(1)
    with pytest.raises(KeyboardInterrupt), worker.finishing(asked.job(1)):
        raise KeyboardInterrupt
    lease = claim(lease_of(asked.runs()[0]))
    assert lease is not None
    lease.release()
    assert worker.take() == asked.job(2), "tried by this worker"


def test_what_is_over_is_said_and_left_alone(
    asked: Comparison, turns: Callable[..., Turns], told: list[Message]
) -> None:
    first, second, third = asked.runs()
    record(first, status="diverged")
    record(second, **failure(NOW + timedelta(seconds=1)))
    record(third, status="finished")
    assert turns().take() == NoJob.ALL_OVER
    assert told == [Over(1, "diverged"), Failed(2, "RuntimeError: boom"), Over(3, "finished")]


def test_what_failed_before_the_command_is_tried_again(asked: Comparison, turns: Callable[..., Turns]) -> None:
    first, second, _ = asked.runs()
    record(first, **failure(NOW - timedelta(seconds=1)))
    record(second, status="running")
    worker = turns()
    for number in (1, 2, 3):
        assert worker.take() == asked.job(number)
        finish(worker, asked.job(number))


def test_what_the_command_knows_to_be_over_is_left_out(
    asked: Comparison, turns: Callable[..., Turns], told: list[Message]
) -> None:
    assert turns(over=(1, 3)).take() == asked.job(2)
    assert told == [Begins(2)]


def test_what_others_hold_is_waited_for(asked: Comparison, turns: Callable[..., Turns], told: list[Message]) -> None:
    """Until they bring it to its end, or leave it."""
    first, second, _ = asked.runs()
    leases = [claim(lease_of(config)) for config in (first, second)]
    worker = turns()
    assert worker.take() == asked.job(3)
    finish(worker, asked.job(3))
    assert [worker.take() for _ in range(4)] == [NoJob.WAIT] * 4
    by = f"{os.uname().nodename}, process {os.getpid()}"
    assert told == [Begins(3), Waits(((1, by), (2, by)))], "said once"
    record(first, status="finished")
    assert worker.take() == NoJob.WAIT
    for lease in leases:
        assert lease is not None
        lease.release()
    assert worker.take() == asked.job(2), "its holder left it"
    assert told[2:] == [Over(1, "finished"), Begins(2)]
    assert holder(lease_of(first)) == ""


def test_a_command_may_leave_to_others_what_they_hold(
    asked: Comparison, turns: Callable[..., Turns], told: list[Message]
) -> None:
    """It looks twice, so that it says who they are, and takes what is free before it goes."""
    first, second, _ = asked.runs()
    leases = [claim(lease_of(config)) for config in (first, second)]
    worker = turns(waits=False)
    assert worker.take() == asked.job(3)
    finish(worker, asked.job(3))
    assert [worker.take(), worker.take()] == [NoJob.WAIT, NoJob.ALL_OVER]
    by = f"{os.uname().nodename}, process {os.getpid()}"
    assert told == [Begins(3), Waits(((1, by), (2, by)))]
    for lease in leases:
        assert lease is not None
        lease.release()


def test_a_run_that_ends_between_look_and_claim_is_not_trained(
    asked: Comparison, turns: Callable[..., Turns], told: list[Message], monkeypatch: pytest.MonkeyPatch
) -> None:
    def late(path: Path) -> Any:
        record(asked.runs()[0], status="finished")
        return claim(path)

    monkeypatch.setattr("studies.dispatch.turns.claim", late)
    assert turns(over=(2, 3)).take() == NoJob.ALL_OVER
    assert told == [Over(1, "finished")]
    lease = claim(lease_of(asked.runs()[0]))
    assert lease is not None, "it was let go"
    lease.release()


def test_another_baseline_needs_the_lease_and_no_training(
    asked: Comparison, turns: Callable[..., Turns], told: list[Message]
) -> None:
    runs = asked.runs()
    folders = [record(config, status="finished", baseline="b") for config in runs]
    lease = claim(lease_of(runs[2]))
    assert lease is not None
    worker = turns()
    assert worker.take() == NoJob.WAIT
    lease.release()
    assert worker.take() == NoJob.ALL_OVER
    assert [folder.manifest()["baseline"] for folder in folders] == ["a"] * 3
    assert told == [Over(number, "finished") for number in (1, 2, 3)]


def test_a_run_that_cannot_be_claimed_is_a_failure(
    asked: Comparison, turns: Callable[..., Turns], told: list[Message]
) -> None:
    Path(asked.cells[0].output.runs, asked.cells[0].study).write_text("a file in the way")
    assert turns().take() == NoJob.ALL_OVER
    assert [type(message) for message in told] == [Failed] * 3
    assert "output.runs: cannot write to " in str(told[0])


def test_a_full_disk_holds_no_lease(
    asked: Comparison, turns: Callable[..., Turns], told: list[Message], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found when another baseline is to be put on record."""
    run = asked.runs()[0]
    record(run, status="finished", baseline="b")

    def full(self: RunFolder, **fields: Any) -> None:
        raise StorageError(28, "No space left on device", "manifest.json")

    monkeypatch.setattr(RunFolder, "update_manifest", full)
    assert turns(over=(2, 3)).take() == NoJob.ALL_OVER
    assert [type(message) for message in told] == [Failed]
    assert "cannot write manifest.json (No space left on device)" in str(told[0])
    lease = claim(lease_of(run))
    assert lease is not None
    lease.release()


# -- failures -------------------------------------------------------------------------------------------------------


def test_a_failure_goes_on_record_once(asked: Comparison) -> None:
    config = asked.runs()[0]
    folder = record(config)
    record_failure(config, "first", "trace", NOW)
    record_failure(config, "second, of another process of this attempt", "", NOW)
    detail = folder.manifest()["status_detail"]
    assert (folder.status(), detail["error"], detail["trace"], detail["log"]) == ("failed", "first", "trace", "log.txt")
    assert datetime.fromisoformat(detail["ended"]) >= NOW
    record_failure(config, "of a later attempt", "", datetime.now(UTC))
    assert folder.manifest()["status_detail"]["error"] == "of a later attempt"


def test_a_failure_that_cannot_be_recorded_hides_nothing(asked: Comparison, monkeypatch: pytest.MonkeyPatch) -> None:
    config = asked.runs()[0]
    record_failure(config, "before there is a manifest", "", NOW)
    assert not folder_of(config).exists()
    folder = record(config)

    def full(self: RunFolder, manifest: Any) -> None:
        raise StorageError(28, "No space left on device", "manifest.json")

    with monkeypatch.context() as patched:
        patched.setattr(RunFolder, "write_manifest", full)
        record_failure(config, "the disk is full", "", NOW)
    assert folder.status() == "running"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (UserError("data.path is\n wrong"), "data.path is wrong"),
        (RuntimeError("no\nroom"), "RuntimeError: no room"),
        (KeyError("a"), "KeyError: 'a'"),
    ],
)
def test_an_error_is_one_line(error: Exception, line: str) -> None:
    assert one_line(error) == line


# -- the log --------------------------------------------------------------------------------------------------------


def test_a_log_holds_what_was_printed_and_the_trace(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "log.txt"
    with pytest.raises(RuntimeError), logged(path, captured=True):
        os.write(1, b"from C\n")
        os.system("echo from a command >&2")
        raise RuntimeError("boom")
    with logged(path, captured=False):
        os.write(1, b"shown\n")
    lines = path.read_text().splitlines()
    here = f"{os.uname().nodename} process {os.getpid()}"
    assert lines[0].endswith(f" {here}: begins")
    assert lines[1:3] == ["from C", "from a command"]
    assert lines[3] == "Traceback (most recent call last):"
    assert lines[-4:-2][0] == "RuntimeError: boom"
    assert [line.partition(" ")[2] for line in lines[-3:]] == [f"{here}: ends", f"{here}: begins", f"{here}: ends"]
    assert capfd.readouterr() == ("shown\n", "")


# -- what the command knows -------------------------------------------------------------------------------------------


def test_what_several_workers_say_is_shown_once(asked: Comparison, capsys: pytest.CaptureFixture[str]) -> None:
    with Display(asked) as display:
        board = Board(asked, display)
        board.hear(Begins(1))
        board.hear(Happened(1, Event("start", 0)))
        board.hear(Waits(((1, "here"), (2, "host, process 3"))))
        board.hear(Happened(1, Event("end", 6, {"status": "finished"}, 1.0)))
        board.hear(Over(1, "finished"))
        for _ in range(2):
            board.hear(Failed(2, "boom"))
        assert not board.all_over
        board.hear(Over(3, "diverged"))
    assert board.all_over
    assert board.failures() == [Failure("b/seed0", "boom")]
    assert capsys.readouterr().out.splitlines() == [
        "cell 2 of 3: b seed 0: trained by another command (host, process 3)",
        "cell 1 of 3: a seed 0: finished",
        "cell 2 of 3: b seed 0: failed: boom",
        "cell 3 of 3: c seed 0: diverged",
    ]
