"""Evaluation: a backbone in, metrics out. No method code runs here, and nothing is drawn from global random state.

Samples, the held-out images (the floor) and the held-out images' reconstructions are all compared with the training
images. The protocol is one digest, and numbers of two digests are never compared.

Shapes: N images, H W image height and width in pixels, C channels and h w size of a latent, B time bins.
"""

from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from harness import extractors, flow
from harness.cache import Report, read_small, write_small
from harness.config import EvaluationConfig, RuntimeConfig, require
from harness.encoders import encoder_width
from harness.environment import resolve_precision
from harness.fidelity import BATCH, KID_SEED, KID_SUBSETS, NEIGHBOURS, Pictures, Reference
from harness.generate import generate_together, inference, labels_for
from harness.prepare import PreparedData
from harness.processes import is_main
from harness.records import count_name, digest
from harness.rng import stream
from harness.sit import SiT

TIME_BINS = 4
"""Quarters of [0, 1) in which the velocity loss is reported, t1 nearest to the data."""
CLASSIFIER_IMAGES = 5000
"""Training images the classifier is fitted on at most: a support vector machine's time grows with their square."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What one evaluation gives."""

    metrics: dict[str, float]
    grid: np.ndarray
    """The first images, uint8 [K, H, W, 3]: image i has the same noise and label in every evaluation."""
    bad_images: int
    """Images whose latent held a NaN or an infinity; they are scored as the decoder shows them."""


class Evaluator:
    """The frozen evaluation of one study."""

    def __init__(
        self,
        config: EvaluationConfig,
        runtime: RuntimeConfig,
        prepared: PreparedData,
        accelerator: Accelerator,
        cache: Path,
        report: Report | None = None,
    ) -> None:
        """Resolve and check the protocol; nothing is computed yet.

        Args:
            config: the protocol; `auto` and 0 are resolved here.
            runtime: resolved; TF32 and compile belong to the protocol.
            prepared: images, moments and autoencoder.
            accelerator: device of the backbones that will be evaluated, and the processes that share the work.
            cache: folder of the caches.
            report: told about reference features made, and about damaged caches.

        Raises:
            UserError: when there are too few images for what is asked.
        """
        self._extractor = extractors.register_encoder(config.extractor, config.extractor_size)
        self._pixels = extractors.register_pixels()
        device = accelerator.device
        self.config = resolve(config, prepared, device)
        self.prepared, self.device, self.cache = prepared, device, cache
        self._accelerator, self._report = accelerator, report
        self.has_classifier = config.classifier and len(np.unique(self._train_labels)) > 1
        self.protocol = make_protocol(self.config, runtime, prepared, self.has_classifier)
        self.digest = digest(self.protocol)
        self.warnings = tuple(self._warnings())
        features = {"reference": self.protocol["reference"], "device": device.type, "tf32": runtime.tf32}
        self._reference = Reference(
            pictures=_pictures(prepared, prepared.train_rows),
            name=f"reference-{digest(features)[:16]}",
            device=device,
            cache=cache / "features",
            report=report,
        )

    def evaluate(self, backbone: SiT) -> Evaluation:
        """Generate `num_samples` images and score them, and score the velocity on held-out images.

        All processes generate; the main one alone scores, and the others get no metrics.

        Args:
            backbone: the EMA backbone, on the evaluator's device; left as it was.
        """
        images_NHWC, bad_images = generate_together(
            backbone, self.prepared.autoencoder, self.config, self.config.num_samples, self._accelerator
        )
        metrics = {}
        if is_main(self._accelerator):
            labels_N = labels_for(0, len(images_NHWC), backbone.num_classes).numpy()
            metrics = {**self.score(images_NHWC, labels_N), **self.velocity_loss(backbone)}
        return Evaluation(metrics=metrics, grid=images_NHWC[: self.config.grid_images], bad_images=bad_images)

    def lines(self) -> dict[str, dict[str, float]]:
        """Metrics of the held-out images (`floor`) and of their reconstructions, cached in one JSON file."""
        path = self.cache / f"floor-{self.digest[:12]}.json"
        stored = read_small(path, self._report)
        if stored is not None:
            return stored
        prepared = self.prepared
        rows = spread(prepared.holdout_rows, self.config.num_samples)
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
        """Metrics of uint8 images against the training images, N in their names.

        Args:
            images_NHWC: uint8 [N, H, W, 3].
            labels_N: the class asked for, or the true one.
        """
        name, num = self.config.extractor, count_name(len(images_NHWC))
        pictures = Pictures(lambda i: images_NHWC[i], len(images_NHWC))
        found = self._reference.distances(self._extractor, pictures, self.config.kid_subset)
        metrics = {f"{kind}_{name}_{num}": value for kind, value in found.items()}
        metrics[f"fd_pixels_{num}"] = self._reference.frechet(self._pixels, pictures)
        if self.has_classifier:
            named_N = self._classifier.predict(extractors.pixel_features(images_NHWC))
            metrics[f"class_accuracy_{num}"] = float(np.mean(named_N == labels_N))
        return metrics

    def velocity_loss(self, backbone: SiT) -> dict[str, float]:
        """Mean squared velocity error on held-out images at fixed times and noise, by quarter of time and in all."""
        prepared, config = self.prepared, self.config
        rows = spread(prepared.holdout_rows, config.velocity_images)
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

    @cached_property
    def _classifier(self) -> Any:
        """A support vector machine on 8 x 8 luminance, fitted on real training images."""
        from sklearn.svm import SVC  # here, because importing scikit-learn takes a second

        rows = spread(self.prepared.train_rows, CLASSIFIER_IMAGES)
        features = extractors.pixel_features(self.prepared.images.rows(rows))
        # Without random_state it would draw from numpy's global state.
        return SVC(C=10.0, gamma="scale", random_state=0).fit(features, self.prepared.images.labels[rows])

    @property
    def _train_labels(self) -> np.ndarray:
        return self.prepared.images.labels[self.prepared.train_rows]

    def _warnings(self) -> list[str]:
        width = encoder_width(self.config.extractor)
        least = min(self.config.num_samples, len(self.prepared.train_rows))
        found = []
        if least < width:
            found.append(
                f"Fréchet distances come from {least} images in {width} dimensions: they are far above their value at "
                "many images, so compare them at equal N only and read them beside the kernel distance"
            )
        if self.config.classifier and not self.has_classifier:
            found.append("evaluation.classifier has no effect: the training images are all of one class")
        return found


