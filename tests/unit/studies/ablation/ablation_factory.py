"""Ablations whose runs are written by hand, so that nothing trains."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from harness.config import BudgetConfig, DataConfig, EvaluationConfig, ModelConfig, OutputConfig, RunConfig
from harness.records.run_folder import RunFolder
from methods.vae_repa import VaeRepaConfig
from studies.ablation.axes import grid_settings, grid_subject, search_subject
from studies.ablation.plan import AblationPlan, PlannedSubject
from studies.configs.sections import nominal_shape, resolve_sections
from studies.runs.folders import folder_of
from tests.unit.harness.records.plain_records import eval_line, manifest, train_line

POINTS = 3
BUDGET = 6
METRIC = "fd_test_10"


def cell(folder: Path, method: str, sections: Mapping[str, Any], study: str = "abl") -> RunConfig:
    config = RunConfig(
        study=study,
        cell=method,
        method=method,
        model=ModelConfig(name="SiT-pico/2"),
        data=DataConfig(name="digits", image_size=32),
        budget=BudgetConfig(amount=BUDGET),
        evaluation=EvaluationConfig(points=POINTS),
        output=OutputConfig(runs=str(folder), mlflow=False),
        sections=sections,
    )
    return resolve_sections(config, nominal_shape(config))


def grid(folder: Path, axes: Mapping[str, Any], seeds: Sequence[int] = (0, 1), **fields: Any) -> AblationPlan:
    """A grid over VAE-REPA."""
    subject = grid_subject(cell(folder, "vae_repa", {"vae_repa": VaeRepaConfig()}), axes)
    return _ablation(folder, subject, seeds, kind="grid", settings=grid_settings(subject, False), **fields)


def search(folder: Path, trials: int, seeds: Sequence[int] = (0, 1), **fields: Any) -> AblationPlan:
    """A search over VAE-REPA's own space."""
    subject = search_subject(cell(folder, "vae_repa", {"vae_repa": VaeRepaConfig()}))
    return _ablation(folder, subject, seeds, kind="search", trials=trials, **fields)


def _ablation(folder: Path, subject: PlannedSubject, seeds: Sequence[int], **fields: Any) -> AblationPlan:
    from methods.sit import SitConfig

    control = cell(folder, "sit", {"sit": SitConfig()})
    return AblationPlan(subjects=(subject,), seeds=tuple(seeds), control=control, **fields)


def start(config: RunConfig, status: str = "running", **fields: Any) -> RunFolder:
    """Put a run on record."""
    folder = folder_of(config)
    folder.create()
    folder.write_manifest(manifest(status=status, status_detail={}, baseline="sit", **fields))
    return folder


def evaluate(config: RunConfig, *values: float) -> RunFolder:
    """Evaluations of a run, from its first point on; each takes a third of the budget."""
    folder = folder_of(config)
    for point, value in enumerate(values, start=1):
        step = point * BUDGET // POINTS
        folder.append("train", train_line(step))
        folder.append("eval", eval_line(step, point=point, metrics={METRIC: value, "velocity_loss": 1.0}))
    return folder


def end(config: RunConfig, *values: float, status: str = "finished") -> RunFolder:
    """A run that came to its end with these evaluations."""
    start(config, status)
    return evaluate(config, *values)


def with_study(ablation: AblationPlan, study: str) -> AblationPlan:
    control = replace(ablation.control, study=study)
    subjects = tuple(replace(s, base=replace(s.base, study=study)) for s in ablation.subjects)
    return replace(ablation, control=control, subjects=subjects)
