"""Distances between two sets of images: torch-fidelity's, with our settings and nobody else's.

torch-fidelity ignores options it does not know; so its arguments are built here, once. It caches features by name
alone, and unpickles what it finds there: its own cache stays off, and the reference's features lie in ours, under a
digest of the images' content, with checksums.

Two distances are its estimators in a faster form, on its draws and moments, and differ from its own by rounding: the
Frechet distance, by the eigenvalues of a symmetric matrix, and the kernel distance, where the sets are small.

Shapes: H W image height and width in pixels, N images, M images of the reference, F features, S subsets.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch_fidelity
from torch import Tensor
from torch.utils.data import Dataset, Subset
from torch_fidelity.metric_fid import fid_features_to_statistics
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric
from torch_fidelity.utils import create_feature_extractor, get_featuresdict_from_dataset

from harness.data import cache as caches
from harness.data.image_set import evenly_spaced_rows
from harness.evaluation.extractors import Extractor
from harness.machine.progress import OnProgress
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
KERNEL_ROWS = 1024
"""Rows of a matrix of kernels that lie in memory at once."""
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
    """The images that all others are compared with. Their features are computed once and cached."""

    pictures: Pictures | None
    """The images; None where only their statistics are known, which Frechet distances alone can be computed from."""
    name: str
    """Digest of all that decides the features but the extractor: images, device, TF32."""
    device: torch.device
    cache: Path
    on_progress: OnProgress | None = None
    """Told about features made, and about damaged files."""
    statistics: Mapping[str, Statistics] = field(default_factory=dict)
    """Given statistics by the name of a Frechet distance, `fd` or `sfd`; they replace those of the images' features."""

    def distances(self, extractor: Extractor, ours: Mapping[str, Tensor], kid_subset: int) -> dict[str, float]:
        """Distances between the reference and other images, on the features of one extractor.

        Args:
            extractor: a registered one.
            ours: features of the generated images, or of others in their place, by layer, float32 [N, F] each.
            kid_subset: images a subset of the kernel distance, at most as many as either set has.

        Returns:
            Frechet distance `fd` and, where the extractor has such a layer, `sfd` on spatial features; Inception score
            `is` where it has logits; kernel distance `kd`, `precision` and `recall` where the reference has images.
        """
        widths = {layer: ours[layer].shape[1] for layer in extractor.compared}
        found = {
            kind: frechet(ours[layer], self._moments(kind, extractor, layer, widths))
            for kind, layer in zip(("fd", "sfd"), extractor.compared, strict=False)
            if kind in self.statistics or self.pictures is not None
        }
        if self.pictures is not None:
            theirs_NF = self._features(extractor, widths)[extractor.layer]
            found |= _kernel_and_manifold(ours[extractor.layer], theirs_NF, kid_subset)
        if extractor.logits and len(ours[extractor.logits]) >= SCORE_SPLITS:
            score = isc_features_to_metric(
                ours[extractor.logits], splits=SCORE_SPLITS, shuffle=True, rng_seed=SCORE_SEED
            )
            found["is"] = score[torch_fidelity.KEY_METRIC_ISC_MEAN]
        return found

    def frechet(self, extractor: Extractor, ours_NF: Tensor) -> float:
        """Frechet distance of features of an extractor's one layer, float32 [N, F], to the reference's images'."""
        widths = {extractor.layer: ours_NF.shape[1]}
        return frechet(ours_NF, self._moments("", extractor, extractor.layer, widths))

    def _moments(self, kind: str, extractor: Extractor, layer: str, widths: Mapping[str, int]) -> "Moments":
        """Moments of a layer, or those that are given for this kind of distance; computed once and cached."""
        given, width = self.statistics.get(kind), widths[layer]
        key: dict[str, Any] = {"reference": self.name, "kind": kind}
        if given is None:
            key = {"reference": self.name, "extractor": extractor.name, "batch": BATCH, "layer": layer}

        def make_row(start: int, stop: int) -> np.ndarray:
            stored = given or fid_features_to_statistics(self._features(extractor, widths)[layer])
            sigma_FF = np.asarray(stored["sigma"], np.float64)
            return np.concatenate([stored["mu"], sigma_FF.ravel(), _root(sigma_FF).ravel()])[None]

        folder = caches.entry(self.cache, "statistics", key)
        cached = caches.build(folder, key, 1, (width + 2 * width**2,), np.float64, make_row, self.on_progress)
        mu_F, sigma, root = np.split(cached.rows(np.arange(1))[0], [width, width + width**2])
        return Moments(mu_F, sigma.reshape(width, width), root.reshape(width, width))

    def _features(self, extractor: Extractor, widths: Mapping[str, int]) -> dict[str, Tensor]:
        """Features of the reference's images by layer, float32 [M, F] each, F as given."""
        pictures = self.pictures
        assert pictures is not None, "a reference that has statistics alone"
        layers, num = extractor.compared, len(pictures)

        def make_rows(start: int, stop: int) -> np.ndarray:
            # Whole batches from row 0 on: the features are those of one pass over all.
            part = extract(extractor, layers, Subset(pictures, range(start, stop)), self.device)
            return torch.cat([part[layer] for layer in layers], dim=1).numpy()

        key = {"reference": self.name, "extractor": extractor.name, "batch": BATCH}
        folder = caches.entry(self.cache, extractor.name, key)
        cached = caches.build(folder, key, num, (sum(widths.values()),), np.float32, make_rows, self.on_progress)
        parts = torch.from_numpy(cached.rows(np.arange(num))).split([widths[layer] for layer in layers], dim=1)
        return dict(zip(layers, parts, strict=True))


