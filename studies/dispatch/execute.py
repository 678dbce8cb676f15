"""Running an agenda to its end: every cell under one budget, one data stream, one evaluator."""

import os
from datetime import UTC, datetime
from pathlib import Path

from harness.config import require
from studies.agenda import Agenda
from studies.dispatch.board import Board, Failure
from studies.dispatch.plan import WorkerPlan
from studies.terminal.display import Display


def run_here(agenda: Agenda, waits: bool = True) -> list[Failure]:
    """Run what is missing in this process, or process group, and return the runs that failed.

    Every cell is checked before the first one trains, so that a typo in the last cell costs no hours. An unwritable
    folder of studies is refused before the data is read. A group of processes ends with the first run that fails.
    """
    from studies.dispatch.turns import Task
    from studies.dispatch.work import work
    from studies.runs.lab import check_agenda, open_lab

    started, first = datetime.now(UTC), agenda.cells[0]
    check_writable(Path(first.output.runs))
    with Display(agenda) as display:
        board = Board(agenda, display)
        lab = open_lab(first, display.report)
        check_agenda(lab, agenda)
        work(lab, Task(agenda=agenda, started=started, tell=board.hear, waits=waits))
    return board.failures()


def run_in_workers(agenda: Agenda, plan: WorkerPlan) -> list[Failure]:
    """As `run_here`, but in processes of their own; this one starts them, shows what they do and uses no device."""
    from studies.dispatch.crew import Crew

    started = datetime.now(UTC)
    check_writable(Path(agenda.cells[0].output.runs))
    with Display(agenda) as display:
        board = Board(agenda, display)
        Crew(agenda, plan, board, started).run()
    return board.failures()


def check_writable(folder: Path) -> None:
    """Raise `UserError` when a folder, which need not exist yet, cannot be made or written to."""
    standing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    ok = standing.is_dir() and os.access(standing, os.W_OK)
    require(ok, f"output.runs is {str(folder)!r}: {standing} cannot be written to; name a folder you may write to")
