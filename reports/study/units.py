"""The units in which budgets are given: the clock that counts each, and how text and axes speak of it."""

from dataclasses import dataclass

from harness.records.schema import BudgetClock


@dataclass(frozen=True)
class Unit:
    """A unit of `budget.unit`."""

    name: str
    """As in the config."""
    clock: BudgetClock
    """The field of a record that counts it."""
    words: str
    """After an amount, and on an axis."""
    is_whole: bool = False
    """Whether amounts are whole numbers."""

    def amount(self, value: float) -> str:
        """An amount with its unit, such as `1,000 training GFLOPs`."""
        words = self.words.removesuffix("s") if value == 1 else self.words
        return f"{number_text(value)} {words}"


STEPS = Unit("steps", "step", "steps", is_whole=True)

UNITS = {
    unit.name: unit
    for unit in (
        STEPS,
        Unit("images", "images", "images", is_whole=True),
        Unit("train_gflops", "train_gflops", "training GFLOPs"),
        Unit("seconds", "train_seconds", "training seconds"),
    )
}
"""Every unit, by its name in the config."""


def number_text(value: float) -> str:
    """A number with thousands separators and no more decimals than it has."""
    return f"{value:,.10g}" if abs(value) < 1e10 else f"{value:,.0f}"


def rounded_text(value: float) -> str:
    """A measured number with four significant digits, or without decimals where it has more before the point."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def short_number(value: float) -> str:
    """A number for a tick of an axis: 20000 -> 20k, 4e6 -> 4M."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if letter == 'k' else size):g}{letter}"
    return f"{value:g}"
