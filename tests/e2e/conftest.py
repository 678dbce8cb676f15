"""The command line as a user runs it: in processes of its own, in an empty folder, with budgets of a few steps."""

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from studies import cli

ROOT = Path(__file__).parents[2]
TIMES = ("train_seconds", "evaluation_seconds", "io_seconds", "images_per_s")
"""Fields of a record that no two runs share."""

SMALL = (
    *("--config", "digits", "--model.name", "SiT-pico/2", "--optimizer.batch_size", "16", "--data.holdout", "0.95"),
    *("--evaluation.num_samples", "48", "--evaluation.kid_subset", "20", "--evaluation.velocity_images", "16"),
    *("--evaluation.sampler.num_steps", "2"),
)
"""Few training images are the reference, so that evaluations take a second."""
STUDY = (
    *("--study", "small", "--methods", "sit,vae_repa", "--seeds", "0", "--budget.amount", "6"),
    *("--evaluation.points", "2", "--output.log_every", "1", "--output.checkpoint_every", "2"),
)
"""Evaluated after steps 3 and 6, whole checkpoints after 2, 3, 4 and 6."""


@dataclass(frozen=True)
class Place:
    """A working folder, and how commands are run in it."""

    folder: Path
    cache: Path

    @property
    def runs(self) -> Path:
        return self.folder / "runs"

    def words(self, *words: str) -> list[str]:
        """Words of a command that trains here; the thread count is this process's, as it changes the last bits."""
        output = ["--output.runs", str(self.runs), "--output.cache", str(self.cache)]
        return [words[0], *SMALL, *output, "--runtime.threads", str(torch.get_num_threads()), *words[1:]]

    def process(self, *words: str) -> subprocess.CompletedProcess[str]:
        """`ditbench` with these words, in a process of its own."""
        return run_process([sys.executable, "-m", "studies.cli", *words], self.folder)


def run_process(command: Sequence[str], folder: Path, root: Path = ROOT) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(root), "COLUMNS": "200"}
    return subprocess.run(command, capture_output=True, text=True, timeout=280, env=environment, cwd=folder)


@pytest.fixture
def place(tmp_path: Path, shared_cache: Path) -> Place:
    """An empty place."""
    return Place(tmp_path, shared_cache)


@dataclass(frozen=True)
class FinishedStudy:
    """A comparison that ran in a process of its own; tests read it, or add to what lies beside its records."""

    place: Place
    result: subprocess.CompletedProcess[str]

    @property
    def path(self) -> Path:
        return self.place.runs / "small"

    def run(self, cell: str) -> Path:
        return self.path / cell / "seed0"


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, shared_cache: Path) -> FinishedStudy:
    place = Place(tmp_path_factory.mktemp("finished"), shared_cache)
    result = place.process(*place.words("compare", *STUDY))
    assert result.returncode == 0, result.stderr
    return FinishedStudy(place, result)


@pytest.fixture
def ditbench(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """`ditbench(*words)` in this process: exit status, stdout, stderr."""

    def run(*words: str) -> tuple[int, str, str]:
        capsys.readouterr()
        status = cli.main(list(words))
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return run


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder with its content."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
