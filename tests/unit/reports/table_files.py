"""The files that a section's tables have beside a page, without writing them."""

import pandas as pd

from reports.sections import Section
from reports.tables.files import latex, markdown


def table_files(section: Section) -> dict[str, tuple[pd.DataFrame | None, str, str]]:
    """By name: numbers, Markdown and LaTeX."""
    return {file.stem: (file.numbers, markdown(file.markdown), latex(file.latex)) for file in section.saved}
