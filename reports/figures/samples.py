"""Generated images side by side: tile i of every run began from the same noise and label."""

import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from harness.records.run_folder import UserError
from reports.study.load import RecordedRun, Study

NUM_IMAGES = 10
"""Images shown of every run."""

MAX_SIDE = 128
"""Largest side of an image on the page, in pixels; larger ones are scaled down."""


@dataclass(frozen=True)
class SampleColumn:
    """The first images of one run, as PNG."""

    cell: str
    point: int
    step: int
    images: tuple[bytes, ...]


@dataclass(frozen=True)
class Grid:
    """One seed's images: a column for every cell that has samples."""

    seed: int
    columns: tuple[SampleColumn, ...]

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


def _column(run: RecordedRun) -> SampleColumn | None:
    kept = kept_lines(run)
    if not kept:
        return None
    tiles = scaled_tiles(run, kept[-1], NUM_IMAGES)
    return SampleColumn(run.cell, kept[-1]["point"], kept[-1]["step"], tuple(_png(tile) for tile in tiles))


def kept_lines(run: RecordedRun) -> list[Mapping[str, Any]]:
    """The evaluations of a run whose images are there."""
    return [line for line in run.evaluations if line.get("samples") and (run.folder / line["samples"]).is_file()]


def scaled_tiles(run: RecordedRun, line: Mapping[str, Any], num: int) -> list[Image.Image]:
    """The first `num` images of an evaluation, scaled down to what a page shows."""
    return [_scaled(tile) for tile in read_tiles(run.folder / line["samples"], run.config["data"]["image_size"], num)]


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


def _scaled(tile: Image.Image) -> Image.Image:
    return tile if tile.width <= MAX_SIDE else tile.resize((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)


def _png(tile: Image.Image) -> bytes:
    buffer = io.BytesIO()
    tile.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()
