"""The command line as a user runs it: in an empty folder, with budgets of a few steps.

In this process, where the libraries are loaded already; in one of its own where that is the point of a test.
"""

import contextlib
import io
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pytest
import torch
from PIL import Image

from reports.figures.files import Draw, data_uri
from reports.figures.style import Look
from reports.page.figures import Picture
from studies import cli

ROOT = Path(__file__).parents[2]
TIMES = ("train_seconds", "evaluation_seconds", "io_seconds", "images_per_s", "evaluation_images_per_s")
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
    path = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "COLUMNS": "200"}
    return subprocess.run(command, capture_output=True, text=True, timeout=280, env=environment, cwd=folder)


@pytest.fixture
def place(tmp_path: Path, shared_cache: Path) -> Place:
    """An empty place."""
    return Place(tmp_path, shared_cache)


@dataclass(frozen=True)
class Said:
    """How a command ended."""

    status: int
    out: str
    err: str


def say(*words: str) -> Said:
    """`ditbench` with these words, in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.MonkeyPatch.context() as patched:
        patched.setattr(sys, "argv", ["ditbench", *words])  # which a run records
        status = cli.main(list(words))
    return Said(status, out.getvalue(), err.getvalue())


@dataclass(frozen=True)
class FinishedStudy:
    """A comparison that is over; tests read it, or add to what lies beside its records."""

    place: Place
    said: Said

    @property
    def path(self) -> Path:
        return self.place.runs / "small"

    def run(self, cell: str) -> Path:
        return self.path / cell / "seed0"


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, shared_cache: Path) -> FinishedStudy:
    place = Place(tmp_path_factory.mktemp("finished"), shared_cache)
    with pytest.MonkeyPatch.context() as patched:
        draw_nothing(patched)
        said = say(*place.words("compare", *STUDY))
    assert said.status == 0, said.err
    return FinishedStudy(place, said)


def pixel() -> bytes:
    """A picture as PNG."""
    buffer = io.BytesIO()
    Image.new("L", (1, 1)).save(buffer, "PNG")
    return buffer.getvalue()


def draw_nothing(patched: pytest.MonkeyPatch) -> None:
    """Reports written in this process have a pixel for every picture: to draw them takes most of a report's time.

    Those of commands that tests start with `run_process` have all of them, and so have those of unit tests.
    """

    def save(draw: Draw, frame: pd.DataFrame, stem: Path, look: Look) -> list[Path]:
        paths = [stem.with_name(f"{stem.name}.{suffix}") for suffix in ("png", "svg", "pdf", "csv")]
        for path in paths[:3]:
            path.write_bytes(pixel())
        frame.to_csv(paths[3], index=False)
        return paths

    patched.setattr("reports.figures.files.save", save)
    patched.setattr("reports.page.figures.picture", lambda draw, look, wide: Picture([], data_uri(pixel())))


@pytest.fixture
def blank_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    draw_nothing(monkeypatch)


@pytest.fixture
def ditbench(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """`ditbench(*words)` in this process: exit status, stdout, stderr."""

    def run(*words: str) -> tuple[int, str, str]:
        capsys.readouterr()
        status = cli.main(list(words))
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return run


FAULTY = """
import os, signal, time
from dataclasses import dataclass
from pathlib import Path

from harness.method import Disclosure, Method, Term


@dataclass(frozen=True, kw_only=True)
class FaultyConfig:
    weight: float = 1.0


class Faulty(Method):
    Config = FaultyConfig
    disclosure = Disclosure(summary="Does what a test asks for.", paper="none")

    def taps(self, progress):
        return (1,)

    def terms(self, view, hidden):
        folder, step = Path(os.environ["FAULTY"]), view.progress.step
        with (folder / "steps").open("a") as steps:
            steps.write(f"{step} ")
        read = (folder / "fault").read_text
        fault = read() if step >= 4 else ""
        if fault == "raise":
            raise RuntimeError("no space [left]\\non the device")
        if fault == "raise on rank 1" and os.environ["RANK"] == "1":
            raise RuntimeError("rank 1 is out of order")
        if fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        while fault == "wait":
            (folder / "waits").write_text(str(os.getpid()))
            time.sleep(0.1)
            fault = read()
        factor = float("nan") if fault == "nan" else 0.0
        return {"faulty": Term(hidden[1].float().mean() * factor, self.config.weight)}
"""
"""A third-party method that breaks as `$FAULTY/fault` says when four steps are made, and notes the steps it sees."""


@dataclass(frozen=True)
class Faults:
    """How the method `faulty` breaks, and what it saw."""

    folder: Path

    def are(self, fault: str) -> None:
        """nan, raise, raise on rank 1, kill, wait (until there is another fault), or "" for none."""
        (self.folder / "steps").write_text("")
        (self.folder / "fault").write_text(fault)

    def steps(self) -> set[int]:
        """Steps seen since, from 0."""
        return {int(step) for step in (self.folder / "steps").read_text().split()}

    def waiting(self) -> int:
        """Process that waits within its fifth step, once there is one."""
        path, deadline = self.folder / "waits", time.monotonic() + 120
        while not (path.is_file() and path.read_text()):
            assert time.monotonic() < deadline, "no process got to its fifth step"
            time.sleep(0.05)
        return int(path.read_text())


@pytest.fixture
def faults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Faults:
    """Installs the method `faulty` for this process and those that it starts."""
    folder = tmp_path / "faulty"
    metadata = folder / "faulty-1.dist-info"
    metadata.mkdir(parents=True)
    (folder / "faulty.py").write_text(FAULTY)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: faulty\nVersion: 1\n")
    (metadata / "entry_points.txt").write_text("[ditbench.methods]\nfaulty = faulty:Faulty\n")
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    monkeypatch.setenv("FAULTY", str(folder))
    faults = Faults(folder)
    faults.are("")
    return faults


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder with its content."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
