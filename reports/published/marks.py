"""Published numbers as reference marks: which rows fit a study, and what stands beside each mark.

They are others' runs under others' protocols, for orientation and never a baseline. A row fits where all agrees that
records can tell: the model's name, pixels along an image's side, a number of classes that is ImageNet's, guidance or
none, and the metric's whole name, which holds the number of samples and, as FID, the standard extractor. Whether the
images are ImageNet's is not on record. No row fits the embedded data, which has other classes and pixels.
"""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from reports.sections import Table
from reports.study.load import Published, Study
from reports.study.units import short_number
from reports.tables.cells import Cell

PUBLISHED = Path(__file__).parent / "published_results.csv"

IMAGENET_CLASSES = 1000

SAMPLERS = {
    "sde-em-250": "SDE Euler-Maruyama, 250 steps",
    "sde-em": "SDE Euler-Maruyama, steps not stated",
    "ode": "ODE",
    "ode-heun": "ODE Heun",
    "not stated": "sampler not stated",
}
"""The samplers of the file, in words."""

PLACED_BY = ("step", "images")
"""Clocks against which a published value has a place."""

CAPTION = (
    "Numbered rings are published values, each explained below the axes: others' runs on ImageNet, under others' "
    "protocols, and so not comparable to the digit."
)


@dataclass(frozen=True)
class Mark:
    """A published value that may stand in a figure of a study."""

    number: int
    """What stands beside it in the figure: one for all values of a method, source and protocol."""
    cell: str
    """Our cell of that method, "" where there is none or more than one."""
    images: int
    """Images that were seen in training."""
    value: float
    row: Mapping[str, str]
    """The row of the file of published numbers."""

    @property
    def guidance(self) -> str:
        scale = self.row["cfg"]
        words = {"none": "no guidance", "unstated": "guidance, scale not printed"}
        return words.get(scale, f"guidance {scale}")

    @property
    def protocol(self) -> str:
        return f"{SAMPLERS.get(self.row['sampler'], self.row['sampler'])}, {self.guidance}"

    @property
    def standing(self) -> str:
        """Provenance, and what kind of row it is where it is none of the authors' main ones."""
        provenance, kind = self.row["provenance"], self.row["row"]
        return provenance if kind in ("main", provenance) else f"{provenance}, {kind}"

    @property
    def label(self) -> str:
        """Source, provenance and protocol, for a figure's key."""
        return f"{self.row['source']} ({self.standing}): {self.protocol}"


def marks(study: Study, name: str) -> list[Mark]:
    """The published values of a metric that fit the study under its protocol, as far as they were asked for.

    Numbers run through the groups of equal method, source, protocol and provenance, in the order of the file.
    """
    rows = [row for row in _rows() if _is_asked(row, study.published) and _fits(row, study, name)]
    cells = _cells_by_method(study)
    numbers: dict[tuple[str, ...], int] = {}
    found = []
    for row in rows:
        group = tuple(row[field] for field in ("method", "source", "sampler", "cfg", "provenance", "row"))
        number = numbers.setdefault(group, len(numbers) + 1)
        cell = cells.get(row["method"], "")
        found.append(Mark(number, cell, int(row["images_seen"]), float(row["value"]), row))
    return found


def _rows() -> list[dict[str, str]]:
    with PUBLISHED.open(newline="") as file:
        return list(csv.DictReader(file))


def _is_asked(row: Mapping[str, str], published: Published) -> bool:
    """By default what authors print of their own runs; ablations, figures read off and hearsay only when asked."""
    if published == "main":
        return row["row"] == "main" and row["provenance"] == "primary"
    return published == "all"


def _fits(row: Mapping[str, str], study: Study, name: str) -> bool:
    run = study.reference
    if run.manifest.get("model", {}).get("num_classes") != IMAGENET_CLASSES:
        return False
    is_guided = run.manifest["protocol"]["sampler"]["cfg_scale"] != 1
    return (
        row["model"] == run.config["model"]["name"]
        and int(row["resolution"]) == run.config["data"]["image_size"]
        and row["metric"] == name
        and (row["cfg"] != "none") == is_guided
    )


