"""Tables of text as Markdown and as LaTeX: a row is a mapping from column names to texts, the same keys in each."""

import itertools
import re
import unicodedata
from collections.abc import Iterable, Sequence

from reports.study.endings import one_line
from reports.tables.cells import Row

SIGNS = (
    {"−": "-", "×": r"\times", "±": r"\pm", "·": r"\cdot", "≤": r"\leq", "≥": r"\geq", "≈": r"\approx"}
    | {"∞": r"\infty", "←": r"\leftarrow", "→": r"\rightarrow", "↑": r"\uparrow", "↓": r"\downarrow"}
    | {"○": r"\circ", "°": r"^\circ", "²": "^2", "³": "^3", "µ": r"\mu", "Δ": r"\Delta"}
    | {"α": r"\alpha", "β": r"\beta", "λ": r"\lambda", "σ": r"\sigma", "τ": r"\tau"}
)
"""What LaTeX has in its fonts for formulas."""

LATEX = (
    {mark: f"\\{mark}" for mark in "{}$&#_%"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    | {"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", '"': "''", "[": "{[}", "]": "{]}", "*": "{*}"}
    | {"–": "--", "—": "---", "‘": "`", "’": "'", "“": "``", "”": "''"}
    | {"†": r"\dag{}", "‡": r"\ddag{}", "…": r"\dots{}"}
    | {sign: rf"\({formula}\)" for sign, formula in SIGNS.items()}
)
"""Characters that LaTeX reads as markup, or for which it wants a command. A bracket or a star behind a row's end would
be read as that end's own."""

LATIN = frozenset("ÆæŒœØøßŁłı")
"""Letters beyond ASCII that pdflatex's first font has, besides those with an accent."""
ACCENTS = frozenset("\u0300\u0301\u0302\u0303\u0304\u0306\u0307\u0308\u030a\u030b\u030c\u0327")
"""Accents that it can put on an ASCII letter."""


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
    """Text in which nothing is a command, a comment or the end of a cell, for any of LaTeX's programs.

    What pdflatex has no letters for stands as code points, as [U+05D0 U+05D1].
    """
    parts = []
    for is_there, letters in itertools.groupby(one_line(text), _is_in_fonts):
        if is_there:
            parts += [LATEX.get(letter, letter) for letter in letters]
        else:
            parts.append(f"{{[}}{' '.join(f'U+{ord(letter):04X}' for letter in letters)}{{]}}")
    return "".join(parts)


def _is_in_fonts(letter: str) -> bool:
    if letter.isascii() or letter in LATEX or letter in LATIN:
        return True
    base, *accents = list(unicodedata.normalize("NFD", letter))
    return "\u00c0" <= letter <= "\u017f" and base.isascii() and len(accents) == 1 and accents[0] in ACCENTS
