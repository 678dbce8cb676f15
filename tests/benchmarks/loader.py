"""What a step waits for its data: batches of latents, and of tokens of a ViT-B/14, from caches on the disk.

Shapes are those of SiT-B/2 at 256 pixels: moments [8, 32, 32] in float32 and tokens [256, 768] in float16, 426 kB an
image. `waited_share` is the part of the time that the consumer waits for the next batch: of a consumer that takes
2,000 images/s and leaves the CPU alone, as a GPU does, and of training itself on this machine.
"""

import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

import methods
from harness.config import BudgetConfig, DataConfig, ModelConfig, OptimizerConfig, RunConfig, RuntimeConfig
from harness.data import cache
from harness.data.batches import BatchSource, Shard
from harness.data.cache import Sharded
from harness.data.prepare import PreparedData
from harness.frozen.encoders import encoder_width
from harness.machine import environment
from harness.machine.processes import open_accelerator
from harness.method import BackboneShape, DataShape, Needs
from harness.rng import stream
from harness.training.step import train_step
from studies.configs.sections import resolve_sections
from studies.costs.synthetic import prepared_data, synthetic_run

TITLE = "batches of 256 from caches of SiT-B/2 at 256 pixels"
NUM_IMAGES, BATCH, COUNT = 12288, 256, 24
"""Images in the caches (5 GB), of a batch, and batches of one measurement: no image comes twice."""
METHOD, ENCODER = "repa", "dinov2_vitb14"
MOMENTS, TOKENS = (8, 32, 32), (256, 768)
PACE = 2000
"""Images a second that are asked for."""
STEP_BATCH, STEPS = 8, 3
"""Of training on this machine."""


def build(folder: Path, row_shape: tuple[int, ...], dtype: torch.dtype) -> Sharded:
    """A cache of random rows; those of one call are those of the next."""
    rows = torch.rand((cache.ROWS_PER_CALL, *row_shape), generator=stream(0, "data")).to(dtype).numpy()
    return cache.build(folder, {}, NUM_IMAGES, row_shape, rows.dtype, lambda start, stop: rows[: stop - start])


def prepared_at(folder: Path) -> PreparedData:
    """Caches on the disk; labels and the rest are made up."""
    config = RunConfig(model=ModelConfig(name="SiT-B/2"), data=DataConfig(name="digits"))
    shape, needs = BackboneShape.of(config.model.name, input_size=32, in_channels=4, num_classes=1000), Needs()
    made = prepared_data(shape, DataShape(image_size=0, num_classes=1000, encoder_width=encoder_width), needs, 1)
    images = replace(cast(Any, made.images), labels=np.arange(NUM_IMAGES) % 1000)
    return replace(
        made,
        images=images,
        train_rows=np.arange(NUM_IMAGES),
        moments=build(folder / "moments", MOMENTS, torch.float32),
        tokens={ENCODER: build(folder / "tokens", TOKENS, torch.float16)},
    )


def source_of(prepared: PreparedData, needs: Needs) -> BatchSource:
    return BatchSource(prepared, 0, BATCH, 0.1, needs, Shard())


def forget(folder: Path) -> None:
    """Have the system drop the files from memory, so that they are read from the disk."""
    os.sync()
    for path in folder.glob("*/shard-*.npy"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def remember(folder: Path) -> None:
    """Have the files in memory."""
    for path in folder.glob("*/shard-*.npy"):
        path.read_bytes()


def waits(batches: Iterator[Any], step_s: float) -> list[float]:
    """Seconds waited for each batch by a consumer whose step takes `step_s` and no CPU."""
    found = []
    while True:
        started = time.perf_counter()
        if next(batches, None) is None:
            return found
        found.append(time.perf_counter() - started)
        time.sleep(step_s)


def measure_loader(prepared: PreparedData, folder: Path, needs: Needs, from_disk: bool) -> dict[str, Any]:
    """Flat out, then at the pace asked for; each over images of its own."""
    (forget if from_disk else remember)(folder)
    source, step_s = source_of(prepared, needs), BATCH / PACE
    flat_out = waits(source.batches(0, COUNT), 0)[1:]
    paced = waits(source.batches(COUNT, 2 * COUNT), step_s)[1:]
    return {
        "case": f"latents{' and tokens' if needs.encoders else ''}, {'from the disk' if from_disk else 'in memory'}",
        "images_per_s": BATCH * len(flat_out) / sum(flat_out),
        "ms_per_batch": 1e3 * statistics.mean(flat_out),
        "waited_share": sum(paced) / (sum(paced) + step_s * len(paced)),
        "longest_wait_ms": 1e3 * max(paced),
    }


def measure_check(prepared: PreparedData) -> dict[str, Any]:
    """Checksums of all shards, which every run makes once as it first touches them."""
    started = time.perf_counter()
    for rows in (prepared.moments, prepared.tokens[ENCODER]):
        rows.verify()
    spent = time.perf_counter() - started
    return {
        "case": "first touch: checksums",
        "images_per_s": NUM_IMAGES / spent,
        "ms_per_batch": 1e3 * spent * BATCH / NUM_IMAGES,
        "waited_share": "",
        "longest_wait_ms": "",
    }


def measure_training(prepared: PreparedData) -> dict[str, Any]:
    """A few steps of SiT-B/2 whose method reads the tokens."""
    runtime = environment.resolve_runtime(RuntimeConfig())
    data = DataShape(image_size=256, num_classes=1000, encoder_width=encoder_width)
    config = RunConfig(
        method=METHOD,
        sections={METHOD: methods.load(METHOD).Config(encoders=ENCODER)},
        model=ModelConfig(name="SiT-B/2"),
        data=DataConfig(name="digits"),
        optimizer=OptimizerConfig(batch_size=STEP_BATCH),
        budget=BudgetConfig(amount=10**9),
        runtime=runtime,
    )
    shape = BackboneShape.of(config.model.name, input_size=32, in_channels=4, num_classes=1000)
    run = synthetic_run(resolve_sections(config, shape), shape, data, open_accelerator(runtime), 1)
    batches = BatchSource(prepared, 0, STEP_BATCH, 0.1, Needs(encoders=(ENCODER,)), Shard(), run.device)
    waited: list[float] = []
    spent: list[float] = []
    stream_of_batches = batches.batches(0, STEPS + 1)
    for number in range(STEPS + 1):
        started = time.perf_counter()
        batch = next(stream_of_batches)
        got = time.perf_counter()
        train_step(run, batch)
        if run.device.type == "cuda":
            torch.cuda.synchronize(run.device)
        if number:  # the first step warms up
            waited.append(got - started)
            spent.append(time.perf_counter() - started)
    return {
        "case": f"training SiT-B/2 with tokens, batch {STEP_BATCH}",
        "images_per_s": STEP_BATCH * STEPS / sum(spent),
        "ms_per_batch": 1e3 * statistics.mean(spent),
        "waited_share": sum(waited) / sum(spent),
        "longest_wait_ms": 1e3 * max(waited),
    }


def measure() -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        prepared = prepared_at(folder)
        rows = [measure_check(prepared)]
        for needs in (Needs(), Needs(encoders=(ENCODER,))):
            rows += [measure_loader(prepared, folder, needs, from_disk) for from_disk in (False, True)]
        return [*rows, measure_training(prepared)]
