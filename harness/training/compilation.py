"""`torch.compile`: when it pays, and what of the backbone is compiled.

Blocks are compiled, not the backbone as a whole. They are alike, so one graph serves all of them, in every cell that a
process trains; it knows nothing of taps, so no method's taps make another; and its warm-up is a third as long
(`docs/performance.md`). The EMA, a method's teacher and evaluations run eagerly.
"""

import contextlib
import importlib.util
import os
import shutil
import sys

import torch

from harness.backbones.sit import SiT
from harness.config import BudgetConfig, RunConfig, require
from harness.method import BackboneShape

LONG_SECONDS = 1000
"""Training from which on `auto` compiles. On the CPU the warm-up took 8 to 17 s and a step became 1 to 18% shorter
(SiT-pico to B, `make bench BENCH=compiled`), so it was paid for after 55 to 425 s, or 4,000 to 59,000 GFLOPs, and every
process pays it again; on CUDA a warm-up of a minute and a gain of a tenth are assumed, and nothing was measured."""

NOMINAL_GFLOPS_PER_S = {"cpu": 100.0, "cuda": 100_000.0}
"""What turns a budget of steps, images or GFLOPs into seconds, by device. Not measured where a command runs: compared
runs must come to the same decision. Two CPU cores sustained 30 to 180 from SiT-pico to S; for CUDA it is assumed."""


def resolve_compile(config: RunConfig, shape: BackboneShape, device: torch.device) -> bool:
    """`runtime.compile` without `auto`, which depends on model, batch, budget and kind of device alone, and on whether
    there is a compiler.

    Args:
        shape: that of the backbone on the run's latents.
    """
    asked = config.runtime.compile
    if isinstance(asked, bool):
        return asked
    rate = NOMINAL_GFLOPS_PER_S.get(device.type, 0.0)
    if not rate:
        return False
    per_image = 6 * forward_gmacs(shape)  # two FLOPs a MAC, and a backward pass that costs two forward ones
    seconds = nominal_seconds(config.budget, per_image, config.optimizer.batch_size, rate)
    return seconds >= LONG_SECONDS and has_compiler(device)


def check_compiler(config: RunConfig, device: torch.device) -> None:
    """Refuse to train what cannot be compiled; `config` is resolved."""
    wanted = "a C++ compiler such as g++" if device.type == "cpu" else "Triton"
    require(
        not config.runtime.compile or has_compiler(device),
        f"runtime.compile is true and {wanted} was not found: install it, or give false",
    )


def forward_gmacs(shape: BackboneShape) -> float:
    """GMACs of the blocks for one image, within 1% of the whole backbone as it is counted."""
    tokens, width = shape.num_tokens, shape.hidden_size
    products = tokens * 12 * width**2  # qkv 3, projection 1, MLP 4 + 4
    attention = 2 * tokens**2 * width
    modulation = 6 * width**2
    return shape.depth * (products + attention + modulation) / 1e9


def nominal_seconds(budget: BudgetConfig, gflops_per_image: float, batch_size: int, rate: float) -> float:
    """Roughly how long a budget lasts on a machine that makes `rate` GFLOP/s."""
    gflops = {"steps": gflops_per_image * batch_size, "images": gflops_per_image, "train_gflops": 1.0, "seconds": rate}
    return budget.amount * gflops[budget.unit] / rate


def has_compiler(device: torch.device) -> bool:
    """Whether torch has what it compiles with, as torch/_inductor/config.py names it: a C++ compiler, or Triton."""
    if device.type != "cpu":
        return importlib.util.find_spec("triton") is not None
    return shutil.which(os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")) is not None


def compile_blocks(backbone: SiT) -> None:
    """Compile every block in place; names of weights stay as they are."""
    for block in backbone.blocks:
        block.compile()


def eager() -> contextlib.AbstractContextManager[None]:
    """Run compiled blocks eagerly within the block: for rare passes that would each compile a graph of their own, and
    for several backward passes through one graph, which compiled blocks refuse."""
    return torch.compiler.set_stance("force_eager")
