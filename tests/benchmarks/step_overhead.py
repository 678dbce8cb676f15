"""What the trainer adds to the bare work of a step, the more the shorter steps are.

The trainer draws, hashes, logs, guards and writes records; the bare loop is forward, backward, clip, AdamW and EMA on
batches that lie ready.
"""

import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from tests.benchmarks.interleaved import timed
from tests.benchmarks.trainer_loops import BATCH, bare_steps, seconds, trainer_run, trainer_steps

TITLE = "what the trainer adds to a training step"
ROUNDS = 8
CASES = {"SiT-nano/2": (8, 100), "SiT-S/2": (32, 6), "SiT-B/2": (32, 2)}
"""Model: latent size, and steps of one measurement."""


def measure() -> list[dict[str, Any]]:
    return [measure_model(name) for name in CASES]


def measure_model(name: str) -> dict[str, Any]:
    size, count = CASES[name]
    with tempfile.TemporaryDirectory() as temporary:
        run = trainer_run(name, size, Path(temporary))
        trainer, bare = trainer_steps(run, Path(temporary)), bare_steps(run)
        cases = {
            "trainer": partial(seconds, trainer, count, run.device),
            "bare": partial(seconds, bare, count, run.device),
        }
        found = timed(cases, ROUNDS)
        trainer.close()  # type: ignore[attr-defined]
    return {
        "model": name,
        "tokens": (size // 2) ** 2,
        "batch": BATCH,
        "precision": run.config.runtime.precision,
        "threads": run.config.runtime.threads,
        "trainer, ms": 1000 * found["trainer"].median / count,
        "bare, ms": 1000 * found["bare"].median / count,
        "trainer over bare": str(found["trainer"].ratio(found["bare"])),
    }
