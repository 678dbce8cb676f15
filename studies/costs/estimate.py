"""What a study will cost, before anything starts: counted operations, hours at one rate, disk and memory.

Nothing is read but listings of files and nothing is written. Operations are counted as for the cost record of a run;
hours are those operations at one rate, measured on this machine in a few seconds or given for another one.
"""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

import methods
from harness.backbones.sit import SiT
from harness.config import DataConfig, EvaluationConfig, RunConfig
from harness.cost import memory
from harness.cost.memory import FLOAT
from harness.cost.operations import (
    CacheCost,
    Passes,
    StepCost,
    cache_cost,
    decoder_gmacs,
    hollow,
    num_parameters,
    step_cost,
)
from harness.data import image_set, images
from harness.data.image_set import Outline
from harness.data.prepare import cache_sizes, token_grid
from harness.evaluation import extractors
from harness.evaluation.evaluate import TIME_BINS
from harness.evaluation.extractors import PIXEL_SIDE
from harness.evaluation.generate import inference
from harness.frozen.autoencoder import Autoencoder, is_here, untrained_network
from harness.frozen.encoders import encoder_width
from harness.machine import environment, ram
from harness.machine.progress import OnProgress
from harness.machine.ram import MemoryPart
from harness.method import BackboneShape, DataShape, Method, Needs
from harness.rng import stream
from harness.sampler import forward_passes
from harness.training.schedule import make_schedule
from harness.training.step import build_backbone, synchronize
from studies.configs.sections import resolve_sections

IMAGENET_IMAGES, IMAGENET_CLASSES = 1_281_167, 1000
"""Training images of ILSVRC 2012."""
REFERENCE_IMAGES = 10_000
"""Images in ADM's reference batch of ImageNet at 256 pixels."""
MEASURED_SECONDS, MEASURED_PASSES = 4.0, 3
"""The rate is measured for at least as long, and over at least as many passes."""
CPU_IMAGES = 2
"""Images a measured pass on a CPU; elsewhere as many as are sampled together."""


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A cell, and at how many seeds, or in how many trials, it is run."""

    config: RunConfig
    runs: int


@dataclass(frozen=True, kw_only=True)
class Rate:
    """Speed at which everything is taken to run."""

    tflops: float
    """10^12 FLOPs a second, a multiplication and an addition being two."""
    source: str
    """The origin of the number: measured here, or given by the user."""

    def hours(self, gflops: float) -> float:
        return gflops / (1000 * self.tflops) / 3600


@dataclass(frozen=True, kw_only=True)
class CellEstimate:
    """The cost of one run of a cell."""

    cell: str
    method: str
    runs: int
    train_gflops_per_image: float
    steps: int
    train_gflops: float
    recomputed_gflops: float
    """The second forward pass of checkpointed activations: it takes time, and is in no counted number."""
    evaluations: int
    """Points of the curve."""
    evaluation_gflops: float
    """Cost of all evaluations of the curve together."""
    final_gflops: float
    """Cost of the evaluation at the end; 0 without one."""
    disk: Mapping[str, int]
    """Bytes by what is kept, at the run's end."""
    memory: Mapping[str, int]
    """Bytes at least: of the accelerator (`device`), and of RAM (`ram`); on a CPU both lie in RAM."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """All cells of a study."""

    study: str
    num_images: int
    num_classes: int
    rate: Rate
    cells: tuple[CellEstimate, ...]
    caches: Mapping[str, int]
    """Bytes by cache; all runs share them."""
    cache_gflops: float
    """Cost of the frozen networks when the caches are made."""
    assumptions: tuple[str, ...]
    """What had to be assumed, as it was not there to be looked at; a line each."""


@dataclass(frozen=True, kw_only=True)
class _Frame:
    """The facts that all cells share."""

    config: RunConfig
    """The first cell's, its shared sections resolved."""
    outline: Outline
    autoencoder: Autoencoder
    """Its shapes alone."""
    shape: BackboneShape
    passes: Passes
    forward_gmacs: float
    decoder_gmacs: float

    @property
    def held_out(self) -> int:
        return split_sizes(self.outline, self.config.data)[1]


