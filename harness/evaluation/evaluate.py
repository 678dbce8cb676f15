"""Evaluation: a backbone in, metrics out. No method code runs here, and nothing is drawn from global random state.

Samples, the held-out images (the floor) and the held-out images' reconstructions are all compared with one reference:
the training images, unless another is named. The protocol is one digest, and numbers of two digests are never compared.

Shapes: N images, H W image height and width in pixels, C channels and h w size of a latent, B time bins.
"""

from concurrent.futures import Future
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from harness import flow
from harness.backbones.sit import SiT
from harness.config import EvaluationConfig, RuntimeConfig, require
from harness.data.cache import read_small, write_small
from harness.data.image_set import evenly_spaced_rows
from harness.data.prepare import PreparedData
from harness.evaluation import extractors
from harness.evaluation.fidelity import Pictures
from harness.evaluation.generate import Summary, generate_rounds, inference, labels_for
from harness.evaluation.scoring import Scorer, ScoringSetup, TrainingImages
from harness.machine.environment import resolve_precision
from harness.machine.processes import beside, is_main
from harness.machine.progress import OnProgress
from harness.records.files import digest
from harness.rng import stream

TIME_BINS = 4
"""Quarters of [0, 1) in which the velocity loss is reported, t1 nearest to the data."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The result of one evaluation."""

    metrics: dict[str, float]
    grid: np.ndarray
    """The first images, uint8 [K, H, W, 3]: image i has the same noise and label in every evaluation."""
    bad_images: int
    """Images whose latent held a NaN or an infinity; they are scored as the decoder shows them."""
    images_per_s: dict[str, float]
    """Images a second that were sampled, decoded and sent through the extractors (`features`), by all processes
    together."""


