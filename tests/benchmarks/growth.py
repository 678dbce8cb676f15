"""How the time of a training step grows with its counted GFLOPs, and the price of accumulation and checkpointing.

Sizes differ in width, depth and tokens. The cases of all sizes are timed in turns; those of one size are the same run
on the same batch, so that nothing but the setting differs. `growth_figure` draws what this measures.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from harness.config import RunConfig, RuntimeConfig
from harness.cost import memory
from harness.machine import environment
from harness.training.step import Run, synchronize, train_step
from tests.benchmarks.interleaved import timed
from tests.benchmarks.runs import build_run

TITLE = "step time against counted GFLOPs, and the price of accumulated gradients and of checkpointed activations"
ROUNDS = 5


@dataclass(frozen=True)
class Size:
    """A backbone, the side of its latents, and images a step."""

    model: str
    side: int
    batch: int

    @property
    def tokens(self) -> int:
        """Of patches of 2 x 2."""
        return (self.side // 2) ** 2


SIZES = (
    Size("SiT-pico/2", 16, 8),
    Size("SiT-nano/2", 16, 8),
    Size("SiT-nano/2", 32, 8),
    Size("SiT-micro/2", 16, 8),
    Size("SiT-micro/2", 32, 4),
    Size("SiT-S/2", 16, 8),
    Size("SiT-S/2", 32, 4),
    Size("SiT-B/2", 16, 4),
    Size("SiT-B/2", 32, 2),
)


def variants(run: Run) -> dict[str, Callable[[], None]]:
    """One step on a batch that lies ready: as it is, in two halves, and with checkpointed activations."""
    plain, batch = run.config, run.batches.batch(0)
    halves = replace(plain, optimizer=replace(plain.optimizer, micro_batch=plain.optimizer.batch_size // 2))

    def step(config: RunConfig, checkpointed: bool) -> None:
        run.config, run.backbone.checkpoint_activations = config, checkpointed
        train_step(run, batch)
        synchronize(run.device)

    return {
        "plain": partial(step, plain, False),
        "halves": partial(step, halves, False),
        "checkpointed": partial(step, plain, True),
    }


def fit(columns: Sequence[Sequence[float]], seconds: Sequence[float]) -> list[float]:
    """Coefficients of seconds = a + b x first column + ..., least in the sum of (fitted / seconds - 1)^2."""
    design = np.stack([np.ones(len(seconds)), *map(np.asarray, columns)], axis=1)
    found, *_ = np.linalg.lstsq(design / np.asarray(seconds)[:, None], np.ones(len(seconds)), rcond=None)
    return [float(value) for value in found]


def fitted(coefficients: Sequence[float], *columns: Sequence[float]) -> list[float]:
    """Seconds by a fit, for each row of the columns."""
    a, *slopes = coefficients
    return [
        a + sum(b * value for b, value in zip(slopes, values, strict=True)) for values in zip(*columns, strict=True)
    ]


def measure() -> list[dict[str, Any]]:
    runtime = environment.resolve_runtime(RuntimeConfig())
    environment.apply_runtime(runtime)
    runs = [build_run(size.model, size.side, size.batch, runtime) for size in SIZES]
    cases = {f"{place} {name}": case for place, run in enumerate(runs) for name, case in variants(run).items()}
    times = timed(cases, ROUNDS)
    plain, halves, checkpointed = (
        [times[f"{place} {name}"] for place in range(len(runs))] for name in ("plain", "halves", "checkpointed")
    )
    gflops = [run.cost.train_gflops_per_image * size.batch for size, run in zip(SIZES, runs, strict=True)]
    kept = [activations_gb(run) for run in runs]
    seconds = [timing.median for timing in plain]
    by_gflops = fitted(fit([gflops], seconds), gflops)
    by_both = fitted(fit([gflops, kept], seconds), gflops, kept)
    return [
        {
            "model": size.model,
            "tokens": size.tokens,
            "batch": size.batch,
            "GFLOPs a step": gflops[place],
            "activations, GB": kept[place],
            "step, ms": 1000 * seconds[place],
            "GFLOP/s": gflops[place] / seconds[place],
            "fit by GFLOPs, %": 100 * (by_gflops[place] / seconds[place] - 1),
            "fit by GFLOPs and activations, %": 100 * (by_both[place] / seconds[place] - 1),
            "two halves / step": str(halves[place].ratio(plain[place])),
            "checkpointed / step": str(checkpointed[place].ratio(plain[place])),
        }
        for place, size in enumerate(SIZES)
    ]


def activations_gb(run: Run) -> float:
    """What autograd keeps of a step's forward pass, in 10^9 bytes."""
    shape = run.method.backbone
    return memory.backbone_activations(run.config, shape, run.config.optimizer.batch_size, shape.depth) / 1e9
