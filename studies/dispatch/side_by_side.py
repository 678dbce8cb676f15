"""How many cells side by side, with how many threads each, train most images a second together on this machine's CPU.

Measured with the trainer's own step of the study's model, batch and precision, on made-up data, by the control method
and uncompiled: what methods add runs on the same backbone. The table is kept among the caches, so a machine is measured
once for each of these.
"""

import dataclasses
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

import methods
from harness.config import RunConfig
from harness.cost import memory
from harness.cost.operations import hollow
from harness.data.cache import cache_folder, read_small, write_small
from harness.frozen.autoencoder import Autoencoder, untrained_network
from harness.frozen.encoders import encoder_width
from harness.machine import environment, ram
from harness.machine.processes import open_accelerator
from harness.method import BackboneShape, DataShape
from harness.records.files import digest
from harness.training.compilation import forward_gmacs
from harness.training.step import train_step
from studies.agenda import Agenda
from studies.children import CONTEXT, start_server
from studies.configs.sections import resolve_sections
from studies.costs.synthetic import backbone_shape, build_method, synthetic_run
from studies.runs.folders import folder_of
from studies.terminal.quiet import quiet_libraries

SECONDS = 2.0
"""Each split of the threads is timed for at least as long, and over at least one step."""
STEP_GFLOPS = 400.0
"""A measured step has fewer images than the study's where those would cost more: some seconds on a few cores."""
GAIN = 1.05
"""More cells at once must be faster by this factor: they leave the clock of seconds, and take more memory."""
HOPELESS = 0.9
"""Nothing is gained by dividing further what is slower than the fastest by this factor."""
CLASSES = 10
"""Of the made-up labels; their number takes no time."""


@dataclass(frozen=True)
class Split:
    """One way to divide the threads, and how fast it is."""

    processes: int
    threads: int
    """Of each."""
    images_per_s: float
    """Of all processes together."""


@dataclass(frozen=True)
class Choice:
    """What a study runs with, and why, in one line."""

    processes: int
    threads: int
    reason: str


