"""How many cells of an agenda run side by side, with how many threads, and on which devices."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch

from harness.config import require
from harness.machine import environment
from studies.agenda import Agenda
from studies.runs.folders import folder_of, is_done

A = TypeVar("A", bound=Agenda)


@dataclass(frozen=True, kw_only=True)
class WorkerPlan:
    """Workers, and what each of them uses."""

    workers: int
    processes: int = 1
    """Processes that train one cell together."""
    gpus: tuple[str, ...] = ()
    """CUDA devices, as CUDA_VISIBLE_DEVICES names them; none on the CPU."""
    shares_device: bool = False
    """Whether some device serves more than one worker."""
    waits: bool = True
    """Whether workers wait for runs that other commands hold."""

    def devices(self, worker: int) -> Mapping[str, str]:
        """The environment that shows a worker (from 0) its devices and no others: more workers take turns on them."""
        if not self.gpus:
            return {}
        mine = [self.gpus[(worker * self.processes + place) % len(self.gpus)] for place in range(self.processes)]
        return {"CUDA_VISIBLE_DEVICES": ",".join(mine)}


def in_group() -> bool:
    """Whether a launcher such as torchrun started several processes of this command."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def check_group(jobs: int, gpus_per_cell: int) -> None:
    """Refuse workers where a launcher has started the processes."""
    require(
        jobs in (0, 1) and gpus_per_cell == 1,
        f"--jobs is {jobs} and --gpus_per_cell is {gpus_per_cell}: under torchrun or accelerate launch all processes "
        "train one cell at a time; leave them out, or start the command without a launcher",
    )


def make_plan(agenda: A, jobs: int, gpus_per_cell: int, option: str = "--jobs") -> tuple[A, WorkerPlan]:
    """The plan, and the agenda with the threads of each cell, when the CPU's are divided.

    Args:
        jobs: cells side by side; 0 = one on the CPU, else one a GPU.
        option: what the command calls `jobs`.

    Raises:
        UserError: for numbers that make no sense, alone or with the device or the budget.
    """
    shared = agenda.cells[0]
    require(jobs >= 0, f"{option} is {jobs}: give the number of cells to run side by side, or 0 for the machine's own")
    require(gpus_per_cell >= 1, f"--gpus_per_cell is {gpus_per_cell}: give 1 or more")
    device, by_clock = environment.resolve_device(shared.runtime.device), shared.budget.unit == "seconds"
    require(
        jobs < 2 or not by_clock,
        f"{option} is {jobs} with budget.unit seconds: cells side by side slow each other; give {option} 1",
    )
    gpus = visible_gpus() if device.type == "cuda" else ()
    require(
        gpus_per_cell == 1 or gpus_per_cell <= len(gpus),
        f"--gpus_per_cell is {gpus_per_cell}: this command sees {len(gpus)} CUDA devices; give at most as many",
    )
    places = max(1, len(gpus) // gpus_per_cell)
    side_by_side = min(jobs or (1 if by_clock else places), agenda.total)
    left = sum(job is None or not is_done(folder_of(job.config)) for job in agenda.jobs())
    workers = max(1, min(side_by_side, left))
    plan = WorkerPlan(workers=workers, processes=gpus_per_cell, gpus=gpus, shares_device=workers > places)
    return with_threads(agenda, side_by_side * gpus_per_cell), plan


def with_threads(agenda: A, processes: int) -> A:
    """Every cell with its part of the threads; one process keeps them all."""
    if processes == 1:
        return agenda
    threads = agenda.cells[0].runtime.threads or torch.get_num_threads()
    return agenda.with_threads(max(1, threads // processes))


def visible_gpus() -> tuple[str, ...]:
    """The CUDA devices that this command may use. Asking makes no context on them."""
    count = torch.cuda.device_count()
    named = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return tuple(named[:count]) or tuple(str(index) for index in range(count))
