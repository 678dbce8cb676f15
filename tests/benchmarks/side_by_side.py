"""Training cells one after another with all threads, or side by side with the threads divided: what `--jobs auto`
measures before it chooses, in turns, and with each process on cores of its own.
"""

import contextlib
import os
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from harness.config import DataConfig, ModelConfig, OptimizerConfig, OutputConfig, RunConfig, RuntimeConfig
from harness.method import BackboneShape
from studies.children import CONTEXT
from studies.dispatch import side_by_side
from studies.dispatch.side_by_side import control_run, divisors, images_per_s, split_words

TITLE = "images a second of cells side by side, threads divided"
ROUNDS = 3
CASES = {"SiT-nano/2": (32, 32, "fp32"), "SiT-S/2": (128, 8, "bf16")}
"""Model: pixels, of which the autoencoder makes 1/4, batch, and precision."""


def study(name: str) -> tuple[RunConfig, BackboneShape]:
    size, batch, precision = CASES[name]
    config = RunConfig(
        model=ModelConfig(name=name),
        data=DataConfig(name="digits", image_size=size),
        optimizer=OptimizerConfig(batch_size=batch),
        runtime=RuntimeConfig(precision=precision, device="cpu"),  # type: ignore[arg-type]
        output=OutputConfig(cache=str(Path("build"))),
    )
    return control_run(config)


class Pinned(CONTEXT.Process):  # type: ignore[name-defined, misc]
    """A process on one core of its own; the next process is on the next one."""

    place = 0

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        cores = sorted(os.sched_getaffinity(0))
        self._core = cores[Pinned.place % len(cores)]
        Pinned.place += 1

    def run(self) -> None:
        os.sched_setaffinity(0, {self._core})
        super().run()


@contextlib.contextmanager
def pinned() -> Iterator[None]:
    """What is measured within the block runs on cores of its own."""

    class Context:
        Pipe, Process = CONTEXT.Pipe, Pinned

    side_by_side.CONTEXT = Context  # type: ignore[assignment]
    try:
        yield
    finally:
        side_by_side.CONTEXT = CONTEXT


def measure_model(name: str) -> list[dict[str, Any]]:
    config, shape = study(name)
    threads = torch.get_num_threads()
    splits = divisors(threads, threads)
    cases = [(number, False) for number in splits] + ([(threads, True)] if hasattr(os, "sched_setaffinity") else [])
    rates: dict[tuple[int, bool], list[float]] = {case: [] for case in cases}
    for _ in range(ROUNDS):
        for processes, is_pinned in cases:
            with pinned() if is_pinned else contextlib.nullcontext():
                rates[processes, is_pinned].append(images_per_s(config, shape, processes, threads // processes))
    return [
        {
            "model": name,
            "batch": config.optimizer.batch_size,
            "precision": config.runtime.precision,
            "split": split_words(processes, threads // processes) + (", on cores of their own" if is_pinned else ""),
            "images/s together": f"{statistics.median(found):.4g} [{min(found):.4g}, {max(found):.4g}]",
            "against one": f"{statistics.median(a / b for a, b in zip(found, rates[1, False], strict=True)):.3g}",
        }
        for (processes, is_pinned), found in rates.items()
    ]


def measure() -> list[dict[str, Any]]:
    return [row for name in CASES for row in measure_model(name)]
