"""A worker: a process of a command that trains cells, one after another. Its command starts it and hears from it.

Imported before workers are forked, so that each of them starts with the libraries loaded.
"""

import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing import parent_process
from multiprocessing.connection import Connection
from typing import Any

from harness.errors import StorageError, UserError
from studies.dispatch.messages import Broke, Happened, Message, Prepares, Ready, Refused
from studies.dispatch.turns import Task
from studies.dispatch.work import work
from studies.runs.lab import check_agenda, open_lab
from studies.terminal.quiet import quiet_libraries

DONE, BROKEN, REFUSED, SPENT = 0, 1, 2, 3
"""Exit status: all runs are over; an error outside of any cell, of ours or of the user's; a cell's error that may have
left this process unfit for the next cell (a context of a device that ran out of memory, for one)."""

STEP_SECONDS = 0.1
"""Least time between two steps that are told."""


@dataclass(frozen=True, kw_only=True)
class Order:
    """What a worker gets from its command."""

    environment: Mapping[str, str]
    """Its environment: devices and place in its group among it."""
    checks: bool
    """Whether to check every cell first, and with it make all caches."""
    task: Mapping[str, Any]
    """Fields of its `Task`, but for `tell`."""


def serve(order: Order, connection: Connection) -> None:
    """Do what was ordered, telling it through the connection, and exit with one of the statuses above."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # on Ctrl-C the command ends its workers
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ.clear()
    os.environ.update(order.environment)
    quiet_libraries()
    wire = Wire(connection)
    try:
        task = Task(**order.task, tell=wire.tell)
        agenda = task.agenda
        lab = open_lab(agenda.cells[0], lambda what, done, total: wire.tell(Prepares(what, done, total)))
        if order.checks:
            check_agenda(lab, agenda)
        wire.tell(Ready())
        sys.exit(DONE if work(lab, task) else SPENT)
    except (UserError, StorageError) as error:
        wire.tell(Refused(error))
        sys.exit(REFUSED)
    except Exception:
        wire.tell(Broke(traceback.format_exc()))
        sys.exit(BROKEN)


class Wire:
    """The way to the command. Most steps are left out: it shows them, and nobody reads a thousand a second."""

    def __init__(self, connection: Connection) -> None:
        self._connection, self._last = connection, 0.0

    def tell(self, message: Message) -> None:
        if isinstance(message, Happened) and message.event.kind == "step":
            if time.monotonic() - self._last < STEP_SECONDS:
                return
            self._last = time.monotonic()
        self._connection.send(message)


def _end_with_parent() -> None:
    """End this process when its command is gone: nobody would hear of what it does."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGKILL)
