"""One of the processes that `test_processes.py` starts: trains, evaluates and generates; the main one writes."""

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors.torch import save_file

from harness.config import SamplerConfig
from harness.evaluation.evaluate import Evaluator
from harness.evaluation.generate import Summary, generate_rounds
from harness.machine.processes import is_main
from harness.records.run_folder import RunFolder
from harness.tracking.feed import Feed
from harness.training import step as training_step
from harness.training.recorder import Recorder
from harness.training.step import Run, train_step
from harness.training.trainer import train
from studies.runs.saved import write_samples
from tests.bench_setting import Bench, open_bench
from tests.unit.harness.records.plain_records import manifest

STEPS = 5


def write(accelerator: Accelerator, path: Path, value: Any) -> None:
    if is_main(accelerator):
        path.write_text(json.dumps(value))


def weights(run: Run) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in run.module.state_dict().items()}


def train_method(bench: Bench, out: Path, name: str, micro_batch: int) -> None:
    """Activations are checkpointed as well where gradients are accumulated: both must change nothing but rounding."""
    words = ("--optimizer.micro_batch", str(micro_batch), "--optimizer.lr", "1e-4", "--optimizer.clip_norm", "0.5")
    run = bench.start(bench.config(name, *words, precision="fp32", checkpoint_activations=micro_batch > 0))
    initial = weights(run)
    trace = bench.train(run, STEPS)
    if is_main(run.accelerator):
        save_file(initial, out / f"{name}-{micro_batch}-initial.safetensors")
        save_file(weights(run), out / f"{name}-{micro_batch}.safetensors")
    found = {"trace": trace, "initial_weights": run.initial_weights, "losses": run.window.take(), "steps": STEPS}
    write(run.accelerator, out / f"{name}-{micro_batch}.json", found)


def train_to_the_end(bench: Bench, out: Path, cache: Path) -> None:
    """The whole loop with a real evaluation, into one folder for all processes."""
    lab = bench.lab
    sampler = SamplerConfig(kind="ode-euler", num_steps=2)
    small = replace(lab.config.evaluation, num_samples=30, chunk=8, kid_subset=20, velocity_images=8, sampler=sampler)
    evaluator = Evaluator(small, lab.config.runtime, lab.prepared, lab.accelerator, cache)
    config = bench.config("sit", "--budget.amount", "2", "--optimizer.lr", "1e-12", precision="fp32")
    config = replace(config, evaluation=replace(small, points=1), output=replace(config.output, log_every=1))
    run = bench.start(config)
    folder = RunFolder(out / "run")
    if is_main(lab.accelerator):
        folder.create()
        folder.write_manifest(manifest())
    recorder = Recorder(folder, Feed(config.output, folder), is_main(lab.accelerator))
    [evaluated] = [event for event in train(run, evaluator, recorder) if event.kind == "eval"]
    metrics = gather_object([evaluated.record["metrics"]])
    found = {
        "metrics": metrics[0],
        "other_metrics": metrics[1] if len(metrics) > 1 else None,
        "lines": len(folder.lines("train")),
    }
    write(lab.accelerator, out / "evaluation.json", found)


def generate(bench: Bench, out: Path) -> None:
    accelerator, run = bench.lab.accelerator, bench.start(bench.config("sit", precision="fp32"))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in run.backbone.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    config = replace(run.config.evaluation, chunk=8, sampler=SamplerConfig(num_steps=3), precision="fp32")
    arguments = (bench.lab.prepared.autoencoder, config, 35, accelerator)
    images_NHWC = np.concatenate([part.images_NHWC for part in generate_rounds(run.backbone, *arguments)])
    if is_main(accelerator):
        np.save(out / "images.npy", images_NHWC)
    lab = replace(bench.lab, config=replace(bench.lab.config, evaluation=config))
    write_samples(lab, run.backbone, 35, out / "images.npz", is_npz=True)
    with torch.no_grad():
        run.backbone.y_embedder.embedding_table.weight[3] = math.nan
    broken = Summary(0)
    list(broken.of(generate_rounds(run.backbone, *arguments)))
    write(accelerator, out / "bad.json", {"bad_images": gather_object([broken.bad_images])})


def diverge(bench: Bench, out: Path) -> None:
    """The loss of the last process alone is infinite at its second step, with a finite gradient."""
    accelerator, run = bench.lab.accelerator, bench.start(bench.config("sit", precision="fp32"))
    forward_losses = training_step.forward_losses

    def infinite(model: Any, run: Run, view: Any) -> Any:
        base, *rest = forward_losses(model, run, view)
        is_bad = accelerator.is_last_process and view.progress.step == 1
        return (base + math.inf if is_bad else base, *rest)

    training_step.forward_losses = infinite
    for step in range(3):
        train_step(run, run.batches.batch(step))
    training_step.forward_losses = forward_losses
    found = run.guard.found()
    assert found is not None
    gathered = gather_object([(found.step, found.parts)])
    steps, parts = [step for step, _ in gathered], [list(names) for _, names in gathered]
    write(accelerator, out / "diverged.json", {"steps": steps, "parts": parts})


def main(out: Path, cache: Path, micro_batches: str, *names: str) -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    bench = open_bench(out / "bench", cache)
    for name, micro_batch in itertools.product(names, micro_batches.split(",")):
        train_method(bench, out, name, int(micro_batch))
    train_to_the_end(bench, out, cache)
    generate(bench, out)
    diverge(bench, out)
    bench.lab.accelerator.end_training()
