"""The workers of one command: started, heard, replaced when a cell spoils or kills them, ended with the command.

What one cell does to its process is gone with it.
"""

import contextlib
import os
import socket
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from multiprocessing.connection import Connection, wait
from typing import Any

from harness.errors import StorageError, UserError
from studies.agenda import Agenda
from studies.children import Child, end_children, ending_in_words, start_child, start_server
from studies.dispatch.board import Board
from studies.dispatch.leases import claim
from studies.dispatch.logs import record_failure
from studies.dispatch.messages import Begins, Broke, Failed, Happened, Left, Ready, Refused
from studies.dispatch.plan import WorkerPlan
from studies.dispatch.worker import DONE, SPENT, Order, serve
from studies.runs.folders import lease_of


class WorkerError(Exception):
    """Workers ended outside of any cell, and none was left."""


@dataclass(eq=False)
class Worker:
    """The processes that train one cell at a time together, one of them as a rule."""

    place: int
    """Counted from 0; decides its devices."""
    children: list[Child] = field(default_factory=list)
    """The processes that have not ended."""
    number: int = 0
    """The run that it is at; 0 between runs."""
    error: UserError | StorageError | WorkerError | None = None
    """Why it ended outside of any cell."""


class Crew:
    """All workers of a command."""

    def __init__(self, agenda: Agenda, plan: WorkerPlan, board: Board, started: datetime) -> None:
        self._agenda, self._plan, self._board, self._started = agenda, plan, board, started
        self._workers: list[Worker] = []
        self._deaths: Counter[int] = Counter()
        """Number of processes that died, by the run that they were at."""
        self._is_ready = False
        self._error: UserError | StorageError | WorkerError | None = None

    def run(self) -> None:
        """Run until all is over. The first worker makes the caches and checks every cell before the others start.

        Raises:
            UserError, StorageError: what is wrong with a cell or with what all cells share. As a rule the first worker
                finds it, before any cell trains.
            WorkerError: no worker is left, and none of them died of a cell.
        """
        start_server()
        try:
            self._start(0)
            while self._workers:
                self._listen()
        finally:
            end_children(child for worker in self._workers for child in worker.children)
        if self._error is not None and not self._board.all_over:
            raise self._error

    # -- starting and ending ----------------------------------------------------------------------------------------

    def _start(self, place: int) -> None:
        """Start the processes of a worker."""
        worker = Worker(place)
        self._workers.append(worker)
        for environment in self._environments(place):
            order = Order(environment=environment, checks=not self._is_ready, task=self._task())
            worker.children.append(start_child(serve, order))

    def _task(self) -> Mapping[str, Any]:
        return {
            "agenda": self._agenda,
            "started": self._started,
            "over": tuple(self._board.over),
            "captured": True,
            "shares_device": self._plan.shares_device,
            "waits": self._plan.waits,
        }

    def _environments(self, place: int) -> Iterator[Mapping[str, str]]:
        """The environment of each process of a worker: its devices, and its rank where there are several."""
        shared, size = {**os.environ, **self._plan.devices(place)}, self._plan.processes
        if size == 1:
            yield shared
            return
        group = {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        for rank in range(size):
            yield {**shared, **group, **meeting, "RANK": str(rank), "LOCAL_RANK": str(rank)}

    # -- hearing ----------------------------------------------------------------------------------------------------

    def _listen(self) -> None:
        """Hear what any worker says next, or that it ended."""
        heard = {child.heard: (worker, child) for worker in self._workers for child in worker.children}
        for connection in wait(list(heard)):
            assert isinstance(connection, Connection)
            worker, child = heard[connection]
            if worker not in self._workers:
                continue  # ended with another process of its group, heard just before
            try:
                self._hear(worker, connection.recv())
            except EOFError:
                self._end_child(worker, child)

    def _hear(self, worker: Worker, message: Any) -> None:
        match message:
            case Ready() if not self._is_ready:
                self._is_ready = True
                for place in range(1, self._plan.workers):
                    self._start(place)
            case Refused(error):
                worker.error = error
            case Broke(trace):
                worker.error = WorkerError(f"a worker ended outside of any cell:\n{trace}")
            case Begins(number):
                worker.number = number
            case Failed(number) if number == worker.number:
                worker.number = 0
            case Happened(number, event) if event.kind == "end":
                worker.number = 0
        self._board.hear(message)

    def _end_child(self, worker: Worker, child: Child) -> None:
        """A process ended: one that did not finish takes the others of its group with it."""
        worker.children.remove(child)
        status = child.ended()
        if status == DONE:
            if not worker.children:
                self._workers.remove(worker)
            return
        end_children(worker.children)
        for other in worker.children:
            with contextlib.suppress(EOFError):
                while other.heard.poll():
                    self._hear(worker, other.heard.recv())
        self._workers.remove(worker)
        self._end_worker(worker, status)

    def _end_worker(self, worker: Worker, status: int) -> None:
        """Replace a worker that ended in a cell; one that ended outside of any would only end again."""
        if worker.number:
            self._record_death(worker.number, ending_in_words(status))
        elif status != SPENT:
            self._error = worker.error or WorkerError(f"a worker ended outside of any cell: {ending_in_words(status)}")
            return
        if not self._board.all_over:
            self._start(worker.place)

    def _record_death(self, number: int, message: str) -> None:
        """Put on record that a run's process died, unless the run is to be taken up again or has been already."""
        self._deaths[number] += 1
        if self._deaths[number] <= self._agenda.retakes:
            self._board.hear(Left(number, message))
            return
        job = self._agenda.job(number)
        assert job is not None, number
        try:
            lease = claim(lease_of(job.config))
        except UserError:
            self._board.hear(Failed(number, message))
            return
        if lease is not None:
            record_failure(job.config, message, "", datetime.now(UTC))
            lease.release()
            self._board.hear(Failed(number, message))


def free_port() -> int:
    """A TCP port that is free on this machine at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
