"""The final evaluation of a study: another protocol than the curves', with its own table, figures and words."""

import json
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import pandas as pd

from harness.records.metrics import metric
from reports.figures.differences import difference_frame, differences_figure
from reports.figures.plans import Plan
from reports.final import figures as final_figures
from reports.published import marks as published_marks
from reports.result import findings
from reports.sections import Part, Section, Table
from reports.study.load import Study, final_study
from reports.study.words import be, count, listed
from reports.tables import results
from reports.tables.cells import Row

KINDS = {"sde-euler-maruyama": "SDE Euler-Maruyama", "ode-euler": "ODE Euler", "ode-heun": "ODE Heun"}
"""Integrators, in words."""

STEM = "final_protocol"
"""The name of its files; the table named final is that of the curves' last point."""


def section(study: Study) -> Section | None:
    """The final evaluation's part of a report; None where no run that counts has had one."""
    final = final_study(study)
    if final is None:
        return None
    rows = results.results(final)
    parts = [Part(_main_table(final)), *map(Part, _other_tables(final, rows))]
    if marks := published_marks.table(final, final.main_metrics):
        parts.append(Part(marks))
    return Section(
        name=STEM,
        title="Final evaluation",
        sentences=_sentences(study, final, rows),
        plans=[*_value_plans(final, rows), *_mark_plans(final, rows)],
        parts=parts,
    )


def terminal_tables(study: Study) -> list[tuple[str, list[dict[str, str]]]]:
    """Titled tables of text, narrow enough for a terminal; none where no run that counts has a final evaluation."""
    final = final_study(study)
    if final is None:
        return []
    title = f"final evaluation, {protocol_words(_protocol(final))}: {final.main_metrics[0]} {final.after}"
    others = [("all metrics of the final evaluation", results.means_rows(final))] if len(final.main_metrics) > 1 else []
    return [(title, results.terminal_rows(final)), *others]


def final_rows(study: Study) -> list[dict[str, Any]]:
    """The numbers of the final table, JSON-like, a row per cell; none where there is no final evaluation."""
    final = final_study(study)
    return [] if final is None else json.loads(results.final_table(final).to_json(orient="records"))


# -- words ----------------------------------------------------------------------------------------------------------


def _protocol(study: Study) -> Mapping[str, Any]:
    return study.reference.manifest.get("protocol", {})


def protocol_words(protocol: Mapping[str, Any]) -> str:
    """How samples were made: `50,000 samples, SDE Euler-Maruyama, 250 steps, no guidance`."""
    sampler = protocol["sampler"]
    kind = KINDS.get(sampler["kind"], sampler["kind"])
    samples = count_text(protocol["num_samples"], "sample")
    return f"{samples}, {kind}, {count_text(sampler['num_steps'], 'step')}, {guidance_words(sampler)}"


def count_text(num: int, noun: str) -> str:
    """`1 sample`, `50,000 samples`."""
    return count(num, noun).replace(str(num), f"{num:,}")


def guidance_words(sampler: Mapping[str, Any]) -> str:
    """The guidance scale, and the times in which it acts where these are not all."""
    if sampler["cfg_scale"] == 1:
        return "no guidance"
    low, high = sampler.get("guidance_low", 0), sampler.get("guidance_high", 1)
    interval = "" if (low, high) == (0, 1) else f" for t in [{low:g}, {high:g}]"
    return f"guidance {sampler['cfg_scale']:g}{interval}"


def _sentences(study: Study, final: Study, rows: Sequence[results.CellResult]) -> list[str]:
    protocol = _protocol(final)
    found = [
        f"The EMA weights at the end of each run, evaluated once more: {protocol_words(protocol)}, "
        f"evaluation seed {protocol['seed']}.",
        "This is another protocol than that of the curves and of all other tables "
        f"({protocol_words(_protocol(study))}), so no number here is to be set beside one there.",
        findings.separated(final, rows),
    ]
    lacking = [run.label for run in final.timed if not run.evaluations]
    if lacking:
        found.append(f"{listed(lacking)} {be(lacking)} without a final evaluation.")
    return [sentence for sentence in found if sentence]


# -- tables ---------------------------------------------------------------------------------------------------------


