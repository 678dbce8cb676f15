"""What the compared cells cost: counted for one image, and measured in the runs themselves.

Everything counted comes from the `cost.json` of the runs; fields that a run has not recorded are shown as a dash.
"""

import math
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any, Literal

import pandas as pd

from harness.records.files import number
from harness.records.schema import Clock
from reports.costs.added import added_plan
from reports.costs.equal_cost import unequal_remarks
from reports.costs.overhead import GFLOPS_NOTE
from reports.sections import Part, Section, Table, TableFile
from reports.study.load import Study
from reports.study.units import UNITS, rounded_text
from reports.study.words import with_all
from reports.tables.cells import Cell, Row
from reports.tables.results import MINUS, MISSING, SHARED_MARK, marks

PARAMETERS: Mapping[str, Literal["backbone_parameters", "head_parameters", "external_parameters"]] = {
    "backbone parameters": "backbone_parameters",
    "head parameters": "head_parameters",
    "external parameters": "external_parameters",
}

COUNTED = (
    *("backbone_forward_gmacs", "head_forward_gmacs", "teacher_forward_gmacs"),
    *("encoder_forward_gmacs", "vae_encode_gmacs"),
    *PARAMETERS.values(),
    *("train_gflops_per_image", "train_gflops_per_image_online"),
    *("cache_images", "cache_gflops_per_image", "cache_gflops"),
)
"""Fields of `cost.json` that stand in the CSV."""

BOOKED: Mapping[str, Clock] = {"train": "train_seconds", "evaluation": "evaluation_seconds", "I/O": "io_seconds"}
"""What the time of a run is booked to, and the clock of each; only the first is training time."""

NOTES = (
    "Matrix products, convolutions and attention of one image, counted by fvcore; element-wise operations and "
    "normalisations are not.",
    GFLOPS_NOTE,
    "Training: what is trained counts three times its forward pass, a teacher once. What stands in brackets ran once "
    "an image before training, when the caches were made that all cells share; with online targets the encoder would "
    "run in every step.",
)


STEM = "cost"
"""The name of the files."""


def section(shown: Study) -> Section:
    """The costs of the shown cells; the files hold all cells."""
    study = shown.whole
    beside = with_all(len(study.cells), len(shown.cells))
    counted = Table("", "Counted for one image", counted_rows(shown), notes=NOTES)
    measured = Table(STEM, "Sizes and times of the runs", measured_rows(shown), notes=time_notes(study), beside=beside)
    added = added_plan(shown)
    return Section(
        name="cost",
        title="Cost",
        plans=[added] if added else [],
        parts=[Part(counted), Part(measured)],
        files=[_file(study)],
    )


def _file(study: Study) -> TableFile:
    whole = [
        Table(STEM, "Counted for one image", counted_rows(study), notes=NOTES),
        Table(STEM, "Sizes and times", measured_rows(study), notes=time_notes(study)),
    ]
    return TableFile(STEM, cost_table(study), whole, whole)


def counted_rows(study: Study) -> list[Row]:
    """Counted cost of an image as text, a row per cell."""
    return [_counted(study, cell) for cell in study.cells]


def _counted(study: Study, cell: str) -> Row:
    cost = study.cost(cell)
    control = study.cost(study.baseline).get("train_gflops_per_image") if study.baseline else None
    total = cost.get("train_gflops_per_image")
    online = cost.get("train_gflops_per_image_online") if cost.get("encoder_forward_gmacs") else None
    forward = cost.get("backbone_forward_gmacs")
    against = f"against {study.baseline or 'a baseline'}"
    return {
        "cell": cell,
        "forward, GMACs": _text(forward),
        "forward, GFLOPs": _text(None if forward is None else 2 * forward),
        "heads, GMACs": _text(cost.get("head_forward_gmacs")),
        "teacher, GMACs": _text(cost.get("teacher_forward_gmacs")),
        "encoder, GMACs": _bracketed(cost.get("encoder_forward_gmacs")),
        "VAE encoding, GMACs": _bracketed(cost.get("vae_encode_gmacs")),
        "training, GFLOPs": _text(total),
        against: MISSING if cell == study.baseline else _change(total, control),
        "online, GFLOPs": _text(online),
        f"online {against}": _change(online, control),
    }


