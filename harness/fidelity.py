"""Distances between two sets of images, computed by torch-fidelity with our settings and nobody else's.

torch-fidelity ignores options it does not know; so its arguments are built here, once. It caches features by name
alone, and unpickles what it finds there: its own cache stays off, and the reference's features lie in ours, under a
digest of the images' content, with checksums.

Shapes: H W image height and width in pixels, N images, F features.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch_fidelity
from torch import Tensor
from torch.utils.data import Dataset, Subset
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric
from torch_fidelity.utils import (
    create_feature_extractor,
    get_featuresdict_from_dataset,
    resolve_feature_layer_for_metric,
)

from harness import cache as caches
from harness.cache import Report
from harness.rng import global_state_kept

BATCH = 32
"""Images an extractor sees together. Fixed, because the batch size changes the last bits of float32 features."""
KID_SUBSETS = 100
KID_SEED = 2020
"""Seed of the draw of those subsets."""
NEIGHBOURS = 3
"""k of precision and recall: an image's ball reaches to its k-th neighbour in its own set."""


class Pictures(Dataset[Tensor]):
    """Images one at a time, as torch-fidelity wants them: uint8 [3, H, W]."""

    def __init__(self, get: Callable[[int], np.ndarray], num: int) -> None:
        """`get(i)` gives image i of `num`, uint8 [H, W, 3]."""
        self.get, self.num = get, num

    def __len__(self) -> int:
        return self.num

    def __getitem__(self, index: int) -> Tensor:
        return torch.from_numpy(self.get(index)).permute(2, 0, 1).contiguous()


@dataclass(frozen=True, kw_only=True)
class Reference:
    """The images that all others are compared with. Their features are computed once and cached."""

    pictures: Pictures
    name: str
    """Digest of all that decides the features but the extractor: images, device, TF32."""
    device: torch.device
    cache: Path
    report: Report | None = None
    """Told about features made, and about damaged files."""

    def distances(self, extractor: str, pictures: Pictures, kid_subset: int) -> dict[str, float]:
        """Frechet distance `fd`, kernel distance `kd`, `precision` and `recall` of `pictures`.

        Args:
            extractor: name registered with torch-fidelity.
            pictures: generated images, or others in their place.
            kid_subset: images a subset of the kernel distance, at most as many as either set has.
        """
        ours_NF, theirs_NF = self._features(extractor, pictures)
        kernel = kid_features_to_metric(
            ours_NF, theirs_NF, kid_subsets=KID_SUBSETS, kid_subset_size=kid_subset, rng_seed=KID_SEED, verbose=False
        )
        manifold = prc_features_to_metric(
            ours_NF, theirs_NF, prc_neighborhood=NEIGHBOURS, save_cpu_ram=True, verbose=False
        )
        return {
            "fd": _frechet(ours_NF, theirs_NF),
            "kd": kernel[torch_fidelity.KEY_METRIC_KID_MEAN],
            "precision": manifold[torch_fidelity.KEY_METRIC_PRECISION],
            "recall": manifold[torch_fidelity.KEY_METRIC_RECALL],
        }

    def frechet(self, extractor: str, pictures: Pictures) -> float:
        """Frechet distance alone."""
        return _frechet(*self._features(extractor, pictures))

    def _features(self, extractor: str, pictures: Pictures) -> tuple[Tensor, Tensor]:
        """Features of the pictures and of the reference, each float32 [N, F]."""
        ours_NF = _extract(extractor, pictures, self.device)

        def make_rows(start: int, stop: int) -> np.ndarray:
            # Whole batches from row 0 on: the features are those of one pass over all.
            return _extract(extractor, Subset(self.pictures, range(start, stop)), self.device).numpy()

        key = {"reference": self.name, "extractor": extractor, "batch": BATCH}
        folder = caches.entry(self.cache, extractor, key)
        num = len(self.pictures)
        theirs = caches.build(folder, key, num, ours_NF.shape[1:], np.float32, make_rows, self.report)
        return ours_NF, torch.from_numpy(theirs.rows(np.arange(num)))


def _extract(extractor: str, pictures: Dataset[Tensor], device: torch.device) -> Tensor:
    """Features of all pictures, in batches of `BATCH`: float32 [N, F] on the CPU."""
    cuda = device.type == "cuda"
    layer = resolve_feature_layer_for_metric("fid", feature_extractor=extractor)
    # Its data loader draws a seed from torch's global state.
    with global_state_kept():
        network = create_feature_extractor(extractor, [layer], cuda=cuda, verbose=False)
        found = get_featuresdict_from_dataset(pictures, network, BATCH, cuda, save_cpu_ram=True, verbose=False)
    return found[layer]


def _frechet(ours_NF: Tensor, theirs_NF: Tensor) -> float:
    statistics = [fid_features_to_statistics(features_NF) for features_NF in (ours_NF, theirs_NF)]
    return fid_statistics_to_metric(*statistics, verbose=False)[torch_fidelity.KEY_METRIC_FID]
