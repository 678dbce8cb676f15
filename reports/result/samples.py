"""Samples: how they came about, and the first images of every run's last evaluation side by side."""

from reports.figures.evolution import evolution_plan
from reports.figures.files import data_uri
from reports.figures.samples import Grid, SampleColumn, grids
from reports.sections import Part, Section, Table
from reports.study.load import Study
from reports.tables.cells import Cell, Row

ABOUT = (
    "Image i of every cell began from the same noise and the same label; only the weights differ. Not picked: the "
    "first images of each run's last evaluation."
)


def section(study: Study) -> Section | None:
    """None where no run kept images."""
    evolution, found = evolution_plan(study), grids(study)
    if not evolution and not found:
        return None
    tables = [Part(_table(study, grid)) for grid in found]
    head = [Part(title="From the last evaluation", sentences=[ABOUT])] if found else []
    plans = [evolution] if evolution else []
    return Section(name="samples", title="Samples", plans=plans, parts=[*head, *tables])


def _table(study: Study, grid: Grid) -> Table:
    """A row per image, a column per cell."""
    rows = [_row(study, grid, image) for image in range(grid.num_rows)]
    return Table("", f"Seed {grid.seed}", rows, kind="samples")


def _row(study: Study, grid: Grid, image: int) -> Row:
    return {"": str(image)} | {_head(study, column): _tile(grid.seed, column, image) for column in grid.columns}


def _head(study: Study, column: SampleColumn) -> Cell:
    """The cell, and the step where its images are not of the compared point."""
    step = [] if column.point == study.point else [f"step {column.step:,}"]
    return Cell(column.cell, lines=[column.cell, *step])


def _tile(seed: int, column: SampleColumn, image: int) -> Cell:
    if image >= len(column.images):
        return Cell("")
    return Cell(f"{column.cell}, seed {seed}, image {image}", image=data_uri(column.images[image]))
