"""When a run is evaluated and over, by hand and for every small budget."""

import math
from dataclasses import replace

import pytest

from harness.config import BudgetConfig, BudgetUnit, DataConfig, EvaluationConfig, OptimizerConfig, RunConfig
from harness.errors import UserError
from harness.records.schema import Spacing
from harness.training.schedule import Schedule, make_schedule

CONFIG = RunConfig(data=DataConfig(name="digits"), optimizer=OptimizerConfig(batch_size=16))


def schedule(unit: BudgetUnit, amount: float, points: int, gflops: float = 0.25, spacing: Spacing = "even") -> Schedule:
    evaluation = EvaluationConfig(points=points, spacing=spacing)
    config = replace(CONFIG, budget=BudgetConfig(unit=unit, amount=amount), evaluation=evaluation)
    return make_schedule(config, gflops)


def points_by_step(plan: Schedule) -> dict[int, int]:
    """Evaluated steps with their point, walking as the trainer does."""
    assert plan.last_step is not None
    spent = [plan.spent(step, math.nan) for step in range(plan.last_step + 1)]
    found = {step: plan.point(spent[step - 1], spent[step]) for step in range(1, len(spent))}
    assert [plan.is_over(value) for value in spent] == [False] * plan.last_step + [True]
    return {step: point for step, point in found.items() if point}


@pytest.mark.parametrize(
    ("unit", "amount", "points", "expected"),
    [
        ("steps", 400, 8, {50: 1, 100: 2, 150: 3, 200: 4, 250: 5, 300: 6, 350: 7, 400: 8}),
        ("steps", 100, 20, {5 * i: i for i in range(2, 21)}),  # point 1, at 5 steps, lies before a tenth
        ("steps", 10, 3, {4: 1, 7: 2, 10: 3}),  # 3.33 and 6.67 steps are spent after 4 and 7
        ("steps", 3, 8, {1: 2, 2: 5, 3: 8}),  # shares .375 .75 | 1.125 1.5 1.875 | 2.25 2.625 3
        ("steps", 1, 8, {1: 8}),
        ("images", 100, 2, {4: 1, 7: 2}),  # 16 images a step: 50 within the 4th, 100 within the 7th
        ("images", 160, 2, {5: 1, 10: 2}),
        ("train_gflops", 20, 2, {3: 1, 5: 2}),  # 16 x 0.25 = 4 GFLOPs a step: 10 within the 3rd, 20 after the 5th
        ("train_gflops", 0.5, 4, {1: 4}),  # one step spends it all
    ],
)
def test_points_by_hand(unit: BudgetUnit, amount: float, points: int, expected: dict[int, int]) -> None:
    plan = schedule(unit, amount, points)
    assert points_by_step(plan) == expected
    assert plan.num_evaluations == len(expected)


def test_every_small_budget_in_steps() -> None:
    for amount in range(1, 60):
        for points in range(1, 25):
            found = points_by_step(schedule("steps", amount, points))
            steps, numbers = list(found), list(found.values())
            assert (steps[-1], numbers[-1]) == (amount, points)
            assert numbers == sorted(set(numbers))
            assert all(step - 1 < amount * number / points <= step for step, number in found.items())
            assert numbers[0] * 10 >= points
            assert schedule("steps", amount, points).num_evaluations == len(found)


@pytest.mark.parametrize("gflops", [0.1, 1 / 3, 0.7, 8.123456789e-3, 237.0])
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 10, 49, 1000])
def test_a_budget_of_so_many_steps_in_gflops_ends_after_them(gflops: float, steps: int) -> None:
    """Whatever the rounding of amount / cost: neither a step more nor one less."""
    plan = schedule("train_gflops", steps * (16 * gflops), 4, gflops)
    assert plan.last_step == steps
    assert points_by_step(plan)[steps] == 4


@pytest.mark.parametrize(
    ("unit", "amount", "points", "expected"),
    [
        ("steps", 400_000, 4, {50_000: 1, 100_000: 2, 200_000: 3, 400_000: 4}),  # the columns of the papers' tables
        ("steps", 420, 3, {105: 1, 210: 2, 420: 3}),
        ("steps", 10, 3, {3: 1, 5: 2, 10: 3}),  # 2.5 steps are spent after 3
        ("steps", 1, 4, {1: 4}),
        ("train_gflops", 20, 2, {3: 1, 5: 2}),  # 4 GFLOPs a step
        ("steps", 7, 1, {7: 1}),
    ],
)
def test_doubling_points_by_hand(unit: BudgetUnit, amount: float, points: int, expected: dict[int, int]) -> None:
    plan = schedule(unit, amount, points, spacing="doubling")
    assert points_by_step(plan) == expected
    assert plan.num_evaluations == len(expected)


def test_doubling_points_before_a_tenth_of_the_budget_are_refused() -> None:
    with pytest.raises(UserError, match=r"points is 5 with .* doubling, .*: give 1 to 4, or evaluation\.spacing even"):
        EvaluationConfig(points=5, spacing="doubling")


def test_seconds_are_the_clocks() -> None:
    plan = schedule("seconds", 60, 4)
    assert plan.by_clock and plan.last_step is None and plan.num_evaluations == 4
    assert plan.spent(1000, 12.5) == 12.5
    assert plan.point(14.9, 15.1) == 1
    assert plan.point(15.1, 29.9) == 0
    assert plan.point(14.0, 46.0) == 3, "one evaluation for all points that one step passed"
    assert not plan.is_over(59.99)
    assert plan.is_over(60.0) and plan.point(59.0, 60.5) == 4
