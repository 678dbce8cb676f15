"""One worker's way through the runs of an agenda, alone or beside other workers and other commands.

A run is claimed before it is trained and let go after its end is on record, so no two processes train one run, and a
run whose holder was killed is taken over from its last checkpoint. Of several processes that train a run together the
main one claims and decides, and the others follow.
"""

import os
import socket
import time
import traceback
from collections.abc import Callable
from datetime import UTC, datetime

import torch

from harness.config import RunConfig
from harness.errors import StorageError, UserError
from harness.machine.processes import from_main, is_main
from harness.training.trainer import Event
from studies.agenda import Agenda
from studies.dispatch.leases import presence
from studies.dispatch.logs import LOG, logged, one_line, record_failure
from studies.dispatch.messages import Failed, Happened
from studies.dispatch.turns import ALL_OVER, WAIT, Task, Turns, known
from studies.runs.folders import folder_of
from studies.runs.lab import Lab, check_cell
from studies.runs.run import run_cell

POLL_SECONDS = 1.0
"""Between two looks at runs that others hold."""


def work(lab: Lab, task: Task) -> bool:
    """Train runs until all are over; returns False after an error that may have left this process unfit for another."""
    agenda, accelerator = task.agenda, lab.accelerator
    turns = Turns(task, lambda config: check_cell(lab, config, agenda.seeds))
    while (number := from_main(accelerator, turns.take() if is_main(accelerator) else WAIT)) != ALL_OVER:
        if number == WAIT:
            time.sleep(POLL_SECONDS)
            continue
        with turns.finishing(number):
            error = attempt(lab, task, number, known(agenda, number))
        # After a damaged cache or a full disk a process is as good as before; but other processes of the group may not
        # have seen it and would wait for this one.
        is_harmless = isinstance(error, (UserError, StorageError)) and accelerator.num_processes == 1
        if error is not None and not is_harmless:
            return False
    return True


# -- one run --------------------------------------------------------------------------------------------------------


def attempt(lab: Lab, task: Task, number: int, config: RunConfig) -> Exception | None:
    """Train a claimed run to its end; an error is put on record, told and returned, so that other cells go on."""
    folder, began = folder_of(config), datetime.now(UTC)
    group = from_main(lab.accelerator, f"{socket.gethostname()}-{os.getpid()}")
    try:
        folder.create()
        with logged(folder.path / LOG, task.captured), presence(device_name(lab.accelerator.device), group) as company:
            follow(lab, task, number, config, company)
    except Exception as error:
        message = one_line(error)
        record_failure(config, message, traceback.format_exc(), began)
        task.tell(Failed(number, message))
        return error
    return None


def follow(lab: Lab, task: Task, number: int, config: RunConfig, company: Callable[[], bool]) -> None:
    """Train a run, telling what happens; one that has company on its device at a logged point is marked."""
    folder, main, agenda = folder_of(config), is_main(lab.accelerator), task.agenda
    is_marked = False
    for event in run_cell(lab, config, agenda.context(number), lambda event: agenda.watch(number, event)):
        if main and event.kind != "step" and not is_marked and (task.shares_device or company()):
            folder.update_manifest(shared_device=True)
            is_marked = True
        if main:
            task.tell(noted_end(agenda, number, event) if event.kind == "end" else Happened(number, event))


def noted_end(agenda: Agenda, number: int, event: Event) -> Happened | Failed:
    """What is said of a run's end, which the agenda is told first; its records are whole even where that fails."""
    try:
        agenda.ended(number)
    except (UserError, StorageError) as error:
        return Failed(number, one_line(error))
    return Happened(number, event)


def device_name(device: torch.device) -> str:
    """A device's name in the registry: the same in every process of this machine, whichever devices it sees."""
    if device.type == "cuda":
        return f"cuda-{torch.cuda.get_device_properties(device).uuid}"
    return device.type