def _cells_by_method(study: Study) -> dict[str, str]:
    """Cells that are the only one of their method."""
    cells: dict[str, list[str]] = {}
    for cell in study.cells:
        cells.setdefault(study.first(cell).manifest["method"], []).append(cell)
    return {method: labels[0] for method, labels in cells.items() if len(labels) == 1}


# -- frames ---------------------------------------------------------------------------------------------------------


def mark_rows(study: Study, name: str) -> list[dict[str, Any]]:
    """Rows of a frame for a figure, with `series` published; `label` is what the key says of the mark."""
    batch_size = study.reference.config["optimizer"]["batch_size"]
    return [
        {
            "quantity": name,
            "series": "published",
            "cell": mark.cell or None,
            "step": round(mark.images / batch_size),
            "images": mark.images,
            "value": mark.value,
            "mark": mark.number,
            "label": mark.label,
            **{field: mark.row[field] for field in ("method", "source", "arxiv", "sampler", "cfg", "provenance")},
            **{field: mark.row[field] for field in ("row", "note")},
        }
        for mark in marks(study, name)
    ]


def with_marks(frame: pd.DataFrame, study: Study, name: str) -> pd.DataFrame:
    """A curve frame with the marks that lie within its runs, where its clock is one that papers print."""
    clock = study.unit.clock
    if clock not in PLACED_BY or not len(frame):
        return frame
    rows = [row for row in mark_rows(study, name) if row[clock] <= frame[clock].max()]
    if not rows:
        return frame
    return pd.concat([frame, pd.DataFrame(rows).astype({"mark": "Int64"})], ignore_index=True)


def caption(frame: pd.DataFrame) -> str:
    """What a figure's caption says of its marks, "" where it has none."""
    return f" {CAPTION}" if (frame["series"] == "published").any() else ""


# -- table ----------------------------------------------------------------------------------------------------------


def table(study: Study, names: Sequence[str]) -> Table | None:
    """The marks of some metrics, a row for each number in their figures; None where there is none."""
    found = [(name, group) for name in names for group in _groups(marks(study, name))]
    if not found:
        return None
    return Table(
        stem="published_marks",
        title="Published values",
        rows=[_texts(name, group) for name, group in found],
        numbers=[_numbers(name, group) for name, group in found],
        notes=_notes(study),
    )


def _groups(found: Sequence[Mark]) -> list[list[Mark]]:
    """Marks of one number together."""
    groups: dict[int, list[Mark]] = {}
    for mark in found:
        groups.setdefault(mark.number, []).append(mark)
    return list(groups.values())


def _texts(name: str, group: Sequence[Mark]) -> dict[str, str]:
    first = group[0]
    noted = [f"{mark.row['value']}: {mark.row['note']}" for mark in group if mark.row["note"]]
    return {
        "mark": str(first.number),
        "metric": name,
        "method": first.row["method"],
        "published": Cell(", ".join(mark.row["value"] for mark in group), first.value),
        "after images": ", ".join(short_number(mark.images) for mark in group),
        "protocol": first.protocol,
        "source": ", ".join(filter(None, (first.row["source"], first.row["arxiv"]))),
        "provenance": first.standing,
        "notes": "; ".join(noted),
    }


def _numbers(name: str, group: Sequence[Mark]) -> dict[str, Any]:
    """Values and images of the group are separated by blanks; the figure's CSV has one value a row."""
    fields = ("source", "arxiv", "method", "model", "resolution", "cfg", "sampler", "provenance", "row")
    first = group[0]
    return {
        "mark": first.number,
        "metric": name,
        "values": " ".join(mark.row["value"] for mark in group),
        "images": " ".join(str(mark.images) for mark in group),
        **{field: first.row[field] for field in fields},
    }


def _notes(study: Study) -> list[str]:
    config = study.reference.config
    rule = (
        f"Rows for {config['model']['name']} at {config['data']['image_size']} pixels, with the same metric and "
        f"guidance or none as here. They stand here because these agree and there are {IMAGENET_CLASSES:,} classes; "
        "whether the images are ImageNet's is not on record."
    )
    values = (
        "Values and the images after which they were measured stand in one order; the CSV of each figure pairs them."
    )
    main = "Main rows that the authors print themselves; --published all adds ablations, reruns, and what was read off."
    other = "All rows, with ablations, reruns, values read off figures and unverified ones, as their provenance says."
    return [rule, values, main if study.published == "main" else other]
