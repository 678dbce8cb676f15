"""The fits of step times, by hand."""

import pytest

from tests.benchmarks.growth import fit, fitted


def test_times_on_a_line_are_met() -> None:
    """3 ms and 200 GFLOP/s; then with a second column as well."""
    gflops, kept = [0.1, 1.0, 10.0, 250.0], [0.01, 0.2, 0.1, 0.5]
    times = [0.003 + value / 200 for value in gflops]
    assert fit([gflops], times) == pytest.approx([0.003, 1 / 200])
    more = [time + 2 * value for time, value in zip(times, kept, strict=True)]
    assert fit([gflops, kept], more) == pytest.approx([0.003, 1 / 200, 2.0])
    assert fitted([0.003, 1 / 200, 2.0], gflops, kept) == pytest.approx(more)


def test_relative_residuals_count() -> None:
    """Times 1 at x = 1, and 1 and 3 at x = 2. The first is met; for y at x = 2 the sum (y - 1)^2 + (y / 3 - 1)^2 is
    least where y - 1 + (y / 3 - 1) / 3 = 0, so y = 1.2: a = 0.8, b = 0.2."""
    assert fit([[1.0, 2.0, 2.0]], [1.0, 1.0, 3.0]) == pytest.approx([0.8, 0.2])