class Evaluator:
    """The frozen evaluation of one study."""

    def __init__(
        self,
        config: EvaluationConfig,
        runtime: RuntimeConfig,
        prepared: PreparedData,
        accelerator: Accelerator,
        cache: Path,
        on_progress: OnProgress | None = None,
        scorer: Scorer | None = None,
    ) -> None:
        """Resolve and check the protocol; nothing is computed yet.

        Args:
            config: the protocol; `auto` and 0 are resolved here.
            runtime: resolved; TF32 and compile belong to the protocol.
            prepared: images, moments and autoencoder.
            accelerator: device of the backbones that will be evaluated, and the processes that share the work.
            cache: folder of the caches.
            on_progress: told about reference features made, and about damaged caches.
            scorer: one that scores as `config` says; made here where none is given.

        Raises:
            UserError: when there are too few images for what is asked.
        """
        device = accelerator.device
        self.prepared, self.device, self.cache = prepared, device, cache
        self._runtime, self._accelerator, self._on_progress = runtime, accelerator, on_progress
        if scorer is None:
            training = TrainingImages(images=prepared.images, rows=prepared.train_rows)
            place = ScoringSetup(device=device, tf32=runtime.tf32, cache=cache, on_progress=on_progress)
            scorer = Scorer(config, training, prepared.images.rows(prepared.train_rows[:1]).shape[1], place)
        self.scorer = scorer
        self.config = resolve(config, prepared, self.scorer, device)
        self.protocol = make_protocol(self.config, runtime, prepared, self.scorer)
        self.digest = digest(self.protocol)
        self.warnings = tuple(self.scorer.warnings(self.config.num_samples))

    def under(self, config: EvaluationConfig) -> "Evaluator":
        """The evaluator of a protocol that only makes its samples in another way; both share what they score by."""
        shared = (self._runtime, self.prepared, self._accelerator, self.cache, self._on_progress)
        return Evaluator(config, *shared, scorer=self.scorer)

    def evaluate(self, backbone: SiT) -> Evaluation:
        """Generate `num_samples` images and score them, and score the velocity on held-out images.

        All processes generate; the main one alone scores, and the others get no metrics. On a GPU, a thread extracts
        features of the images that are there while the next ones are generated, and computes the distances while the
        velocity is scored. Features are kept of all images, and pixels of the first ones.

        Args:
            backbone: the EMA backbone, on the evaluator's device; left as it was.
        """
        num, is_scoring = self.config.num_samples, is_main(self._accelerator)
        made, features = Summary(self.config.grid_images), self.scorer.features(num)
        metrics: dict[str, float] = {}
        with beside(self.device) as begin:
            begun: list[Future[None]] = []
            rounds = generate_rounds(backbone, self.prepared.autoencoder, self.config, num, self._accelerator)
            for images_NHWC in made.of(rounds):
                if is_scoring:
                    for job in begun:
                        job.result()  # so that images never wait in a row
                    begun = [begin(features.add, images_NHWC)]
            if is_scoring:
                labels_N = labels_for(0, num, backbone.num_classes).numpy()
                scores = begin(self.scorer.score_features, features, labels_N)
                velocity = self.velocity_loss(backbone)
                for job in begun:
                    job.result()
                metrics = {**scores.result(), **velocity}
        seconds = {"sampling": made.sampling_s, "decoding": made.decoding_s, "features": features.seconds}
        return Evaluation(
            metrics=metrics,
            grid=np.stack(made.first),
            bad_images=made.bad_images,
            images_per_s={what: num / spent for what, spent in seconds.items() if is_scoring},
        )

    @property
    def metric_names(self) -> tuple[str, ...]:
        """Names of the metrics that `evaluate` gives."""
        bins = [f"velocity_loss_t{number}" for number in range(1, TIME_BINS + 1)]
        return (*self.scorer.metric_names(self.config.num_samples), "velocity_loss", *bins)

    def lines(self) -> dict[str, dict[str, float]]:
        """Metrics of the held-out images (`floor`) and of their reconstructions, cached in one JSON file."""
        path = self.cache / f"floor-{self.digest[:12]}.json"
        stored = read_small(path, self._on_progress)
        if stored is not None:
            return stored
        prepared = self.prepared
        rows = evenly_spaced_rows(prepared.holdout_rows, self.config.num_samples)
        labels_N = prepared.images.labels[rows]
        moments = torch.from_numpy(prepared.moments.rows(rows))
        reconstructed = prepared.autoencoder.decode(prepared.autoencoder.latent_means(moments))
        lines = {
            "floor": self.score(prepared.images.rows(rows), labels_N),
            "reconstruction": self.score(reconstructed, labels_N),
        }
        write_small(path, lines)
        return lines

    def score(self, images_NHWC: np.ndarray, labels_N: np.ndarray) -> dict[str, float]:
        """Metrics of uint8 images against the reference, N in their names.

        Args:
            images_NHWC: uint8 [N, H, W, 3].
            labels_N: the class asked for, or the true one.
        """
        return self.scorer.score(Pictures(lambda i: images_NHWC[i], len(images_NHWC)), labels_N)

    def velocity_loss(self, backbone: SiT) -> dict[str, float]:
        """Mean squared velocity error on held-out images at fixed times and noise, by quarter of time and in all."""
        prepared, config = self.prepared, self.config
        rows = evenly_spaced_rows(prepared.holdout_rows, config.velocity_images)
        errors = [
            velocity_errors(
                backbone,
                prepared.autoencoder.latent_means(torch.from_numpy(prepared.moments.rows(part))),
                torch.from_numpy(prepared.images.labels[part]),
                *velocity_draws(config.seed, part, prepared.moments.shape),
                precision=config.precision,
                device=self.device,
            )
            for part in np.split(rows, range(config.chunk, len(rows), config.chunk))
        ]
        mean_B = torch.cat(errors).mean(dim=0).tolist()
        bins = {f"velocity_loss_t{number}": value for number, value in enumerate(mean_B, start=1)}
        return {"velocity_loss": sum(mean_B) / TIME_BINS, **bins}


# -- the protocol ---------------------------------------------------------------------------------------------------