def measured_rows(study: Study) -> list[Row]:
    """Sizes and times of the runs as text, a row per cell."""
    return [_measured(study, cell) for cell in study.cells]


def _measured(study: Study, cell: str) -> Row:
    cost = study.cost(cell)
    speed = images_per_s(study, cell)
    return {
        "cell": cell,
        **{name: _count(cost.get(field)) for name, field in PARAMETERS.items()},
        "images/s": _text(None if math.isnan(speed) else speed),
        **{f"{what} seconds": _seconds(study, cell, clock) for what, clock in BOOKED.items()},
        "caches, GFLOPs": _text(cost.get("cache_gflops")),
        "cached images": _count(cost.get("cache_images")),
    }


def images_per_s(study: Study, cell: str) -> float:
    """Median over the logged stretches of a cell's runs whose seconds count; NaN without any."""
    runs = [run for run in study.counted(UNITS["seconds"]) if run.cell == cell]
    speeds = [number(line["images_per_s"]) for run in runs for line in run.train if "images_per_s" in line]
    return median(speeds) if speeds else math.nan


def _spent(study: Study, cell: str, clock: Clock) -> list[tuple[float, bool]]:
    """For every run at the compared point: what its clock says, and whether it shared its device."""
    reached = [(run, line) for run in study.of(cell) if (line := run.evaluation(study.point))]
    return [(line[clock], run.shared_device) for run, line in reached]


def _seconds(study: Study, cell: str, clock: Clock) -> Cell:
    spent = _spent(study, cell, clock)
    text = ", ".join(f"{_time(time)}{f' {SHARED_MARK}' if shared else ''}" for time, shared in spent)
    return Cell(text, spent[0][0]) if spent else Cell(MISSING)


def _time(seconds: float) -> str:
    return f"{seconds:,.0f}" if seconds >= 10 else f"{seconds:.2g}"


def _text(value: float | None) -> Cell:
    return Cell(MISSING if value is None else rounded_text(value), value)


def _bracketed(value: float | None) -> Cell:
    """What runs once an image when caches are made, and not in these runs."""
    return Cell(f"({_text(value)})", value) if value else _text(value)


def _count(value: int | None) -> Cell:
    return Cell(MISSING if value is None else f"{value:,}", value)


def _change(value: float | None, control: float | None) -> Cell:
    """In percent, without decimals where there are three digits before the point."""
    if not value or not control:
        return Cell(MISSING)
    percent = 100 * (value / control - 1)
    return Cell(f"{percent:+,.{0 if abs(percent) >= 100 else 1}f}%".replace("-", MINUS), percent)


def time_notes(study: Study) -> list[str]:
    """What the times are, and which say nothing."""
    booked = (
        "Time is taken after the device is done and booked to training, evaluation or reading and writing; seconds of "
        f"every run {study.after}, images/s the median of the logged stretches."
    )
    return [booked, *unequal_remarks(study), *marks(study, [])]


# -- files ------------------------------------------------------------------------------------------------------------


def cost_table(study: Study) -> pd.DataFrame:
    """As numbers, a row per cell: the fields of `cost.json`, and medians of the runs whose seconds count."""
    return pd.DataFrame([_numbers(study, cell) for cell in study.cells])


def _numbers(study: Study, cell: str) -> dict[str, Any]:
    cost = study.cost(cell)
    booked: dict[str, float] = {clock: _counted_median(_spent(study, cell, clock)) for clock in BOOKED.values()}
    return {
        "cell": cell,
        **{field: cost.get(field, math.nan) for field in COUNTED},
        "images_per_s": images_per_s(study, cell),
        **booked,
    }


def _counted_median(spent: Sequence[tuple[float, bool]]) -> float:
    counted = [time for time, shared in spent if not shared]
    return median(counted) if counted else math.nan