class Features:
    """Features of images by several extractors, made part by part, so that the images need not lie in memory."""

    def __init__(self, extractors: Sequence[Extractor], num: int, device: torch.device):
        """Make an empty collection that `num` images will be added to."""
        self._extractors, self.num, self._device = extractors, num, device
        self._parts: dict[str, list[dict[str, Tensor]]] = {extractor.name: [] for extractor in extractors}
        self._waiting: list[np.ndarray] = []
        self._done = 0
        self.seconds = 0.0
        """Time that making them took."""

    def add(self, images_NHWC: np.ndarray) -> None:
        """Take the next images, uint8. Whole batches are made, so that all are those of one pass; the rest waits."""
        started = time.perf_counter()
        images = [*self._waiting, *images_NHWC]
        there = len(images)
        num = there if self._done + there == self.num else there // BATCH * BATCH
        for extractor in self._extractors if num else ():
            part = extract(extractor, extractor.layers, Pictures(images.__getitem__, num), self._device)
            self._parts[extractor.name].append(part)
        self._waiting = [image_HWC.copy() for image_HWC in images[num:]]  # a view would keep the whole array
        self._done += num
        self.seconds += time.perf_counter() - started

    def of(self, extractor: Extractor) -> dict[str, Tensor]:
        """The features of all images by one extractor, by layer: float32 [N, F] on the CPU."""
        assert self._done == self.num, (self._done, self.num)
        parts = self._parts[extractor.name]
        return {layer: torch.cat([part[layer] for part in parts]) for layer in extractor.layers}


def extract(
    extractor: Extractor, layers: Sequence[str], pictures: Dataset[Tensor], device: torch.device
) -> dict[str, Tensor]:
    """Features of all pictures by layer, in batches of `BATCH`: float32 [N, F] on the CPU."""
    cuda = device.type == "cuda"
    # Its data loader draws a seed from torch's global state.
    with global_state_kept():
        network = create_feature_extractor(extractor.name, list(layers), cuda=cuda, verbose=False)
        return get_featuresdict_from_dataset(pictures, network, BATCH, cuda, save_cpu_ram=True, verbose=False)


@dataclass(frozen=True)
class Moments:
    """A normal distribution of features, float64."""

    mu_F: np.ndarray
    sigma_FF: np.ndarray
    root_FF: np.ndarray
    """The symmetric square root of `sigma_FF`."""


