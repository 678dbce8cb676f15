"""Student-t intervals, paired differences, probabilities of improvement and the bootstrap over settings, against
values worked out by hand, scipy's and rliable's own, and the bootstrap's whole distribution.
"""

import itertools
import math

import numpy as np
import pytest
import scipy.stats

from reports.statistics.intervals import improvement, over_settings, paired_difference, t_interval


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


# -- probability of improvement ---------------------------------------------------------------------------------------


def by_seed(values):
    return dict(enumerate(values))


@pytest.mark.parametrize("task", [0, 1])
def test_improvement_over_all_pairs_is_that_of_rliables_own_test(task):
    # google-research/rliable tests/rliable/metrics_test.py:24-40: 1/3 over both tasks, and 1/3 in each by hand:
    # x has two ones and two twos against 1, 2, 3: two ties count half, 1 + 1 wins and 1 + 1 halves, 4 of 12.
    x, y = np.array([[1, 2], [2, 2], [1, 1], [2, 1]]), np.array([[1, 1], [2, 2], [3, 3]])
    found = improvement(by_seed(x[:, task].tolist()), by_seed(y[:, task].tolist()), "higher")
    assert found.over_all == pytest.approx(1 / 3)
    assert found.num_all == 12


def test_improvement_equals_scipys_mann_whitney():
    generator = np.random.default_rng(3)
    x, y = generator.integers(0, 6, 7).tolist(), generator.integers(0, 6, 5).tolist()
    u = scipy.stats.mannwhitneyu(x, y).statistic  # pairs that x wins by being larger, ties half
    assert improvement(by_seed(x), by_seed(y), "higher").over_all == pytest.approx(u / 35)
    assert improvement(by_seed(x), by_seed(y), "lower").over_all == pytest.approx(1 - u / 35)


def test_pairs_at_a_seed_and_over_all_differ_where_seeds_differ_more_than_cells():
    # Better at every seed; of all nine pairs, it loses those with a baseline of an easier seed: 10<20<30 by 10 each.
    found = improvement({0: 9.0, 1: 19.0, 2: 29.0}, {0: 10.0, 1: 20.0, 2: 30.0}, "lower")
    assert (found.paired, found.num_pairs) == (1.0, 3)
    assert (found.over_all, found.num_all) == (pytest.approx(6 / 9), 9)


def test_ties_count_half_a_diverged_run_loses_and_a_missing_one_is_none():
    cell, baseline = {0: 1.0, 1: math.inf, 2: math.nan, 3: 5.0}, {0: 1.0, 1: 2.0, 2: 3.0, 4: 9.0}
    found = improvement(cell, baseline, "lower")
    assert (found.paired, found.num_pairs) == (0.25, 2)  # a tie and a loss
    # 1 ties 1 and beats 2, 3, 9; inf loses four times; 5 beats 9 alone: 3.5 + 0 + 1 of 12.
    assert (found.over_all, found.num_all) == (pytest.approx(4.5 / 12), 12)
    none = improvement({0: math.nan}, {0: 1.0}, "lower")
    assert math.isnan(none.paired) and math.isnan(none.over_all) and none.num_all == 0


# -- bootstrap over settings ------------------------------------------------------------------------------------------


def draws(seed=0):
    return np.random.default_rng(np.random.SeedSequence(seed))


def test_bootstrap_quantiles_are_those_of_all_resamples():
    values = [[1.0, 4.0, 5.0], [0.0, 2.0, 9.0], [3.0, 3.5, 7.0], [2.0, 6.0, 6.5]]
    # The whole distribution: 27 equally likely means a setting, and the mean of four of them.
    means = [[np.mean(drawn) for drawn in itertools.product(each, repeat=3)] for each in values]
    whole = np.array(means[0])
    for each in means[1:]:
        whole = np.add.outer(whole, each).ravel()
    found = over_settings(values, draws())
    assert found.num == 12
    assert found.mean == pytest.approx(np.mean(values))
    # 4,000 resamples: the standard error of a 2.5% quantile is 0.25% of the probability.
    for bound, probability in ((found.low, 0.025), (found.high, 0.975)):
        assert np.quantile(whole / 4, probability - 0.009) <= bound <= np.quantile(whole / 4, probability + 0.009)


def test_bootstrap_keeps_settings_apart():
    # What varies is the second one's 0 or 1, however far the settings are from each other.
    found = over_settings([[1.0] * 5, [100.0, 101.0, 100.0, 101.0, 100.0]], draws())
    assert 50.5 <= found.low < found.mean < found.high <= 51.0


def test_settings_weigh_alike_whatever_their_number_of_seeds():
    found = over_settings([[0.0] * 3, [1.0] * 9, []], draws())
    assert (found.mean, found.num) == (0.5, 12)


@pytest.mark.parametrize(
    "values",
    [[[1.0, 2.0, 3.0] * 4], [[1.0, 2.0] * 5, [1.0, 2.0]], [[1.0, 2.0, 3.0]] * 3, [[1.0] * 5, [2.0] * 5], []],
)
def test_without_enough_that_varies_there_is_no_bootstrap(values):
    found = over_settings(values, draws())
    assert math.isnan(found.low) and math.isnan(found.high)
    assert math.isnan(found.mean) == (not values)


def test_bootstrap_covers_as_often_as_its_docstring_says():
    # 90% at 5 seeds x 4 settings; 400 simulations have a standard error of 1.5%.
    normal = np.random.default_rng(1).normal(size=(400, 4, 5))
    found = [over_settings(each.tolist(), draws(i)) for i, each in enumerate(normal)]
    assert np.mean([each.low <= 0 <= each.high for each in found]) == pytest.approx(0.90, abs=0.045)