def resolve(config: EvaluationConfig, prepared: PreparedData, scorer: Scorer, device: torch.device) -> EvaluationConfig:
    """The config without `auto` and 0, checked against the data; `UserError` says what is too few."""
    num_train, num_held_out = len(prepared.train_rows), len(prepared.holdout_rows)
    num_samples = config.num_samples or min(num_held_out, num_train)
    have = f"{num_samples} samples, and data.holdout leaves {num_held_out} held-out and {num_train} training images"
    if config.reference:
        have += f"; the reference has {scorer.source.num}"
    else:
        require(
            num_samples <= num_train,
            f"num_samples of evaluation or final is {num_samples}: precision and recall need as many training images "
            f"and there are {num_train}; give at most {num_train}, or lower data.holdout",
        )
    scorer.require_enough(min(num_samples, num_held_out), have)
    return replace(
        config,
        num_samples=num_samples,
        precision=resolve_precision(config.precision, device),  # type: ignore[arg-type]
        extractor_size=extractors.input_size(config.extractor, config.extractor_size),
    )


def make_protocol(
    config: EvaluationConfig, runtime: RuntimeConfig, prepared: PreparedData, scorer: Scorer
) -> dict[str, Any]:
    """All that decides an evaluation's numbers, readable; its digest stands beside every one of them.

    Args:
        config: resolved.
        runtime: resolved.
        prepared: gives the data's and the autoencoder's digests.
        scorer: gives what decides the scores of given images.
    """
    return {
        **scorer.protocol,
        "sampler": asdict(config.sampler),
        "backbone": "EMA",
        "labels": f"image i has label i mod {prepared.images.num_classes}",
        "noise": "image i draws from its own stream (seed, eval, i)",
        "num_samples": config.num_samples,
        "seed": config.seed,
        "chunk": config.chunk,
        "precision": config.precision,
        "decoder_precision": "fp32",
        "autoencoder": prepared.autoencoder.digest,
        "compile": runtime.compile,
        "velocity": {"images": config.velocity_images, "time_bins": TIME_BINS, "latents": "posterior mean"},
        "held_out": digest({"data": prepared.images.digest, "rows": prepared.holdout_rows.tolist()}),
    }


# -- parts ----------------------------------------------------------------------------------------------------------


def velocity_draws(seed: int, rows: np.ndarray, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Fixed times and noise of the velocity loss; those of a row depend on (seed, row) alone.

    Args:
        seed: of the evaluation.
        rows: of the images.
        shape: (M, 2C, h, w), the moments'.

    Returns:
        t [N, B], one in each of the B bins of [0, 1), and noise [N, B, C, h, w], float32.
    """
    times, noises = [], []
    for row in rows.tolist():
        # Two indices: streams with one index belong to the generated images.
        generator = stream(seed, "eval", row, 0)
        times.append((torch.arange(TIME_BINS) + torch.rand(TIME_BINS, generator=generator)) / TIME_BINS)
        noises.append(torch.randn((TIME_BINS, shape[1] // 2, *shape[2:]), generator=generator))
    return torch.stack(times), torch.stack(noises)


def velocity_errors(
    backbone: SiT,
    x0_NCHW: Tensor,
    labels_N: Tensor,
    t_NB: Tensor,
    noise_NBCHW: Tensor,
    *,
    precision: str,
    device: torch.device,
) -> Tensor:
    """Mean squared velocity error of each image at each of its times, float64 [N, B]. Labels are not dropped."""
    errors = []
    x0_NCHW, labels_N = x0_NCHW.to(device), labels_N.to(device)
    for t_N, noise_NCHW in zip(t_NB.to(device).unbind(1), noise_NBCHW.to(device).unbind(1), strict=True):
        xt_NCHW = flow.interpolate(x0_NCHW, noise_NCHW, t_N)
        with inference(backbone, precision, device):
            v_NCHW, _ = backbone(xt_NCHW, t_N, labels_N)
        errors.append((v_NCHW.float() - flow.velocity(x0_NCHW, noise_NCHW)).square().flatten(1).mean(dim=1))
    return torch.stack(errors, dim=1).double().cpu()
