"""Running an agenda to its end: every cell under one budget, one data stream, one evaluator."""

import os
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from harness.config import require
from studies.agenda import Agenda
from studies.display import Display
from studies.messages import Begins, Failed, Happened, Left, Message, Over, Prepares, Waits
from studies.plan import Plan


@dataclass(frozen=True)
class Failure:
    """A run that ended with an error; the others went on."""

    run: str
    message: str


class Board:
    """What a command knows of its runs: which go on here, and which are over and how. Shows all it hears."""

    def __init__(self, agenda: Agenda, display: Display) -> None:
        self._agenda, self._display = agenda, display
        self._here: set[int] = set()
        self.over: dict[int, str] = {}
        """The message of each run that failed, "" for each that came to its end, by number."""

    def hear(self, message: Message) -> None:
        """Take note of what a worker says. What several workers find over is said once."""
        match message:
            case Prepares(what, done, total):
                self._display.report(what, done, total)
            case Begins(number, notice):
                self._here.add(number)
                self._display.begin(number, notice)
            case Happened(number, event):
                self._display.event(number, event)
                if event.kind == "end":
                    self._end(number, "")
            case Over(number, status) if number not in self.over:
                self._end(number, "")
                self._display.over(number, status)
            case Failed(number, reason) if number not in self.over:
                self._end(number, reason)
                self._display.failed(number, reason)
            case Left(number, reason):
                self._here.discard(number)
                self._display.left(number, reason)
            case Waits(holders):
                for number, holder in holders:
                    if number not in self._here and number not in self.over:
                        self._display.waits(number, holder)

    def _end(self, number: int, failure: str) -> None:
        self._here.discard(number)
        self.over[number] = failure

    @property
    def all_over(self) -> bool:
        return len(self.over) == self._agenda.total

    def failures(self) -> list[Failure]:
        """The runs that failed, in their order."""
        return [Failure(self._name(number), message) for number, message in sorted(self.over.items()) if message]

    def _name(self, number: int) -> str:
        config = self._agenda.run(number)
        return f"{config.label}/seed{config.seed}" if config else f"run {number}, which was not decided"


def run_here(agenda: Agenda, waits: bool = True) -> list[Failure]:
    """Run what is missing in this process, or process group, and return the runs that failed.

    Every cell is checked before the first one trains, so that a typo in the last cell costs no hours. An unwritable
    folder of studies is refused before the data is read. A group of processes ends with the first run that fails.
    """
    from studies.run import check_agenda, open_lab
    from studies.work import Task, work

    started, first = datetime.now(UTC), agenda.cells[0]
    check_writable(Path(first.output.runs))
    with Display(agenda) as display:
        board = Board(agenda, display)
        lab = open_lab(first, display.report)
        check_agenda(lab, agenda)
        work(lab, Task(agenda=agenda, started=started, tell=board.hear, waits=waits))
    return board.failures()


def run_in_workers(agenda: Agenda, plan: Plan) -> list[Failure]:
    """As `run_here`, but in processes of their own; this one starts them, shows what they do and uses no device."""
    from studies.workers import Crew

    started = datetime.now(UTC)
    check_writable(Path(agenda.cells[0].output.runs))
    with Display(agenda) as display:
        if plan.reason:
            display.report(plan.reason, 1, 1)
        board = Board(agenda, display)
        Crew(agenda, plan, board, started).run()
    return board.failures()


def check_writable(folder: Path) -> None:
    """Raise `UserError` when a folder, which need not exist yet, cannot be made or written to."""
    standing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    ok = standing.is_dir() and os.access(standing, os.W_OK)
    require(ok, f"output.runs is {str(folder)!r}: {standing} cannot be written to; name a folder you may write to")
