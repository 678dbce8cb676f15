"""Writing a study's report: figures with their data, tables, checks and the page, swapped in as a whole."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from harness.records.files import replaced, write_json
from reports.ablation import findings as ablation_findings
from reports.ablation import report as ablation_report
from reports.ablation.trials import Ablation, load_ablation
from reports.analysis import section as analysis
from reports.claims import ledger as claims_ledger
from reports.costs import clocks, targets
from reports.costs import table as costs
from reports.figures.plans import Plan
from reports.figures.style import Look, cell_styles
from reports.final import protocol as final_protocol
from reports.page.figures import write_figures
from reports.page.render import Page, render
from reports.result import findings, improvement, metrics, samples, training
from reports.result import section as result
from reports.sections import Section
from reports.setup import checks as study_checks
from reports.setup import environment, methods, protocol, reproduce
from reports.study.load import Published, Study, load_study
from reports.study.verify import Check, verify
from reports.tables.files import save_tables

SECTIONS: tuple[Callable[[Study], Section | None], ...] = (
    result.section,
    targets.section,
    improvement.section,
    final_protocol.section,
    claims_ledger.section,
    analysis.section,
    clocks.section,
    metrics.section,
    samples.section,
    methods.section,
    costs.section,
    training.section,
    protocol.section,
    study_checks.section,
    environment.section,
    reproduce.section,
)
"""The parts of a report, in this order. Each gets the study with the cells that have lines and columns, whose `whole`
is the study with all cells; None where a study has nothing of it."""

CHOSEN = "the control, the default, and the best and worst setting; of several methods, each one's default and best"
"""Which cells of an ablation have lines."""


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
    sections = [ablation_report.section(ablation)] if ablation else []
    sections += [_remarked(section, shown) for make in SECTIONS if (section := make(shown))]
    with replaced(study / "report") as folder:
        figures = write_figures([plan for section in sections for plan in section.all_plans], look, folder)
        save_tables(sections, folder)
        _save_checks(checks, folder)
        page = dataclasses.replace(
            _front(loaded, ablation),
            sections=sections,
            figures={figure.stem: figure for figure in figures},
            styles=styles,
        )
        (folder / "index.html").write_text(render(page))
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


def _front(study: Study, ablation: Ablation | None) -> Page:
    """The head of the page: of an ablation its own sentences, else what the comparison came to."""
    notes = findings.notes(study)
    if ablation:
        headline, own = ablation_findings.headline(ablation), ablation_findings.notes(ablation)
        return Page(name=study.name, kind="ablation", headline=headline, notes=[*own, *notes])
    return Page(
        name=study.name,
        kind="comparison of training methods",
        headline=findings.headline(study),
        points=targets.sentences(study),
        notes=notes,
    )


def _remarked(section: Section, shown: Study) -> Section:
    """The section, whose figures say so where they show some cells alone."""
    num, num_shown = len(shown.whole.cells), len(shown.cells)
    if num_shown == num:
        return section
    remark = f" Of {num} cells {num_shown} are shown: {CHOSEN}."

    def remarked(plans: Sequence[Plan]) -> list[Plan]:
        return [dataclasses.replace(plan, caption=plan.caption + remark) for plan in plans]

    parts = [dataclasses.replace(part, plans=remarked(part.plans)) for part in section.parts]
    return dataclasses.replace(section, plans=remarked(section.plans), parts=parts)


def _save_checks(checks: Sequence[Check], folder: Path) -> None:
    """What was checked to agree, with whole digests."""
    rows = [dataclasses.asdict(check) for check in checks]
    pd.DataFrame(rows).to_csv(folder / "checks.csv", index=False)
    write_json(folder / "checks.json", rows)
