"""Peak memory of a training step, measured in a process of its own."""

import gc
import resource
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch

import methods
from harness.backbones.sit import parse_name
from harness.config import RuntimeConfig
from harness.cost import memory
from harness.machine import environment, ram
from harness.machine.processes import open_accelerator
from harness.machine.ram import MemoryPart
from harness.method import Method
from harness.training.step import synchronize
from studies.children import in_own_process
from studies.costs.stands import Case, Conditions, Stand, Workload

PEAK_STEPS = 2
"""The second step has the optimiser's moments beside the activations, which is the most that a step needs."""


def check_memory(conditions: Conditions, group: Sequence[Case]) -> None:
    """Refuse a model whose cases cannot be held together: one of them trains while the heads of the others rest."""
    outlines = []
    for case in group:
        config = conditions.config(case)
        build = partial(methods.build, config, conditions.shape(config), conditions.data)
        outlines.append((config, memory.outline(case.method, build)))
    resting = [heads_bytes(method) for _, method in outlines]
    for (config, method), own in zip(outlines, resting, strict=True):
        others = MemoryPart(
            name="heads of the other rows",
            num_bytes=sum(resting) - own,
            way_out="name fewer methods at a time",
            on_device=True,
        )
        weights = [replace(p, way_out="choose a smaller model") for p in memory.weight_parts(config, method)]
        training = [replace(p, way_out="lower batch_size") for p in memory.training_parts(config, method, 1)]
        ram.check([others, *weights, *training], conditions.device)


def heads_bytes(method: Method) -> int:
    """Weights and two moments of a method's heads."""
    return 3 * memory.FLOAT * memory.head_parameters(method)


def peak_bytes(conditions: Conditions, case: Case) -> int:
    """Peak memory of a case: on CUDA by torch's counters, else in a process of its own, as resident memory has none."""
    if conditions.device.type == "cuda":
        return peak_of_steps(conditions.runtime, conditions.setting, case)
    return in_own_process(peak_of_steps, conditions.runtime, conditions.setting, case)


def peak_of_steps(runtime: RuntimeConfig, setting: Workload, case: Case) -> int:
    """Bytes that the first steps of a case need at their peak, beyond what a tiny run needed before.

    The tiny run loads the libraries' code and makes their workspaces, which belong to no case.
    """
    environment.apply_runtime(runtime)
    conditions = Conditions(runtime, open_accelerator(runtime), setting)
    control = methods.control()
    tiny = replace(
        case,
        model=f"SiT-pico/{parse_name(case.model)['patch_size']}",
        method=control,
        sections={control: methods.load(control).Config()},
    )
    train_some(replace(conditions, setting=replace(setting, batch_size=1)), tiny)
    if conditions.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(conditions.device)
    before = most_bytes(conditions.device)
    train_some(conditions, case)
    return most_bytes(conditions.device) - before


def train_some(conditions: Conditions, case: Case) -> None:
    """The first steps of a case, of which nothing is left."""
    stand = Stand(conditions, case)
    for number in range(PEAK_STEPS):
        stand.step(stand.batch(number))
    synchronize(conditions.device)
    del stand
    conditions.accelerator.free_memory()  # it keeps every model that it has prepared
    gc.collect()


def most_bytes(device: torch.device) -> int:
    """Peak so far: of torch's memory on a CUDA device since the last reset, else of this process's resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage(2) of the two systems
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
