"""Progress as people read it: a live display on a terminal, plain lines elsewhere. The only room that prints."""

import sys
import time
from types import TracebackType

from rich.progress import BarColumn, Progress, TaskID, TextColumn

from harness.config import BudgetConfig
from harness.records.metrics import metric
from harness.training.trainer import Event
from studies.agenda import Agenda
from studies.terminal.tables import console

PLAIN_SECONDS = 10
"""Least time between two plain lines of one run's training."""


def duration(seconds: float) -> str:
    """1:02:03, or 2:03."""
    minutes, seconds = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class Display:
    """Shows, for every run that goes on, cell k of n, step, loss, images/s and time left. Use as a context manager.

    Without an agenda it shows preparation alone. With `stderr`, stdout is left to what a command prints at its end.
    """

    def __init__(self, agenda: Agenda | None = None, stderr: bool = False) -> None:
        self._agenda, self._total = agenda, agenda.total if agenda else 0
        self._budget = agenda.cells[0].budget if agenda else BudgetConfig()
        self._live = (sys.stderr if stderr else sys.stdout).isatty()
        self._console = console(stderr)
        self._started, self._printed = time.monotonic(), 0.0
        self._finished = self._made = 0.0
        self._shares: dict[int, float] = {}
        """The share of the budget that each run which goes on has spent."""
        self._facts: dict[int, str] = {}
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.completed}/{task.total}"),
            TextColumn("{task.fields[facts]}"),
            console=self._console,
            disable=not self._live,
        )
        self._rows: dict[int, TaskID] = {}
        """Live rows; 0 is the preparation's."""

    def __enter__(self) -> "Display":
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def report(self, what: str, done: int, total: int) -> None:
        """Progress of preparing data: `done` of `total` rows of `what`. A single one, such as a notice, stays shown."""
        if total == 1:
            self._print(what)
        elif self._live:
            self._show(0, what, done, total, "")
            if done >= total:
                self._hide(0)
        elif done >= total or time.monotonic() - self._printed > PLAIN_SECONDS:
            self._print(f"{what}: {done} of {total}")

    def begin(self, number: int, notice: str = "") -> None:
        """A run starts or goes on, and what people should know of that."""
        self._facts[number], self._shares[number] = "", 0.0
        if notice:
            self._print(f"{self._name(number)}: {notice}")

    def event(self, number: int, event: Event) -> None:
        """Show what a run did."""
        record = event.record
        for notice in record.get("notices", ()):
            self._print(f"{self._name(number)}: {notice}")
        if event.kind != "start":
            # What was made before this command went on with the run took none of its time.
            self._made += event.share - self._shares[number]
        if event.kind == "train":
            self._facts[number] = f"loss {record['loss']:.4f}  {record['images_per_s']:.0f} images/s"
        self._shares[number] = event.share
        if self._live:
            done = round(event.share * self._budget.amount)
            facts = f"{self._facts[number]}  {self._left()} left"
            self._show(number, self._name(number), done, self._budget.amount, facts)
        if event.kind in ("eval", "final") or (
            event.kind == "train" and not self._live and time.monotonic() - self._printed > PLAIN_SECONDS
        ):
            self._print(self._line(number, event))
        if event.kind == "end":
            self.over(number, record["status"])

    def over(self, number: int, status: str) -> None:
        """A run is at its end."""
        self._shares.pop(number, None)
        self._hide(number)
        self._finished += 1
        self._print(f"{self._name(number)}: {status}")

    def failed(self, number: int, message: str) -> None:
        """A run ended with an error."""
        self.over(number, f"failed: {message}")

    def left(self, number: int, message: str) -> None:
        """The process of a run died, and the run is to be taken up again."""
        self._shares.pop(number, None)
        self._hide(number)
        self._print(f"{self._name(number)}: {message}; it is taken up again")

    def waits(self, number: int, holder: str) -> None:
        """Another command is at a run."""
        self._print(f"{self._name(number)}: trained by another command{f' ({holder})' if holder else ''}")

    def _name(self, number: int) -> str:
        job = self._agenda.job(number) if self._agenda else None
        what = f": {job.config.label} seed {job.config.seed}" if job else ""
        return f"cell {number} of {self._total}{what}"

    def _line(self, number: int, event: Event) -> str:
        step = f"{self._name(number)}: {self._where(event)}"
        if event.kind in ("eval", "final"):
            shown = [name for name in event.record["metrics"] if metric(name).prefix in ("fd", "fid", "class_accuracy")]
            values = "  ".join(f"{name} {event.record['metrics'][name]:.4g}" for name in shown)
            return f"{step}{', final' if event.kind == 'final' else ''}  {values}"
        return f"{step}  {self._facts[number]}  {self._left()} left"

    def _where(self, event: Event) -> str:
        """The progress of a run in words: its step, and what it has spent where the budget has another unit."""
        unit, amount = self._budget.unit, self._budget.amount
        if unit == "steps":
            return f"step {event.step} of {amount}"
        return f"step {event.step}, {event.share * amount:,.4g} of {amount:,.4g} {unit}"

    def _left(self) -> str:
        """Time left for all runs, from what this command has made so far: resumed and skipped parts took no time."""
        if not self._made:
            return "?"
        remaining = max(0.0, self._total - self._finished - sum(self._shares.values()))
        return duration((time.monotonic() - self._started) / self._made * remaining)

    def _show(self, row: int, name: str, done: int, total: float, facts: str) -> None:
        if row not in self._rows:
            self._rows[row] = self._progress.add_task(name, total=total, facts=facts)
        self._progress.update(self._rows[row], description=name, completed=done, total=total, facts=facts)

    def _hide(self, row: int) -> None:
        if row in self._rows:
            self._progress.remove_task(self._rows.pop(row))

    def _print(self, line: str) -> None:
        self._printed = time.monotonic()
        self._progress.console.print(line)
