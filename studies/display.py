"""Progress as people read it: a live display on a terminal, plain lines elsewhere. The only room that prints."""

import sys
import time
from types import TracebackType

from rich.progress import BarColumn, Progress, TaskID, TextColumn

from harness.config import BudgetConfig, RunConfig
from harness.records import metric
from harness.trainer import Event
from studies.tables import console

PLAIN_SECONDS = 10
"""Least time between two plain lines of one run's training."""


def duration(seconds: float) -> str:
    """1:02:03, or 2:03."""
    minutes, seconds = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class Display:
    """Shows cell k of n, step, loss, images/s and time left. Use as a context manager."""

    def __init__(self, num_runs: int, budget: BudgetConfig | None = None) -> None:
        self._num_runs, self._budget = num_runs, budget or BudgetConfig()
        self._live = sys.stdout.isatty()
        self._console = console()
        self._started = time.monotonic()
        self._finished = self._made = self._share = 0.0
        self._facts, self._name, self._printed = "", "", 0.0
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.completed}/{task.total}"),
            TextColumn("{task.fields[facts]}"),
            console=self._console,
            disable=not self._live,
        )
        self._task: TaskID | None = None

    def __enter__(self) -> "Display":
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def report(self, what: str, done: int, total: int) -> None:
        """Progress of preparing data: `done` of `total` rows of `what`."""
        if self._live:
            self._show(what, done, total, "")
        elif done >= total or time.monotonic() - self._printed > PLAIN_SECONDS:
            self._print(f"{what}: {done} of {total}")

    def begin(self, number: int, config: RunConfig) -> None:
        """Run `number` of all, from 1, is next."""
        self._name = f"cell {number} of {self._num_runs}: {config.label} seed {config.seed}"
        self._facts, self._share = "", 0.0

    def event(self, event: Event) -> None:
        """Show what a run did."""
        for notice in event.record.get("notices", ()):
            self._print(f"{self._name}: {notice}")
        if event.kind == "notice":
            return
        if event.kind == "step":
            self._made += event.share - self._share
        if event.kind == "train":
            record = event.record
            self._facts = f"loss {record['loss']:.4f}  {record['images_per_s']:.0f} images/s"
        self._share = event.share
        if self._live:
            done = round(event.share * self._budget.amount)
            self._show(self._name, done, self._budget.amount, f"{self._facts}  {self._left()} left")
        if event.kind in ("eval", "end") or (
            event.kind == "train" and not self._live and time.monotonic() - self._printed > PLAIN_SECONDS
        ):
            self._print(self._line(event))
        if event.kind == "end":
            self._finished += 1
            self._share = 0.0

    def failed(self, message: str) -> None:
        """A run ended with an error."""
        self._finished += 1
        self._print(f"{self._name}: failed: {message}")

    def _line(self, event: Event) -> str:
        step = f"{self._name}: {self._where(event)}"
        if event.kind == "eval":
            shown = [name for name in event.record["metrics"] if metric(name).prefix in ("fd", "fid", "class_accuracy")]
            values = "  ".join(f"{name} {event.record['metrics'][name]:.4g}" for name in shown)
            return f"{step}  {values}"
        if event.kind == "end":
            return f"{self._name}: {event.record['status']}"
        return f"{step}  {self._facts}  {self._left()} left"

    def _where(self, event: Event) -> str:
        """How far a run is: its step, and what it has spent where the budget is in another unit."""
        unit, amount = self._budget.unit, self._budget.amount
        if unit == "steps":
            return f"step {event.step} of {amount}"
        return f"step {event.step}, {event.share * amount:,.4g} of {amount:,.4g} {unit}"

    def _left(self) -> str:
        """Time left for all runs, from what this process has made so far: resumed and skipped parts took no time."""
        if not self._made:
            return "?"
        remaining = self._num_runs - self._finished - self._share
        return duration((time.monotonic() - self._started) / self._made * remaining)

    def _show(self, name: str, done: int, total: float, facts: str) -> None:
        if self._task is None:
            self._task = self._progress.add_task(name, total=total, facts=facts)
        self._progress.update(self._task, description=name, completed=done, total=total, facts=facts)

    def _print(self, line: str) -> None:
        self._printed = time.monotonic()
        self._progress.console.print(line)
