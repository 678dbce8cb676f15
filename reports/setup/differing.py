"""Settings in which the cells of a study differ, from the resolved configs of their runs."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from reports.study.load import Study
from reports.study.verify import flatten, short_text

NOT_SETTINGS = ("study", "cell", "method", "seed", "output.")
"""Names and places: they make no difference to a result."""

ABSENT = "–"
"""Shown for a setting that a cell does not have, such as one of another method."""


@dataclass(frozen=True)
class DifferingSetting:
    """A setting with its value in every cell, in the study's order."""

    name: str
    """Dotted, as on the command line."""
    values: tuple[str, ...]


def differing_settings(study: Study) -> list[DifferingSetting]:
    """The settings that not all cells share, in the order of the config: what is shared first, then methods' own."""
    by_cell = {cell: [_settings(run.config) for run in study.of(cell)] for cell in study.cells}
    names = dict.fromkeys(name for found in by_cell.values() for settings in found for name in settings)
    rows = [DifferingSetting(name, tuple(_text(name, found) for found in by_cell.values())) for name in names]
    return [row for row in rows if len(set(row.values)) > 1]


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of one run by their names on the command line, where methods' sections stand beside the others."""
    shared = {name: value for name, value in config.items() if name != "sections"}
    flat = flatten(shared) | flatten(config.get("sections", {}))
    return {name: value for name, value in flat.items() if name and not name.startswith(NOT_SETTINGS)}


def _text(name: str, found: list[dict[str, Any]]) -> str:
    """The value in the runs of a cell; several where its seeds differ."""
    texts = dict.fromkeys(_value_text(settings[name]) for settings in found if name in settings)
    return " or ".join(texts) or ABSENT


def _value_text(value: Any) -> str:
    """As one types it."""
    return str(value).lower() if isinstance(value, bool) else short_text(value) or '""'
