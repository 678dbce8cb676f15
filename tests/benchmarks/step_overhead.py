"""Step time of the trainer against a bare loop of the same work, measured interleaved in one run.

The trainer draws, hashes, logs, guards and writes records; the bare loop is forward, backward, clip, AdamW and EMA on
batches that lie ready.
"""

import itertools
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch

import methods
from harness import environment, flow
from harness.config import (
    BudgetConfig,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    OutputConfig,
    RunConfig,
    RuntimeConfig,
)
from harness.encoders import encoder_width
from harness.evaluate import Evaluator
from harness.method import DataShape
from harness.processes import open_accelerator
from harness.recorder import Recorder
from harness.records import RunFolder
from harness.tracking import Tracker
from harness.trainer import Run, build_backbone, build_optimizer, clip_gradients, step_views, train
from studies.settings import resolve_sections
from studies.synthetic import backbone_shape, synthetic_run

TITLE = "what the harness adds to a training step"
PAIRS = 5
BATCH = 8
CASES = {"SiT-nano/2": (8, 200), "SiT-S/2": (32, 4)}
"""Model: latent size, and steps of one measurement."""


def build_run(name: str, size: int, runs: Path) -> Run:
    """A vanilla run that would go on for ever, on random latents of real shapes."""
    runtime = environment.resolve_runtime(RuntimeConfig())
    environment.apply_runtime(runtime)
    control = methods.control()
    config = RunConfig(
        study="bench",
        method=control,
        sections={control: methods.load(control).Config()},
        model=ModelConfig(name=name),
        data=DataConfig(name="digits"),
        optimizer=OptimizerConfig(batch_size=BATCH),
        budget=BudgetConfig(amount=10**9),
        runtime=runtime,
        output=OutputConfig(runs=str(runs), log_every=50),
    )
    shape = backbone_shape(config, size, 4, 10)
    config = resolve_sections(config, shape)
    data = DataShape(image_size=8 * size, num_classes=10, encoder_width=encoder_width)
    return synthetic_run(config, shape, data, open_accelerator(runtime), 1024)


def trainer_steps(run: Run, runs: Path) -> Iterator[None]:
    """The trainer, one item a step; records, hashing and MLflow's absence as in a real run."""
    folder = RunFolder(runs / "run")
    folder.create()
    tracker = Tracker(replace(run.config.output, mlflow=False), "bench", "bench", {}, "")
    for event in train(run, cast(Evaluator, None), Recorder(folder, tracker)):
        if event.kind == "step":
            yield


def bare_steps(run: Run) -> Iterator[None]:
    """Forward, backward, clip, AdamW and EMA of the same model and precision, on batches that lie ready."""
    backbone = build_backbone(run.config, run.method.backbone).to(run.device)
    module = type(run.module)(backbone, run.method)
    optimizer = build_optimizer(run.config, module)
    average = [p.detach().clone() for p in backbone.parameters() if p.requires_grad]
    weights = [p for p in backbone.parameters() if p.requires_grad]
    views = [step_views(run, run.batches.batch(step))[0] for step in range(8)]
    for view in itertools.cycle(views):
        with run.autocast():
            velocity_NCHW, _ = backbone(view.xt_NCHW, view.t_N, view.labels_N)
        target_NCHW = flow.velocity(view.x0_NCHW, view.noise_NCHW)
        (velocity_NCHW.float() - target_NCHW).square().mean().backward()
        clip_gradients(module, run.config.optimizer.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            torch._foreach_lerp_(average, weights, 1 - run.config.ema.decay)
        yield


def seconds(steps: Iterator[None], count: int, device: torch.device) -> float:
    """Time of one step, over `count` of them."""
    started = time.perf_counter()
    for _ in itertools.islice(steps, count):
        pass
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - started) / count


def measure_model(name: str) -> dict[str, Any]:
    """Interleaved pairs of one model: A B A B ..., after one pair that is not counted."""
    size, count = CASES[name]
    with tempfile.TemporaryDirectory() as temporary:
        run = build_run(name, size, Path(temporary))
        trainer, bare = trainer_steps(run, Path(temporary)), bare_steps(run)
        pairs = [(seconds(trainer, count, run.device), seconds(bare, count, run.device)) for _ in range(PAIRS + 1)][1:]
        trainer.close()  # type: ignore[attr-defined]
    ratios = [a / b for a, b in pairs]
    return {
        "model": name,
        "batch": BATCH,
        "precision": run.config.runtime.precision,
        "threads": run.config.runtime.threads,
        "trainer_s": statistics.median(a for a, _ in pairs),
        "bare_s": statistics.median(b for _, b in pairs),
        "ratio_median": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
    }


def measure() -> list[dict[str, Any]]:
    return [measure_model(name) for name in CASES]