def _main_table(final: Study) -> Table:
    """The main metric, a row per cell; its numbers are those of every metric."""
    name = final.main_metrics[0]
    numbers = results.final_table(final).to_dict("records")
    return Table(
        stem=STEM,
        title=f"{name} {final.after}",
        rows=results.terminal_rows(final),
        numbers=[{str(key): value for key, value in row.items()} for row in numbers],
        notes=results.footnotes(final, [name]),
    )


def _other_tables(final: Study, rows: Sequence[results.CellResult]) -> list[Table]:
    """The other main metrics, a row per metric and cell."""
    names = final.main_metrics[1:]
    if not names:
        return []
    table = Table(
        stem=f"{STEM}_metrics",
        title="Other metrics of the final evaluation",
        rows=[_other_row(final, rows, row, name) for name in names for row in rows],
        numbers=[
            {"metric": name, "cell": row.cell, **_numbers(name, row.metrics[name])} for name in names for row in rows
        ],
        notes=results.footnotes(final, names),
    )
    return [table]


def _other_row(final: Study, rows: Sequence[results.CellResult], row: results.CellResult, name: str) -> Row:
    result, show = row.metrics[name], results.digits(rows, name)
    texts = {
        "cell": row.cell,
        "metric": name,
        "mean": results.mean_text(result, show),
        "every seed": results.values_text(result, show),
    }
    if final.baseline:
        texts[f"minus {final.baseline} [95%]"] = results.difference_text(result.difference, show)
        texts["reading"] = results.short_reading(result.difference)
    return texts


def _numbers(name: str, result: results.MetricResult) -> dict[str, Any]:
    """The columns of a metric, without its name in them."""
    return {
        "mean" if key == name else key.removeprefix(f"{name}_"): value
        for key, value in results.metric_numbers(name, result).items()
    }


# -- figures --------------------------------------------------------------------------------------------------------


def _value_plans(final: Study, rows: Sequence[results.CellResult]) -> list[Plan]:
    """The main metric of every cell, and its paired differences."""
    name = final.main_metrics[0]
    frame = final_figures.value_frame(final, rows, name)
    if not (frame["series"] == "mean").any():
        return []
    caption = (
        f"{metric(name).title} ({name}) {final.after}, {metric(name).direction} is better: means (bars), every seed "
        "(dots) and the mean’s 95% Student-t interval (lines)."
    )
    if (frame["series"] == "line").any():
        caption += " Dashed: real held-out images, and those after the autoencoder, for orientation."
    plans = [Plan(STEM, frame, final_figures.values_figure, f"{name} of every cell", caption)]
    differences = difference_frame(rows, name)
    if len(differences):
        plans.append(_difference_plan(final, differences))
    return plans


def _difference_plan(final: Study, frame: pd.DataFrame) -> Plan:
    caption = (
        f"Each seed’s difference to {final.baseline} {final.after} under the final protocol (dots), their mean (tick) "
        "and its 95% Student-t interval (line)."
    )
    draw = partial(differences_figure, baseline=final.baseline)
    alt = f"Paired differences to {final.baseline} in the final evaluation"
    return Plan(f"{STEM}_differences", frame, draw, alt, caption)


def _mark_plans(final: Study, rows: Sequence[results.CellResult]) -> list[Plan]:
    """Every metric of which fitting values are published, against images seen."""
    found = [(name, published_marks.mark_rows(final, name)) for name in final.main_metrics]
    return [_mark_plan(final, rows, name, marks) for name, marks in found if marks]


def _mark_plan(final: Study, rows: Sequence[results.CellResult], name: str, marks: Sequence[Mapping[str, Any]]) -> Plan:
    ours = final_figures.value_frame(final, rows, name)
    published = pd.DataFrame(marks).drop(columns="step").astype({"mark": "Int64"})
    frame = pd.concat([ours[ours["series"] != "line"], published], ignore_index=True)
    caption = (
        f"{metric(name).title} ({name}) against images seen, {metric(name).direction} is better. Ours: means with "
        "their 95% intervals and seeds as small dots, drawn side by side to the right of where they belong. "
        f"{published_marks.CAPTION} A ring has the colour of our cell of the same method."
    )
    alt = f"{name} of every cell and published values against images seen"
    return Plan(f"{STEM}_{name}_published", frame, final_figures.images_figure, alt, caption)
