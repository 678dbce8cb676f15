"""The self-contained page: everything a reader needs in one HTML file that asks for nothing from outside."""

import base64
import hashlib
import re
import urllib.parse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import markupsafe

from harness.records.metrics import metric
from reports.ablation import findings as ablation_findings
from reports.ablation import report as ablation_report
from reports.ablation.trials import Ablation
from reports.costs import equal_cost, targets
from reports.costs import table as costs
from reports.figures import samples
from reports.figures.style import DARK, LIGHT, CellStyle
from reports.page.columns import columns, sort_key
from reports.page.differing import differing_settings
from reports.page.figures import ShownFigure, data_uri
from reports.page.reproduce import PLACES, cell_commands, configs_read, study_commands
from reports.result import findings, methods
from reports.sections import Section
from reports.study.endings import endings
from reports.study.load import Study
from reports.study.verify import Check, EnvironmentFact, environment, flatten, short_text
from reports.study.words import listed
from reports.tables import results

TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class Content:
    """What a page shows."""

    study: Study
    shown: Study
    """The cells that stand for all where each takes a line or a column; all of them but for ablations."""
    ablation: Ablation | None
    sections: Sequence[Section]
    checks: Sequence[Check]
    styles: Mapping[str, CellStyle]
    figures: Sequence[ShownFigure]


def templates() -> jinja2.Environment:
    """The templates of pages, in which every label is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=one_direction,
    )
    environment.filters |= {"breakable": breakable, "columns": columns, "sort_key": sort_key}
    return environment


def render(content: Content) -> str:
    """The page as text. Every label goes through the template's escaping."""
    script = TEMPLATES.joinpath("page.js").read_text()
    study, shown = content.study, content.shown
    rows, settings = results.results(study), environment(study)
    shown_rows = [row for row in rows if row.cell in shown.cells]
    template = templates().get_template("page.html")
    return template.render(
        study=study,
        shown=shown,
        styles=content.styles,
        **_heading(content, rows, settings),
        figures={figure.stem: figure for figure in content.figures},
        sections=content.sections,
        endings=[{"ending": ending, "link": _link(study, ending.file)} for ending in endings(study)],
        shows_steps=study.unit.name in ("train_gflops", "seconds"),
        final=_main_table(study, rows),
        others=_other_table(study, shown_rows),
        footnotes=results.footnotes(study, study.main_metrics[:1]),
        grids=[_grid(grid) for grid in samples.grids(shown)],
        methods=methods.methods_table(shown),
        equal=[_equal_table(shown, equal) for equal in equal_cost.equal_costs(study)],
        equal_notes=equal_cost.notes(study),
        counted=costs.counted_rows(shown),
        measured=costs.measured_rows(shown),
        cost_notes=costs.NOTES,
        time_notes=costs.time_notes(study),
        details=_details(study, shown_rows),
        protocol=_settings(study.reference.manifest.get("protocol", {})),
        training=_training_settings(study),
        checks=content.checks,
        environment=settings,
        differing=differing_settings(shown),
        study_commands=study_commands(study),
        configs_read=listed(configs_read(study)),
        cell_commands=cell_commands(study),
        script=markupsafe.Markup(script),
        script_hash=script_hash(script),
        light=LIGHT,
        dark=DARK,
    )


def _heading(
    content: Content, rows: Sequence[results.CellResult], settings: Sequence[EnvironmentFact]
) -> dict[str, Any]:
    """The first sentences and notes, and what comes before the result of all cells: an ablation's own part."""
    notes = findings.notes(content.study, rows, settings)
    if content.ablation is None:
        return {
            "headline": findings.headline(content.study, rows),
            "reached": targets.sentences(content.study),
            "notes": notes,
            "blocks": [],
            "optuna": None,
        }
    return {
        "headline": ablation_findings.headline(content.ablation),
        "reached": [],
        "notes": [*ablation_findings.notes(content.ablation), *notes],
        "blocks": ablation_report.blocks(content.ablation),
        "optuna": {
            "stems": [f.stem for f in content.figures if f.stem.startswith(("history", "parallel_", "importance_"))],
            "notes": ablation_report.importance_notes(content.ablation),
        },
    }


