"""Student-t intervals and paired differences, against values worked out by hand and scipy's own interval."""

import math

import numpy as np
import pytest
import scipy.stats

from reports.statistics import paired_difference, t_interval


def test_interval_by_hand():
    # 1, 2, 3: mean 2, s = 1, t(0.975; 2) = 4.302653, half-width 4.302653 / sqrt(3) = 2.484138.
    interval = t_interval([1.0, 2.0, 3.0])
    assert interval.num == 3
    assert interval.mean == 2
    assert interval.low == pytest.approx(2 - 2.484138, abs=1e-6)
    assert interval.high == pytest.approx(2 + 2.484138, abs=1e-6)


@pytest.mark.parametrize(("num", "half_width"), [(2, 8.98), (3, 2.48), (5, 1.24), (10, 0.72)])
def test_half_widths_in_standard_deviations(num, half_width):
    values = np.arange(num) * 1.0
    interval = t_interval(list(values))
    assert (interval.high - interval.mean) / values.std(ddof=1) == pytest.approx(half_width, abs=0.006)


@pytest.mark.parametrize("num", [2, 3, 7, 30])
def test_interval_equals_scipys(num):
    values = np.random.default_rng(num).normal(3.0, 2.0, num)
    low, high = scipy.stats.t.interval(0.95, num - 1, loc=values.mean(), scale=scipy.stats.sem(values))
    interval = t_interval(values.tolist())
    assert (interval.low, interval.high) == pytest.approx((low, high), rel=1e-10)


def test_interval_covers_the_mean_as_often_as_it_says():
    # 2,000 draws of 3 values: the standard error of the coverage is 0.5%.
    draws = np.random.default_rng(0).normal(size=(2000, 3))
    intervals = [t_interval(row.tolist()) for row in draws]
    assert np.mean([i.low <= 0 <= i.high for i in intervals]) == pytest.approx(0.95, abs=0.02)


def test_one_value_has_no_interval_and_none_has_no_mean():
    one, none = t_interval([4.0]), t_interval([])
    assert (one.num, one.mean) == (1, 4.0)
    assert math.isnan(one.low) and math.isnan(one.high)
    assert none.num == 0 and math.isnan(none.mean)


def test_paired_difference_by_hand():
    # Differences -1, -3, -2: mean -2, s = 1, half-width 2.484138: the interval holds 0.
    difference = paired_difference({0: 9.0, 1: 17.0, 2: 28.0}, {0: 10.0, 1: 20.0, 2: 30.0}, "lower")
    assert difference.by_seed == {0: -1.0, 1: -3.0, 2: -2.0}
    assert difference.interval.mean == -2
    assert difference.interval.low == pytest.approx(-4.484138, abs=1e-6)
    assert difference.interval.high == pytest.approx(0.484138, abs=1e-6)
    assert difference.num_better == 3
    assert difference.reading == "not separated"


def test_pairing_removes_what_the_seeds_share():
    # The seeds differ by 100, the cells by about 1: unpaired, the difference would drown.
    baseline = {0: 100.0, 1: 200.0, 2: 300.0}
    cell = {0: 99.0, 1: 198.9, 2: 299.1}
    assert paired_difference(cell, baseline, "lower").reading == "better"
    assert paired_difference(cell, baseline, "higher").reading == "worse"
    assert paired_difference(cell, baseline, "higher").num_better == 0


def test_seeds_are_paired_by_number_not_by_place():
    difference = paired_difference({3: 5.0, 0: 1.0}, {0: 2.0, 3: 8.0, 5: 0.0}, "lower")
    assert difference.by_seed == {0: -1.0, 3: -3.0}


def test_values_that_are_not_finite_pair_with_nothing():
    difference = paired_difference({0: 1.0, 1: math.nan, 2: math.inf}, {0: 3.0, 1: 3.0, 2: 3.0}, "lower")
    assert difference.by_seed == {0: -2.0}
    assert difference.reading == "one seed"
    assert math.isnan(difference.interval.low)
    assert paired_difference({0: math.nan}, {0: 1.0}, "lower").reading == "no pair"


def test_equal_values_are_not_better():
    difference = paired_difference({0: 1.0, 1: 2.0}, {0: 1.0, 1: 2.0}, "lower")
    assert difference.num_better == 0
    assert difference.reading == "not separated"
