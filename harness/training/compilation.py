"""`torch.compile`: what of the backbone is compiled, and what must be there for it.

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
from harness.config import RunConfig, require


def check_compiler(config: RunConfig, device: torch.device) -> None:
    """Raise `UserError` where blocks are to be compiled and there is no compiler."""
    wanted = "a C++ compiler such as g++" if device.type == "cpu" else "Triton"
    require(
        not config.runtime.compile or has_compiler(device),
        f"runtime.compile is true and {wanted} was not found: install it, or give false",
    )


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
