"""Writing a study's report: figures with their data, tables, checks and the page, swapped in as a whole."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pandas as pd

from harness.records.files import replaced, write_json
from harness.records.metrics import metric
from reports.ablation import report as ablation_report
from reports.ablation.trials import Ablation, load_ablation
from reports.analysis import section as analysis
from reports.claims import ledger as claims_ledger
from reports.costs import equal_cost, targets
from reports.costs import table as costs
from reports.costs.added import added_plan
from reports.figures.curves import clock_curves, gradient_curves, metric_curves, training_curves
from reports.figures.differences import difference_frame, differences_figure
from reports.figures.evolution import evolution_plan
from reports.figures.lines import BAND_SEEDS, clocks_figure, metric_figure, panels_figure
from reports.figures.plans import Plan
from reports.figures.style import Look, cell_styles
from reports.final import protocol as final_protocol
from reports.page import render as page
from reports.page.figures import write_figures
from reports.published import marks as published_marks
from reports.result import improvement
from reports.sections import Section, saved_tables
from reports.study.load import Published, Study, load_study
from reports.study.units import UNITS
from reports.study.verify import Check, verify
from reports.study.words import listed
from reports.tables import results

CHOSEN = "the control, the default, and the best and worst setting; of several methods, each one's default and best"
"""Which cells of an ablation have lines."""


SECTIONS: tuple[Callable[[Study], Section | None], ...] = (
    targets.section,
    improvement.section,
    final_protocol.section,
    claims_ledger.section,
    analysis.section,
)
"""What a report may hold besides its fixed parts, in this order; None where a study has nothing of it."""


@dataclass(frozen=True)
class ReportPaths:
    """What a report consists of, and what it was made from."""

    study: Study
    checks: tuple[Check, ...]
    folder: Path
    page: Path
    table_csv: Path
    table_markdown: Path
    checks_csv: Path
    checks_json: Path
    figures: tuple[Path, ...]


def write_report(study: Path, published: Published = "main", target_values: Sequence[float] = ()) -> ReportPaths:
    """Write `<study>/report/` anew from the records.

    Args:
        study: folder of the study.
        published: rows of published numbers that may be drawn beside it.
        target_values: values of the main metric whose cost is shown besides that of the baseline's last one.

    Raises:
        UserError: there is nothing to report, or the runs may not be compared (says which, and which field).
    """
    loaded = dataclasses.replace(load_study(study), published=published, targets=tuple(target_values))
    checks = verify(loaded)
    ablation = load_ablation(loaded)
    shown = loaded.only(ablation.shown_cells()) if ablation else loaded
    styles = cell_styles([*shown.cells, *(cell for cell in loaded.cells if cell not in shown.cells)], loaded.baseline)
    look = Look({cell: styles[cell] for cell in shown.cells}, unit=loaded.unit)
    sections = [section for make in SECTIONS if (section := make(shown))]
    plans = [*(ablation_report.plans(ablation) if ablation else []), *_plans(loaded, shown)]
    plans += [plan for section in sections for plan in section.plans]
    with replaced(study / "report") as folder:
        figures = write_figures(plans, look, folder)
        _save_tables(loaded, ablation, sections, folder)
        _save_checks(checks, folder)
        content = page.Content(loaded, shown, ablation, sections, checks, styles, figures)
        (folder / "index.html").write_text(page.render(content))
    report = study / "report"
    return ReportPaths(
        study=loaded,
        checks=tuple(checks),
        folder=report,
        page=report / "index.html",
        table_csv=report / "final.csv",
        table_markdown=report / "final.md",
        checks_csv=report / "checks.csv",
        checks_json=report / "checks.json",
        figures=tuple(report / path.relative_to(folder) for figure in figures for path in figure.files),
    )


def _save_tables(study: Study, ablation: Ablation | None, sections: Sequence[Section], folder: Path) -> None:
    """The result, the result at equal cost, the costs, and those of ablation and sections: CSV, Markdown and LaTeX."""
    equal = equal_cost.equal_costs(study)
    saved = {
        "final": (results.final_table(study), results.markdown(study), results.latex(study)),
        "cost": (costs.cost_table(study), costs.markdown(study), costs.latex(study)),
    }
    if equal:
        numbers = equal_cost.equal_cost_table(study, equal)
        saved["equal_cost"] = (numbers, equal_cost.markdown(study, equal), equal_cost.latex(study, equal))
    if ablation:
        saved |= saved_tables(ablation_report.blocks(ablation))
        for name, numbers in ablation_report.numbers(ablation).items():
            numbers.to_csv(folder / f"{name}.csv", index=False)
    for section in sections:
        saved |= saved_tables(section.blocks)
    for name, (table, markdown, latex) in saved.items():
        table.to_csv(folder / f"{name}.csv", index=False)
        (folder / f"{name}.md").write_text(markdown)
        (folder / f"{name}.tex").write_text(latex)


def _save_checks(checks: Sequence[Check], folder: Path) -> None:
    """What was checked to agree, with whole digests."""
    rows = [dataclasses.asdict(check) for check in checks]
    pd.DataFrame(rows).to_csv(folder / "checks.csv", index=False)
    write_json(folder / "checks.json", rows)


def _plans(study: Study, shown: Study) -> list[Plan]:
    """The main metric, its paired differences, the other metrics on one page, and training, of the shown cells."""
    main, *others = study.main_metrics
    curves = published_marks.with_marks(metric_curves(shown, main), shown, main)
    plans = [_main_plan(shown, main, curves), *_others_plans(shown, others)]
    plans.append(_clocks_plan(shown, main))
    differences = difference_frame([row for row in results.results(study) if row.cell in shown.cells], main)
    if len(differences):
        plans.append(_difference_plan(study, differences))
    plans += [*_training_plans(shown), *_gradients_plans(shown)]
    plans += [plan for plan in (added_plan(shown), evolution_plan(shown)) if plan]
    if len(shown.cells) == len(study.cells):
        return plans
    chosen = f" Of {len(study.cells)} cells {len(shown.cells)} are shown: {CHOSEN}."
    return [dataclasses.replace(plan, caption=plan.caption + chosen) for plan in plans]


def _training_plans(study: Study) -> list[Plan]:
    frame = training_curves(study)
    if frame.empty:
        return []
    caption = "Means over the steps between two logged points; terms before their weights."
    if study.thinning > 1:
        caption += f" Of the logged points, 1 in {study.thinning} is shown, and the last."
    alt = f"Losses and gradient norm against {study.unit.words}"
    draw = partial(panels_figure, has_points=False)
    return [Plan("training", frame, draw, alt, caption + _bands(frame) + _stops(frame))]


def _gradients_plans(study: Study) -> list[Plan]:
    """Gradient norms by term, where runs have recorded them."""
    frame = gradient_curves(study)
    if frame.empty:
        return []
    caption = (
        "Norm of the backbone's gradient from the velocity loss alone and from each weighted term alone, before "
        "clipping, on a batch at each evaluation. Thick lines are means, thin ones single seeds."
    )
    alt = f"Gradient norms by term against {study.unit.words}"
    return [Plan("gradients", frame, panels_figure, alt, caption + _bands(frame) + _stops(frame))]


def _others_plans(study: Study, others: Sequence[str]) -> list[Plan]:
    if not others:
        return []
    caption = "Every other metric. Thick lines are means, thin ones single seeds."
    frame = pd.concat([metric_curves(study, name) for name in others], ignore_index=True)
    alt = f"{', '.join(others)} against {study.unit.words}"
    return [Plan("metrics", frame, panels_figure, alt, caption + _bands(frame) + _stops(frame))]


def _main_plan(study: Study, name: str, frame: pd.DataFrame) -> Plan:
    caption = (
        f"{metric(name).title} ({name}) of the EMA weights, {metric(name).direction} is better. Thick lines are means "
        "over seeds, thin ones single seeds; dotted where not every seed has a value."
    )
    if (frame["series"] == "line").any():
        caption += (
            " Floor: real held-out images against the same reference. Reconstruction: those images after the "
            "autoencoder. They are there for orientation."
        )
    caption += _bands(frame) + _stops(frame) + published_marks.caption(frame)
    if study.unit.name == "seconds":
        caption += "".join(f" {remark}" for remark in equal_cost.seconds_remarks(study))
    return Plan("main", frame, metric_figure, f"{name} against {study.unit.words}, a line for every cell", caption)


def _clocks_plan(study: Study, name: str) -> Plan:
    """The main metric against the clocks that the budget does not count."""
    frame = clock_curves(study, name)
    units = [UNITS[unit].words for unit in dict.fromkeys(frame["unit"])]
    caption = f"{name} against {listed(units)}. Thick lines are means, thin ones single seeds; "
    caption += "dotted where not every seed has a value that counts."
    if study.unit.name != "seconds":
        caption += "".join(f" {remark}" for remark in equal_cost.seconds_remarks(study))
    not_comparable = ("seconds",) if equal_cost.unequal_timing(study) else ()

    draw = partial(clocks_figure, not_comparable=not_comparable)
    return Plan("clocks", frame, draw, f"{name} against {listed(units)}", caption + _bands(frame) + _stops(frame))


def _bands(frame: pd.DataFrame) -> str:
    has_bands = (frame["num_seeds"] >= BAND_SEEDS).any()
    return " Shaded: the means’ 95% Student-t intervals, as far as the axes reach." if has_bands else ""


def _stops(frame: pd.DataFrame) -> str:
    text = " A cross marks where a run diverged or failed: at its last value, or at the bottom where it has none."
    return text if (frame["series"] == "stop").any() else ""


def _difference_plan(study: Study, frame: pd.DataFrame) -> Plan:
    caption = (
        f"Each seed's difference to {study.baseline} {study.after} (dots), their mean (tick) and its 95% "
        "Student-t interval (line)."
    )
    draw = partial(differences_figure, baseline=study.baseline)
    return Plan("differences", frame, draw, f"Paired differences to {study.baseline}", caption)
