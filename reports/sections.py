"""Parts of a report that only some studies have: figures, tables and sentences, for the folder and for the page."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from reports.figures.plans import Plan
from reports.tables.formats import Row, latex_table, markdown_table, markdown_text


@dataclass(frozen=True)
class Table:
    """A table with its file name, title, text and numbers; both have the same rows."""

    stem: str
    title: str
    rows: Sequence[Row]
    numbers: Sequence[Mapping[str, Any]]
    notes: Sequence[str]

    @property
    def markdown(self) -> str:
        """The text in Markdown, with what one needs to read it."""
        notes = [f"\n{markdown_text(note)}" for note in self.notes]
        return "\n".join([f"# {markdown_text(self.title)}", "", markdown_table(self.rows), *notes]) + "\n"

    @property
    def latex(self) -> str:
        """The text in LaTeX, with its notes."""
        return latex_table(self.rows, self.notes)


@dataclass(frozen=True)
class Block:
    """A table on the page, and the sentences in front of it."""

    table: Table
    sentences: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of the page: its sentences, then its figures, then its tables."""

    name: str
    """Its place in the page's address."""
    title: str
    sentences: Sequence[str] = ()
    plans: Sequence[Plan] = ()
    blocks: Sequence[Block] = ()


def saved_tables(blocks: Sequence[Block]) -> dict[str, tuple[pd.DataFrame, str, str]]:
    """Every table by its file name: numbers, Markdown and LaTeX."""
    return {
        block.table.stem: (pd.DataFrame(block.table.numbers), block.table.markdown, block.table.latex)
        for block in blocks
    }