# -- the protocol ---------------------------------------------------------------------------------------------------


def resolve(config: EvaluationConfig, prepared: PreparedData, device: torch.device) -> EvaluationConfig:
    """The config without `auto` and 0, checked against the data; `UserError` says what is too few."""
    num_train, num_held_out = len(prepared.train_rows), len(prepared.holdout_rows)
    num_samples = config.num_samples or min(num_held_out, num_train)
    least = min(num_samples, num_held_out, num_train)
    have = f"{num_samples} samples, and data.holdout leaves {num_held_out} held-out and {num_train} training images"
    require(
        num_samples <= num_train,
        f"evaluation.num_samples is {num_samples}: precision and recall need as many training images and there are "
        f"{num_train}; give at most {num_train}, or lower data.holdout",
    )
    require(
        least > NEIGHBOURS,
        f"evaluation.num_samples: precision and recall need {NEIGHBOURS + 1} or more images in each set and there are "
        f"{have}; give more",
    )
    require(
        2 <= config.kid_subset <= least,
        f"evaluation.kid_subset is {config.kid_subset}: there are {have}; give 2 to {least}",
    )
    precision = resolve_precision(config.precision, device)
    return replace(config, num_samples=num_samples, precision=precision)  # type: ignore[arg-type]


def make_protocol(
    config: EvaluationConfig, runtime: RuntimeConfig, prepared: PreparedData, has_classifier: bool
) -> dict[str, Any]:
    """All that decides an evaluation's numbers, readable; its digest stands beside every one of them.

    Args:
        config: resolved.
        runtime: resolved.
        prepared: gives the data's and the autoencoder's digests.
        has_classifier: whether the classifier takes part.
    """
    data = prepared.images.digest
    return {
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
        "tf32": runtime.tf32,
        "evaluator": "torch-fidelity",
        "extractor": {**extractors.describe(config.extractor, config.extractor_size), "batch": BATCH},
        "kernel_distance": {"subset": config.kid_subset, "subsets": KID_SUBSETS, "seed": KID_SEED},
        "precision_recall": {"neighbours": NEIGHBOURS},
        "pixels": f"luminance, {extractors.PIXEL_SIDE} x {extractors.PIXEL_SIDE}",
        "classifier": f"SVC on pixels, at most {CLASSIFIER_IMAGES} training images" if has_classifier else "none",
        "velocity": {"images": config.velocity_images, "time_bins": TIME_BINS, "latents": "posterior mean"},
        "reference": digest({"data": data, "rows": prepared.train_rows.tolist()}),
        "held_out": digest({"data": data, "rows": prepared.holdout_rows.tolist()}),
    }


# -- parts ----------------------------------------------------------------------------------------------------------


def spread(rows: np.ndarray, num: int) -> np.ndarray:
    """At most `num` of the rows, evenly spaced: folders are sorted by class, so the first ones are of one class."""
    num = min(num, len(rows))
    return rows[np.arange(num) * len(rows) // num]


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


def _pictures(prepared: PreparedData, rows: np.ndarray) -> Pictures:
    return Pictures(lambda i: prepared.images.rows(rows[i : i + 1])[0], len(rows))
