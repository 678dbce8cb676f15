"""Distances between two sets of images, computed by torch-fidelity with our settings and nobody else's.

torch-fidelity ignores options it does not know; so its arguments are built here, once. It caches features by name
alone, and unpickles what it finds there: its own cache stays off, and the reference's features lie in ours, under a
digest of the images' content, with checksums.

Shapes: H W image height and width in pixels, N images, F features.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch_fidelity
from torch import Tensor
from torch.utils.data import Dataset, Subset
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric
from torch_fidelity.utils import create_feature_extractor, get_featuresdict_from_dataset

from harness import cache as caches
from harness.cache import Report
from harness.extractors import Extractor
from harness.rng import global_state_kept

BATCH = 32
"""Images an extractor sees together. Fixed, because the batch size changes the last bits of float32 features."""
KID_SUBSETS = 100
KID_SEED = 2020
"""Seed of the draw of those subsets."""
NEIGHBOURS = 3
"""k of precision and recall: an image's ball reaches to its k-th neighbour in its own set."""
MANIFOLD_IMAGES = 10_000
"""Reference images of precision and recall at most, as in ADM's reference batches: the time grows with their square."""
SCORE_SPLITS = 10
"""Parts of the images that the Inception score is a mean over."""
SCORE_SEED = 2020
"""Seed of the order in which they are dealt out."""


class Pictures(Dataset[Tensor]):
    """Images one at a time, as torch-fidelity wants them: uint8 [3, H, W]."""

    def __init__(self, get: Callable[[int], np.ndarray], num: int) -> None:
        """`get(i)` gives image i of `num`, uint8 [H, W, 3]."""
        self.get, self.num = get, num

    def __len__(self) -> int:
        return self.num

    def __getitem__(self, index: int) -> Tensor:
        # What comes from a decoder or a memory map may be read-only, of which torch would warn.
        image_HWC = np.require(self.get(index), requirements="W")
        return torch.from_numpy(image_HWC).permute(2, 0, 1).contiguous()


Statistics = Mapping[str, np.ndarray]
"""`mu` [F] and `sigma` [F, F] of a set of features."""


@dataclass(frozen=True, kw_only=True)
class Reference:
    """What all images are compared with. Features of its own images are computed once and cached."""

    pictures: Pictures | None
    """None where statistics alone are known: then nothing but Frechet distances can be computed."""
    name: str
    """Digest of all that decides the features but the extractor: images, device, TF32."""
    device: torch.device
    cache: Path
    report: Report | None = None
    """Told about features made, and about damaged files."""
    statistics: Mapping[str, Statistics] = field(default_factory=dict)
    """By the names of Frechet distances, `fd` and `sfd`: these count instead of those of the images' features."""

    def distances(self, extractor: Extractor, pictures: Pictures, kid_subset: int) -> dict[str, float]:
        """What can be said of `pictures` by one extractor.

        Args:
            extractor: a registered one.
            pictures: generated images, or others in their place.
            kid_subset: images a subset of the kernel distance, at most as many as either set has.

        Returns:
            Frechet distance `fd` and, where the extractor has such a layer, `sfd` on spatial features; Inception score
            `is` where it has logits; kernel distance `kd`, `precision` and `recall` where the reference has images.
        """
        ours = extract(extractor, extractor.layers, pictures, self.device)
        theirs = self._features(extractor, [ours[layer].shape[1] for layer in extractor.compared])
        found = {}
        for kind, layer in zip(("fd", "sfd"), extractor.compared, strict=False):
            if kind in self.statistics:
                found[kind] = _to_statistics(ours[layer], self.statistics[kind])
            elif theirs:
                found[kind] = _frechet(ours[layer], theirs[layer])
        if theirs:
            found |= _kernel_and_manifold(ours[extractor.layer], theirs[extractor.layer], kid_subset)
        if extractor.logits and len(pictures) >= SCORE_SPLITS:
            score = isc_features_to_metric(
                ours[extractor.logits], splits=SCORE_SPLITS, shuffle=True, rng_seed=SCORE_SEED
            )
            found["is"] = score[torch_fidelity.KEY_METRIC_ISC_MEAN]
        return found

    def frechet(self, extractor: Extractor, ours_NF: Tensor) -> float:
        """Frechet distance of features, float32 [N, F], to those of the reference's images."""
        return _frechet(ours_NF, self._features(extractor, [ours_NF.shape[1]])[extractor.layer])

    def _features(self, extractor: Extractor, widths: list[int]) -> dict[str, Tensor]:
        """Features of the reference's images by layer, float32 [N, F] each; empty where there are no images."""
        pictures = self.pictures
        if pictures is None:
            return {}
        layers, num = extractor.compared, len(pictures)

        def make_rows(start: int, stop: int) -> np.ndarray:
            # Whole batches from row 0 on: the features are those of one pass over all.
            part = extract(extractor, layers, Subset(pictures, range(start, stop)), self.device)
            return torch.cat([part[layer] for layer in layers], dim=1).numpy()

        key = {"reference": self.name, "extractor": extractor.name, "batch": BATCH}
        folder = caches.entry(self.cache, extractor.name, key)
        cached = caches.build(folder, key, num, (sum(widths),), np.float32, make_rows, self.report)
        parts = torch.from_numpy(cached.rows(np.arange(num))).split(widths, dim=1)
        return dict(zip(layers, parts, strict=True))


