"""Random streams: apart by seed, role and index, equal when asked again, and blind to the global state.

`tests/golden/rng_draws.json` holds a few draws, so that a change of the streams, and with it of every result, is
noticed. It was written once from these calls; integers must agree exactly, floats to a rounding.
"""

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from harness import rng

GOLDEN = Path(__file__).parents[2] / "golden" / "rng_draws.json"


def uniform(generator: torch.Generator) -> Tensor:
    return torch.rand(8, generator=generator)


@pytest.fixture
def global_state_checked() -> Iterator[None]:
    """Fails a test that moves any of the three global random states."""
    before = torch.get_rng_state(), np.random.get_state(), random.getstate()
    yield
    assert torch.equal(torch.get_rng_state(), before[0])
    assert all(np.array_equal(a, b) for a, b in zip(np.random.get_state(), before[1], strict=True))
    assert random.getstate() == before[2]


def test_the_same_name_gives_the_same_draws() -> None:
    assert torch.equal(uniform(rng.stream(1, "noise", 5)), uniform(rng.stream(1, "noise", 5)))


def test_streams_of_different_names_differ() -> None:
    roles = [*rng.ROLES, "method/a/init", "method/a/gap", "method/b/gap"]
    names: list[tuple[Any, ...]] = [
        (seed, role, *index) for seed in (0, 1) for role in roles for index in [(), (0,), (1,)]
    ]
    names += [
        (0, "eval", 0, 0),
        (0, "eval", 0, 1),
        (0, "eval", 1, 0),
        (0, "eval", 0, 0, 0),
        (2**32, "eval"),
        (0, "eval", 2**32),
    ]
    draws = {tuple(uniform(rng.stream(*name)).tolist()) for name in names}
    assert len(draws) == len(names)


@pytest.mark.parametrize(("left", "right"), [((7,), (7, 0)), ((0,), (0, 0)), ((), (0,)), ((1, 2), (2, 1))])
def test_the_length_and_order_of_the_index_count(left: tuple[int, ...], right: tuple[int, ...]) -> None:
    """`numpy.random.SeedSequence` alone would mix [s] and [s, 0] into the same seed."""
    assert np.array_equal(
        np.random.SeedSequence([7]).generate_state(4), np.random.SeedSequence([7, 0]).generate_state(4)
    )
    assert not torch.equal(uniform(rng.stream(3, "time", *left)), uniform(rng.stream(3, "time", *right)))


def test_neighbouring_streams_are_uncorrelated() -> None:
    """One number of each of 4,000 neighbouring steps: U[0, 1) in mean, variance and lag-1 correlation."""
    num = 4000
    values = torch.stack([torch.rand((), generator=rng.stream(0, "time", step)) for step in range(num)]).double()
    centred = values - 0.5
    # 5 standard errors: sqrt(1/12/n) of the mean, 1/sqrt(180 n) of the variance, 1/sqrt(n) of the correlation
    assert abs(centred.mean()) < 5 * (1 / 12 / num) ** 0.5
    assert abs(centred.square().mean() - 1 / 12) < 5 * (1 / 180 / num) ** 0.5
    assert abs((centred[1:] * centred[:-1]).mean() * 12) < 5 / num**0.5


def test_an_unknown_role_is_our_bug() -> None:
    with pytest.raises(AssertionError, match="nois"):
        rng.stream(0, "nois", 1)


@pytest.mark.usefixtures("global_state_checked")
def test_streams_leave_the_global_state_alone() -> None:
    uniform(rng.stream(0, "noise", 1))
    rng.batch_rows(0, 3, 4, 10)


@pytest.mark.usefixtures("global_state_checked")
def test_global_state_is_restored_after_building_a_module() -> None:
    before = torch.get_rng_state()
    with rng.global_state_kept():
        torch.nn.Linear(4, 4)
        assert not torch.equal(torch.get_rng_state(), before)
    with pytest.raises(RuntimeError, match="half-way"), rng.global_state_kept():
        torch.nn.Linear(4, 4)
        raise RuntimeError("half-way")


def test_permutation_is_an_order_of_all_items() -> None:
    order = rng.permutation(0, "data", 2, 50)
    assert order.dtype == torch.int64
    assert sorted(order.tolist()) == list(range(50))
    assert not torch.equal(order, rng.permutation(0, "data", 3, 50))
    assert not torch.equal(order, rng.permutation(1, "data", 2, 50))


@pytest.mark.parametrize(("batch_size", "num_images"), [(4, 10), (3, 7), (5, 5), (1, 3), (8, 3), (7, 7), (16, 5)])
def test_every_image_is_seen_once_in_each_pass(batch_size: int, num_images: int) -> None:
    num_passes = 6
    num_steps = -(-num_passes * num_images // batch_size)
    rows = [rng.batch_rows(0, step, batch_size, num_images) for step in range(num_steps)]
    assert all(row.shape == (batch_size,) and row.dtype == torch.int64 for row in rows)
    seen = torch.cat(rows).tolist()
    passes = [tuple(seen[i * num_images : (i + 1) * num_images]) for i in range(num_passes)]
    assert all(sorted(one) == list(range(num_images)) for one in passes)
    assert len(set(passes)) > 1  # another order in another pass


def test_batch_rows_depend_on_seed_and_step_alone() -> None:
    rows = rng.batch_rows(0, 5, 4, 10)
    assert torch.equal(rows, rng.batch_rows(0, 5, 4, 10))
    assert not torch.equal(rows, rng.batch_rows(1, 5, 4, 10))


DRAWS: dict[str, Callable[[], Tensor]] = {
    "uniform of (0, time, 0)": lambda: torch.rand(4, generator=rng.stream(0, "time", 0)),
    "normal of (1, noise, 400000)": lambda: torch.randn(4, generator=rng.stream(1, "noise", 400_000)),
    "normal of (2, eval, 49999, 249)": lambda: torch.randn(4, generator=rng.stream(2, "eval", 49_999, 249)),
    "uniform of (0, method/sra/time_gap, 7)": lambda: torch.rand(4, generator=rng.stream(0, "method/sra/time_gap", 7)),
    "uniform of (12345, init)": lambda: torch.rand(4, generator=rng.stream(12_345, "init")),
    "rows of step 2 of 6 of 10 images": lambda: rng.batch_rows(0, 2, 6, 10),
}


@pytest.mark.parametrize("name", DRAWS)
def test_known_draws(name: str) -> None:
    expected = torch.tensor(json.loads(GOLDEN.read_text())[name])
    found = DRAWS[name]()
    if found.dtype == torch.int64:
        assert torch.equal(found, expected)
    else:
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
