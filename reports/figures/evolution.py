"""How samples came about: a row for every cell, a column for every evaluation, the same noise and label throughout.

Where evaluations are few, cells stand side by side.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL.Image import Image

from reports.figures.labels import shorten
from reports.figures.plans import Plan
from reports.figures.samples import kept_lines, scaled_tiles
from reports.figures.style import Look, rc
from reports.study.load import RecordedRun, Study

SIDE = 2
"""Images of one run at one evaluation: so many in a row, and so many rows."""
MOST_COLUMNS, MOST_NARROW = 8, 4
"""Evaluations in a figure; of more, evenly chosen ones with the first and the last."""
MOST_CELLS = 12
"""Cells in a figure: each is an inch high."""

LARGEST, GAP, APART = 1.3, 0.06, 0.12
"""Largest side of the images of one run at one evaluation, what lies between two of them, and what is added to that
between cells side by side, in inches."""
HEAD, NAME = 0.3, 0.24
"""Heights of the first line and of a cell's name above its images, in inches."""

Item = TypeVar("Item")
Tiles = Mapping[tuple[str, int], Sequence[Image]]
"""By cell and evaluation point."""


@dataclass(frozen=True)
class Evolution:
    """What the figure is drawn from: a row of the frame for every image, and the images."""

    frame: pd.DataFrame
    tiles: Tiles


def evolution(study: Study) -> Evolution | None:
    """The images of the seed at which most cells kept some; None without two evaluations that did."""
    kept = {seed: _kept(study, seed) for seed in study.seeds}
    seed = max(study.seeds, key=lambda seed: len({cell for cell, _ in kept[seed]}))
    points = evenly(sorted({point for _, point in kept[seed]}), MOST_COLUMNS)
    if len(points) < 2:
        return None
    rows: list[dict[str, Any]] = []
    tiles: dict[tuple[str, int], Sequence[Image]] = {}
    for (cell, point), (run, line) in kept[seed].items():
        if point in points:
            tiles[cell, point] = scaled_tiles(run, line, SIDE * SIDE)
            about = {"cell": cell, "seed": seed, "point": point, "step": line["step"]}
            file = (run.folder / line["samples"]).relative_to(study.path).as_posix()
            rows += [{**about, "image": image, "file": file} for image in range(len(tiles[cell, point]))]
    frame = pd.DataFrame(rows)
    frame["head"] = frame["point"].map(_heads(study, frame))
    return Evolution(frame, tiles)


def _kept(study: Study, seed: int) -> dict[tuple[str, int], tuple[RecordedRun, Mapping[str, Any]]]:
    """The evaluations of a seed that kept images, by cell and point."""
    runs = [run for run in study.at(seed) if run.cell in study.cells[:MOST_CELLS]]
    return {(run.cell, line["point"]): (run, line) for run in runs for line in kept_lines(run)}


def _heads(study: Study, frame: pd.DataFrame) -> dict[int, str]:
    """What stands above the columns: the step, or the share of the budget where cells make different steps."""
    if (frame.groupby("point")["step"].nunique() > 1).any():
        return {point: f"{study.share(point):.0%} of budget" for point in frame["point"].unique()}
    return {point: f"step {step:,}" for point, step in zip(frame["point"], frame["step"], strict=True)}


def evenly(items: Sequence[Item], num: int) -> list[Item]:
    """At most `num` (2 or more) of the items, the first and the last among them, evenly apart."""
    if len(items) <= num:
        return list(items)
    return [items[round(i * (len(items) - 1) / (num - 1))] for i in range(num)]


def evolution_figure(frame: pd.DataFrame, look: Look, tiles: Tiles) -> Figure:
    """Rows of cells, columns of evaluations; as many cells in a row as fit."""
    cells = [cell for cell in look.styles if cell in set(frame["cell"])]
    heads = dict(zip(frame["point"], frame["head"], strict=True))
    points = evenly(sorted(heads), MOST_NARROW if look.is_narrow else MOST_COLUMNS)
    width = 4.2 if look.is_narrow else 8.4
    side = min(LARGEST, (width + GAP) / len(points) - GAP)
    block = len(points) * (side + GAP) + APART
    beside = min(len(cells), max(1, int((width + GAP + APART) / block)))
    height = HEAD + math.ceil(len(cells) / beside) * (NAME + side + GAP)
    with matplotlib.rc_context(rc(look.theme)):
        figure = Figure(figsize=(width, height))
        ax = figure.add_axes((0, 0, 1, 1))
        lefts = [number * block + column * (side + GAP) for number in range(beside) for column in range(len(points))]
        for left, point in zip(lefts, points * beside, strict=True):
            ax.text(left, 0.16, heads[point], color=look.theme.muted, fontsize=7.5)
        for number, cell in enumerate(cells):
            left, top = number % beside * block, HEAD + number // beside * (NAME + side + GAP)
            name = shorten(cell, width if beside == 1 else block - APART)
            ax.text(left, top + NAME - 0.07, name, color=look.colour(cell), fontweight="bold", parse_math=False)
            for column, point in enumerate(points):
                _show(ax, tiles.get((cell, point), ()), (left + column * (side + GAP), top + NAME), side, look)
        ax.set(xlim=(0, width), ylim=(height, 0))
        ax.axis("off")
    return figure


def _show(ax: Axes, tiles: Sequence[Image], place: tuple[float, float], side: float, look: Look) -> None:
    """Images of one run at one evaluation as a square, its top left corner at `place`; a dash where there are none."""
    x, y = place
    if tiles:
        ax.imshow(_square(tiles, look), extent=(x, x + side, y + side, y), aspect="auto")
    else:
        ax.text(x + side / 2, y + side / 2, "–", color=look.theme.muted, ha="center", va="center")


def _square(tiles: Sequence[Image], look: Look) -> np.ndarray:
    """SIDE x SIDE images with narrow gaps in the colour of the page, as uint8."""
    size = tiles[0].height
    gap = max(1, size // 24)
    whole = SIDE * size + (SIDE - 1) * gap
    square = np.empty((whole, whole, 3), dtype=np.uint8)
    square[:] = np.round(255 * np.array(to_rgb(look.theme.background)))
    for i, tile in enumerate(tiles[: SIDE * SIDE]):
        top, left = ((size + gap) * k for k in divmod(i, SIDE))
        square[top : top + size, left : left + size] = np.asarray(tile)
    return square


def evolution_plan(study: Study) -> Plan | None:
    """The figure with its words; None for a study that has too few images."""
    found = evolution(study)
    if found is None:
        return None
    num, seed = SIDE * SIDE, found.frame["seed"].iloc[0]
    caption = (
        f"Images 0 to {num - 1} of seed {seed}, from the EMA weights at each evaluation. Image i began from the same "
        "noise and the same label everywhere. Not picked."
    )
    if len(study.cells) > MOST_CELLS:
        caption += f" The first {MOST_CELLS} of {len(study.cells)} cells."
    draw = partial(evolution_figure, tiles=found.tiles)
    return Plan("evolution", found.frame, draw, "Samples of every cell as training goes on", caption)