def extract(
    extractor: Extractor, layers: Sequence[str], pictures: Dataset[Tensor], device: torch.device
) -> dict[str, Tensor]:
    """Features of all pictures by layer, in batches of `BATCH`: float32 [N, F] on the CPU."""
    cuda = device.type == "cuda"
    # Its data loader draws a seed from torch's global state.
    with global_state_kept():
        network = create_feature_extractor(extractor.name, list(layers), cuda=cuda, verbose=False)
        return get_featuresdict_from_dataset(pictures, network, BATCH, cuda, save_cpu_ram=True, verbose=False)


def _frechet(ours_NF: Tensor, theirs_NF: Tensor) -> float:
    statistics = [fid_features_to_statistics(features_NF) for features_NF in (ours_NF, theirs_NF)]
    return fid_statistics_to_metric(*statistics, verbose=False)[torch_fidelity.KEY_METRIC_FID]


def _to_statistics(ours_NF: Tensor, theirs: Statistics) -> float:
    """Frechet distance to stored statistics; torch-fidelity wants both in one type."""
    statistics = [
        {name: np.asarray(value, np.float64) for name, value in stored.items()}
        for stored in (fid_features_to_statistics(ours_NF), theirs)
    ]
    return fid_statistics_to_metric(*statistics, verbose=False)[torch_fidelity.KEY_METRIC_FID]


def _kernel_and_manifold(ours_NF: Tensor, theirs_NF: Tensor, kid_subset: int) -> dict[str, float]:
    kernel = kid_features_to_metric(
        ours_NF, theirs_NF, kid_subsets=KID_SUBSETS, kid_subset_size=kid_subset, rng_seed=KID_SEED, verbose=False
    )
    real_NF = theirs_NF[spread(np.arange(len(theirs_NF)), MANIFOLD_IMAGES)]
    manifold = prc_features_to_metric(ours_NF, real_NF, prc_neighborhood=NEIGHBOURS, save_cpu_ram=True, verbose=False)
    return {
        "kd": kernel[torch_fidelity.KEY_METRIC_KID_MEAN],
        "precision": manifold[torch_fidelity.KEY_METRIC_PRECISION],
        "recall": manifold[torch_fidelity.KEY_METRIC_RECALL],
    }


def spread(rows: np.ndarray, num: int) -> np.ndarray:
    """At most `num` of the rows, evenly spaced: folders are sorted by class, so the first ones are of one class."""
    num = min(num, len(rows))
    return rows[np.arange(num) * len(rows) // num]
