"""How cells and figures look: one colour, marker and dash pattern per cell, for light and dark pages.

The palette is Okabe and Ito's (Color Universal Design, 2008), which stays apart under the common kinds of colour
blindness; the baseline is neutral. On dark pages the same hues are lightened.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from reports.study.units import STEPS, Unit


@dataclass(frozen=True)
class Theme:
    """Colours of a page and its figures."""

    name: str
    background: str
    text: str
    muted: str
    grid: str
    baseline: str
    cells: tuple[str, ...]


LIGHT = Theme(
    name="light",
    background="#ffffff",
    text="#1f2328",
    muted="#6a737d",
    grid="#e6e8eb",
    baseline="#3d444d",
    cells=("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"),
)
DARK = Theme(
    name="dark",
    background="#16191d",
    text="#e6e8eb",
    muted="#9aa4af",
    grid="#2b3036",
    baseline="#d0d5da",
    cells=("#4aa3df", "#f0803c", "#2cc295", "#e39cc6", "#f2b632", "#a5dcff"),
)

FONT = "DejaVu Sans"
FONT_SIZE = 9
"""Font of figures, which comes with matplotlib, and its size in points."""

MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES: tuple[tuple[float, ...], ...] = ((), (6, 2), (2, 1.6), (6, 2, 2, 2))
"""Solid first; the pattern and the marker change each time the colours start again."""


@dataclass(frozen=True)
class CellStyle:
    """One cell's look in every figure and table."""

    light: str
    dark: str
    marker: str
    dashes: tuple[float, ...]
    turn: int = 0
    """How often the colours had started again before this cell: with them a swatch changes its shape."""

    def colour(self, theme: Theme) -> str:
        return self.dark if theme.name == "dark" else self.light


def cell_styles(cells: Sequence[str], baseline: str) -> dict[str, CellStyle]:
    """A style for every cell, by its place in the study's order; the baseline is neutral."""
    styles = {}
    others = [cell for cell in cells if cell != baseline]
    if baseline in cells:
        styles[baseline] = CellStyle(LIGHT.baseline, DARK.baseline, MARKERS[0], DASHES[0])
    for i, cell in enumerate(others):
        turn, colour = divmod(i, len(LIGHT.cells))
        marker = MARKERS[1:][(i + turn) % (len(MARKERS) - 1)]
        styles[cell] = CellStyle(LIGHT.cells[colour], DARK.cells[colour], marker, DASHES[turn % len(DASHES)], turn)
    return styles


@dataclass(frozen=True)
class Look:
    """What a figure is drawn for: a page's theme, its width, and the cells' styles."""

    styles: Mapping[str, CellStyle]
    theme: Theme = LIGHT
    is_narrow: bool = False
    """For phones: about 390 px, so less width and no second column."""
    unit: Unit = STEPS
    """What the x axis of curves counts."""

    def colour(self, cell: str) -> str:
        return self.styles[cell].colour(self.theme)


def rc(theme: Theme) -> dict[Any, Any]:
    """Matplotlib settings of every figure."""
    return {
        "font.family": FONT,
        "font.size": FONT_SIZE,
        "text.color": theme.text,
        "figure.facecolor": theme.background,
        "savefig.facecolor": theme.background,
        "axes.facecolor": theme.background,
        "axes.edgecolor": theme.muted,
        "axes.labelcolor": theme.muted,
        "axes.titlesize": 10,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.titlepad": 10,
        "axes.titley": 1.0,  # at the axes' top edge, without measuring every label to see whether one is in the way
        "axes.linewidth": 0.8,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.grid.axis": "y",
        "axes.axisbelow": True,
        "grid.color": theme.grid,
        "grid.linewidth": 0.8,
        "xtick.color": theme.muted,
        "ytick.color": theme.muted,
        "xtick.major.size": 3,
        "ytick.major.size": 0,
        "ytick.minor.size": 0,
        "xtick.labelsize": 8.5,
        "ytick.labelsize": 8.5,
        "lines.solid_capstyle": "round",
        "legend.frameon": False,
        "svg.hashsalt": "ditbench",
        "svg.fonttype": "path",
        "pdf.fonttype": 42,  # TrueType: venues refuse Type 3
        "ps.fonttype": 42,
    }
