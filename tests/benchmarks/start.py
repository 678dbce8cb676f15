"""What lies between two runs of one command: seconds from the end of a run to the first step of the next.

The data is a folder of many small files, as every one of them is looked at when a data set is opened.
"""

import tempfile
import time
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import methods
from harness.config import (
    BudgetConfig,
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    OptimizerConfig,
    OutputConfig,
    RunConfig,
    RuntimeConfig,
    SamplerConfig,
)
from studies.agenda import Context
from studies.configs.cells import Comparison
from studies.runs.lab import Lab, check_agenda, open_lab
from studies.runs.run import run_cell

TITLE = "from the end of a run to the first step of the next, on 200,000 files"
NUM_FILES, CLASSES, PICTURES = 200_000, 100, 256
FILE_BYTES, SIDE = 1000, 8
METHOD, SEEDS = "sit", (0, 1, 2, 3)


def write_images(folder: Path) -> Path:
    """Files in class folders: one of a few pictures of noise, padded to the size wanted."""
    random, contents = np.random.default_rng(0), []
    for _ in range(PICTURES):
        content = BytesIO()
        Image.fromarray(random.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)).save(content, "PNG")
        contents.append(content.getvalue().ljust(FILE_BYTES, b"\0"))
    for label in range(CLASSES):
        (folder / f"{label:03d}").mkdir(parents=True)
    for number in range(NUM_FILES):
        path = folder / f"{number % CLASSES:03d}" / f"{number:06d}.png"
        path.write_bytes(contents[number % PICTURES])
    return folder


def cell(folder: Path, images: Path) -> RunConfig:
    """The smallest run on these pictures, of one step."""
    return RunConfig(
        study="start",
        method=METHOD,
        sections={METHOD: methods.load(METHOD).Config()},
        model=ModelConfig(name="SiT-pico/2"),
        data=DataConfig(
            path=str(images), image_size=SIDE, holdout=0.99
        ),  # few are the reference, so that it is soon made
        optimizer=OptimizerConfig(batch_size=16),
        budget=BudgetConfig(amount=1),
        evaluation=EvaluationConfig(
            points=1,
            num_samples=16,
            kid_subset=8,
            velocity_images=16,
            classifier=False,
            precision="fp32",
            sampler=SamplerConfig(num_steps=2),
        ),
        runtime=RuntimeConfig(precision="fp32"),
        output=OutputConfig(runs=str(folder / "runs"), cache=str(folder / "cache"), log_every=1, mlflow=False),
    )


def starts(lab: Lab, asked: Comparison) -> Iterator[float]:
    """Seconds to the first step of every run but the first one, from the end of the run before it."""
    ended = 0.0
    for config in asked.runs():
        for event in run_cell(lab, config, Context(baseline=METHOD)):
            if event.kind == "step" and ended:
                yield time.perf_counter() - ended
            if event.kind == "end":
                ended = time.perf_counter()


def measure() -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        asked = Comparison(cells=(cell(folder, write_images(folder / "images")),), seeds=SEEDS, baseline=METHOD)
        began = time.perf_counter()
        lab = open_lab(asked.cells[0], lambda what, done, total: None)
        check_agenda(lab, asked)
        opened = time.perf_counter() - began
        found = list(starts(lab, asked))
    return [
        {
            "files": NUM_FILES,
            "caches made, s": opened,
            "next run, median s": float(np.median(found)),
            "next run, least s": min(found),
            "next run, most s": max(found),
        }
    ]
