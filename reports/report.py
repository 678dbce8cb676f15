"""Writing a study's report: figures with their data, the final table and the page, swapped in as a whole."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from harness.records import metric, replaced
from reports import figures, page, tables
from reports.load import Study, load_study, metric_curves, training_curves
from reports.style import CellStyle, Look, cell_styles
from reports.verify import verify


@dataclass(frozen=True)
class ReportPaths:
    """What a report consists of."""

    folder: Path
    page: Path
    table_csv: Path
    table_markdown: Path
    figures: tuple[Path, ...]


@dataclass(frozen=True)
class Plan:
    """A figure to be written: the frame that it is drawn from, and how it is drawn."""

    stem: str
    frame: pd.DataFrame
    draw: Callable[[pd.DataFrame, Look], figures.Figure]
    alt: str
    caption: str

    def drawn(self, look: Look) -> figures.Figure:
        return self.draw(self.frame, look)


def write_report(study: Path) -> ReportPaths:
    """Write `<study>/report/` anew from the records.

    Raises:
        UserError: there is nothing to report, or the runs may not be compared (says which, and which field).
    """
    loaded = load_study(study)
    checks = verify(loaded)
    styles = cell_styles(loaded.cells, loaded.baseline)
    plans = _plans(loaded)
    with replaced(study / "report") as folder:
        folder.joinpath("figures").mkdir()
        files = [path for plan in plans for path in _save(plan, folder, styles)]
        shown = [_shown(plan, styles) for plan in plans]
        tables.final_table(loaded).to_csv(folder / "final.csv", index=False)
        (folder / "final.md").write_text(tables.markdown(loaded))
        (folder / "index.html").write_text(page.render(loaded, checks, styles, shown))
    report = study / "report"
    return ReportPaths(
        folder=report,
        page=report / "index.html",
        table_csv=report / "final.csv",
        table_markdown=report / "final.md",
        figures=tuple(report / path.relative_to(folder) for path in files),
    )


def _save(plan: Plan, folder: Path, styles: Mapping[str, CellStyle]) -> list[Path]:
    return figures.save(plan.drawn, plan.frame, folder / "figures" / plan.stem, Look(styles))


def _shown(plan: Plan, styles: Mapping[str, CellStyle]) -> page.ShownFigure:
    return page.ShownFigure(plan.stem, page.picture(plan.drawn, styles), plan.alt, plan.caption)


def _plans(study: Study) -> list[Plan]:
    """The main metric, its paired differences, the other metrics on one page, and training."""
    main, *others = study.main_metrics
    plans = [_main_plan(main, metric_curves(study, main))]
    if others:
        caption = "Every other metric. Thick lines are means, thin ones single seeds."
        frame = pd.concat([metric_curves(study, name) for name in others], ignore_index=True)
        plans.append(Plan("metrics", frame, figures.panels_figure, f"{', '.join(others)} against steps", caption))
    differences = figures.difference_frame(tables.results(study), main)
    if len(differences):
        plans.append(_difference_plan(study, differences))
    training = training_curves(study)
    if len(training):
        caption = "Means over the steps between two logged points; terms before their weights."
        plans.append(Plan("training", training, _training_figure, "Losses and gradient norm against steps", caption))
    return plans


def _main_plan(name: str, frame: pd.DataFrame) -> Plan:
    caption = (
        f"{metric(name).title} ({name}) of the EMA weights, {metric(name).direction} is better. Thick lines are means "
        "over seeds, thin ones single seeds; dotted where not every seed has a value."
    )
    if (frame["series"] == "line").any():
        caption += (
            " Floor: real held-out images against the same reference. Reconstruction: those images after the "
            "autoencoder. They are there for orientation."
        )
    return Plan("main", frame, figures.metric_figure, f"{name} against steps, a line for every cell", caption)


def _difference_plan(study: Study, frame: pd.DataFrame) -> Plan:
    caption = (
        f"Each seed's difference to {study.baseline} at step {study.step:,} (dots), their mean (tick) and its 95% "
        "Student-t interval (line)."
    )

    def draw(frame: pd.DataFrame, look: Look) -> figures.Figure:
        return figures.differences_figure(frame, look, study.baseline)

    return Plan("differences", frame, draw, f"Paired differences to {study.baseline}", caption)


def _training_figure(frame: pd.DataFrame, look: Look) -> figures.Figure:
    return figures.panels_figure(frame, look, has_points=False)
