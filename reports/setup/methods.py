"""What each method is, side by side: its losses, heads, needs and tuning, and the settings in which cells differ."""

from collections.abc import Mapping
from typing import Any

from reports.sections import Part, Section, Table
from reports.setup.differing import differing_settings
from reports.study.load import Study
from reports.study.words import count
from reports.tables.cells import Cell, Row
from reports.tables.results import MISSING

SHARED = (
    "Everything else (backbone, initial weights, data order, noise, times, optimiser, evaluation) is shared, and "
    "checked below."
)


def section(study: Study) -> Section:
    """A column for every cell."""
    methods = [
        {"": what} | {cell: _field(lines) for cell, lines in zip(study.cells, fields, strict=True)}
        for what, fields in methods_table(study)
    ]
    settings: list[Row] = [
        {"setting": setting.name} | dict(zip(study.cells, setting.values, strict=True))
        for setting in differing_settings(study)
    ]
    return Section(
        name="methods",
        title="What differs between the methods",
        short="Methods",
        sentences=[SHARED],
        parts=[
            Part(Table("", "", methods, kind="facts")),
            *([Part(Table("", "Settings that differ", settings, kind="facts"))] if settings else []),
        ],
    )


def _field(lines: list[str]) -> Cell:
    return Cell("; ".join(lines) or MISSING, lines=lines)


def methods_table(study: Study) -> list[tuple[str, list[list[str]]]]:
    """What differs between the methods: (what, for every cell its lines of text), rows that are all empty left out."""
    columns = [_method_facts(study, cell) for cell in study.cells]
    rows = [(what, [column[what] for column in columns]) for what in columns[0]]
    return [(what, cells) for what, cells in rows if any(cells)]


def _method_facts(study: Study, cell: str) -> dict[str, list[str]]:
    run = study.first(cell)
    facts = run.facts
    return {
        "What it adds": _lines(facts.get("summary")),
        "Paper": _lines(facts.get("paper")),
        "Blocks read, from 1": _lines(", ".join(str(tap) for tap in facts.get("taps", []))),
        "Loss terms and weights": [f"{_weight(weight)} × {name}" for name, weight in facts.get("terms", {}).items()],
        "Heads": [_head_text(name, head) for name, head in facts.get("heads", {}).items()],
        "Needs": _needs(facts.get("needs", {})),
        "Pretrained models": list(facts.get("pretrained", [])),
        "Outside data": list(facts.get("outside_data", [])),
        "Tuned": _lines(tuning_text(run.manifest.get("tuning", {}))),
        "Note": _lines(facts.get("note")),
    }


def _lines(text: str | None) -> list[str]:
    return [text] if text else []


def tuning_text(tuning: Mapping[str, Any]) -> str:
    """Where a cell's settings come from; "" for settings that were not searched for."""
    if not tuning:
        return ""
    seeds = f"{'seed' if len(tuning['seeds']) == 1 else 'seeds'} {', '.join(map(str, tuning['seeds']))}"
    return f"on {seeds} of study {tuning['study']}: best of {count(tuning['trials'], 'trial')}"


def _weight(weight: Any) -> str:
    return f"{float(weight):g}"


def _head_text(name: str, head: Mapping[str, Any]) -> str:
    shapes = ", ".join("×".join(str(n) for n in shape) for shape in head.get("shapes", []) if len(shape) > 1)
    return f"{name}: {head['parameters']:,} parameters" + (f" ({shapes})" if shapes else "")


def _needs(needs: Mapping[str, Any]) -> list[str]:
    lines = ["images"] if needs.get("images") else []
    lines += [f"tokens of the frozen encoder {name}" for name in needs.get("encoders", [])]
    return lines + (["forward passes of the EMA teacher"] if needs.get("ema") else [])
