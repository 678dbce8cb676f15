"""Distances between two sets of images, computed by torch-fidelity with our settings and nobody else's.

torch-fidelity ignores options it does not know and caches features by name alone; so its arguments are built here,
once, and cache names hold a digest of the images' content.

Shapes: H W image height and width in pixels.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch_fidelity
from torch import Tensor
from torch.utils.data import Dataset

from harness.cache import writing_to
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

    def distances(self, extractor: str, pictures: Pictures, kid_subset: int) -> dict[str, float]:
        """Frechet distance `fd`, kernel distance `kd`, `precision` and `recall` of `pictures`.

        Args:
            extractor: name registered with torch-fidelity.
            pictures: generated images, or others in their place.
            kid_subset: images a subset of the kernel distance, at most as many as either set has.
        """
        options = {"fid": True, "kid": True, "prc": True, "kid_subset_size": kid_subset}
        found = self._calculate(extractor, pictures, options)
        return {
            "fd": found[torch_fidelity.KEY_METRIC_FID],
            "kd": found[torch_fidelity.KEY_METRIC_KID_MEAN],
            "precision": found[torch_fidelity.KEY_METRIC_PRECISION],
            "recall": found[torch_fidelity.KEY_METRIC_RECALL],
        }

    def frechet(self, extractor: str, pictures: Pictures) -> float:
        """Frechet distance alone."""
        return self._calculate(extractor, pictures, {"fid": True})[torch_fidelity.KEY_METRIC_FID]

    def _calculate(self, extractor: str, pictures: Pictures, options: dict[str, Any]) -> dict[str, float]:
        # Its data loader draws a seed from torch's global state.
        with writing_to(self.cache), global_state_kept():
            return torch_fidelity.calculate_metrics(
                input1=pictures,
                input2=self.pictures,
                input2_cache_name=self.name,
                feature_extractor=extractor,
                cuda=self.device.type == "cuda",
                batch_size=BATCH,
                cache_root=str(self.cache),
                kid_subsets=KID_SUBSETS,
                prc_neighborhood=NEIGHBOURS,
                rng_seed=KID_SEED,
                save_cpu_ram=True,
                verbose=False,
                **options,
            )
