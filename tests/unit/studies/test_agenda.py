"""Turns on an agenda that decides its runs late, settles some, lets some wait, and is told of every end."""

from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

import pytest

from harness.config import DataConfig, OutputConfig, RunConfig
from harness.errors import UserError
from harness.training.trainer import Event
from studies.agenda import Agenda, Context, Job
from studies.configs.cells import Comparison
from studies.dispatch.board import Board, Failure
from studies.dispatch.crew import Crew
from studies.dispatch.leases import claim
from studies.dispatch.messages import Begins, Failed, Happened, Left, Message, Over
from studies.dispatch.plan import WorkerPlan, make_plan
from studies.dispatch.turns import NoJob, Task, Turns
from studies.dispatch.work import noted_end
from studies.runs.folders import folder_of, lease_of
from studies.runs.run import may_be_stopped
from studies.terminal.display import Display
from tests.unit.studies.ablation.ablation_factory import start


class Late(Agenda):
    """Three runs: the first is known, the second is decided when it is due, the third waits for the first."""

    seeds = (0,)

    def __init__(self, folder: Path) -> None:
        config = RunConfig(data=DataConfig(name="digits"), output=OutputConfig(runs=str(folder), mlflow=False))
        self.configs = [replace(config, cell=cell) for cell in "abc"]
        self.cells = tuple(self.configs[:1])
        self.decided = {1, 3}
        self.calls: list[Any] = []
        self.refusal = ""
        self.needless = ""

    @property
    def total(self) -> int:
        return 3

    def job(self, number: int) -> Job | None:
        return self.decided_job(number) if number in self.decided else None

    def decided_job(self, number: int) -> Job:
        return Job(number, self.configs[number - 1], Context(baseline="sit"))

    def with_threads(self, threads: int) -> Self:
        return self

    def settled(self, job: Job) -> str:
        return self.needless if job.number == 3 else ""

    def due(self, number: int) -> Job | None:
        if number == 2 and 2 not in self.decided:
            self.calls.append("decided")
            self.decided.add(2)
        is_due = number != 3 or folder_of(self.configs[0]).status() == "finished"
        return self.job(number) if is_due else None

    def begins(self, job: Job) -> str:
        if self.refusal:
            raise UserError(self.refusal)
        self.calls.append(("begins", job.number))
        return f"notice {job.number}"

    def ended(self, job: Job) -> None:
        if self.refusal:
            raise UserError(self.refusal)
        self.calls.append(("ended", job.number))


@pytest.fixture
def agenda(tmp_path: Path) -> Late:
    return Late(tmp_path)


@pytest.fixture
def told() -> list[Message]:
    return []


@pytest.fixture
def turns(agenda: Late, told: list[Message]) -> Callable[..., Turns]:
    def open_turns(check: Callable[[RunConfig], None] = lambda config: None) -> Turns:
        return Turns(Task(agenda=agenda, started=datetime.now(UTC), tell=told.append), check)

    return open_turns


def finish(worker: Turns, agenda: Late, number: int) -> None:
    with worker.finishing(agenda.decided_job(number)):
        start(agenda.configs[number - 1], "finished")


def test_a_run_is_decided_when_no_run_before_it_is_free(
    agenda: Late, turns: Callable[..., Turns], told: list[Message]
) -> None:
    checked: list[str] = []
    worker, other = turns(), turns(lambda config: checked.append(config.label))
    assert worker.take() == agenda.decided_job(1)
    assert (agenda.job(2), checked) == (None, [])
    assert other.take() == agenda.decided_job(2), "the first is taken, and the third waits for it"
    assert checked == ["b"], "known too late to be checked with the others"
    assert agenda.calls == [("begins", 1), "decided", ("begins", 2)]
    assert told == [Begins(1, "notice 1"), Begins(2, "notice 2")]
    finish(other, agenda, 2)
    assert other.take() == NoJob.WAIT
    finish(worker, agenda, 1)
    assert other.take() == agenda.decided_job(3)
    finish(other, agenda, 3)
    assert other.take() == NoJob.ALL_OVER
    assert told[2:] == [Over(1, "finished"), Begins(3, "notice 3")]
    assert worker.take() == NoJob.ALL_OVER


def test_what_is_found_over_is_told_to_the_agenda(agenda: Late, turns: Callable[..., Turns]) -> None:
    for config in agenda.configs:
        start(config, "pruned" if config.label == "b" else "finished")
    assert turns().take() == NoJob.ALL_OVER
    assert agenda.calls == [("ended", 1), "decided", ("ended", 2), ("ended", 3)]


def test_a_run_that_is_never_needed_is_over(agenda: Late, turns: Callable[..., Turns], told: list[Message]) -> None:
    agenda.needless = "left out, pruned at seed 0"
    worker = turns()
    for number in (1, 2):
        assert worker.take() == agenda.decided_job(number)
        finish(worker, agenda, number)
    assert worker.take() == NoJob.ALL_OVER
    assert told[-1] == Over(3, "left out, pruned at seed 0")


def test_what_waits_for_a_run_that_failed_is_left_out(
    agenda: Late, turns: Callable[..., Turns], told: list[Message]
) -> None:
    worker = turns()
    for number in (1, 2):
        assert worker.take() == agenda.decided_job(number)
        with worker.finishing(agenda.decided_job(number)):
            pass
    assert worker.take() == NoJob.ALL_OVER
    assert told[-1] == Over(3, "left out, as a run that it waits for failed")


