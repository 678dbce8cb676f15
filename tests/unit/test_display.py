"""Progress as plain lines, and as a live line on a terminal: cell k of n, step, loss, images/s, time left."""

import io
import sys
from collections.abc import Callable
from dataclasses import replace

import pytest

from harness.config import BudgetConfig, DataConfig, RunConfig
from harness.trainer import Event
from studies import display
from studies.display import Display, duration

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


def train_event(step: int) -> Event:
    return Event("train", step, {"loss": 1.25, "images_per_s": 640.4})


def steps(shown: Display, clock: Clock, start: int, stop: int, seconds: float) -> None:
    for step in range(start, stop):
        clock.now += seconds
        shown.event(Event("step", step + 1))


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(0, "0:00"), (59.4, "0:59"), (59.6, "1:00"), (123, "2:03"), (3600, "1:00:00"), (3723, "1:02:03")],
)
def test_durations(seconds: float, expected: str) -> None:
    assert duration(seconds) == expected


def test_plain_lines_of_a_run(clock: Clock, lines: Callable[[], list[str]]) -> None:
    with Display(8, BUDGET) as shown:
        shown.begin(3, replace(CONFIG, cell="repa,block=2", seed=1))
        shown.event(Event("start", 0))
        clock.now = 20
        steps(shown, clock, 0, 20, 0.5)
        shown.event(train_event(20))
        shown.event(Event("eval", 20, {"metrics": METRICS}))
        shown.event(Event("end", 100, {"status": "finished"}))
    name = "cell 3 of 8: repa,block=2 seed 1"
    # 20 steps in 30 s; 8 runs of 100 steps less 20 remain: 780 x 1.5 s = 19:30
    assert lines() == [
        f"{name}: step 20 of 100  loss 1.2500  640 images/s  19:30 left",
        f"{name}: step 20 of 100  fd_efficientnet_lite0_898 12.35  class_accuracy_898 0.8125",
        f"{name}: finished",
    ]


def test_training_lines_come_at_most_every_ten_seconds(clock: Clock, lines: Callable[[], list[str]]) -> None:
    with Display(1, BUDGET) as shown:
        shown.begin(1, CONFIG)
        for step in range(1, 31):
            steps(shown, clock, step - 1, step, 1.0)
            shown.event(train_event(step))
    printed = [line.split(": ")[2].split(" of")[0] for line in lines()]
    assert printed == ["step 11", "step 22"]


def test_skipped_and_resumed_steps_do_not_shorten_the_time_left(clock: Clock, lines: Callable[[], list[str]]) -> None:
    with Display(3, BUDGET) as shown:
        shown.begin(1, CONFIG)
        shown.event(Event("end", BUDGET, {"status": "finished"}))  # finished by an earlier command
        shown.begin(2, replace(CONFIG, seed=1))
        shown.event(Event("start", 60))  # went on from its checkpoint
        steps(shown, clock, 60, 80, 1.0)
        shown.event(train_event(80))
    # 20 steps took 20 s; 20 of this run and 100 of the next remain
    assert lines()[-1].endswith("2:00 left")


def test_no_time_left_before_the_first_step(clock: Clock, lines: Callable[[], list[str]]) -> None:
    with Display(1, BUDGET) as shown:
        shown.begin(1, CONFIG)
        shown.event(Event("start", 99))
        clock.now = 100
        shown.event(train_event(99))
    assert lines()[-1].endswith("? left")


def test_a_failed_run_is_said_and_counts_as_over(clock: Clock, lines: Callable[[], list[str]]) -> None:
    with Display(2, BUDGET) as shown:
        shown.begin(1, CONFIG)
        steps(shown, clock, 0, 10, 1.0)
        shown.failed("RuntimeError: [Errno 28] no space [red]")
        shown.begin(2, replace(CONFIG, seed=1))
        steps(shown, clock, 0, 30, 1.0)
        shown.event(train_event(30))
    failed, trained = lines()
    assert failed == "cell 1 of 2: sit seed 0: failed: RuntimeError: [Errno 28] no space [red]"
    assert trained.endswith("1:10 left")  # 40 steps took 40 s, 70 remain


def test_preparation_is_reported_now_and_then_and_at_its_end(clock: Clock, lines: Callable[[], list[str]]) -> None:
    with Display(1, BUDGET) as shown:
        for done in range(1, 26):
            clock.now += 1
            shown.report("latents", done, 25)
    assert lines() == ["latents: 11 of 25", "latents: 22 of 25", "latents: 25 of 25"]


def test_a_terminal_gets_one_live_line(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setenv("TERM", "xterm-256color")
    with Display(2, BUDGET) as shown:
        shown.report("latents", 1, 2)
        shown.begin(1, CONFIG)
        steps(shown, clock, 0, 10, 1.0)
        shown.event(train_event(10))
        live = shown._progress.tasks[0]
        assert (live.description, live.completed, live.total) == ("cell 1 of 2: sit seed 0", 10, BUDGET)
        assert live.fields["facts"] == "loss 1.2500  640 images/s  3:10 left"
        shown.event(Event("end", BUDGET, {"status": "diverged"}))
    assert "cell 1 of 2: sit seed 0: diverged" in terminal.getvalue()
    assert "step 10 of 100" not in terminal.getvalue(), "training is the live line, not one more line each time"
