"""The trainer on made-up data of real shapes, and the same work with nothing around it."""

import itertools
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import cast

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
from harness.trainer import Run, build_backbone, build_optimizer, clip_gradients, step_views, synchronize, train
from studies.settings import resolve_sections
from studies.synthetic import backbone_shape, synthetic_run

BATCH = 8
NUM_IMAGES = 256


def build_run(model: str, size: int, runs: Path, method: str = "") -> Run:
    """A run that would go on for ever, of the control or another method, on latents of 4 x `size` x `size`."""
    runtime = environment.resolve_runtime(RuntimeConfig())
    environment.apply_runtime(runtime)
    method = method or methods.control()
    config = RunConfig(
        study="bench",
        method=method,
        sections={method: methods.load(method).Config()},
        model=ModelConfig(name=model),
        data=DataConfig(name="digits"),
        optimizer=OptimizerConfig(batch_size=BATCH),
        budget=BudgetConfig(amount=10**9),
        runtime=runtime,
        output=OutputConfig(runs=str(runs), log_every=50),
    )
    shape = backbone_shape(config, size, 4, 1000)
    config = resolve_sections(config, shape)
    data = DataShape(image_size=8 * size, num_classes=1000, encoder_width=encoder_width)
    return synthetic_run(config, shape, data, open_accelerator(runtime), NUM_IMAGES)


def trainer_steps(run: Run, runs: Path) -> Iterator[None]:
    """The trainer, one item a step; records, hashing and MLflow's absence as in a real run."""
    folder = RunFolder(runs / run.config.method)
    folder.create()
    tracker = Tracker(replace(run.config.output, mlflow=False), "bench", "bench", {}, "")
    for event in train(run, cast(Evaluator, None), Recorder(folder, tracker)):
        if event.kind == "step":
            yield


def bare_steps(run: Run) -> Iterator[None]:
    """Forward, backward, clip, AdamW and EMA of the control's model in its precision, on batches that lie ready."""
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
    synchronize(device)
    return (time.perf_counter() - started) / count