def test_a_refusal_is_a_failure_and_holds_no_lease(
    agenda: Late, turns: Callable[..., Turns], told: list[Message]
) -> None:
    agenda.refusal = "the storage is away"
    assert turns().take() == NoJob.ALL_OVER
    assert told[:2] == [Failed(1, "the storage is away"), Failed(2, "the storage is away")]
    lease = claim(lease_of(agenda.configs[0]))
    assert lease is not None
    lease.release()


def test_a_late_cell_may_be_refused(agenda: Late, turns: Callable[..., Turns], told: list[Message]) -> None:
    def refuse(config: RunConfig) -> None:
        if config.label == "b":
            raise UserError("b needs too much memory")

    worker = turns(refuse)
    assert worker.take() == agenda.decided_job(1)
    finish(worker, agenda, 1)
    assert worker.take() == agenda.decided_job(3)
    assert Failed(2, "b needs too much memory") in told
    assert claim(lease_of(agenda.configs[1])) is not None


def test_an_end_that_cannot_be_noted_is_a_failure(agenda: Late) -> None:
    event = Event("end", 6, {"status": "finished"}, 1.0)
    assert noted_end(agenda, agenda.decided_job(1), event) == Happened(1, event)
    agenda.refusal = "the storage is away"
    assert noted_end(agenda, agenda.decided_job(1), event) == Failed(1, "the storage is away")


@pytest.mark.parametrize(
    ("kind", "point", "bad_images", "open_"),
    [("eval", 1, 0, True), ("eval", 8, 0, False), ("eval", 1, 2, False), ("train", 1, 0, False)],
)
def test_when_a_run_may_be_stopped(agenda: Late, kind: str, point: int, bad_images: int, open_: bool) -> None:
    """After an evaluation that is not its last, unless it diverges there."""
    event = Event(kind, 6, {"point": point, "bad_images": bad_images})
    assert may_be_stopped(event, agenda.configs[0]) is open_


# -- the command ----------------------------------------------------------------------------------------------------


def test_runs_that_are_not_decided_are_left_to_do(agenda: Late) -> None:
    assert make_plan(agenda, 3, 1)[1].workers == 3
    start(agenda.configs[0], "pruned")
    assert make_plan(agenda, 3, 1)[1].workers == 2
    with pytest.raises(UserError, match=r"^--workers is -1: "):
        make_plan(agenda, -1, 1, "--workers")


def test_a_process_that_died_is_replaced_once(agenda: Late, capsys: pytest.CaptureFixture[str]) -> None:
    agenda.retakes = 1
    folder = start(agenda.configs[0])
    with Display(agenda) as display:
        board = Board(agenda, display)
        crew = Crew(agenda, WorkerPlan(workers=1), board, datetime.now(UTC))
        for _ in range(2):
            board.hear(Begins(1, "taken over from host:3, which is gone"))
            crew._record_death(1, "its process was killed by SIGKILL")
        assert folder.status() == "failed"
        board.hear(Begins(2))
    assert board.over == {1: "its process was killed by SIGKILL"}
    assert capsys.readouterr().out.splitlines() == [
        "cell 1 of 3: a seed 0: taken over from host:3, which is gone",
        "cell 1 of 3: a seed 0: its process was killed by SIGKILL; it is taken up again",
        "cell 1 of 3: a seed 0: taken over from host:3, which is gone",
        "cell 1 of 3: a seed 0: failed: its process was killed by SIGKILL",
    ]


def test_a_run_that_was_left_is_not_over(agenda: Late) -> None:
    with Display(agenda) as display:
        board = Board(agenda, display)
        board.hear(Begins(1))
        board.hear(Left(1, "killed"))
    assert board.over == {}


def test_the_failure_of_a_run_that_nobody_knows_counts(agenda: Late) -> None:
    """The storage was away when it was to be decided."""
    with Display(agenda) as display:
        board = Board(agenda, display)
        board.hear(Failed(2, "the storage is away"))
    assert board.failures() == [Failure("run 2, which was not decided", "the storage is away")]


# -- comparisons ----------------------------------------------------------------------------------------------------


def test_a_comparison_is_an_agenda(agenda: Late) -> None:
    asked = Comparison(cells=tuple(agenda.configs), seeds=(3, 5), baseline="b", notes={"c": {"tuning": {"study": "s"}}})
    runs, jobs = asked.runs(), [asked.job(number) for number in range(1, 7)]
    assert asked.total == len(runs) == 6
    assert asked.jobs() == jobs
    assert [job.config for job in jobs] == runs
    assert [job.number for job in jobs] == list(range(1, 7))
    tuned = {"tuning": {"study": "s"}}
    assert [job.context.facts for job in jobs] == [{}, {}, tuned, {}, {}, tuned]
    assert {job.context.baseline for job in jobs} == {"b"}
    first = jobs[0]
    assert (asked.retakes, asked.settled(first), asked.due(1), asked.begins(first)) == (0, "", first, "")
    assert not asked.watch(first, Event("eval", 6, {"point": 1, "bad_images": 0}))
    assert {cell.runtime.threads for cell in asked.with_threads(2).cells} == {2}
