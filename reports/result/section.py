"""The result: the main metric of every cell, its curves and paired differences, and the runs that are not finished."""

import urllib.parse
from functools import partial

from harness.records.metrics import metric
from reports.costs import equal_cost
from reports.figures.curves import metric_curves
from reports.figures.differences import difference_frame, differences_figure
from reports.figures.lines import bands_remark, metric_figure, stops_remark
from reports.figures.plans import Plan
from reports.published import marks as published_marks
from reports.sections import Part, Section, Table, TableFile
from reports.study.endings import endings
from reports.study.load import Study
from reports.tables import results
from reports.tables.cells import Cell, Row

SHOWS_STEPS = ("train_gflops", "seconds")
"""Units of budgets on which cells make different numbers of steps."""


def section(shown: Study) -> Section:
    """The main metric: curves of the shown cells, and a table of all cells."""
    study = shown.whole
    is_narrowed = len(shown.cells) < len(study.cells)
    unfinished = _endings_rows(study)
    return Section(
        name="result",
        title="All cells" if is_narrowed else "Result",
        plans=[_curves_plan(shown), *_difference_plans(shown)],
        parts=[
            Part(_table(study)),
            *([Part(Table("", "Runs that are not finished", unfinished))] if unfinished else []),
        ],
        files=[_file(study)],
    )


def _table(study: Study) -> Table:
    """The main metric and what stands beside it, a row per cell."""
    name, rows = study.main_metrics[0], results.results(study)
    show = results.digits(rows, name)
    return Table(
        stem="final",
        title=f"{name} {study.after}",
        rows=[
            {**results.result_texts(study, row, name, show), **_costs(study, row), "runs": row.status} for row in rows
        ],
        notes=results.footnotes(study, [name]),
    )


def _costs(study: Study, row: results.CellResult) -> Row:
    left_out = () if study.unit.name in SHOWS_STEPS else ("steps",)
    return {name: cell for name, cell in results.cost_texts(row).items() if name not in left_out}


def _file(study: Study) -> TableFile:
    """Markdown holds all metrics; LaTeX the main one alone, so that it fits a page."""
    notes = results.footnotes(study, study.main_metrics)
    whole = Table("final", f"{study.name} {study.after}", results.display_rows(study), notes=notes)
    narrow = Table("final", "", results.terminal_rows(study), notes=results.footnotes(study, study.main_metrics[:1]))
    return TableFile("final", results.final_table(study), [whole], [narrow])


def _endings_rows(study: Study) -> list[Row]:
    """Runs that stopped early or go on, with what to look at."""
    return [
        {
            "cell": ending.cell,
            "seed": Cell(str(ending.seed), ending.seed),
            "status": ending.status,
            "at": ending.where,
            "why": ending.why or results.MISSING,
            "where to look": Cell(ending.file or results.MISSING, link=_link(study, ending.file)),
        }
        for ending in endings(study)
    ]


def _link(study: Study, file: str) -> str:
    """From the page to a file of the study, "" where it is not there: records may be copied without checkpoints."""
    return urllib.parse.quote(f"../{file}") if file and (study.path / file).exists() else ""


# -- figures --------------------------------------------------------------------------------------------------------


def _curves_plan(study: Study) -> Plan:
    name = study.main_metrics[0]
    frame = published_marks.with_marks(metric_curves(study, name), study, name)
    caption = (
        f"{metric(name).title} ({name}) of the EMA weights, {metric(name).direction} is better. Thick lines are means "
        "over seeds, thin ones single seeds; dotted where not every seed has a value."
    )
    if (frame["series"] == "line").any():
        caption += (
            " Floor: real held-out images against the same reference. Reconstruction: those images after the "
            "autoencoder. They are there for orientation."
        )
    caption += bands_remark(frame) + stops_remark(frame) + published_marks.caption(frame)
    if study.unit.name == "seconds":
        caption += "".join(f" {remark}" for remark in equal_cost.seconds_remarks(study))
    return Plan("main", frame, metric_figure, f"{name} against {study.unit.words}, a line for every cell", caption)


def _difference_plans(shown: Study) -> list[Plan]:
    """Paired differences to the baseline of the shown cells; none where no cell has one."""
    study = shown.whole
    rows = [row for row in results.results(study) if row.cell in shown.cells]
    frame = difference_frame(rows, study.main_metrics[0])
    if frame.empty:
        return []
    caption = (
        f"Each seed's difference to {study.baseline} {study.after} (dots), their mean (tick) and its 95% "
        "Student-t interval (line)."
    )
    draw = partial(differences_figure, baseline=study.baseline)
    return [Plan("differences", frame, draw, f"Paired differences to {study.baseline}", caption)]
