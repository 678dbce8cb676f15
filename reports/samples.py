"""Generated images side by side: tile i of every run began from the same noise and label."""

import io
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from harness.records import UserError
from reports.load import Run, Study

NUM_IMAGES = 10
"""Images shown of every run."""

MAX_SIDE = 128
"""Largest side of an image on the page, in pixels; larger ones are scaled down."""


@dataclass(frozen=True)
class Column:
    """The first images of one run, as PNG."""

    cell: str
    point: int
    step: int
    images: tuple[bytes, ...]


@dataclass(frozen=True)
class Grid:
    """One seed's images: a column for every cell that has samples."""

    seed: int
    columns: tuple[Column, ...]

    @property
    def num_rows(self) -> int:
        return max(len(column.images) for column in self.columns)


def grids(study: Study) -> list[Grid]:
    """For every seed the images of each run's last evaluation that kept some; seeds without any are left out."""
    found = []
    for seed in study.seeds:
        columns = tuple(column for run in study.at(seed) if (column := _column(run)))
        if columns:
            found.append(Grid(seed, columns))
    return found


def _column(run: Run) -> Column | None:
    kept = [line for line in run.evaluations if line.get("samples") and (run.folder / line["samples"]).is_file()]
    if not kept:
        return None
    tiles = read_tiles(run.folder / kept[-1]["samples"], run.config["data"]["image_size"], NUM_IMAGES)
    return Column(run.cell, kept[-1]["point"], kept[-1]["step"], tuple(_png(tile) for tile in tiles))


def read_tiles(path: Path, side: int, num: int) -> list[Image.Image]:
    """The first `num` tiles of a grid of square tiles, row by row.

    Raises:
        UserError: the picture is unreadable, or is no grid of tiles of that side.
    """
    try:
        with Image.open(path) as opened:
            grid = opened.convert("RGB")
    except OSError as error:
        raise UserError(f"{path} cannot be read as an image ({error}): evaluate the run again") from None
    if grid.width % side or grid.height % side:
        raise UserError(f"{path} has {grid.width}x{grid.height} pixels: a grid of {side} px tiles was expected")
    per_row = grid.width // side
    places = [divmod(i, per_row) for i in range(min(num, per_row * (grid.height // side)))]
    return [grid.crop((side * c, side * r, side * (c + 1), side * (r + 1))) for r, c in places]


def _png(tile: Image.Image) -> bytes:
    if tile.width > MAX_SIDE:
        tile = tile.resize((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    tile.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()
