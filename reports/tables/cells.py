"""Cells of tables: a text as it is shown, with the number behind it, so that no number is read out of a text again."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Self

Mark = Literal["", "main", "better", "worse", "unclear", "differs"]
"""How a page sets a cell off: the number that a row is about, what a reading says, or that runs differ in it."""


class Cell(str):
    """The text of a cell, the same in every form of its table, and what a page knows of it besides.

    A plain `str` may stand in its place: it is a cell of words.
    """

    value: float | None
    """The number that the cell stands for, by which a page sorts it; None for words and for a missing number."""
    mark: Mark
    lines: Sequence[str]
    """What a page shows in place of the text: a first line, and smaller ones below it."""
    link: str
    """Where a page's cell leads to; "" for nowhere."""
    image: str
    """The source of an image that a page shows in place of the text, which describes it; "" for none."""

    def __new__(
        cls,
        text: str,
        value: float | None = None,
        *,
        mark: Mark = "",
        lines: Sequence[str] = (),
        link: str = "",
        image: str = "",
    ) -> Self:
        cell = super().__new__(cls, text)
        cell.value = None if value is None or math.isnan(value) else value
        cell.mark, cell.lines, cell.link, cell.image = mark, tuple(lines), link, image
        return cell

    @property
    def shown_lines(self) -> Sequence[str]:
        """What a page shows, line by line; a mark belongs to the first one."""
        first, *others = self.lines or (str(self),)
        return [Cell(first, mark=self.mark), *others]


Row = Mapping[str, str]
"""A cell for every column, the same columns in every row of a table; the first one names the row."""


@dataclass(frozen=True)
class TableColumn:
    """A column of a table."""

    name: str
    is_number: bool
    """Whether its cells stand for numbers, so that they stand below each other and are sorted by their values."""


def columns(rows: Sequence[Row]) -> list[TableColumn]:
    """The columns of a table; the first one names its rows, whatever it holds."""
    return [
        TableColumn(name, place > 0 and any(number_of(row[name]) is not None for row in rows))
        for place, name in enumerate(rows[0])
    ]


def number_of(cell: str) -> float | None:
    """The number that a cell stands for; None for words and for a missing number."""
    return cell.value if isinstance(cell, Cell) else None


def sort_key(cell: str) -> str:
    """The cell's number for a page's script; "" where it has none."""
    number = number_of(cell)
    if number is None:
        return ""
    return f"{number:.15g}" if math.isfinite(number) else f"{'-' if number < 0 else ''}Infinity"