def estimate(planned: Sequence[Planned], tflops: float, on_progress: OnProgress) -> Estimate:
    """The cost of these cells.

    Args:
        planned: the cells; the first one's shared sections are all cells'.
        tflops: sustained rate of the machine that is meant; 0 = that of forward passes on this one, measured here.
        on_progress: told how far counting and measuring are.

    Raises:
        UserError: for settings that do not fit each other, and for a backbone that is to be measured and does not fit.
    """
    outline, assumptions = data_outline(planned[0].config.data)
    frame = _frame(planned[0].config, outline)
    rate = Rate(tflops=tflops, source="given") if tflops else measured_rate(frame, on_progress)
    cells, needs, caches = [], Needs(), {}
    for number, each in enumerate(planned, start=1):
        method = _method(frame, each.config)
        cost, caches[each.config.label] = step_cost(frame.passes, method), cache_cost(frame.autoencoder.network, method)
        cells.append(_cell_cost(frame, each, method, cost, rate))
        needs = Needs(encoders=tuple(dict.fromkeys((*needs.encoders, *method.needs().encoders))))
        on_progress("cells counted", number, len(planned))
    return Estimate(
        study=frame.config.study,
        num_images=outline.num_images,
        num_classes=outline.num_classes,
        rate=rate,
        cells=tuple(cells),
        caches={**cache_sizes(frame.config, needs, frame.autoencoder, outline), **_reference_features(frame)},
        cache_gflops=_cache_gflops(frame, list(caches.values())),
        assumptions=(*assumptions, *_other_assumptions(frame.config)),
    )


# -- what is there --------------------------------------------------------------------------------------------------


def data_outline(config: DataConfig) -> tuple[Outline, tuple[str, ...]]:
    """What the listing of the data says; where there is none, ImageNet-1k, and a line that says so."""
    if config.name == "digits" or Path(config.path).exists():
        return images.outline(config), ()
    assumed = Outline(
        num_images=IMAGENET_IMAGES,
        num_classes=IMAGENET_CLASSES,
        is_cached=config.name != "preprocessed",
        has_moments=bool(config.latents),
    )
    size = f"{IMAGENET_IMAGES:,} images of {IMAGENET_CLASSES:,} classes"
    return assumed, (f"data.path {config.path} is not here: {size}, as in ImageNet-1k",)


def split_sizes(outline: Outline, config: DataConfig) -> tuple[int, int]:
    """Numbers of training and of held-out images; `UserError` where either is none."""
    train_rows, holdout_rows = image_set.split(outline.num_images, config.holdout, config.split_seed)
    return len(train_rows), len(holdout_rows)


def _other_assumptions(config: RunConfig) -> Iterator[str]:
    if not is_here(config.autoencoder.path):
        yield f"autoencoder.path {config.autoencoder.path} is not here: the shapes of Stable Diffusion's"
    if config.evaluation.reference:
        yield f"evaluation.reference is not opened: {REFERENCE_IMAGES:,} images, as in ADM's batches"


