"""The guard finds the first step that is not finite, and its parts."""

import math

import pytest
import torch
from torch import Tensor

from harness.training.divergence import Divergence, Guard

CPU = torch.device("cpu")


def parts(**values: float) -> dict[str, Tensor]:
    return {name: torch.tensor(value) for name, value in values.items()}


def test_finite_steps_leave_it_off() -> None:
    guard = Guard(CPU)
    for step in range(3):
        assert float(guard.check(step, parts(loss=1e30, base=-1.0, grad_norm=0.0))) == 0
    assert guard.found() is None


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_the_first_bad_step_and_its_parts(bad: float) -> None:
    guard = Guard(CPU)
    guard.check(0, parts(loss=1.0, base=1.0, term=0.0, grad_norm=1.0))
    assert float(guard.check(1, parts(loss=bad, base=1.0, term=bad, grad_norm=1.0))) == 1
    assert guard.found() == Divergence(step=1, parts=("loss", "term"))


def test_later_steps_do_not_overwrite_it() -> None:
    guard = Guard(CPU)
    guard.check(4, parts(loss=1.0, base=1.0, grad_norm=math.inf))
    assert float(guard.check(5, parts(loss=math.nan, base=math.nan, grad_norm=math.nan))) == 1
    assert float(guard.check(6, parts(loss=1.0, base=1.0, grad_norm=1.0))) == 1, "the flag stays on"
    assert guard.found() == Divergence(step=4, parts=("grad_norm",))


def test_a_part_that_later_steps_lack_is_still_named() -> None:
    """A term may end with its schedule, before a logged step asks what was found."""
    guard = Guard(CPU)
    guard.check(2, parts(loss=math.nan, term=math.nan))
    guard.check(3, parts(loss=1.0))
    guard.check(4, parts(loss=1.0, other=math.nan))
    assert guard.found() == Divergence(step=2, parts=("loss", "term"))


def test_the_flag_is_a_tensor_on_the_device() -> None:
    """Asking for it does not wait for the device: it goes into the optimiser and the EMA as it is."""
    guard = Guard(CPU)
    stopped = guard.check(0, parts(loss=math.nan))
    assert stopped is guard.stopped
    assert stopped.shape == ()
    assert stopped.dtype == torch.float32
