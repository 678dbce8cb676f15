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
from accelerate import Accelerator

from harness.errors import StorageError, UserError
from harness.machine.processes import from_main, is_main
from harness.training.trainer import Event
from studies.agenda import Agenda, Job
from studies.dispatch.leases import presence
from studies.dispatch.logs import LOG, logged, one_line, record_failure
from studies.dispatch.messages import Failed, Happened
from studies.dispatch.turns import NoJob, Task, Turns
from studies.runs.folders import folder_of
from studies.runs.lab import Lab, check_cell
from studies.runs.run import run_cell

POLL_SECONDS = 1.0
"""Between two looks at runs that others hold."""


def work(lab: Lab, task: Task) -> bool:
    """Train runs until all are over; returns False after an error that may have left this process unfit for another."""
    agenda, accelerator = task.agenda, lab.accelerator
    turns = Turns(task, lambda config: check_cell(lab, config, agenda.seeds))
    while (job := next_job(accelerator, turns)) is not NoJob.ALL_OVER:
        if job is NoJob.WAIT:
            time.sleep(POLL_SECONDS)
            continue
        with turns.finishing(job):
            error = attempt(lab, task, job)
        # After a damaged cache or a full disk a process is as good as before; but other processes of the group may not
        # have seen it and would wait for this one.
        is_harmless = isinstance(error, (UserError, StorageError)) and accelerator.num_processes == 1
        if error is not None and not is_harmless:
            return False
    return True


def next_job(accelerator: Accelerator, turns: Turns) -> Job | NoJob:
    """What the main process takes, in every process."""
    taken: Job | NoJob = turns.take() if is_main(accelerator) else NoJob.WAIT
    return from_main(accelerator, taken)


# -- one run --------------------------------------------------------------------------------------------------------


def attempt(lab: Lab, task: Task, job: Job) -> Exception | None:
    """Train a claimed job to its end; an error is put on record, told and returned, so that other cells go on."""
    folder, began = folder_of(job.config), datetime.now(UTC)
    group = from_main(lab.accelerator, f"{socket.gethostname()}-{os.getpid()}")
    try:
        folder.create()
        with logged(folder.path / LOG, task.captured), presence(device_name(lab.accelerator.device), group) as company:
            follow(lab, task, job, company)
    except Exception as error:
        message = one_line(error)
        record_failure(job.config, message, traceback.format_exc(), began)
        task.tell(Failed(job.number, message))
        return error
    return None


def follow(lab: Lab, task: Task, job: Job, company: Callable[[], bool]) -> None:
    """Train a job, telling what happens; one that has company on its device at a logged point is marked."""
    folder, main, agenda = folder_of(job.config), is_main(lab.accelerator), task.agenda
    is_marked = False
    for event in run_cell(lab, job.config, job.context, lambda event: agenda.watch(job, event)):
        if main and event.kind != "step" and not is_marked and (task.shares_device or company()):
            folder.update_manifest(shared_device=True)
            is_marked = True
        if main:
            task.tell(noted_end(agenda, job, event) if event.kind == "end" else Happened(job.number, event))


def noted_end(agenda: Agenda, job: Job, event: Event) -> Happened | Failed:
    """What is said of a run's end, which the agenda is told first; its records are whole even where that fails."""
    try:
        agenda.ended(job)
    except (UserError, StorageError) as error:
        return Failed(job.number, one_line(error))
    return Happened(job.number, event)


def device_name(device: torch.device) -> str:
    """A device's name in the registry: the same in every process of this machine, whichever devices it sees."""
    if device.type == "cuda":
        return f"cuda-{torch.cuda.get_device_properties(device).uuid}"
    return device.type