def _frame(config: RunConfig, outline: Outline) -> _Frame:
    """The shared sections resolved, and passes of the backbone counted; `UserError` for what does not fit."""
    runtime = environment.resolve_runtime(config.runtime)
    autoencoder = Autoencoder(hollow(partial(untrained_network, config.autoencoder.path)), "")
    token_grid(config, autoencoder)
    protocol = config.evaluation
    precision: Any = environment.resolve_precision(protocol.precision, torch.device(runtime.device))
    protocol = replace(
        protocol,
        num_samples=protocol.num_samples or min(split_sizes(outline, config.data)),
        precision=precision,
        extractor_size=extractors.input_size(protocol.extractor, protocol.extractor_size),
    )
    config = replace(config, runtime=runtime, evaluation=protocol)
    latent_shape = autoencoder.latent_shape(config.data.image_size)
    channels, side, _ = latent_shape
    shape = BackboneShape.of(config.model.name, input_size=side, in_channels=channels, num_classes=outline.num_classes)
    passes = Passes(hollow(partial(SiT.of, shape, config.model.qk_norm)))
    return _Frame(
        config=config,
        outline=outline,
        autoencoder=autoencoder,
        shape=shape,
        passes=passes,
        forward_gmacs=passes.whole().gmacs,
        decoder_gmacs=decoder_gmacs(autoencoder.network, latent_shape),
    )


# -- the rate -------------------------------------------------------------------------------------------------------


def measured_rate(frame: _Frame, on_progress: OnProgress) -> Rate:
    """The rate of forward passes of the backbone, as in sampling, timed on this machine for some seconds.

    Raises:
        UserError: when the backbone does not fit.
    """
    config, shape, device = frame.config, frame.shape, torch.device(frame.config.runtime.device)
    num = min(config.evaluation.chunk, CPU_IMAGES) if device.type == "cpu" else config.evaluation.chunk
    way_out = "give --tflops, the sustained rate of the machine that you mean"
    copies = FLOAT + (2 if config.runtime.precision == "bf16" else 0)
    size = copies * memory.backbone_parameters(shape)
    ram.check([MemoryPart(name="weights", num_bytes=size, way_out=way_out, on_device=True)], device)
    environment.apply_runtime(config.runtime)
    on_progress("measuring forward passes", 0, 2)
    backbone = build_backbone(config, shape).to(device)
    generator = stream(0, "noise")
    x_NCHW = torch.randn(num, shape.in_channels, shape.input_size, shape.input_size, generator=generator).to(device)
    t_N, y_N = torch.rand(num, generator=generator).to(device), torch.zeros(num, dtype=torch.int64, device=device)
    with inference(backbone, config.runtime.precision, device):
        backbone(x_NCHW, t_N, y_N)
        synchronize(device)
        times: list[float] = []
        while len(times) < MEASURED_PASSES or sum(times) < MEASURED_SECONDS:
            start = time.perf_counter()
            backbone(x_NCHW, t_N, y_N)
            synchronize(device)
            times.append(time.perf_counter() - start)
    on_progress("measuring forward passes", 2, 2)
    # The fastest, since other work on the machine slows passes down and nothing speeds one up.
    what = f"the fastest of {len(times)} forward passes of {config.model.name}, {num} image{'s'[: num > 1]} each"
    source = f"measured here: {what}, in {config.runtime.precision} on {device.type}"
    return Rate(tflops=2 * frame.forward_gmacs * num / min(times) / 1000, source=source)


# -- a cell ---------------------------------------------------------------------------------------------------------


def _method(frame: _Frame, config: RunConfig) -> Method:
    """The method of a cell, its heads without weights of any meaning; refuses sizes that do not fit."""
    config = resolve_sections(config, frame.shape)
    shapes = DataShape(
        image_size=config.data.image_size, num_classes=frame.shape.num_classes, encoder_width=encoder_width
    )
    build = partial(methods.build, config, frame.shape, shapes)
    memory.outline(config.method, build)
    return build()


