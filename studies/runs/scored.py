"""Anybody's images, scored under a protocol. There is no backbone here, no autoencoder and no method."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from harness.config import DataConfig, EvaluationConfig, OutputConfig, RunConfig, RuntimeConfig
from harness.data.cache import cache_folder
from harness.data.image_set import split
from harness.data.images import load_images
from harness.evaluation.fidelity import Pictures
from harness.evaluation.samples_file import read_images
from harness.evaluation.scoring import Scorer, ScoringSetup, TrainingImages
from harness.machine import environment
from harness.machine.progress import OnProgress
from harness.records.files import digest


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """The settings that decide the scores of given images, and the folder that features are kept in."""

    evaluation: EvaluationConfig
    runtime: RuntimeConfig
    output: OutputConfig
    data: DataConfig | None
    """The training images; None where there are none, and `evaluation.reference` names the images to compare with."""

    @classmethod
    def of(cls, config: RunConfig) -> "Protocol":
        """The protocol of a recorded run."""
        return cls(evaluation=config.evaluation, runtime=config.runtime, output=config.output, data=config.data)


@dataclass(frozen=True, kw_only=True)
class Scores:
    """The scores, and warnings for their reader."""

    record: Mapping[str, Any]
    settings: Mapping[str, Any]
    """The protocol in words, whose digest stands in the record."""
    warnings: tuple[str, ...]


def score_file(path: Path, protocol: Protocol, on_progress: OnProgress) -> Scores:
    """Score a .npz in ADM's layout or a folder of PNG files.

    Raises:
        UserError: when it holds no images, or too few for the protocol.
    """
    runtime = environment.resolve_runtime(protocol.runtime)
    environment.apply_runtime(runtime)
    images = read_images(path, "--samples")
    height, width, _ = images.get(0).shape
    side = protocol.data.image_size if protocol.data else height
    cache = cache_folder(protocol.output)
    place = ScoringSetup(device=torch.device(runtime.device), tf32=runtime.tf32, cache=cache, on_progress=on_progress)
    scorer = Scorer(protocol.evaluation, _training_images(protocol, cache, on_progress), side, place)
    scorer.require_enough(images.num, f"{images.num} images in {path} and {scorer.source.num} in the reference")
    settings = {**scorer.protocol, "num_samples": images.num, "samples": "from a file"}
    record = {
        "samples": path.name,
        "sha256": images.digest,
        "images": images.num,
        "protocol": digest(settings),
        "metrics": scorer.score(Pictures(images.get, images.num), images.labels_N),
    }
    warnings = scorer.warnings(images.num)
    if scorer.has_classifier and images.labels_N is None:
        warnings.append(f"{path} has no labels, so no class accuracy is given")
    if (height, width) != (side, side):
        warnings.append(f"the images are of {height} x {width} pixels, and those of the data of {side} x {side}")
    return Scores(record=record, settings=settings, warnings=tuple(warnings))


def _training_images(protocol: Protocol, cache: Path, on_progress: OnProgress) -> TrainingImages | None:
    if protocol.data is None:
        return None
    images = load_images(protocol.data, cache, on_progress)
    rows, _ = split(len(images), protocol.data.holdout, protocol.data.split_seed)
    return TrainingImages(images=images, rows=rows)
