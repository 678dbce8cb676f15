"""CKA and CKNNA against closed forms and slow loops, and principal components whose signs are fixed."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from harness.analysis.similarity import Kernel, cka, cknna, hsic, principal_components


def draws(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def alike(x_ND: Tensor, y_ND: Tensor, neighbours: int = 3) -> tuple[float, float]:
    """CKA and CKNNA."""
    kernels = Kernel.of(x_ND, neighbours), Kernel.of(y_ND, neighbours)
    return cka(*kernels), cknna(*kernels)


# -- the estimator --------------------------------------------------------------------------------------------------


def u_statistic(a: np.ndarray, b: np.ndarray) -> float:
    """Its definition for symmetric tables (Song et al. 2012, equation 4): means over ordered tuples without repetition
    of a_ij b_ij, a_ij b_qr and a_ij b_iq."""
    num = range(len(a))
    pairs = np.mean([a[i, j] * b[i, j] for i, j in itertools.permutations(num, 2)])
    fours = np.mean([a[i, j] * b[q, r] for i, j, q, r in itertools.permutations(num, 4)])
    threes = np.mean([a[i, j] * b[i, q] for i, j, q in itertools.permutations(num, 3)])
    return float(pairs + fours - 2 * threes)


@pytest.mark.parametrize("num", [4, 5, 8])
def test_the_estimator_is_the_mean_over_tuples(num: int) -> None:
    x, y = draws(num, 3), draws(num, 2, seed=1)
    a, b = x @ x.T, y @ y.T
    assert hsic(a, b) == pytest.approx(u_statistic(a.numpy(), b.numpy()), rel=1e-10)


def test_the_estimator_knows_tables_that_are_not_symmetric() -> None:
    # By hand, N = 4, without diagonals. A = e_01 + e_02, B = e_10 + e_30: sum(A * B^T) = 1 (the pair 01, 10);
    # sum(A) sum(B) / (3 * 2) = 4 / 6; column sums of A (0, 1, 1, 0) by row sums of B (0, 1, 0, 1) = 1, times 2 / 2.
    # (1 + 2/3 - 1) / (4 * 1) = 1/6. The diagonals count for nothing.
    a, b = torch.zeros(4, 4), torch.zeros(4, 4)
    a[0, 1] = a[0, 2] = b[1, 0] = b[3, 0] = 1
    assert hsic(a, b) == pytest.approx(1 / 6)
    assert hsic(a + 7 * torch.eye(4), b + 5 * torch.eye(4)) == pytest.approx(1 / 6)


# -- CKA ------------------------------------------------------------------------------------------------------------


def test_cka_is_1_for_rotated_moved_and_scaled_features() -> None:
    x = draws(40, 6)
    rotation = torch.linalg.qr(draws(6, 6, seed=1)).Q
    assert alike(x, 3 * x @ rotation + draws(6, seed=2))[0] == pytest.approx(1, abs=1e-12)
    assert alike(x, torch.cat([x, torch.zeros(40, 4)], dim=1)) == pytest.approx((1, 1), abs=1e-12)


def test_cka_of_centred_scalars_is_near_their_squared_correlation() -> None:
    # Biased linear CKA of one-dimensional features is r^2; the estimators differ by O(1 / N).
    x = draws(1000, 1)
    y = 0.6 * x + 0.8 * draws(1000, 1, seed=1)
    r = float(np.corrcoef(x[:, 0], y[:, 0])[0, 1])
    assert alike(x, y)[0] == pytest.approx(r**2, abs=5e-3)


def test_cka_of_independent_wide_features_is_about_0_where_the_biased_one_is_about_1() -> None:
    x, y = draws(20, 2000), draws(20, 2000, seed=1)
    assert abs(alike(x, y)[0]) < 0.1
    a, b = ((z - z.mean(dim=0)) @ (z - z.mean(dim=0)).T for z in (x, y))
    biased = float((a * b).sum() / (a.norm() * b.norm()))
    assert biased > 0.9


# -- CKNNA ----------------------------------------------------------------------------------------------------------


def slow_cknna(x: np.ndarray, y: np.ndarray, neighbours: int) -> float:
    """Loops over pairs; the estimator of masked tables as sums over i, j and k."""

    def tables(z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        unit = z / np.sqrt((z**2).sum(axis=1, keepdims=True))
        likeness, near = np.zeros((len(z), len(z))), np.zeros((len(z), len(z)))
        for i in range(len(z)):
            for j in range(len(z)):
                likeness[i, j] = sum(unit[i] * unit[j])
            others = [j for j in range(len(z)) if j != i]
            for j in sorted(others, key=lambda j: -likeness[i, j])[:neighbours]:
                near[i, j] = 1
        return likeness, near

    def estimate(a: np.ndarray, b: np.ndarray) -> float:
        num = len(a)
        places = [(i, j) for i in range(num) for j in range(num) if i != j]
        pairs = sum(a[i, j] * b[j, i] for i, j in places)
        means = sum(a[p] for p in places) * sum(b[p] for p in places) / ((num - 1) * (num - 2))
        chains = sum(a[i, j] * b[j, k] for i, j in places for k in range(num) if k != j)
        return (pairs + means - 2 * chains / (num - 2)) / (num * (num - 3))

    (k, near_k), (m, near_m) = tables(x), tables(y)
    both = near_k * near_m
    own = estimate(near_k * k, near_k * k) * estimate(near_m * m, near_m * m)
    return estimate(both * k, both * m) / math.sqrt(own)


@pytest.mark.parametrize(("num", "neighbours"), [(8, 2), (12, 3), (15, 10)])
def test_cknna_is_what_loops_give(num: int, neighbours: int) -> None:
    x = draws(num, 4)
    y = torch.cat([x[:, :2] + 0.3 * draws(num, 2, seed=1), draws(num, 3, seed=2)], dim=1)
    assert alike(x, y, neighbours)[1] == pytest.approx(slow_cknna(x.numpy(), y.numpy(), neighbours), rel=1e-9)


def test_cknna_sees_neighbours_where_cka_sees_the_whole() -> None:
    # Twelve tight groups on a circle, and the same groups dealt out anew on it: who is near whom stays, where the
    # groups lie does not.
    angle = torch.arange(12, dtype=torch.float64) * (2 * math.pi / 12)
    order = torch.tensor([0, 5, 10, 3, 8, 1, 6, 11, 4, 9, 2, 7])
    places = [torch.stack([a.cos(), a.sin()], dim=1).repeat_interleave(5, dim=0) for a in (angle, angle[order])]
    x, y = (place + 1e-3 * draws(60, 2, seed=seed) for seed, place in enumerate(places))
    whole, near = alike(x, y, neighbours=4)
    assert whole < 0.1 and near > 0.9


def test_cknna_of_independent_features_is_small() -> None:
    assert abs(alike(draws(200, 8), draws(200, 8, seed=1), neighbours=10)[1]) < 0.05


# -- features that say nothing --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "features",
    [
        torch.full((12, 3), 0.1),
        torch.zeros(12, 3),
        torch.full((12, 3), 0.1) + 1e-8 * draws(12, 3).float(),
        draws(12, 3).index_fill(0, torch.tensor([4]), math.nan),
        draws(12, 3).index_fill(0, torch.tensor([4]), math.inf),
    ],
    ids=["constant", "zero", "rounding", "nan", "infinite"],
)
def test_features_that_do_not_vary_or_are_not_finite_are_like_nothing(features: Tensor) -> None:
    for pair in ((features, draws(12, 3)), (draws(12, 3), features)):
        assert all(math.isnan(value) for value in alike(*pair))


# -- principal components -------------------------------------------------------------------------------------------


def test_components_are_those_of_the_covariance() -> None:
    x = draws(50, 6) * torch.tensor([5.0, 3.0, 2.0, 0.5, 0.4, 0.3]).double() + 10
    scores, shares = principal_components(x)
    variances, vectors = np.linalg.eigh(np.cov(x.numpy().T))
    expected = (x.numpy() - x.numpy().mean(axis=0)) @ vectors[:, ::-1][:, :3]
    assert shares.tolist() == pytest.approx((variances[::-1][:3] / variances.sum()).tolist())
    np.testing.assert_allclose(scores.abs().numpy(), np.abs(expected), atol=1e-10)
    # These axes are nearly the coordinates: with the largest weight positive, each score follows its coordinate.
    assert all(np.corrcoef(scores[:, i], x[:, i])[0, 1] > 0.9 for i in range(3))


def test_signs_and_order_do_not_depend_on_how_tokens_came() -> None:
    x = draws(40, 5)
    scores, _ = principal_components(x)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(principal_components(x[order])[0], scores[order])
    torch.testing.assert_close(principal_components(x.float() + 4)[0], scores, atol=1e-5, rtol=1e-5)


def test_missing_components_are_0_and_bad_tokens_give_nan() -> None:
    scores, shares = principal_components(torch.tensor([[0.0], [2.0]]))
    assert scores.tolist() == [[-1, 0, 0], [1, 0, 0]] and shares.tolist() == [1, 0, 0]
    scores, shares = principal_components(torch.ones(5, 4))
    assert not scores.any() and not shares.any()
    scores, shares = principal_components(torch.tensor([[0.0, math.nan], [2.0, 1.0]]))
    assert scores.shape == (2, 3) and scores.isnan().all() and shares.isnan().all()
