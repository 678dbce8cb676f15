"""Scores of images: their distances to a reference, and how often a classifier names the class that was asked for.

Nothing here knows where the images come from: a backbone, the held-out images, or anybody's file.

Shapes: N images, M images of the reference, H W image height and width in pixels.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from harness.config import EvaluationConfig, require
from harness.data.image_set import ImageSet, evenly_spaced_rows
from harness.evaluation import extractors
from harness.evaluation.fidelity import (
    BATCH,
    KID_SEED,
    KID_SUBSETS,
    MANIFOLD_IMAGES,
    NEIGHBOURS,
    SCORE_SEED,
    SCORE_SPLITS,
    Features,
    Pictures,
    Reference,
)
from harness.evaluation.reference import ReferenceImages, open_reference
from harness.machine.progress import OnProgress
from harness.records.files import digest
from harness.records.metrics import count_name

CLASSIFIER_IMAGES = 5000
"""Training images the classifier is fitted on at most: a support vector machine's time grows with their square."""
STANDARD_NAMES = {"fd": "fid", "sfd": "sfid", "kd": "kid"}
"""What distances are called on the features of the standard evaluator, and on no others."""


@dataclass(frozen=True, kw_only=True)
class TrainingImages:
    """The labelled images that a backbone was trained on: the classifier is fitted on them, and they are the reference
    unless another is named."""

    images: ImageSet
    rows: np.ndarray
    """int64."""

    @property
    def labels_N(self) -> np.ndarray:
        return self.images.labels[self.rows]

    @property
    def source(self) -> ReferenceImages:
        """All of them as a reference."""
        return ReferenceImages(
            num=len(self.rows),
            get=lambda i: self.images.rows(self.rows[i : i + 1])[0],
            digest=digest({"data": self.images.digest, "rows": self.rows.tolist()}),
        )


@dataclass(frozen=True, kw_only=True)
class ScoringSetup:
    """The device that scores are computed on, and the folder that features are kept in."""

    device: torch.device
    tf32: bool
    cache: Path
    """Folder of the caches."""
    on_progress: OnProgress | None = None
    """Told about reference features made, and about damaged caches."""


