"""How the time of a training step grows with its counted GFLOPs, and the price of accumulation and checkpointing.

Sizes differ in width, depth and tokens. The cases of all sizes are timed in turns; those of one size are the same run
on the same batch, so that nothing but the setting differs. `growth_figure` draws what this measures.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

import methods
from harness import environment
from harness.config import BudgetConfig, DataConfig, ModelConfig, OptimizerConfig, RunConfig, RuntimeConfig
from harness.encoders import encoder_width
from harness.method import DataShape
from harness.processes import open_accelerator
from harness.trainer import Run, synchronize, train_step
from studies.settings import resolve_sections
from studies.synthetic import backbone_shape, synthetic_run
from tests.benchmarks.interleaved import timed

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


def build(size: Size, runtime: RuntimeConfig, micro_batch: int = 0) -> Run:
    """A run of the control on made-up latents of 1000 classes. `runtime` is resolved."""
    control = methods.control()
    config = RunConfig(
        study="bench",
        method=control,
        sections={control: methods.load(control).Config()},
        model=ModelConfig(name=size.model),
        data=DataConfig(name="digits"),
        optimizer=OptimizerConfig(batch_size=size.batch, micro_batch=micro_batch),
        budget=BudgetConfig(amount=10**9),
        runtime=runtime,
    )
    shape = backbone_shape(config, size.side, 4, 1000)
    data = DataShape(image_size=8 * size.side, num_classes=1000, encoder_width=encoder_width)
    return synthetic_run(resolve_sections(config, shape), shape, data, open_accelerator(runtime), size.batch)


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


def fit(gflops: Sequence[float], seconds: Sequence[float]) -> tuple[float, float]:
    """a and b of seconds = a + b x GFLOPs with the least sum of squared relative residuals (fit / seconds - 1)^2."""
    columns = np.stack([np.ones(len(gflops)), np.asarray(gflops)], axis=1)
    (a, b), *_ = np.linalg.lstsq(columns / np.asarray(seconds)[:, None], np.ones(len(gflops)), rcond=None)
    return float(a), float(b)


def measure() -> list[dict[str, Any]]:
    runtime = environment.resolve_runtime(RuntimeConfig())
    environment.apply_runtime(runtime)
    runs = [build(size, runtime) for size in SIZES]
    cases = {f"{place} {name}": case for place, run in enumerate(runs) for name, case in variants(run).items()}
    times = timed(cases, ROUNDS)
    plain, halves, checkpointed = (
        [times[f"{place} {name}"] for place in range(len(runs))] for name in ("plain", "halves", "checkpointed")
    )
    gflops = [run.cost.train_gflops_per_image * size.batch for size, run in zip(SIZES, runs, strict=True)]
    a, b = fit(gflops, [timing.median for timing in plain])
    rows = []
    for place, (size, counted) in enumerate(zip(SIZES, gflops, strict=True)):
        time, fitted = plain[place].median, a + b * counted
        rows.append(
            {
                "model": size.model,
                "tokens": size.tokens,
                "batch": size.batch,
                "GFLOPs a step": counted,
                "step, ms": 1000 * time,
                "fit, ms": 1000 * fitted,
                "fit / step - 1, %": 100 * (fitted / time - 1),
                "GFLOP/s": counted / time,
                "two halves / step": str(halves[place].ratio(plain[place])),
                "checkpointed / step": str(checkpointed[place].ratio(plain[place])),
            }
        )
    return rows
