"""The other metrics: their curves, and side by side what each cell came to."""

import pandas as pd

from harness.records.metrics import metric
from reports.figures.curves import metric_curves
from reports.figures.lines import bands_remark, panels_figure, stops_remark
from reports.figures.plans import Plan
from reports.sections import Part, Section, Table
from reports.study.load import Study
from reports.tables import results
from reports.tables.cells import Cell


def section(shown: Study) -> Section | None:
    """A panel and a row for every metric but the main one; None for a study that has no other."""
    names = shown.main_metrics[1:]
    if not names:
        return None
    return Section(name="metrics", title="Other metrics", plans=[_plan(shown, names)], parts=[Part(_table(shown))])


def _table(shown: Study) -> Table:
    """A row per metric, a column per shown cell; below them the metrics that are parts of others."""
    study = shown.whole
    rows = [row for row in results.results(study) if row.cell in shown.cells]
    head = f"{study.after[0].upper()}{study.after[1:]}"
    parts = [name for name in study.metrics if name not in study.main_metrics]
    to = f" to {study.baseline}" if study.baseline else ""
    note = f"In each field: the mean, every seed's value, then the difference{to} with its 95% interval."
    return Table(
        stem="",
        title="",
        rows=[
            *({head: _name(name, metric(name).title)} | _fields(rows, name) for name in study.main_metrics[1:]),
            *({head: _name(name, "")} | _means(rows, name) for name in parts),
        ],
        notes=[note],
        kind="facts",
    )


def _name(name: str, title: str) -> Cell:
    better = f"{metric(name).direction} is better"
    return Cell(title or name, lines=[title, name, better] if title else [name, better])


def _fields(rows: list[results.CellResult], name: str) -> dict[str, str]:
    """What stands in each cell's field."""
    show = results.digits(rows, name)
    return {row.cell: _field(row.metrics[name], show) for row in rows}


def _field(result: results.MetricResult, show: results.Digits) -> Cell:
    mean, difference = results.mean_text(result, show), result.difference
    lines: list[str] = [mean, results.values_text(result, show)]
    if difference:
        lines += [results.difference_text(difference, show), *results.short_reading(difference).shown_lines]
    return Cell(mean, result.mean, mark="main", lines=lines)


def _means(rows: list[results.CellResult], name: str) -> dict[str, str]:
    show = results.digits(rows, name)
    return {row.cell: Cell(results.mean_text(row.metrics[name], show), row.metrics[name].mean) for row in rows}


def _plan(study: Study, names: tuple[str, ...]) -> Plan:
    caption = "Every other metric. Thick lines are means, thin ones single seeds."
    frame = pd.concat([metric_curves(study, name) for name in names], ignore_index=True)
    alt = f"{', '.join(names)} against {study.unit.words}"
    return Plan("metrics", frame, panels_figure, alt, caption + bands_remark(frame) + stops_remark(frame))