class Scorer:
    """Scores images under one protocol."""

    def __init__(
        self, config: EvaluationConfig, training: TrainingImages | None, image_size: int, place: ScoringSetup
    ) -> None:
        """Open the reference and register the extractor; nothing is computed yet.

        Args:
            config: extractor, reference, classifier and subset size.
            training: None where there is no data: then there is no classifier, and `config.reference` names the
                reference.
            image_size: side to which the images of a reference folder are cut.
            place: device and caches.

        Raises:
            UserError: for an extractor or a reference that is not there.
        """
        self.config, self._training, self._place = config, training, place
        self.extractor = extractors.find(config.extractor, config.extractor_size)
        self._pixels = extractors.find_pixels()
        if config.reference:
            path = Path(config.reference)
            self.source = open_reference(path, self.extractor, image_size, place.cache, place.on_progress)
        else:
            assert training is not None, "no training images and no reference"
            self.source = training.source
        self.has_classifier = config.classifier and training is not None and len(np.unique(training.labels_N)) > 1
        features = {"reference": self.source.digest, "device": place.device.type, "tf32": place.tf32}
        self._reference = Reference(
            pictures=self.source.pictures,
            name=f"reference-{digest(features)[:16]}",
            device=place.device,
            cache=place.cache / "features",
            on_progress=place.on_progress,
            statistics=self.source.statistics,
        )

    def score(self, pictures: Pictures, labels_N: np.ndarray | None) -> dict[str, float]:
        """Metrics of images, N in their names.

        Args:
            pictures: the images.
            labels_N: the class asked for, or the true one; None where it is not known, and then no class is asked.
        """
        features = self.features(len(pictures))
        for start in range(0, len(pictures), BATCH):
            rows = range(start, min(start + BATCH, len(pictures)))
            features.add(np.stack([pictures.get(row) for row in rows]))
        return self.score_features(features, labels_N)

    def features(self, num: int) -> Features:
        """An empty collection of the features of `num` images; `score_features` takes it when all were added."""
        needs_pixels = self.source.num or self.has_classifier
        found = [self.extractor, self._pixels] if needs_pixels else [self.extractor]
        return Features(found, num, self._place.device)

    def score_features(self, features: Features, labels_N: np.ndarray | None) -> dict[str, float]:
        """The metrics that `score` gives, from features that were made before."""
        num = features.num
        found = self._reference.distances(self.extractor, features.of(self.extractor), self.config.kid_subset)
        metrics = {self.metric_name(kind, num): value for kind, value in found.items()}
        if self.source.num:
            pixels_NF = features.of(self._pixels)[self._pixels.layer]
            metrics[f"fd_pixels_{count_name(num)}"] = self._reference.frechet(self._pixels, pixels_NF)
        if self.has_classifier and labels_N is not None:
            named_N = self._classifier.predict(features.of(self._pixels)[self._pixels.layer].numpy())
            metrics[f"class_accuracy_{count_name(num)}"] = float(np.mean(named_N == labels_N))
        return metrics

    def metric_names(self, num: int) -> tuple[str, ...]:
        """Names of the metrics that `score` gives for `num` images whose classes are known."""
        extractor, source = self.extractor, self.source
        kinds = [
            kind
            for kind, _ in zip(("fd", "sfd"), extractor.compared, strict=False)
            if source.num or kind in source.statistics
        ]
        kinds += ["kd", "precision", "recall"] if source.num else []
        kinds += ["is"] if extractor.logits and num >= SCORE_SPLITS else []
        others = ["fd_pixels"] if source.num else []
        others += ["class_accuracy"] if self.has_classifier else []
        return (*(self.metric_name(kind, num) for kind in kinds), *(f"{other}_{count_name(num)}" for other in others))

    def metric_name(self, kind: str, num: int) -> str:
        """The metric name of a kind of score of `num` images, such as `fid50k` or `fd_efficientnet_lite0_898`."""
        if self.extractor.is_standard:
            return f"{STANDARD_NAMES.get(kind, kind)}{count_name(num)}"
        return f"{kind}_{self.extractor.label}_{count_name(num)}"

    def require_enough(self, least: int, have: str) -> None:
        """Refuse sets that are too small for what is computed.

        Args:
            least: images in the smallest set that is scored.
            have: which sets there are, for the message.
        """
        if not self.source.num:
            require(least > 1, f"a Frechet distance needs 2 or more images, and there are {have}; give more")
            return
        least = min(least, self.source.num)
        require(
            least > NEIGHBOURS,
            f"evaluation.num_samples: precision and recall need {NEIGHBOURS + 1} or more images in each set and there "
            f"are {have}; give more",
        )
        subset = self.config.kid_subset
        require(2 <= subset <= least, f"evaluation.kid_subset is {subset}: there are {have}; give 2 to {least}")

    @property
    def protocol(self) -> dict[str, Any]:
        """All that decides the scores of given images."""
        manifold = {"neighbours": NEIGHBOURS}
        if self.source.num > MANIFOLD_IMAGES:
            manifold["reference_images"] = MANIFOLD_IMAGES
        has_score = bool(self.extractor.logits)
        return {
            "tf32": self._place.tf32,
            "evaluator": "torch-fidelity",
            "extractor": {**self.extractor.facts, "batch": BATCH},
            "kernel_distance": {"subset": self.config.kid_subset, "subsets": KID_SUBSETS, "seed": KID_SEED},
            "precision_recall": manifold,
            **({"inception_score": {"splits": SCORE_SPLITS, "seed": SCORE_SEED}} if has_score else {}),
            "pixels": f"luminance, {extractors.PIXEL_SIDE} x {extractors.PIXEL_SIDE}",
            "classifier": f"SVC on pixels, at most {CLASSIFIER_IMAGES} training images"
            if self.has_classifier
            else "none",
            "reference": self.source.digest,
        }

    def warnings(self, num: int) -> list[str]:
        """Warnings that a reader of scores of `num` images should see."""
        found = []
        least = min(num, self.source.num or num)
        if least < self.extractor.width:
            found.append(
                f"Fréchet distances come from {least} images in {self.extractor.width} dimensions: they are far above "
                "their value at many images, so compare them at equal N only and read them beside the kernel distance"
            )
        if self.config.classifier and not self.has_classifier:
            why = "the training images are all of one class" if self._training else "there are no training images"
            found.append(f"evaluation.classifier has no effect: {why}")
        if not self.source.num:
            found.append(
                f"{self.config.reference} holds statistics and no images: kernel distance, precision, recall and the "
                "distance on pixels are left out"
            )
        return found

    @cached_property
    def _classifier(self) -> Any:
        """A support vector machine on 8 x 8 luminance, fitted on real training images."""
        from sklearn.svm import SVC  # here, because importing scikit-learn takes a second

        assert self._training is not None, "no training images"
        rows, images = evenly_spaced_rows(self._training.rows, CLASSIFIER_IMAGES), self._training.images
        parts = [
            extractors.pixel_features(images.rows(part)) for part in np.split(rows, range(BATCH, len(rows), BATCH))
        ]
        # Without random_state it would draw from numpy's global state.
        return SVC(C=10.0, gamma="scale", random_state=0).fit(np.concatenate(parts), images.labels[rows])
