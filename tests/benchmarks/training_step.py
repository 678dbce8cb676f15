"""A training step of SiT-B/2 at batch 8 and 256 tokens: naive scripts, the bare optimum, and the trainer, in turns.

The naive loop is `naive_loop.py`; the bare optimum is the trainer's forward, backward, clip and fused update with no
harness around it. The machine's own rate is that of the matrix products of one block, forward and backward, measured
in the same rounds.
"""

import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch

import methods
from harness.training.step import Run, synchronize
from tests.benchmarks.interleaved import Timing, timed
from tests.benchmarks.naive_loop import NaiveLoop
from tests.benchmarks.trainer_loops import BATCH, bare_steps, seconds, trainer_run, trainer_steps

TITLE = "a training step of SiT-B/2, batch 8, 256 tokens: naive scripts, the bare optimum, the trainer"
MODEL, SIZE, WIDTH, TOKENS = "SiT-B/2", 32, 768, 256
ROUNDS = 6
PRODUCTS = {"qkv": (WIDTH, 3 * WIDTH), "proj": (WIDTH, WIDTH), "fc1": (WIDTH, 4 * WIDTH), "fc2": (4 * WIDTH, WIDTH)}
"""Inputs and outputs of a block's linear layers."""
PRODUCTS_GFLOPS = 3 * sum(2 * BATCH * TOKENS * a * b for a, b in PRODUCTS.values()) / 1e9
"""Of one call of `products`: forward, and backward to inputs and weights."""


def products(precision: torch.dtype, device: torch.device) -> Callable[[], None]:
    """All matrix products of a block's linear layers, forward and backward."""
    shapes = [
        (torch.randn(BATCH * TOKENS, a), torch.randn(b, a), torch.randn(BATCH * TOKENS, b))
        for a, b in PRODUCTS.values()
    ]
    operands = [tuple(value.to(device, precision) for value in shape) for shape in shapes]

    def run() -> None:
        for x, weight, gradient in operands:
            torch.nn.functional.linear(x, weight)
            gradient @ weight
            gradient.t() @ x
        synchronize(device)

    return run


def measure() -> list[dict[str, Any]]:
    with ExitStack() as stack:
        runs = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        built = {name: trainer_run(MODEL, SIZE, runs, name) for name in methods.names()}
        control = built[methods.control()]
        device = control.device
        naive = NaiveLoop(MODEL, SIZE, BATCH, device)
        loops = {name: trainer_steps(run, runs) for name, run in built.items()}
        for loop in loops.values():
            stack.callback(loop.close)  # type: ignore[attr-defined]
        found = timed(
            {
                "products fp32": products(torch.float32, device),
                "products bf16": products(torch.bfloat16, device),
                **{f"naive {name}": getattr(naive, name) for name in built if hasattr(naive, name)},
                f"bare {methods.control()}": partial(seconds, bare_steps(control), 1, device),
                **{f"trainer {name}": partial(seconds, loop, 1, device) for name, loop in loops.items()},
            },
            ROUNDS,
        )
    return [row(name, found, built) for name in found]


def row(name: str, found: dict[str, Timing], built: dict[str, Run]) -> dict[str, Any]:
    """One line of the table."""
    loop, method = name.split()
    timing, control = found[name], methods.control()
    filled: dict[str, Any] = {"loop": loop, "method": method, "seconds": timing.median}
    filled["range"] = f"{min(timing.seconds):.3g} to {max(timing.seconds):.3g}"
    if loop == "products":
        gflops, filled["method"] = PRODUCTS_GFLOPS, f"one block, {method}"
    else:
        gflops = BATCH * built[method].cost.train_gflops_per_image
    filled["counted GFLOP/s"] = gflops / timing.median
    rate = PRODUCTS_GFLOPS / found["products bf16"].median
    filled["of the bf16 rate"] = f"{gflops / timing.median / rate:.1%}"
    others = {
        "naive / this": f"naive {method}" if loop == "trainer" else "",
        "this / bare": f"bare {method}" if loop == "trainer" else "",
        "this / vanilla": f"{loop} {control}" if loop in ("naive", "trainer") else "",
    }
    for column, other in others.items():
        if other in found:
            ratio = found[other].ratio(timing) if column == "naive / this" else timing.ratio(found[other])
            filled[column] = str(ratio)
        else:
            filled[column] = "-"
    counted = loop == "trainer"
    filled["counted / vanilla"] = (
        f"{built[method].cost.train_gflops_per_image / built[control].cost.train_gflops_per_image:.3f}"
        if counted
        else "-"
    )
    return filled
