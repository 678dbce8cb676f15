"""Progress as plain lines, and as a live line on a terminal: cell k of n, step, loss, images/s, time left."""

import io
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest

from harness.config import BudgetConfig, DataConfig, RunConfig
from harness.training.trainer import Event
from studies.configs.cells import Comparison
from studies.terminal import display
from studies.terminal.display import Display, duration

BUDGET = 100
CONFIG = RunConfig(data=DataConfig(name="digits"), method="sit", budget=BudgetConfig(amount=BUDGET))
METRICS = {
    "fd_efficientnet_lite0_898": 12.345678,
    "fd_pixels_898": 3.0,
    "class_accuracy_898": 0.8125,
    "recall_x_898": 0.1,
}


class Clock:
    """Stands in for the module `time`."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(display, "time", clock)
    return clock


@pytest.fixture
def lines(capsys: pytest.CaptureFixture[str]) -> Callable[[], list[str]]:
    """Lines printed since the last call."""
    return lambda: capsys.readouterr().out.splitlines()


def named(*cells: str, seed: int = 0) -> Comparison:
    """These cells at a seed."""
    return comparison([replace(CONFIG, cell=cell) for cell in cells], seed)


def comparison(cells: Sequence[RunConfig], seed: int = 0) -> Comparison:
    return Comparison(cells=tuple(cells), seeds=(seed,), baseline=cells[0].cell)


def train_event(step: int) -> Event:
    return Event("train", step, {"loss": 1.25, "images_per_s": 640.4}, step / BUDGET)


def steps(shown: Display, clock: Clock, number: int, start: int, stop: int, seconds: float) -> None:
    for step in range(start, stop):
        clock.now += seconds
        shown.event(number, Event("step", step + 1, {}, (step + 1) / BUDGET))


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(0, "0:00"), (59.4, "0:59"), (59.6, "1:00"), (123, "2:03"), (3600, "1:00:00"), (3723, "1:02:03")],
)
def test_durations(seconds: float, expected: str) -> None:
    assert duration(seconds) == expected


def test_plain_lines_of_a_run(clock: Clock, lines: Callable[[], list[str]]) -> None:
    with Display(named(*"ab", "repa,block=2", *"defgh", seed=1)) as shown:
        shown.begin(3)
        shown.event(3, Event("start", 0))
        clock.now = 20
        steps(shown, clock, 3, 0, 20, 0.5)
        shown.event(3, train_event(20))
        shown.event(3, Event("eval", 20, {"metrics": METRICS}, 0.2))
        shown.event(3, Event("end", 100, {"status": "finished"}, 1.0))
    name = "cell 3 of 8: repa,block=2 seed 1"
    # 20 steps in 30 s; 8 runs of 100 steps less 20 remain: 780 x 1.5 s = 19:30
    assert lines() == [
        f"{name}: step 20 of 100  loss 1.2500  640 images/s  19:30 left",
        f"{name}: step 20 of 100  fd_efficientnet_lite0_898 12.35  class_accuracy_898 0.8125",
        f"{name}: finished",
    ]


def test_a_budget_in_another_unit_is_shown_beside_the_step(clock: Clock, lines: Callable[[], list[str]]) -> None:
    cell = replace(CONFIG, cell="a", budget=BudgetConfig(unit="train_gflops", amount=2500.0))
    with Display(comparison([cell])) as shown:
        shown.begin(1)
        shown.event(1, Event("eval", 30, {"metrics": {"kd_x_898": 1.0, "fd_x_898": 2.0}}, 0.5))
    assert lines() == ["cell 1 of 1: a seed 0: step 30, 1,250 of 2,500 train_gflops  fd_x_898 2"]


def test_what_a_run_has_to_say_at_its_start(clock: Clock, lines: Callable[[], list[str]]) -> None:
    with Display(named("a")) as shown:
        shown.begin(1)
        shown.event(1, Event("start", 3, {"notices": ["step_00000004 is damaged"]}))
    assert lines() == ["cell 1 of 1: a seed 0: step_00000004 is damaged"]


def test_training_lines_come_at_most_every_ten_seconds(clock: Clock, lines: Callable[[], list[str]]) -> None:
    with Display(named("a")) as shown:
        shown.begin(1)
        for step in range(1, 31):
            steps(shown, clock, 1, step - 1, step, 1.0)
            shown.event(1, train_event(step))
    printed = [line.split(": ")[2].split(" of")[0] for line in lines()]
    assert printed == ["step 11", "step 22"]


def test_skipped_and_resumed_steps_do_not_shorten_the_time_left(clock: Clock, lines: Callable[[], list[str]]) -> None:
    with Display(named("a", "b", "c")) as shown:
        shown.over(1, "finished")  # by an earlier command
        shown.begin(2)
        shown.event(2, Event("start", 60, {}, 0.6))  # went on from its checkpoint
        steps(shown, clock, 2, 60, 80, 1.0)
        shown.event(2, train_event(80))
    # 20 steps took 20 s; 20 of this run and 100 of the next remain
    assert lines()[-1].endswith("2:00 left")


def test_steps_that_are_left_out_count_with_the_next_one(clock: Clock, lines: Callable[[], list[str]]) -> None:
    with Display(named("a")) as shown:
        shown.begin(1)
        shown.event(1, Event("start", 0))
        clock.now = 20
        shown.event(1, train_event(20))
    assert lines()[-1].endswith("1:20 left")


def test_no_time_left_before_the_first_step(clock: Clock, lines: Callable[[], list[str]]) -> None:
    with Display(named("a")) as shown:
        shown.begin(1)
        shown.event(1, Event("start", 99, {}, 0.99))
        clock.now = 100
        shown.event(1, train_event(99))
    assert lines()[-1].endswith("? left")


def test_a_failed_run_is_said_and_counts_as_over(clock: Clock, lines: Callable[[], list[str]]) -> None:
    with Display(named("a", "b")) as shown:
        shown.begin(1)
        steps(shown, clock, 1, 0, 10, 1.0)
        shown.failed(1, "RuntimeError: [Errno 28] no space [red]")
        shown.begin(2)
        steps(shown, clock, 2, 0, 30, 1.0)
        shown.event(2, train_event(30))
    failed, trained = lines()
    assert failed == "cell 1 of 2: a seed 0: failed: RuntimeError: [Errno 28] no space [red]"
    assert trained.endswith("1:10 left")  # 40 steps took 40 s, 70 remain


def test_runs_side_by_side_share_the_time_left(clock: Clock, lines: Callable[[], list[str]]) -> None:
    with Display(named("a", "b", "c")) as shown:
        for number in (1, 2):
            shown.begin(number)
            shown.event(number, Event("start", 0))
        clock.now = 30
        shown.event(1, Event("step", 20, {}, 0.2))
        shown.event(2, train_event(40))
    # 60 steps in 30 s; of 300 steps 240 remain
    assert lines() == ["cell 2 of 3: b seed 0: step 40 of 100  loss 1.2500  640 images/s  2:00 left"]


def test_a_run_of_another_command_is_said(clock: Clock, lines: Callable[[], list[str]]) -> None:
    with Display(named("a", "b")) as shown:
        shown.waits(1, "host, process 12")
        shown.waits(2, "")
    assert lines() == [
        "cell 1 of 2: a seed 0: trained by another command (host, process 12)",
        "cell 2 of 2: b seed 0: trained by another command",
    ]


def test_preparation_is_reported_now_and_then_and_at_its_end(clock: Clock, lines: Callable[[], list[str]]) -> None:
    with Display() as shown:
        for done in range(1, 26):
            clock.now += 1
            shown.report("latents", done, 25)
    assert lines() == ["latents: 11 of 25", "latents: 22 of 25", "latents: 25 of 25"]


@pytest.mark.parametrize("live", [False, True])
def test_a_notice_stays_on_the_screen(
    clock: Clock, lines: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch, live: bool
) -> None:
    if live:
        monkeypatch.setattr(sys, "stdout", Terminal())
    with Display() as shown:
        shown.report("shard-00000.npy is made again", 1, 1)
        shown.report("latents", 1, 25)
    printed = sys.stdout.getvalue().splitlines() if live else lines()
    assert any(line.endswith("shard-00000.npy is made again") for line in printed), printed


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_one_live_line_a_run(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setenv("TERM", "xterm-256color")
    with Display(named("a", "b")) as shown:
        shown.report("latents", 1, 2)
        assert [task.description for task in shown._progress.tasks] == ["latents"]
        shown.report("latents", 2, 2)
        for number in (1, 2):
            shown.begin(number)
            shown.event(number, Event("start", 0))
        steps(shown, clock, 1, 0, 10, 1.0)
        shown.event(1, train_event(10))
        shown.event(2, Event("step", 30, {}, 0.3))
        first, second = shown._progress.tasks
        assert (first.description, first.completed, first.total) == ("cell 1 of 2: a seed 0", 10, BUDGET)
        assert first.fields["facts"] == "loss 1.2500  640 images/s  3:10 left"
        # 40 steps in 10 s; of 200 steps 160 remain
        assert (second.description, second.completed) == ("cell 2 of 2: b seed 0", 30)
        assert second.fields["facts"].strip() == "0:40 left"
        shown.event(1, Event("end", BUDGET, {"status": "diverged"}, 1.0))
        assert [task.description for task in shown._progress.tasks] == ["cell 2 of 2: b seed 0"]
    assert "cell 1 of 2: a seed 0: diverged" in terminal.getvalue()
    assert "step 10 of 100" not in terminal.getvalue(), "training is the live line, not one more line each time"
