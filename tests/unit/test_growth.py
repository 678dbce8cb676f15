"""The fit of step times to counted GFLOPs, by hand."""

import pytest

from tests.benchmarks.growth import fit


def test_times_on_a_line_are_met() -> None:
    """3 ms and 200 GFLOP/s."""
    gflops = [0.1, 1.0, 10.0, 250.0]
    assert fit(gflops, [0.003 + value / 200 for value in gflops]) == pytest.approx((0.003, 1 / 200))


def test_relative_residuals_count() -> None:
    """Through (1, 1) and two times 1 and 3 at x = 2. With y = a + 2 b and a + b = 1 + r, the sum r^2 + (y - 1)^2 +
    (y / 3 - 1)^2 is least at r = 0, and y - 1 + (y / 3 - 1) / 3 = 0, so y = 1.2: a = 0.8, b = 0.2."""
    assert fit([1.0, 2.0, 2.0], [1.0, 1.0, 3.0]) == pytest.approx((0.8, 0.2))
