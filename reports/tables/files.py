"""The files of tables beside a page: numbers as CSV, text as Markdown and as LaTeX."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from reports.sections import Section, Table
from reports.tables.formats import latex_table, markdown_table, markdown_text


def save_tables(sections: Sequence[Section], folder: Path) -> None:
    """Write every table of the sections that has a file."""
    for file in (file for section in sections for file in section.saved):
        if file.numbers is not None:
            file.numbers.to_csv(folder / f"{file.stem}.csv", index=False)
        if file.markdown:
            (folder / f"{file.stem}.md").write_text(markdown(file.markdown))
        if file.latex:
            (folder / f"{file.stem}.tex").write_text(latex(file.latex))


def markdown(tables: Sequence[Table]) -> str:
    """Titled tables, and below them what one needs to read them, each note once."""
    parts = [f"# {markdown_text(table.title)}\n\n{markdown_table(table.rows)}\n" for table in tables]
    notes = dict.fromkeys(note for table in tables for note in table.notes)
    return "\n".join([*parts, *(f"{markdown_text(note)}\n" for note in notes)])


def latex(tables: Iterable[Table]) -> str:
    """A `tabular` for each table, with its notes."""
    return "\n".join(latex_table(table.rows, table.notes) for table in tables)