def frechet(ours_NF: Tensor, theirs: Moments) -> float:
    """|mu1 - mu2|^2 + tr(S1 + S2 - 2 (R S1 R)^(1/2)), R the root of S2, of float32 features [N, F].

    Eigenvalues of R S1 R are those of S1 S2, of which torch-fidelity takes the roots; but R S1 R is symmetric, which
    makes them a few times cheaper, and real and positive where there are fewer images than features.
    """
    ours = fid_features_to_statistics(ours_NF)
    gap_F = ours["mu"] - theirs.mu_F
    values_F = np.linalg.eigvalsh(theirs.root_FF @ ours["sigma"] @ theirs.root_FF)
    traces = np.trace(ours["sigma"]) + np.trace(theirs.sigma_FF)
    return float(gap_F @ gap_F + traces - 2 * np.sqrt(values_F.clip(0)).sum())


def _root(sigma_FF: np.ndarray) -> np.ndarray:
    values_F, vectors_FF = np.linalg.eigh(sigma_FF)
    return vectors_FF * np.sqrt(values_F.clip(0)) @ vectors_FF.T


def kernel_distance(ours_NF: Tensor, theirs_MF: Tensor, subset: int) -> float:
    """Unbiased squared MMD with the kernel (x.y / F + 1)^3 (arXiv 1801.01401, section 4), a mean over pairs of subsets.

    torch-fidelity makes the kernels of every pair of subsets anew. Where that is more work, each kernel is made once,
    and summed over the same subsets in float64.
    """
    num, num_real = len(ours_NF), len(theirs_MF)
    if num**2 + num_real**2 + num * num_real > KID_SUBSETS * 3 * subset**2:
        settings = {"kid_subsets": KID_SUBSETS, "kid_subset_size": subset, "rng_seed": KID_SEED, "verbose": False}
        return kid_features_to_metric(ours_NF, theirs_MF, **settings)[torch_fidelity.KEY_METRIC_KID_MEAN]
    draws = np.random.RandomState(KID_SEED)
    chosen_SN, chosen_SM = np.zeros((KID_SUBSETS, num)), np.zeros((KID_SUBSETS, num_real))
    for ours_N, theirs_M in zip(chosen_SN, chosen_SM, strict=True):
        ours_N[draws.choice(num, subset, replace=False)] = 1
        theirs_M[draws.choice(num_real, subset, replace=False)] = 1
    x_NF, y_MF = ours_NF.numpy(), theirs_MF.numpy()
    across_S = _kernel_sums(x_NF, y_MF, chosen_SN, chosen_SM) / subset**2
    within_S = _sums_within(x_NF, chosen_SN) + _sums_within(y_MF, chosen_SM)
    return float(np.mean(within_S / (subset * (subset - 1)) - 2 * across_S))


def _sums_within(x_NF: np.ndarray, chosen_SN: np.ndarray) -> np.ndarray:
    """Sum of the kernels of every two different images of each subset, float64 [S]."""
    squares_N = np.einsum("nf,nf->n", x_NF, x_NF, dtype=np.float64)
    return _kernel_sums(x_NF, x_NF, chosen_SN, chosen_SN) - chosen_SN @ (squares_N / x_NF.shape[1] + 1) ** 3


def _kernel_sums(x_NF: np.ndarray, y_MF: np.ndarray, chosen_SN: np.ndarray, chosen_SM: np.ndarray) -> np.ndarray:
    """Sum of the kernels of every image of a subset of x with every one of a subset of y, float64 [S]."""
    sums_S = np.zeros(len(chosen_SN))
    for rows in np.split(np.arange(len(x_NF)), range(KERNEL_ROWS, len(x_NF), KERNEL_ROWS)):
        kernels_RM = (x_NF[rows] @ y_MF.T / x_NF.shape[1] + 1) ** 3
        sums_S += ((chosen_SN[:, rows] @ kernels_RM.astype(np.float64)) * chosen_SM).sum(axis=1)
    return sums_S


def _kernel_and_manifold(ours_NF: Tensor, theirs_MF: Tensor, kid_subset: int) -> dict[str, float]:
    real_MF = theirs_MF[evenly_spaced_rows(np.arange(len(theirs_MF)), MANIFOLD_IMAGES)]
    manifold = prc_features_to_metric(ours_NF, real_MF, prc_neighborhood=NEIGHBOURS, save_cpu_ram=True, verbose=False)
    return {
        "kd": kernel_distance(ours_NF, theirs_MF, kid_subset),
        "precision": manifold[torch_fidelity.KEY_METRIC_PRECISION],
        "recall": manifold[torch_fidelity.KEY_METRIC_RECALL],
    }
