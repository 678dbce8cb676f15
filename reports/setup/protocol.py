"""The protocol of the evaluations and the settings of training, as the records of the study's first run have them."""

from collections.abc import Mapping
from typing import Any

from reports.sections import Part, Section, Table
from reports.setup.reproduce import PLACES
from reports.study.load import Study
from reports.study.verify import flatten, short_text
from reports.tables.cells import Row

NOT_TRAINING = ("sections", "evaluation")
"""Sections of the config that stand elsewhere on the page."""


def section(shown: Study) -> Section:
    """The evaluation protocol, and folded the settings of training."""
    run = shown.whole.reference
    protocol = settings_rows(run.manifest.get("protocol", {}))
    config = {name: value for name, value in run.config.items() if name not in NOT_TRAINING}
    training = [row for row in settings_rows(config) if row["setting"] not in PLACES]
    title = f"Training settings, of {run.label}"
    folded = Part(Table("", "", training, kind="settings"), title=title, is_folded=True)
    return Section(
        name="protocol",
        title="Protocol and settings",
        short="Protocol",
        parts=[*([Part(Table("", "Evaluation protocol", protocol, kind="settings"))] if protocol else []), folded],
    )


def settings_rows(values: Mapping[str, Any]) -> list[Row]:
    """Every setting by its dotted name."""
    return [{"setting": name, "value": short_text(value) or '""'} for name, value in flatten(values).items() if name]