def _cell_cost(frame: _Frame, planned: Planned, method: Method, cost: StepCost, rate: Rate) -> CellEstimate:
    config = replace(planned.config, runtime=frame.config.runtime, evaluation=frame.config.evaluation)
    size, per_image = config.optimizer.batch_size, cost.train_gflops_per_image
    schedule = make_schedule(config, per_image)
    steps = schedule.last_step or math.ceil(config.budget.amount * 1000 * rate.tflops / (size * per_image))
    protocols = {name: protocol_gflops(frame, protocol) for name, protocol in config.protocols.items()}
    return CellEstimate(
        cell=config.label,
        method=config.method,
        runs=planned.runs,
        train_gflops_per_image=per_image,
        steps=steps,
        train_gflops=steps * size * per_image,
        recomputed_gflops=steps * size * 2 * frame.forward_gmacs if config.runtime.checkpoint_activations else 0.0,
        evaluations=schedule.num_evaluations,
        evaluation_gflops=schedule.num_evaluations * protocols["evaluation"],
        final_gflops=protocols.get("final", 0.0),
        disk=_disk(config, frame, cost, schedule.num_evaluations),
        memory=_memory(_on_the_machine_meant(config, rate), method),
    )


def _on_the_machine_meant(config: RunConfig, rate: Rate) -> RunConfig:
    """A rate that is given is a GPU's, which keeps other activations than a CPU; a measured one is this machine's."""
    runtime = replace(config.runtime, device="cuda") if rate.source == "given" else config.runtime
    return replace(config, runtime=runtime)


def protocol_gflops(frame: _Frame, protocol: EvaluationConfig) -> float:
    """Cost of one evaluation: sampling, decoding, and the velocity loss on held-out images, without the extractor."""
    of_sample = forward_passes(protocol.sampler) * frame.forward_gmacs + frame.decoder_gmacs
    passes = TIME_BINS * min(protocol.velocity_images, frame.held_out)
    return 2 * (protocol.num_samples * of_sample + passes * frame.forward_gmacs)


def _disk(config: RunConfig, frame: _Frame, cost: StepCost, evaluations: int) -> dict[str, int]:
    """What a run keeps: whole checkpoints (weights, EMA, two moments; heads without an EMA), one EMA backbone a point,
    and pictures of samples, at most."""
    whole, trained = num_parameters(frame.passes.backbone), cost.backbone_parameters
    checkpoint = FLOAT * (2 * whole + 2 * trained + 3 * cost.head_parameters)
    pictures = evaluations + (1 if config.final.num_samples else 0)
    return {
        "checkpoints": config.output.keep_checkpoints * checkpoint,
        "EMA backbones": evaluations * FLOAT * whole,
        "samples": pictures * config.evaluation.grid_images * 3 * config.data.image_size**2,
    }


def _memory(config: RunConfig, method: Method) -> dict[str, int]:
    """The largest phase of a run in one process, by place."""
    weights = list(memory.weight_parts(config, method))
    phases = [memory.training_parts(config, method, 1)]
    phases += [memory.evaluation_parts(config, method.backbone, 1, section) for section in config.protocols]
    parts = [[*weights, *phase] for phase in phases]
    return {
        place: max(sum(p.num_bytes for p in phase if p.on_device == on_device) for phase in parts)
        for place, on_device in (("device", True), ("ram", False))
    }


# -- caches ---------------------------------------------------------------------------------------------------------


def _reference_features(frame: _Frame) -> dict[str, int]:
    """Features of the reference's images, float32: those of the extractor, and pixels."""
    protocol = frame.config.evaluation
    num = REFERENCE_IMAGES if protocol.reference else split_sizes(frame.outline, frame.config.data)[0]
    width = extractors.compared_width(protocol.extractor) + PIXEL_SIDE**2
    return {"reference features": FLOAT * num * width}


def _cache_gflops(frame: _Frame, costs: Sequence[CacheCost]) -> float:
    """Every image through the autoencoder's encoder, where its moments are not there, and every encoder once."""
    mirrors = 2 if frame.config.data.flip else 1
    encoders = {name: encoder.forward_gmacs for cost in costs for name, encoder in cost.encoders.items()}
    encoded = mirrors - frame.outline.has_moments
    of_image = encoded * costs[0].vae.forward_gmacs + mirrors * sum(encoders.values())
    return 2 * frame.outline.num_images * of_image
