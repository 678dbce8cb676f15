"""Columns of text: which of them hold numbers, and by what their cells are sorted."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from reports.tables.formats import Row

NUMBER = re.compile(r"[+−-]?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:e[+-]?\d+)?")
"""A number as tables print it, with a true or a plain minus and separators of thousands."""

BEYOND = re.compile(r"\s*(?:>|∞|inf\b)")
"""How a cell begins that stands for more than any number, such as `> budget`."""

WORDS = frozenset(
    {"x", "of", "at", "seed", "seeds", "budget", "inf", "failed", "diverged", "pruned", "unfinished", "left", "out"}
    | {"no", "value", "pair", "baseline", "default", "reference"}
)
"""Words that may stand beside numbers, or in place of one, in a column of numbers. Units that come in several sizes
are none of them: by its first number 2 GB would come before 10 MB."""


def sort_number(text: str) -> float | None:
    """The first number of a cell, infinity for `> budget` and its like, None where there is none."""
    if BEYOND.match(text):
        return math.inf
    found = NUMBER.search(text)
    return float(found[0].replace(",", "").replace("−", "-")) if found else None


def sort_key(text: str) -> str:
    """`sort_number` as it stands in the page, for its script to read: "" where there is none."""
    number = sort_number(text)
    return "" if number is None else "Infinity" if math.isinf(number) else f"{number:.15g}"


@dataclass(frozen=True)
class Column:
    """A column of a table of text."""

    name: str
    is_number: bool
    """Whether its cells are numbers, so that they stand below each other and sort as numbers."""


def columns(rows: Sequence[Row]) -> list[Column]:
    """The columns of a table; the first one names its rows, whatever it holds."""
    return [
        Column(name, place > 0 and _holds_numbers([row[name] for row in rows])) for place, name in enumerate(rows[0])
    ]


def _holds_numbers(cells: Sequence[str]) -> bool:
    """Whether at least one cell is a number, and no cell holds words that do not go with numbers."""
    return any(NUMBER.search(cell) for cell in cells) and all(map(_goes_with_numbers, cells))


def _goes_with_numbers(cell: str) -> bool:
    words = re.findall(r"[^\W\d_]+", NUMBER.sub(" ", cell))
    return "_" not in cell and all(word.lower() in WORDS for word in words)
