"""One worker's way through the runs of an agenda, alone or beside other workers and other commands.

A run is claimed before it is trained and let go after its end is on record, so no two processes train one run, and a
run whose holder was killed is taken over from its last checkpoint. Of several processes that train a run together the
main one claims and decides, and the others follow.
"""

import contextlib
import faulthandler
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from io import FileIO
from pathlib import Path
from typing import Any

import torch

from harness.config import RunConfig
from harness.errors import StorageError, UserError
from harness.machine.processes import from_main, is_main
from harness.tracking import live
from harness.training.trainer import Event
from studies.agenda import Agenda
from studies.folders import folder_of, is_done, lease_of
from studies.lease import Lease, claim, holder, presence
from studies.messages import Begins, Failed, Happened, Over, Tell, Waits
from studies.run import Lab, check_cell, run_cell

POLL_SECONDS = 1.0
"""Between two looks at runs that others hold."""

WAIT, ALL_OVER = 0, -1
"""Instead of a run's number: others hold what is left; nothing is left."""

LOG = "log.txt"
"""In a run's folder: when and where it was worked on, what the libraries printed, and the trace of a failure."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """What a worker is to do, and how it says what it does."""

    agenda: Agenda
    started: datetime
    """When the command began. A run that failed after that has been tried, and is left alone."""
    tell: Tell
    over: Collection[int] = ()
    """Runs that this command knows to be over, also where a full disk kept their end off the record."""
    captured: bool = False
    """Whether what is printed while a cell runs goes to its log."""
    shares_device: bool = False
    """Whether another worker of this command uses the same device."""
    waits: bool = True
    """Whether to wait for runs that others hold: one of them may be left by a process that dies."""


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


def known(agenda: Agenda, number: int) -> RunConfig:
    """What a run is that is decided."""
    config = agenda.run(number)
    assert config is not None, number
    return config


# -- whose turn it is -----------------------------------------------------------------------------------------------


class Turns:
    """The runs that are not over as far as this worker knows, and the lease on the one it is at."""

    def __init__(self, task: Task, check: Callable[[RunConfig], None] = lambda config: None) -> None:
        """`check` is given each cell that was decided too late to be checked with the others, and may refuse it."""
        self._task, self._agenda, self._check = task, task.agenda, check
        self._checked = {cell.label for cell in self._agenda.cells}
        self._open = [number for number in range(1, self._agenda.total + 1) if number not in task.over]
        self._lease: Lease | None = None
        self._notice = ""
        self._looks = 0

    def take(self) -> int:
        """The number of the first run that could be claimed, `WAIT`, or `ALL_OVER` where there is none to wait for."""
        taken: list[int] = []
        later: list[int] = []
        for number in tuple(self._open):
            try:
                if self._is_settled(number):
                    continue
                if not self._agenda.is_due(number):
                    later.append(number)
                    continue
                self._lease = self._claim(number, taken)
            except (UserError, StorageError) as error:
                self._close(number)
                self._task.tell(Failed(number, one_line(error)))
            if self._lease is not None:
                self._looks = 0
                self._task.tell(Begins(number, self._notice))
                return number
        if not taken:
            for number in later:  # nobody is at what they wait for, and it is not over: it failed
                self._over(number, "left out, as a run that it waits for failed")
            return ALL_OVER
        self._looks += 1
        if self._looks == 2:  # at the first look, another worker of this command may not have said that it began
            self._task.tell(Waits(tuple((number, holder(self._lease_of(number))) for number in taken)))
        return WAIT if self._task.waits or self._looks < 2 else ALL_OVER

    @contextlib.contextmanager
    def finishing(self, number: int) -> Iterator[None]:
        """Let the run go after the block, however it ends; it is over for this worker."""
        try:
            yield
        finally:
            self._close(number)
            if self._lease is not None:
                self._lease.release()
                self._lease = None

    def _claim(self, number: int, taken: list[int]) -> Lease | None:
        """The lease on a run that is to be trained; notes in `taken` those that others hold."""
        if self._found_over(number):
            return None
        config = known(self._agenda, number)
        if config.label not in self._checked:
            self._check(config)
            self._checked.add(config.label)
        lease = claim(lease_of(config))
        if lease is None:
            taken.append(number)
            return None
        is_ours = False
        try:
            # Its holder may have brought it to its end between the look and the claim.
            if not (self._found_over(number) or self._took_baseline(number)):
                self._notice = self._agenda.begins(number)
                is_ours = True
        finally:
            if not is_ours:
                lease.release()
        return lease if is_ours else None

    def _is_settled(self, number: int) -> bool:
        """Whether a run will never be needed; then it is told, and closed."""
        reason = self._agenda.settled(number)
        if reason:
            self._over(number, reason)
        return bool(reason)

    def _found_over(self, number: int) -> bool:
        """Whether the records say that a run is over; then it is told, and closed."""
        folder, baseline = folder_of(known(self._agenda, number)), self._agenda.context(number).baseline
        if not folder.exists():
            return False
        manifest = folder.manifest()
        if is_done(folder) and baseline in ("", manifest["baseline"]):
            self._agenda.ended(number)
            self._over(number, manifest["status"])
            return True
        if has_failed_since(manifest, self._task.started):
            self._close(number)
            self._task.tell(Failed(number, manifest["status_detail"]["error"]))
            return True
        return False

    def _took_baseline(self, number: int) -> bool:
        """Whether a run only needed another baseline on record; the caller holds its lease."""
        folder = folder_of(known(self._agenda, number))
        if not is_done(folder):
            return False
        folder.update_manifest(baseline=self._agenda.context(number).baseline)
        self._agenda.ended(number)
        self._over(number, folder.manifest()["status"])
        return True

    def _lease_of(self, number: int) -> Path:
        return lease_of(known(self._agenda, number))

    def _over(self, number: int, status: str) -> None:
        self._close(number)
        self._task.tell(Over(number, status))

    def _close(self, number: int) -> None:
        if number in self._open:
            self._open.remove(number)


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


def record_failure(config: RunConfig, message: str, trace: str, began: datetime) -> None:
    """Put a failure on record and close the run in MLflow, unless another process of this attempt has.

    That it cannot be recorded (a full disk is the likely cause of both) must not hide the failure itself.
    """
    detail = {"error": message, "trace": trace, "log": LOG, "ended": datetime.now(UTC).isoformat()}
    folder = folder_of(config)
    with contextlib.suppress(OSError, UserError):
        before = folder.manifest()
        if has_failed_since(before, began):
            return
        folder.update_manifest(status="failed", status_detail=detail)
        live.mark(config.output, before.get("mlflow_run", ""), "failed")


def has_failed_since(manifest: Mapping[str, Any], when: datetime) -> bool:
    """Whether a run has been tried and failed since then."""
    ended = manifest["status_detail"].get("ended", "")
    return manifest["status"] == "failed" and bool(ended) and datetime.fromisoformat(ended) >= when


def one_line(error: Exception) -> str:
    """An error as one line; its type only where the message is not meant for the user."""
    text = str(error) if isinstance(error, (UserError, StorageError)) else f"{type(error).__name__}: {error}"
    return " ".join(text.split())


def device_name(device: torch.device) -> str:
    """A device's name in the registry: the same in every process of this machine, whichever devices it sees."""
    if device.type == "cuda":
        return f"cuda-{torch.cuda.get_device_properties(device).uuid}"
    return device.type


