"""The process that workers are forked from loads their libraries, and may have no threads and no device."""

import os
import subprocess
import sys
from pathlib import Path

from studies.children import PRELOADED, in_own_process

ROOT = Path(__file__).parents[3]

CODE = """
import importlib
import os
from studies.terminal.quiet import quiet_libraries

quiet_libraries()
import torch

asked = []
torch.cuda._device_count_nvml = lambda: 1  # as on a machine with a GPU
torch._C._cuda_getDeviceCount = lambda: asked.append("the CUDA runtime") or 1

importlib.import_module("PRELOADED")

assert torch.cuda.is_available(), "the stand-in for a GPU is not seen"
assert not asked and not torch.cuda.is_initialized()
assert len(os.listdir("/proc/self/task")) == 1
"""


def test_what_workers_are_forked_from_is_clean() -> None:
    settings = ("PYTORCH_NVML_BASED_CUDA_CHECK", "PYTHONWARNINGS")
    environment = {key: value for key, value in os.environ.items() if key not in settings}
    result = subprocess.run(
        [sys.executable, "-c", CODE.replace("PRELOADED", PRELOADED)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**environment, "PYTHONPATH": str(ROOT)},
    )
    assert result.returncode == 0, result.stderr


def is_preloaded() -> bool:
    return PRELOADED in sys.modules


def test_a_child_starts_with_the_libraries_of_workers_loaded() -> None:
    """A name that cannot be imported is passed over by Python, and every worker would load torch anew."""
    assert in_own_process(is_preloaded)
