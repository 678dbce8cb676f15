"""Measured cost: what a step of each method takes on this machine, in time and memory.

The cases of one model are timed in turns, A B C A B C ..., so that what slows the machine down for a while slows all of
them, and each is compared with the control of its own round. A timed step is the trainer's own, from a batch that lies
ready on the CPU to updated weights and EMA; reading and drawing the batch goes on beside it and is not timed.
The cases of a model train one backbone, in turns, so that all of them take little more memory than one.

Shapes: N images, C channels, H W height and width, T tokens, Z encoder width.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import methods
from harness.config import RuntimeConfig, require
from harness.machine import environment
from harness.machine.processes import open_accelerator
from harness.machine.progress import OnProgress
from studies.costs.peaks import PEAK_STEPS, check_memory, peak_bytes
from studies.costs.stands import Case, Conditions, Workload, stands_of, work
from studies.costs.timing import Ratio, Spread, TimeLeft, paired_ratio, spread_ms, synced_clock, time_rounds


@dataclass(frozen=True, kw_only=True)
class MeasuredRow:
    """One case, measured."""

    model: str
    label: str
    method: str
    step_ms: Spread
    """Milliseconds of a training step of `batch` images."""
    images_per_s: float
    """Images trained on a second, at the median step."""
    forward_ms: Spread
    """Milliseconds of one forward pass of the EMA backbone on `batch` images, as in sampling: no heads, no gradient."""
    ratio: Ratio
    """Step time over the control's."""
    peak_memory_gb: float
    """What training adds to the process at its peak, in 10^9 bytes: weights, moments, EMA, heads, activations, and the
    encoder where targets are made online. On CUDA what torch has allocated; elsewhere the resident memory of a process
    of the case's own, beyond what the loaded libraries take."""
    batch: int
    precision: str
    device: str
    threads: int
    rounds: int


def measure(
    cases: Sequence[Case], runtime: RuntimeConfig, on_progress: OnProgress, setting: Workload | None = None
) -> list[MeasuredRow]:
    """Measure cases, one model after another; rows come in that order.

    Args:
        cases: every model among them needs its control case.
        runtime: device, precision and threads.
        on_progress: told what is measured, with an estimate of the time left.
        setting: batch, rounds and shapes; by default those of the papers' 256-pixel images.

    Raises:
        UserError: for wrong settings of a method, a missing control, or what does not fit into memory; all are found
            before anything is measured, but for memory that another process takes meanwhile.
    """
    runtime = environment.resolve_runtime(runtime)
    environment.apply_runtime(runtime)
    accelerator = open_accelerator(runtime)
    require(accelerator.num_processes == 1, "steps are measured in one process: start the command without a launcher")
    conditions = Conditions(runtime, accelerator, (setting or Workload()).resolved(accelerator.device))
    groups = [[case for case in cases if case.model == model] for model in dict.fromkeys(c.model for c in cases)]
    for group in groups:
        control_of(group)
        check_memory(conditions, group)
    progress = TimeLeft(on_progress, total_work(conditions, groups))
    return [row for group in groups for row in measure_model(conditions, group, progress)]


def control_of(group: Sequence[Case]) -> int:
    """The number of the case that all cases of a model are compared with."""
    found = [index for index, case in enumerate(group) if case.method == methods.control()]
    model, control = group[0].model, methods.control()
    require(bool(found), f"{model} has no row to compare with: measure {control} beside the other methods")
    return found[0]


def measure_model(conditions: Conditions, group: Sequence[Case], progress: TimeLeft) -> list[MeasuredRow]:
    """The rows of one model's cases."""
    peaks = []
    for case in group:
        peaks.append(peak_bytes(conditions, case))
        progress.tell(f"memory of {case.model} {case.label}", PEAK_STEPS * work(conditions, case))
    stands = stands_of(conditions, group)
    times = time_rounds(stands, conditions.setting, synced_clock(conditions.device), progress)
    conditions.accelerator.free_memory()  # it keeps every model that it has prepared
    control = times[control_of(group)]
    device = environment.describe(conditions.runtime)["device"]
    return [
        MeasuredRow(
            model=case.model,
            label=case.label,
            method=case.method,
            step_ms=spread_ms(own.steps),
            images_per_s=conditions.setting.batch_size / statistics.median(own.steps),
            forward_ms=spread_ms(own.forwards),
            ratio=paired_ratio(own.steps, control.steps),
            peak_memory_gb=peak / 1e9,
            batch=conditions.setting.batch_size,
            precision=conditions.runtime.precision,
            device=device,
            threads=conditions.runtime.threads,
            rounds=conditions.setting.rounds,
        )
        for case, own, peak in zip(group, times, peaks, strict=True)
    ]


# -- progress -------------------------------------------------------------------------------------------------------


def total_work(conditions: Conditions, groups: Sequence[Sequence[Case]]) -> list[float]:
    """The work of everything that is measured, in order."""
    rounds = conditions.setting.warmup + conditions.setting.rounds
    total = []
    for group in groups:
        steps = [work(conditions, case) for case in group]
        total += [PEAK_STEPS * step for step in steps] + rounds * steps
    return total
