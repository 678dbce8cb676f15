"""The trainer on made-up data of real shapes, and the same work with nothing around it."""

import itertools
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch

from harness import flow
from harness.config import OutputConfig, RuntimeConfig
from harness.evaluation.evaluate import Evaluator
from harness.machine import environment
from harness.records.run_folder import RunFolder
from harness.tracking.feed import Feed
from harness.training.recorder import Recorder
from harness.training.step import Run, build_backbone, build_optimizer, clip_gradients, step_views, synchronize
from harness.training.trainer import train
from tests.benchmarks.runs import build_run

BATCH = 8
"""Images a step of the compared loops."""


def trainer_run(model: str, side: int, runs: Path, method: str = "") -> Run:
    """A run of the control or another method in the machine's own precision, logged every 50 steps."""
    runtime = environment.resolve_runtime(RuntimeConfig())
    environment.apply_runtime(runtime)
    return build_run(model, side, BATCH, runtime, method=method, output=OutputConfig(runs=str(runs), log_every=50))


def trainer_steps(run: Run, runs: Path) -> Iterator[None]:
    """The trainer, one item a step; records, hashing and MLflow's absence as in a real run."""
    folder = RunFolder(runs / run.config.method)
    folder.create()
    feed = Feed(replace(run.config.output, mlflow=False), folder)
    for event in train(run, cast(Evaluator, None), Recorder(folder, feed)):
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
