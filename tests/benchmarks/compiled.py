"""Eager steps against steps with compiled blocks, in turns, and the warm-up that the gain has to pay for.

torch's caches of compiled code are off, so every warm-up is a first one.
"""

import itertools
import math
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch._inductor import config as inductor

from harness.config import RuntimeConfig
from harness.machine import environment
from harness.training.step import Run, synchronize, train_step
from tests.benchmarks.interleaved import timed
from tests.benchmarks.runs import build_run

TITLE = "a training step with compiled blocks against an eager one, and the warm-up"
ROUNDS = 5
CASES = [
    ("SiT-pico/2", 8, 32, "fp32", 40),
    ("SiT-nano/2", 8, 32, "fp32", 12),
    ("SiT-nano/2", 8, 32, "bf16", 12),
    ("SiT-S/2", 32, 8, "fp32", 1),
    ("SiT-S/2", 32, 8, "bf16", 1),
    ("SiT-B/2", 32, 4, "bf16", 1),
]
"""Model, latent size, batch, precision, and steps of one measurement."""


def measure() -> list[dict[str, Any]]:
    return [measure_model(*case) for case in CASES]


def measure_model(name: str, size: int, batch: int, precision: str, count: int) -> dict[str, Any]:
    runtime = environment.resolve_runtime(RuntimeConfig(precision=precision))  # type: ignore[arg-type]
    eager, compiled = (build_run(name, size, batch, replace(runtime, compile=on)) for on in (False, True))
    first = {}
    with inductor.patch(force_disable_caches=True):
        torch._dynamo.reset()  # or the graph of a case before this one would be taken
        for kind, run in (("eager", eager), ("compiled", compiled)):
            started = time.perf_counter()
            train_some(run, itertools.count(), 2)
            first[kind] = time.perf_counter() - started
        cases = {
            kind: partial(train_some, run, itertools.count(2), count)
            for kind, run in (("eager", eager), ("compiled", compiled))
        }
        found = timed(cases, ROUNDS)
    warmup, gain = first["compiled"] - first["eager"], found["eager"].median - found["compiled"].median
    steps = warmup / gain * count if gain > 0 else math.inf
    return {
        "model": name,
        "tokens": eager.method.backbone.num_tokens,
        "batch": batch,
        "precision": precision,
        "eager, ms": 1000 * found["eager"].median / count,
        "compiled, ms": 1000 * found["compiled"].median / count,
        "compiled over eager": str(found["compiled"].ratio(found["eager"])),
        "warm-up, s": warmup,
        "pays after, s": steps * found["eager"].median / count,
        "pays after, GFLOPs": steps * batch * eager.cost.train_gflops_per_image,
    }


def train_some(run: Run, steps: Iterator[int], count: int) -> None:
    """Some steps, finished on the device."""
    for step in itertools.islice(steps, count):
        train_step(run, run.batches.batch(step))
    synchronize(run.device)
