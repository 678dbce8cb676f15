"""Peak memory of a training step against what `harness.cost.memory` works out, each case in a process of its own.

On a CPU the resident memory is measured while glibc returns freed blocks to the system at once, so that it is what is
in use. A run has it keep freed blocks of up to 32 MB for later; what that comes to stands beside it.
"""

import ctypes
import gc
import itertools
import sys
from dataclasses import replace
from typing import Any

import torch

from harness.config import RuntimeConfig
from harness.cost import memory
from harness.machine import environment
from harness.training.step import synchronize, train_step
from studies.children import in_own_process
from studies.costs.peaks import most_bytes
from tests.benchmarks.growth import Size
from tests.benchmarks.runs import build_run

TITLE = "peak memory of a training step, against the formula"
STEPS = 2
"""The second has the optimiser's moments beside the activations."""
SIZES = (
    Size("SiT-pico/2", 32, 64),
    Size("SiT-nano/2", 32, 32),
    Size("SiT-micro/2", 16, 32),
    Size("SiT-micro/2", 32, 8),
    Size("SiT-S/2", 16, 8),
    Size("SiT-S/2", 32, 4),
    Size("SiT-B/2", 16, 4),
    Size("SiT-B/2", 32, 2),
)
RETURNED = 65536
"""Bytes from which blocks are returned when they are freed, and of free memory at the end of the heap."""


def peak_of_steps(size: Size, runtime: RuntimeConfig, micro_batch: int, keeps_freed: bool) -> tuple[int, int]:
    """Bytes that two steps need at their peak beyond what a tiny run needed before, and those worked out for them."""
    environment.apply_runtime(runtime)
    if sys.platform == "linux" and not keeps_freed:
        for parameter in (environment.MMAP_THRESHOLD, environment.TRIM_THRESHOLD):
            ctypes.CDLL(None).mallopt(parameter, RETURNED)
    train(Size("SiT-pico/2", size.side, 2), runtime, 1)
    device = torch.device(runtime.device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    before = most_bytes(device)
    expected = train(size, runtime, micro_batch)
    return most_bytes(device) - before, expected


def train(size: Size, runtime: RuntimeConfig, micro_batch: int) -> int:
    """Two steps, of which nothing is left; returns the bytes worked out for them."""
    run = build_run(size.model, size.side, size.batch, runtime, micro_batch=micro_batch)
    for number in range(STEPS):
        train_step(run, run.batches.batch(number))
    synchronize(run.device)
    parts = [*memory.weight_parts(run.config, run.method), *memory.training_parts(run.config, run.method, 1)]
    run.accelerator.free_memory()  # it keeps every model that it has prepared
    del run
    gc.collect()
    return sum(part.num_bytes for part in parts)


def measure() -> list[dict[str, Any]]:
    runtime = environment.resolve_runtime(RuntimeConfig())
    return [row(size, replace(runtime, precision=name)) for size, name in itertools.product(SIZES, ("bf16", "fp32"))]  # type: ignore[arg-type]


def row(size: Size, runtime: RuntimeConfig) -> dict[str, Any]:
    """One size in one precision: three ways to train, measured over worked out, and the first as runs do."""
    checkpointed = replace(runtime, checkpoint_activations=True)
    found = {
        "plain": in_own_process(peak_of_steps, size, runtime, 0, False),
        "two halves": in_own_process(peak_of_steps, size, runtime, size.batch // 2, False),
        "checkpointed": in_own_process(peak_of_steps, size, checkpointed, 0, False),
    }
    kept, _ = in_own_process(peak_of_steps, size, runtime, 0, True)
    cells: dict[str, Any] = {}
    for name, (peak, expected) in found.items():
        cells |= {f"{name}, GB": peak / 1e9, f"{name} / formula": peak / expected}
    facts = {"model": size.model, "tokens": size.tokens, "batch": size.batch, "precision": runtime.precision}
    return {**facts, **cells, "plain, freed memory kept / formula": kept / found["plain"][1]}
