"""Figures of what blocks represent: curves over blocks, and principal components as pictures."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from PIL import Image

from reports.figures.labels import End, label_lines, shorten, text_width
from reports.figures.style import Look, rc

WIDE, NARROW = 8.4, 4.2
"""Width of figures, in inches."""
COLUMNS = 3
"""Panels in a row of a wide figure, at most."""
TICKS = 10
"""Blocks with a number on the axis, at most."""
LINE_ROOM = 0.2
"""Room for the names of lines, as a share of the range of blocks."""
TILE = 160
"""Side of a picture, in pixels."""
GAP = 8
"""Between pictures, in pixels."""


# -- curves over blocks ---------------------------------------------------------------------------------------------


def plot_blocks(ax: Axes, frame: pd.DataFrame, look: Look) -> Axes:
    """Every seed as a thin line over blocks, means as thick ones, and the reference lines, named on them."""
    lines = frame[frame["series"] == "line"].dropna(subset=["value"])
    for value in lines["value"]:
        ax.axhline(value, color=look.theme.muted, linewidth=1, dashes=(4, 3), zorder=1)
    for cell, style in look.styles.items():
        own, colour = frame[frame["cell"] == cell], look.colour(cell)
        for _, seed in own[own["series"] == "seed"].groupby("seed", sort=True):
            ax.plot(seed["block"].astype(int), seed["value"], color=colour, linewidth=0.6, alpha=0.5, zorder=2)
        mean = own[own["series"] == "mean"]
        thick: dict[str, Any] = {
            "color": colour,
            "linewidth": 1.4,
            "marker": style.marker,
            "markersize": 3.2,
            "zorder": 3,
        }
        line = ax.plot(mean["block"].astype(int), mean["value"], clip_on=False, **thick)[0]
        if style.dashes:
            line.set_dashes(style.dashes)
    blocks = sorted(set(frame["block"].dropna().astype(int)))
    ax.set_xticks(blocks[:: math.ceil(len(blocks) / TICKS)])
    # The names of lines stand left of the first block.
    ax.set_xlim(blocks[0] - LINE_ROOM * max(1, blocks[-1] - blocks[0]), blocks[-1])
    label_lines(ax, [End(v, n, look.theme.muted) for v, n in zip(lines["value"], lines["cell"], strict=True)])
    return ax


def blocks_figure(frame: pd.DataFrame, look: Look, titles: Mapping[str, str]) -> Figure:
    """A panel for every quantity and time, those of a quantity side by side and on one scale, below a key.

    Args:
        frame: of `reports.analysis.section.block_frame`.
        look: theme and the cells' styles.
        titles: of quantities.
    """
    drawn = replace(look, styles={cell: style for cell, style in look.styles.items() if cell in set(frame["cell"])})
    names, times = list(dict.fromkeys(frame["quantity"])), sorted(set(frame["t"]))
    with matplotlib.rc_context(rc(look.theme)):
        figure, axes = _panels(len(names), len(times), drawn)
        for name, row in zip(names, axes, strict=True):
            whole = frame[frame["quantity"] == name]
            for ax, t in zip(row, times, strict=True):
                ax.set_ylim(*_range(whole["value"]))
                plot_blocks(ax, whole[whole["t"] == t], drawn)
                title = f"{titles[name]}, t = {t:g}"
                ax.set_title(title, color=look.theme.text, fontsize=9, parse_math=False)
                ax.set_xlabel("block")
    return figure


def _range(values: pd.Series) -> tuple[float, float]:
    """Limits of an axis with all values inside, and room above for the names of lines."""
    finite = values.dropna()
    low, high = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 1.0)
    room = max(high - low, 1e-3)
    return low - 0.06 * room, high + 0.14 * room


def _panels(num_rows: int, num_columns: int, look: Look) -> tuple[Figure, list[list[Axes]]]:
    """A figure with rows of panels, each folded where it is too long, below a key; placed by hand, which is fast."""
    width, columns = (NARROW, 1) if look.is_narrow else (WIDE, min(COLUMNS, num_columns))
    folds = math.ceil(num_columns / columns)
    left, gap, row_gap, panel_height, bottom = 0.5, 0.52, 0.82, 1.6, 0.46
    top = _key_height(look)
    panel_width = (width - left - 0.14 - gap * (columns - 1)) / columns
    rows = num_rows * folds
    figure = Figure(figsize=(width, height := top + rows * panel_height + (rows - 1) * row_gap + bottom))
    axes = []
    for row in range(num_rows):
        placed = []
        for i in range(num_columns):
            fold, column = divmod(i, columns)
            x = left + column * (panel_width + gap)
            y = height - top - panel_height - (row * folds + fold) * (panel_height + row_gap)
            placed.append(figure.add_axes((x / width, y / height, panel_width / width, panel_height / height)))
        axes.append(placed)
    _key(figure, look)
    return figure, axes


def _names(look: Look) -> list[str]:
    """Names of the cells as the key has room for them."""
    return [shorten(cell, 1.3 if look.is_narrow else 2.9) for cell in look.styles]


def _key_columns(look: Look) -> int:
    width = 0.6 + text_width(_names(look))
    return max(1, min(len(look.styles), int((NARROW if look.is_narrow else WIDE) / width)))


def _key_height(look: Look) -> float:
    """Height of the key and of the titles below it, in inches."""
    return 0.22 * math.ceil(len(look.styles) / _key_columns(look)) + 0.42


def _key(figure: Figure, look: Look) -> None:
    """A legend of the cells at the top. Names go in afterwards: a legend drops labels that begin with `_`."""
    handles = [
        Line2D([], [], color=look.colour(cell), linewidth=2, marker=style.marker, markersize=4.5)
        for cell, style in look.styles.items()
    ]
    numbers = [str(i) for i in range(len(handles))]
    columns = _key_columns(look)
    legend = figure.legend(handles, numbers, loc="upper left", ncols=columns, borderaxespad=0.2, handlelength=1.6)
    for text, name in zip(legend.get_texts(), _names(look), strict=True):
        text.set(text=name, parse_math=False, color=look.theme.text)


# -- pictures -------------------------------------------------------------------------------------------------------


def pictures_figure(frame: pd.DataFrame, look: Look, images_KHWC: np.ndarray) -> Figure:
    """Rows of pictures: for every cell and image the image itself, then latent, encoder and blocks.

    Args:
        frame: colours by cell, source, image, row and column (reports/analysis/section.py).
        look: theme and the cells' styles.
        images_KHWC: uint8, the images; their number is the one of the frame.
    """
    cells = list(dict.fromkeys(frame["cell"]))
    sources = list(dict.fromkeys(frame["source"]))
    background = np.array(to_rgb(look.theme.background))
    groups = [_sheet(frame[frame["cell"] == cell], sources, images_KHWC, background) for cell in cells]
    height_px, width_px, _ = groups[0].shape
    with matplotlib.rc_context({**rc(look.theme), "axes.grid": False}):
        width, label, top, side = NARROW if look.is_narrow else WIDE, 0.27, 0.2, 0.06
        inches = (width - 2 * side) * height_px / width_px
        figure = Figure(figsize=(width, height := top + len(cells) * (inches + label) + side))
        for place, (cell, sheet) in enumerate(zip(cells, groups, strict=True)):
            y = height - top - (place + 1) * (inches + label)
            ax = figure.add_axes((side / width, y / height, 1 - 2 * side / width, inches / height))
            ax.imshow(sheet, interpolation="nearest", aspect="auto")
            ax.set_axis_off()
            size: dict[str, Any] = {"fontsize": 8, "fontweight": "bold", "parse_math": False}
            ax.text(0, -6, shorten(cell, width - 0.3), color=look.colour(cell), va="bottom", **size)
            if place == 0:
                _head(ax, ["image", *sources], look, y_px=-6 - label * 0.72 * width_px / width)
    return figure


def _head(ax: Axes, names: Sequence[str], look: Look, y_px: float) -> None:
    """What each column shows."""
    for column, name in enumerate(names):
        x = column * (TILE + GAP) + TILE / 2
        size = 6 if look.is_narrow else 7.5
        ax.text(x, y_px, name, color=look.theme.muted, fontsize=size, ha="center", va="bottom")


def _sheet(frame: pd.DataFrame, sources: Sequence[str], images_KHWC: np.ndarray, background: np.ndarray) -> np.ndarray:
    """Tiles of one cell, a row for every image, as float RGB."""
    columns = [[image / 255 for image in images_KHWC]]
    for source in sources:
        own = frame[frame["source"] == source].sort_values(["image", "row", "column"])
        side = int(own["row"].max()) + 1
        columns.append(list(own[["red", "green", "blue"]].to_numpy().reshape(-1, side, side, 3)))
    num = len(images_KHWC)
    step = TILE + GAP
    sheet = np.empty((num * step - GAP, len(columns) * step - GAP, 3))
    sheet[:] = background
    for column, tiles in enumerate(columns):
        for row, tile in enumerate(tiles):
            sheet[row * step : row * step + TILE, column * step : column * step + TILE] = _tile(tile)
    return sheet


def _tile(picture: np.ndarray) -> np.ndarray:
    """A picture at the size of a tile: enlarged without blur, or made smaller smoothly."""
    eight = Image.fromarray((picture * 255).round().astype(np.uint8))
    way = Image.Resampling.NEAREST if eight.width <= TILE else Image.Resampling.LANCZOS
    return np.asarray(eight.resize((TILE, TILE), way)) / 255