def choose(agenda: Agenda) -> Choice:
    """How the runs of an agenda share the CPU: with the threads the study was begun with, else as is fastest.

    All cells get the same threads, whose number changes the last bits of sums.
    """
    config = agenda.cells[0]
    threads = config.runtime.threads or torch.get_num_threads()
    if begun := recorded_threads(agenda):
        processes = max(1, threads // begun)
        return Choice(processes, begun, f"{split_words(processes, begun)}, as this study was begun with")
    if len(divisors(threads, agenda.total)) == 1:
        return Choice(1, threads, f"{split_words(1, threads)}, as there is nothing to divide")
    splits = measured(config, threads, agenda.total)
    best = fastest(splits)
    return Choice(best.processes, best.threads, table_words(splits, best))


def recorded_threads(agenda: Agenda) -> int:
    """Threads of the first run that is on record; 0 where there is none."""
    for job in agenda.jobs():
        if job is not None and folder_of(job.config).exists():
            return int(folder_of(job.config).manifest()["config"]["runtime"]["threads"])
    return 0


def fastest(splits: Sequence[Split]) -> Split:
    """The fastest, but fewer processes where more gain little; `splits` begin with the fewest."""
    best = splits[0]
    for split in splits[1:]:
        if split.images_per_s >= GAIN * best.images_per_s:
            best = split
    return best


def table_words(splits: Sequence[Split], best: Split) -> str:
    """The table in one line, the chosen split first."""
    others = (split for split in splits if split is not best)
    line = f"{split_words(best.processes, best.threads)}: {best.images_per_s:.1f} images/s"
    line += " together" if best.processes > 1 else ""
    return "; ".join([line, *(f"{split_words(s.processes, s.threads)}: {s.images_per_s:.1f}" for s in others)])


def split_words(processes: int, threads: int) -> str:
    """`2 processes of 1 thread each`, `1 process of 2 threads`."""
    line = f"{processes} process{'es'[: 2 * (processes > 1)]} of {threads} thread{'s'[: threads > 1]}"
    return f"{line} each" if processes > 1 else line


# -- the table ------------------------------------------------------------------------------------------------------


def measured(config: RunConfig, threads: int, most: int) -> list[Split]:
    """The splits of `threads` that were measured, now or earlier, for at most `most` processes, the fewest first."""
    config, shape = control_run(config)
    path, key = place_of(config, shape, threads)
    stored = read_small(path)
    known = {row["processes"]: Split(**row) for row in stored["splits"]} if stored and stored["key"] == key else {}
    splits: list[Split] = []
    for processes in divisors(threads, most):
        if processes > 1 and not fits(config, shape, processes):
            break
        if processes not in known:
            speed = images_per_s(config, shape, processes, threads // processes)
            known[processes] = Split(processes, threads // processes, speed)
            # One whose process died is not remembered: it may have been for want of memory.
            rows = [dataclasses.asdict(known[number]) for number in sorted(known) if known[number].images_per_s]
            write_small(path, {"key": key, "splits": rows})
        splits.append(known[processes])
        if known[processes].images_per_s < HOPELESS * max(split.images_per_s for split in splits):
            break
    return splits


def control_run(config: RunConfig) -> tuple[RunConfig, BackboneShape]:
    """The control method's run of a study, eager and with batches that take some seconds at most, and its shape."""
    network = Autoencoder(hollow(partial(untrained_network, config.autoencoder.path)), "")
    channels, side, _ = network.latent_shape(config.data.image_size)
    shape = backbone_shape(config, side, channels, CLASSES)
    images = int(STEP_GFLOPS / (6 * forward_gmacs(shape)))
    optimizer = config.optimizer
    optimizer = replace(optimizer, batch_size=max(1, min(images, optimizer.batch_size)))
    control = methods.control()
    runtime = replace(environment.resolve_runtime(config.runtime), compile=False)
    sections = {control: methods.load(control).Config()}
    config = replace(config, method=control, sections=sections, optimizer=optimizer, runtime=runtime)
    return resolve_sections(config, shape), shape


def place_of(config: RunConfig, shape: BackboneShape, threads: int) -> tuple[Path, Mapping[str, Any]]:
    """Where the table of this machine and run is kept, and all that its speed depends on."""
    runtime, optimizer = config.runtime, config.optimizer
    key = {
        "cpu": cpu_name(),
        "cpus": usable_cpus(),
        "threads": threads,
        "model": dataclasses.asdict(config.model),
        "latents": [shape.in_channels, shape.input_size],
        "batch": [optimizer.batch_size, optimizer.micro_batch],
        "precision": runtime.precision,
        "checkpoint_activations": runtime.checkpoint_activations,
        "torch": torch.__version__,
    }
    return cache_folder(config.output) / f"side-by-side-{digest(key)[:12]}.json", key


def cpu_name(info: Path = Path("/proc/cpuinfo")) -> str:
    """What the processor calls itself; its kind where the system does not say."""
    try:
        lines = info.read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def usable_cpus() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def divisors(threads: int, most: int) -> list[int]:
    """Numbers of processes, at most `most`, that divide the threads."""
    return [number for number in range(1, min(threads, most) + 1) if threads % number == 0]


def fits(config: RunConfig, shape: BackboneShape, processes: int) -> bool:
    """Whether so many runs at once have room in memory."""
    method = memory.outline(config.method, partial(build_method, config, shape, data_shape(config)))
    parts = [*memory.weight_parts(config, method), *memory.training_parts(config, method, 1)]
    return processes * sum(part.num_bytes for part in parts) <= ram.free_ram()


def data_shape(config: RunConfig) -> DataShape:
    """Of the made-up data."""
    return DataShape(image_size=config.data.image_size, num_classes=CLASSES, encoder_width=encoder_width)


# -- the measurement ------------------------------------------------------------------------------------------------


def images_per_s(config: RunConfig, shape: BackboneShape, processes: int, threads: int) -> float:
    """Images a second of `processes` runs at once, each in a process of its own; 0 where one of them died.

    Their clocks start together, after a step each that is not counted.
    """
    start_server()
    config = replace(config, runtime=replace(config.runtime, threads=threads))
    pairs = [CONTEXT.Pipe() for _ in range(processes)]
    workers = [CONTEXT.Process(target=train_some, args=(config, shape, theirs), daemon=True) for _, theirs in pairs]
    try:
        for worker in workers:
            worker.start()
        for _, theirs in pairs:
            theirs.close()  # so that the end of a process is the end of what is heard
        heard = [ours for ours, _ in pairs]
        for connection in heard:
            connection.recv()
        for connection in heard:
            connection.send("go")
        return sum(connection.recv() for connection in heard)
    except (EOFError, BrokenPipeError):
        return 0.0
    finally:
        for worker in workers:
            worker.kill()
            worker.join()


def train_some(config: RunConfig, shape: BackboneShape, wire: Connection) -> None:
    """Train for `SECONDS` from when the command says so, and tell it the images a second."""
    quiet_libraries()
    environment.apply_runtime(config.runtime)
    images = config.optimizer.batch_size
    run = synthetic_run(config, shape, data_shape(config), open_accelerator(config.runtime), images)
    batches = (run.batches.batch(step) for step in range(10**9))
    train_step(run, next(batches))
    wire.send("ready")
    wire.recv()
    wire.send(speed(lambda: train_step(run, next(batches)), images))


def speed(step: Callable[[], None], images: int) -> float:
    """Images a second over steps of `SECONDS` in all."""
    started, steps = time.perf_counter(), 0
    while not steps or time.perf_counter() - started < SECONDS:
        step()
        steps += 1
    return steps * images / (time.perf_counter() - started)
