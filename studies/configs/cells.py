"""The cells of a comparison, and the config of each of its runs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

from jsonargparse import ArgumentError, ArgumentParser, Namespace

import methods
from harness.config import RunConfig, require
from harness.errors import UserError
from harness.records.schema import ManifestNotes
from studies.agenda import Agenda, Context, Job
from studies.configs.refusals import explain
from studies.configs.sections import SECTIONS
from studies.configs.settings import _checked, _known


@dataclass(frozen=True, kw_only=True)
class Comparison(Agenda):
    """What `compare` runs: every cell at every seed."""

    cells: tuple[RunConfig, ...]
    """One config a cell, at seed 0."""
    seeds: tuple[int, ...]
    baseline: str
    """Label of the control cell."""
    notes: Mapping[str, ManifestNotes] = field(default_factory=dict)
    """Further fields of the manifests of a cell's runs, by its label."""

    def runs(self) -> list[RunConfig]:
        """All runs, seed by seed, so that a comparison is complete at one seed before the next begins."""
        return [replace(cell, seed=seed) for seed in self.seeds for cell in self.cells]

    @property
    def total(self) -> int:
        return len(self.seeds) * len(self.cells)

    def job(self, number: int) -> Job:
        seed, cell = divmod(number - 1, len(self.cells))
        config = replace(self.cells[cell], seed=self.seeds[seed])
        return Job(number, config, Context(baseline=self.baseline, facts=self.notes.get(config.label, {})))

    def with_threads(self, threads: int) -> Self:
        runtime = replace(self.cells[0].runtime, threads=threads)
        return replace(self, cells=tuple(replace(cell, runtime=runtime) for cell in self.cells))


def run_config(parser: ArgumentParser, namespace: Namespace) -> RunConfig:
    """The config of a single run."""
    return _config(parser, namespace, namespace.method, namespace.cell, namespace.seed)


def comparison(parser: ArgumentParser, namespace: Namespace) -> Comparison:
    """The cells of a comparison; `UserError` for labels, methods or a baseline that do not exist."""
    asked = _cells(namespace)
    labels = list(asked)
    control = next((label for label, cell in asked.items() if cell["method"] == methods.control()), labels[0])
    baseline = namespace.baseline or control
    require(baseline in labels, f"baseline is {baseline!r}: the cells are {', '.join(labels)}")
    cells = []
    for label, cell in asked.items():
        changed = _with_overrides(parser, namespace, label, cell)
        cells.append(_config(parser, changed, cell["method"], label, 0))
    return Comparison(cells=tuple(cells), seeds=checked_seeds(namespace.seeds), baseline=baseline)


def checked_seeds(seeds: Sequence[int]) -> tuple[int, ...]:
    """The seeds; `UserError` when there are none, or one is named twice."""
    require(bool(seeds), "seeds is empty: give at least one, such as --seeds 0,1")
    require(len(set(seeds)) == len(seeds), f"seeds {list(seeds)} name a seed twice")
    return tuple(seeds)


def _cells(namespace: Namespace) -> dict[str, dict[str, Any]]:
    """Label -> {method, and overrides of methods' sections}."""
    if namespace.cells:
        for label, cell in namespace.cells.items():
            known = isinstance(cell, Mapping) and "method" in cell
            require(known, f"cells.{label} is {cell!r}: give at least its method, as {{method: name}}")
        return {str(label): dict(cell) for label, cell in namespace.cells.items()}
    require(
        bool(namespace.methods), f"methods is empty: give --methods or --config; there are {_known(methods.names())}"
    )
    require(len(set(namespace.methods)) == len(namespace.methods), f"methods {namespace.methods} name one twice")
    return {name: {"method": name} for name in namespace.methods}


def _with_overrides(parser: ArgumentParser, namespace: Namespace, label: str, cell: Mapping[str, Any]) -> Namespace:
    """The namespace with a cell's own method settings."""
    overrides = {key: value for key, value in cell.items() if key != "method"}
    if not overrides:
        return namespace
    strange = [key for key in overrides if key not in methods.names()]
    require(
        not strange,
        f"cells.{label} sets {', '.join(strange)}: a cell may set its method and methods' own sections only",
    )
    try:
        return _checked(parser, parser.parse_object(overrides, namespace.clone()))
    except ArgumentError as error:
        raise UserError(f"cells.{label}: {explain(str(error), parser)}") from None


def _config(parser: ArgumentParser, namespace: Namespace, method: str, cell: str, seed: int) -> RunConfig:
    """Build the typed config of one run, with every section checked and only the method's own sections kept."""
    methods.load(method)
    made = parser.instantiate(namespace)
    sections = {name: made[name] for name in methods.parts(method)}
    shared = {name: made[name] for name in SECTIONS}
    return RunConfig(study=namespace.study, cell=cell or method, method=method, seed=seed, sections=sections, **shared)
