"""How long commands take until they do something: each in a process of its own, in turns."""

import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.benchmarks.interleaved import timed
from tests.unit.reports.records_factory import write_study

TITLE = "start-up of commands, in seconds"
ROUNDS = 5
COMMANDS = ("--help", "report --help", "methods", "doctor", "compare --help", "overhead --help")


def command(words: list[str]) -> Callable[[], object]:
    """A run of a command that succeeds, its output unseen."""
    return lambda: subprocess.run(words, check=True, stdout=subprocess.DEVNULL)


def measure() -> list[dict[str, Any]]:
    ditbench = str(Path(sys.executable).with_name("ditbench"))
    with tempfile.TemporaryDirectory() as temporary:
        study = write_study(Path(temporary))
        cases = {f"ditbench {words}": command([ditbench, *words.split()]) for words in COMMANDS}
        cases["ditbench report of 10 runs"] = command([ditbench, "report", str(study)])
        cases["python -c 'import torch'"] = command([sys.executable, "-c", "import torch"])
        timings = timed(cases, ROUNDS)
    return [
        {"command": name, "median_s": timing.median, "least_s": min(timing.seconds), "most_s": max(timing.seconds)}
        for name, timing in timings.items()
    ]
