"""Tables of text as Markdown and as LaTeX: a row is a mapping from column names to texts, the same keys in each."""

import re
from collections.abc import Iterable, Mapping, Sequence

from reports.endings import one_line

Row = Mapping[str, str]

LATEX = (
    {mark: f"\\{mark}" for mark in "{}$&#_%"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    | {"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", '"': "''", "[": "{[}", "]": "{]}"}
    | {"−": r"\(-\)", "–": "--", "×": r"\(\times\)", "†": r"\dag{}", "‡": r"\ddag{}", "…": r"\dots{}"}
)
"""Characters that LaTeX reads as markup or that its standard fonts lack. A bracket behind a row's end would be read as
its space."""


# -- Markdown -------------------------------------------------------------------------------------------------------


def markdown_table(rows: Sequence[Row]) -> str:
    """A table without the last line break; columns are the first row's keys."""
    lines = [_markdown_row(rows[0]), _markdown_row("---" for _ in rows[0])]
    return "\n".join([*lines, *(_markdown_row(row.values()) for row in rows)])


def _markdown_row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(markdown_text(cell) for cell in cells) + " |"


def markdown_text(text: str) -> str:
    """Text that cannot end its cell or become markup; an underscore inside a word is none."""
    text = re.sub("[<>&]", lambda found: f"&#{ord(found[0])};", one_line(text))
    return re.sub(r"[\\|*`$~\[]|(?<![^\W_])_|_(?![^\W_])", r"\\\g<0>", text)


# -- LaTeX ----------------------------------------------------------------------------------------------------------


def latex_table(rows: Sequence[Row], notes: Sequence[str] = ()) -> str:
    """A `tabular` with the rules of booktabs, first column left and the others right; notes follow it as paragraphs.

    The text needs `\\usepackage{booktabs}` and is to be read by `\\input` inside a table environment.
    """
    lines = [
        f"\\begin{{tabular}}{{@{{}}l{'r' * (len(rows[0]) - 1)}@{{}}}}",
        r"\toprule",
        _latex_row(rows[0]),
        r"\midrule",
        *(_latex_row(row.values()) for row in rows),
        r"\bottomrule",
        r"\end{tabular}",
        *(f"\n{latex_text(note)}" for note in notes),
    ]
    return "\n".join(["% needs \\usepackage{booktabs}", *lines]) + "\n"


def _latex_row(cells: Iterable[str]) -> str:
    return " & ".join(latex_text(cell) for cell in cells) + r" \\"


def latex_text(text: str) -> str:
    """Text in which nothing is a command, a comment or the end of a cell."""
    return "".join(LATEX.get(letter, letter) for letter in one_line(text))
