"""The process that workers are forked from loads their libraries, and may have no threads and no device."""

import os
import signal
import subprocess
import sys
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from studies import children
from studies.children import PRELOADED, end_children, ending_in_words, in_own_process, start_child, start_server

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


def say_and_wait(words: str, told: Connection) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    told.send(words)
    signal.pause()


def say_and_exit(status: int, told: Connection) -> None:
    told.send("last words")
    sys.exit(status)


def test_children_are_heard_until_they_end_and_are_ended_whatever_they_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(children, "GRACE_SECONDS", 0.2)
    start_server()
    stubborn, quick = start_child(say_and_wait, "here"), start_child(say_and_exit, 7)
    assert stubborn.heard.recv() == "here"
    assert quick.heard.recv() == "last words"
    with pytest.raises(EOFError):
        quick.heard.recv()
    assert quick.ended() == 7
    end_children([stubborn, quick])
    assert (stubborn.ended(), quick.ended()) == (-signal.SIGKILL, 7)


def test_how_a_process_ended() -> None:
    assert ending_in_words(-signal.SIGKILL) == "its process was killed by SIGKILL (often: out of memory)"
    assert ending_in_words(-signal.SIGSEGV) == "its process was killed by SIGSEGV"
    assert ending_in_words(7) == "its process ended with status 7"
