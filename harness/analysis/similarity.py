"""How alike two sets of features are that describe the same images, and what of features can be seen.

CKA and CKNNA compare N x N tables of likeness, so the two sets may have different widths. Everything is float64, on the
CPU.

Shapes: N images, D width of a feature, M tokens.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

COMPONENTS = 3
"""Principal components that are kept: one for each of red, green and blue."""
LEAST_IMAGES = 4
"""The unbiased estimator divides by N - 3."""
LEAST_SPREAD = 1e-6
"""Least spread of features around their mean, as a share of their size; below it lies the rounding of float32."""


@dataclass(frozen=True)
class Kernel:
    """The likeness of N images to one another, as one set of features has it."""

    centred_NN: Tensor
    """Inner products of the features less their mean."""
    cosine_NN: Tensor
    """Inner products of the features at length 1, as minyoungg/platonic-rep 07ef02a measure_alignment.py,
    `compute_score`, has them."""
    near_NN: Tensor
    """1 where image j is among the nearest neighbours of image i by that product, itself not counted; else 0."""
    varies: bool
    """Whether the features are finite and differ between images; otherwise they are like nothing."""

    @classmethod
    def of(cls, features_ND: Tensor, neighbours: int) -> "Kernel":
        """Tables of N features; `neighbours` is the k of CKNNA."""
        assert len(features_ND) >= max(LEAST_IMAGES, neighbours + 1), f"{len(features_ND)} images"
        x_ND = features_ND.detach().cpu().double()
        centred_ND = x_ND - x_ND.mean(dim=0)
        unit_ND = torch.nn.functional.normalize(x_ND, dim=1)
        cosine_NN = unit_ND @ unit_ND.T
        others_NN = cosine_NN.clone().fill_diagonal_(-math.inf)
        near_NN = torch.zeros_like(cosine_NN).scatter_(1, others_NN.topk(neighbours, dim=1).indices, 1.0)
        varies = bool(centred_ND.norm() > LEAST_SPREAD * x_ND.norm()) and bool(x_ND.isfinite().all())
        return cls(centred_NN=centred_ND @ centred_ND.T, cosine_NN=cosine_NN, near_NN=near_NN, varies=varies)


def hsic(a_NN: Tensor, b_NN: Tensor) -> float:
    """The unbiased estimator of the Hilbert-Schmidt independence criterion (Song et al., JMLR 13, 2012, equation 5).

    With A and B without their diagonals, which need not be symmetric:
    (sum(A * B^T) + sum(A) sum(B) / ((N-1)(N-2)) - 2 / (N-2) 1^T A B 1) / (N(N-3)).
    """
    num = len(a_NN)
    a_NN, b_NN = (table.clone().fill_diagonal_(0) for table in (a_NN, b_NN))
    pairs = (a_NN * b_NN.T).sum()
    means = a_NN.sum() * b_NN.sum() / ((num - 1) * (num - 2))
    crossed = a_NN.sum(dim=0) @ b_NN.sum(dim=1) * 2 / (num - 2)
    return float(pairs + means - crossed) / (num * (num - 3))


def cka(a: Kernel, b: Kernel) -> float:
    """Linear centred kernel alignment, hsic(K, L) / sqrt(hsic(K, K) hsic(L, L)); NaN for features that do not vary.

    Kornblith et al. (2019), section 3, with the unbiased estimator in place of the biased one, which goes to 1 where
    features are wider than there are images. 1 for features that are equal up to rotation, shift and scale, about 0
    for independent ones, and slightly below 0 by chance.
    """
    if not (a.varies and b.varies):
        return math.nan
    return _normalised(hsic(a.centred_NN, b.centred_NN), *(hsic(k.centred_NN, k.centred_NN) for k in (a, b)))


def cknna(a: Kernel, b: Kernel) -> float:
    """Centred kernel nearest-neighbour alignment (Huh et al., "The Platonic Representation Hypothesis", 2024).

    As CKA, of tables that keep the pairs (i, j) alone in which j is a nearest neighbour of i in both sets:
    hsic(mK, mL) / sqrt(hsic(aK, aK) hsic(bL, bL)) with K and L of features at length 1, a and b the neighbours of each
    set, and m = a * b (minyoungg/platonic-rep 07ef02a metrics.py, `cknna` with unbiased=True; without the 1e-6 that it
    adds to the denominator).
    """
    if not (a.varies and b.varies):
        return math.nan
    shared_NN = a.near_NN * b.near_NN
    own = [k.near_NN * k.cosine_NN for k in (a, b)]
    return _normalised(
        hsic(shared_NN * a.cosine_NN, shared_NN * b.cosine_NN), *(hsic(table_NN, table_NN) for table_NN in own)
    )


def _normalised(value: float, own_a: float, own_b: float) -> float:
    """A similarity over the root of the self-similarities; NaN where there is none: of tables that are not symmetric
    an estimate may fall below 0."""
    return value / math.sqrt(own_a * own_b) if own_a > 0 and own_b > 0 else math.nan


def principal_components(tokens_MD: Tensor) -> tuple[Tensor, Tensor]:
    """The first three principal components of tokens, largest variance first.

    The sign of a component is free: its weight of the largest size is positive here, so equal tokens give equal
    pictures. Components that the tokens do not have are 0; tokens that are not finite give NaN.

    Returns:
        scores, float64 [M, 3], and the shares of the variance that they hold, float64 [3].
    """
    x_MD = tokens_MD.detach().cpu().double()
    if not x_MD.isfinite().all():
        return torch.full((len(x_MD), COMPONENTS), math.nan).double(), torch.full((COMPONENTS,), math.nan).double()
    x_MD = x_MD - x_MD.mean(dim=0)
    _, sizes, weights_KD = torch.linalg.svd(x_MD, full_matrices=False)
    weights_KD = weights_KD[:COMPONENTS]
    largest_K = weights_KD.gather(1, weights_KD.abs().argmax(dim=1, keepdim=True))
    scores_MK = x_MD @ (weights_KD * largest_K.sign()).T
    total = sizes.square().sum()
    shares_K = sizes[:COMPONENTS].square() / total if total > 0 else torch.zeros_like(sizes[:COMPONENTS])
    missing = COMPONENTS - len(weights_KD)
    return torch.nn.functional.pad(scores_MK, (0, missing)), torch.nn.functional.pad(shares_K, (0, missing))
