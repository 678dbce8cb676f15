"""What a command runs, and what must be known around each run. An agenda hands out jobs, and workers take them.

A comparison knows all its jobs beforehand. A search decides a job when a worker is free for it, and may stop one early;
so an agenda is asked before a run begins, told what happens to it, and asked after every evaluation.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Self

from harness.config import RunConfig
from harness.records.schema import ManifestNotes

if TYPE_CHECKING:
    from harness.training.trainer import Event


@dataclass(frozen=True, kw_only=True)
class Context:
    """What a run is told about the study around it."""

    baseline: str = ""
    """Label of the control cell; "" where the run stands alone."""
    facts: ManifestNotes = field(default_factory=ManifestNotes)
    """Further fields of its manifest."""
    mlflow_parent: str = ""
    """MLflow run that it is a child of."""


@dataclass(frozen=True)
class Job:
    """One run that is decided: all that a worker needs to know of it."""

    number: int
    """The place of the run in its agenda, counted from 1."""
    config: RunConfig
    context: Context


class Agenda(ABC):
    """Jobs numbered from 1 in their order, and how far they are decided. It is pickled to workers, so what it opens it
    opens when it is first needed. Of several processes that train one run together the main one alone calls what
    decides or notes something: `due`, `begins`, `watch` and `ended`.
    """

    cells: tuple[RunConfig, ...]
    """What is checked before anything trains, one config a cell at seed 0; the first one's shared sections are all
    cells'."""
    seeds: tuple[int, ...]
    """Training seeds of every cell."""
    retakes: int = 0
    """How often within one command a run whose process died is taken up again, from its last checkpoint."""

    @property
    @abstractmethod
    def total(self) -> int:
        """Number of runs."""

    @abstractmethod
    def job(self, number: int) -> Job | None:
        """The job of that number; None while it is not decided."""

    @abstractmethod
    def with_threads(self, threads: int) -> Self:
        """The same runs with that many threads each."""

    def jobs(self) -> list[Job | None]:
        """All jobs in their order; None for each that is not decided."""
        return [self.job(number) for number in range(1, self.total + 1)]

    def check_metrics(self, names: Sequence[str]) -> None:  # noqa: B027 - most agendas look at no metric
        """Told before the first run what every evaluation measures; `UserError` where a needed metric is missing."""

    def settled(self, job: Job) -> str:
        """Why a job will never be needed; "" for one that may be."""
        return ""

    def due(self, number: int) -> Job | None:
        """The job of that number for a worker that finds no job before it free; None while the job has to wait.

        A job that is still open is decided now.
        """
        return self.job(number)

    def begins(self, job: Job) -> str:
        """The caller holds the lease on a run and is about to train it; returns a line for people, or ""."""
        return ""

    def watch(self, job: Job, event: "Event") -> bool:
        """Whether to stop a run after this evaluation, which is not its last."""
        return False

    def ended(self, job: Job) -> None:  # noqa: B027 - most agendas keep no account of their own
        """A run's end is on record. It may be told more than once."""