def script_hash(script: str) -> str:
    """How the page's policy names the one script that may run: by what it is, so that no other one can."""
    return f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}"


TURNING = {ord(mark): "\ufffd" for mark in "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"}
"""Characters that turn the direction of all text after them."""


def one_direction(value: Any) -> Any:
    """A value of the page; text without marks that would turn around what stands beside it."""
    return value.translate(TURNING) if type(value) is str else value


def breakable(text: str) -> markupsafe.Markup:
    """Escaped text that may break after the separators of labels and metric names."""
    parts = re.split(r"(?<=[_+,=/.])", one_direction(text))
    return markupsafe.Markup("<wbr>").join(markupsafe.escape(part) for part in parts)


def _link(study: Study, file: str) -> str:
    """From the page to a file of the study, "" where it is not there: records may be copied without checkpoints."""
    return urllib.parse.quote(f"../{file}") if file and (study.path / file).exists() else ""


def _main_table(study: Study, rows: Sequence[results.CellResult]) -> list[dict[str, str]]:
    """The main metric and what stands beside it, a row per cell."""
    name = study.main_metrics[0]
    show = results.digits(rows, name)
    return [
        {
            "cell": row.cell,
            **_metric_texts(row.metrics[name], show),
            "heads": results.MISSING if row.head_parameters is None else f"{row.head_parameters:,}",
            "steps": results.whole_text(row.step),
            "gflops": results.whole_text(row.train_gflops),
            "status": row.status,
        }
        for row in rows
    ]


def _equal_table(study: Study, equal: equal_cost.EqualCost) -> dict[str, Any]:
    """The main metric at one amount of a clock, a row per shown cell."""
    show = results.shared_digits(equal.results.values())
    rows = [
        {"cell": cell, **_metric_texts(result, show), "steps": equal.steps_text(cell)}
        for cell, result in equal.results.items()
        if cell in study.cells
    ]
    return {"title": equal_cost.title(equal), "rows": rows}


def _other_table(study: Study, rows: Sequence[results.CellResult]) -> list[dict[str, Any]]:
    """The other main metrics, a row per metric: for every cell what stands in its field."""
    return [
        {
            "name": name,
            "title": metric(name).title,
            "direction": metric(name).direction,
            "cells": [_metric_texts(row.metrics[name], results.digits(rows, name)) for row in rows],
        }
        for name in study.main_metrics[1:]
    ]


def _metric_texts(result: results.MetricResult, show: results.Digits) -> dict[str, str]:
    difference = result.difference
    return {
        "mean": results.mean_text(result, show),
        "over": result.over,
        "by_seed": results.seeds_values(result, show),
        "difference": results.difference_text(difference, show) if difference else "",
        "seeds": results.seeds_text(difference) if difference and difference.by_seed else "",
        "reading": difference.reading if difference else "",
    }


def _details(study: Study, rows: Sequence[results.CellResult]) -> list[dict[str, Any]]:
    """The metrics that are parts of others: (name, for every cell its mean)."""
    parts = [name for name in study.metrics if name not in study.main_metrics]
    return [
        {
            "name": name,
            "direction": metric(name).direction,
            "means": [results.mean_text(row.metrics[name], results.digits(rows, name)) for row in rows],
        }
        for name in parts
    ]


def _grid(grid: samples.Grid) -> dict[str, Any]:
    return {
        "seed": grid.seed,
        "columns": grid.columns,
        "rows": [[_tile(column, i) for column in grid.columns] for i in range(grid.num_rows)],
    }


def _tile(column: samples.Column, i: int) -> str:
    return data_uri(column.images[i]) if i < len(column.images) else ""


def _settings(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(name, short_text(value) or '""') for name, value in flatten(values).items() if name]


def _training_settings(study: Study) -> list[tuple[str, str]]:
    """Of the study's first run that got somewhere, without what is shown elsewhere and where things lie."""
    config = {k: v for k, v in study.reference.config.items() if k not in ("sections", "evaluation")}
    return [(name, text) for name, text in _settings(config) if name not in PLACES]
