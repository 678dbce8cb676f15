"""Whose turn it is: which job a worker takes next, and when it waits for others."""

import contextlib
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from datetime import datetime
from enum import Enum, auto

from harness.config import RunConfig
from harness.errors import StorageError, UserError
from harness.records.locks import Lock, holder
from studies.agenda import Agenda, Job
from studies.dispatch.leases import claim
from studies.dispatch.logs import has_failed_since, one_line
from studies.dispatch.messages import Begins, Failed, Over, Tell, Waits
from studies.runs.folders import folder_of, is_done, lease_of


class NoJob(Enum):
    """Why a worker gets no job."""

    WAIT = auto()
    """Others hold what is left."""
    ALL_OVER = auto()
    """Nothing is left."""


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


class Turns:
    """The runs that are not over as far as this worker knows, and the lease on the one it is at."""

    def __init__(self, task: Task, check: Callable[[RunConfig], None] = lambda config: None) -> None:
        """`check` is given each cell that was decided too late to be checked with the others, and may refuse it."""
        self._task, self._agenda, self._check = task, task.agenda, check
        self._checked = {cell.label for cell in self._agenda.cells}
        self._open = [number for number in range(1, self._agenda.total + 1) if number not in task.over]
        self._lease: Lock | None = None
        self._notice = ""
        self._looks = 0

    def take(self) -> Job | NoJob:
        """The first job that could be claimed, or why there is none."""
        taken: list[Job] = []
        later: list[int] = []
        for number in tuple(self._open):
            try:
                if self._is_settled(number):
                    continue
                job = self._agenda.due(number)
                if job is None:
                    later.append(number)
                    continue
                self._lease = self._claim(job, taken)
            except (UserError, StorageError) as error:
                self._close(number)
                self._task.tell(Failed(number, one_line(error)))
                continue
            if self._lease is not None:
                self._looks = 0
                self._task.tell(Begins(number, self._notice))
                return job
        if not taken:
            for number in later:  # nobody is at what they wait for, and it is not over: it failed
                self._over(number, "left out, as a run that it waits for failed")
            return NoJob.ALL_OVER
        self._looks += 1
        if self._looks == 2:  # at the first look, another worker of this command may not have said that it began
            self._task.tell(Waits(tuple((job.number, holder(lease_of(job.config))) for job in taken)))
        return NoJob.WAIT if self._task.waits or self._looks < 2 else NoJob.ALL_OVER

    @contextlib.contextmanager
    def finishing(self, job: Job) -> Iterator[None]:
        """Let the run go after the block, however it ends; it is over for this worker."""
        try:
            yield
        finally:
            self._close(job.number)
            if self._lease is not None:
                self._lease.release()
                self._lease = None

    def _claim(self, job: Job, taken: list[Job]) -> Lock | None:
        """The lease on a job that is to be trained; notes in `taken` those that others hold."""
        if self._found_over(job):
            return None
        if job.config.label not in self._checked:
            self._check(job.config)
            self._checked.add(job.config.label)
        lease = claim(lease_of(job.config))
        if lease is None:
            taken.append(job)
            return None
        is_ours = False
        try:
            # Its holder may have brought it to its end between the look and the claim.
            if not (self._found_over(job) or self._took_baseline(job)):
                self._notice = self._agenda.begins(job)
                is_ours = True
        finally:
            if not is_ours:
                lease.release()
        return lease if is_ours else None

    def _is_settled(self, number: int) -> bool:
        """Whether a job will never be needed; then it is told, and closed."""
        job = self._agenda.job(number)
        reason = self._agenda.settled(job) if job else ""
        if reason:
            self._over(number, reason)
        return bool(reason)

    def _found_over(self, job: Job) -> bool:
        """Whether the records say that a job is over; then it is told, and closed."""
        folder, baseline = folder_of(job.config), job.context.baseline
        if not folder.exists():
            return False
        manifest = folder.manifest()
        if is_done(folder) and baseline in ("", manifest["baseline"]):
            self._agenda.ended(job)
            self._over(job.number, manifest["status"])
            return True
        if has_failed_since(manifest, self._task.started):
            self._close(job.number)
            self._task.tell(Failed(job.number, manifest["status_detail"]["error"]))
            return True
        return False

    def _took_baseline(self, job: Job) -> bool:
        """Whether a job only needed another baseline on record; the caller holds its lease."""
        folder = folder_of(job.config)
        if not is_done(folder):
            return False
        folder.update_manifest(baseline=job.context.baseline)
        self._agenda.ended(job)
        self._over(job.number, folder.manifest()["status"])
        return True

    def _over(self, number: int, status: str) -> None:
        self._close(number)
        self._task.tell(Over(number, status))

    def _close(self, number: int) -> None:
        if number in self._open:
            self._open.remove(number)
