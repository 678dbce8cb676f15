"""The contract of reports: a study's report is a list of sections, each made of figures, tables and sentences.

A new part of the report is one module with a function `section(study)`, and a line in `reports.report.SECTIONS`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pandas as pd

from reports.figures.plans import Plan
from reports.tables.cells import Row

Kind = Literal["rows", "facts", "settings", "samples"]
"""How a page lays a table out: rows that sort, facts of cells side by side, names with their values, or images."""


@dataclass(frozen=True)
class Table:
    """A table as a page shows it, and the files that it has beside the page."""

    stem: str
    """The name of the table's files; "" for a table that has none."""
    title: str
    rows: Sequence[Row]
    numbers: Sequence[Mapping[str, Any]] = ()
    """The rows of the CSV; empty where the section says what the files hold."""
    notes: Sequence[str] = ()
    kind: Kind = "rows"
    forms: Sequence[str] = ("csv", "md", "tex")
    """The kinds of the table's files."""
    beside: str = ""
    """What the files have that the page has not, such as `with whole digests`."""


@dataclass(frozen=True)
class TableFile:
    """What the files of one name hold: numbers for CSV, and the tables that make up the Markdown and the LaTeX."""

    stem: str
    numbers: pd.DataFrame | None
    markdown: Sequence[Table] = ()
    latex: Sequence[Table] = ()


@dataclass(frozen=True)
class Part:
    """A piece of a section, shown in this order: a heading, sentences, figures, a table, and commands."""

    table: Table | None = None
    sentences: Sequence[str] = ()
    title: str = ""
    """The heading; a table has its own."""
    plans: Sequence[Plan] = ()
    commands: Sequence[str] = ()
    is_folded: bool = False
    """Whether the reader opens it by its heading."""


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of the page with a heading: its sentences, then its figures, then its parts."""

    name: str
    """Its place in the page's address."""
    title: str
    short: str = ""
    """The title in the page's list of sections, where the whole one is too long."""
    sentences: Sequence[str] = ()
    plans: Sequence[Plan] = ()
    parts: Sequence[Part] = ()
    files: Sequence[TableFile] = ()
    """Files beside the page that hold other than one table of the section as it is shown."""

    @property
    def all_plans(self) -> list[Plan]:
        """The figures of the section and of its parts."""
        return [*self.plans, *(plan for part in self.parts for plan in part.plans)]

    @property
    def saved(self) -> list[TableFile]:
        """The files of the section's tables."""
        tables = [part.table for part in self.parts if part.table and part.table.numbers]
        return [
            *(TableFile(table.stem, pd.DataFrame(table.numbers), [table], [table]) for table in tables),
            *self.files,
        ]