@contextlib.contextmanager
def logged(path: Path, captured: bool) -> Iterator[None]:
    """Note in a run's log when the block begins and ends, and the trace of its error.

    With `captured`, whatever it prints goes there as well, also from C code, and the stack of a crash.
    """
    with path.open("ab", buffering=0) as log, printing_to(log) if captured else contextlib.nullcontext():
        note(log, f"{datetime.now(UTC).isoformat()} {socket.gethostname()} process {os.getpid()}: begins\n")
        try:
            yield
        except BaseException as error:
            note(log, "".join(traceback.format_exception(error)))
            raise
        finally:
            note(log, f"{datetime.now(UTC).isoformat()} {socket.gethostname()} process {os.getpid()}: ends\n")


def note(log: FileIO, text: str) -> None:
    """Write to a log at once. That a full disk refuses it must not hide the error that it tells of."""
    with contextlib.suppress(OSError):
        log.write(text.encode(errors="backslashreplace"))


@contextlib.contextmanager
def printing_to(log: FileIO) -> Iterator[None]:
    """Send the process's standard output and error, and the stack of a crash, to a file within the block."""
    kept = [(number, os.dup(number)) for number in (1, 2)]
    for number, _ in kept:
        os.dup2(log.fileno(), number)
    faulthandler.enable(file=2)
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):  # as in `note`
                stream.flush()
        for number, copy in kept:
            os.dup2(copy, number)
            os.close(copy)
