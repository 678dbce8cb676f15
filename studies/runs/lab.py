"""What all runs of a process share, and the checks before the first of them starts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from accelerate import Accelerator

import methods
from harness.config import RunConfig
from harness.cost.memory import check_run, outline
from harness.data.cache import cache_folder
from harness.data.prepare import PreparedData, prepare
from harness.errors import UserError
from harness.evaluation.evaluate import Evaluator
from harness.frozen.encoders import encoder_width
from harness.machine import environment
from harness.machine.processes import main_first, open_accelerator
from harness.machine.progress import OnProgress
from harness.method import BackboneShape, DataShape, Needs
from harness.records.run_folder import RunFolder
from harness.training.compilation import check_compiler
from harness.training.step import check_split
from studies.agenda import Agenda
from studies.configs.differences import differing
from studies.configs.sections import SECTIONS, as_plain, resolve_sections
from studies.runs.folders import folder_of, is_done, refuse_older_run


@dataclass(frozen=True, kw_only=True)
class Lab:
    """What all cells of a study share: device, data, autoencoder, and the evaluator with its reference."""

    config: RunConfig
    """The shared sections, with every `auto` and 0 resolved."""
    accelerator: Accelerator
    prepared: PreparedData
    """Without the tokens of any encoder; `with_tokens` adds those that a cell reads."""
    shape: BackboneShape
    data: DataShape
    evaluator: Evaluator
    final: Evaluator | None
    """The evaluator of the protocol at the end of a run, where there is one."""
    on_progress: OnProgress


def open_lab(config: RunConfig, on_progress: OnProgress) -> Lab:
    """Read data and autoencoder, and build the evaluator.

    Raises:
        UserError: for a device that is not there, and for data, autoencoder and protocol that do not fit.
    """
    runtime = environment.resolve_runtime(config.runtime)
    environment.apply_runtime(runtime)
    accelerator = open_accelerator(runtime)
    with main_first(accelerator):
        prepared = prepare(config, Needs(), accelerator.device, on_progress)
    shape = backbone_shape(config, prepared)
    cache = cache_folder(config.output)
    evaluator = Evaluator(config.evaluation, runtime, prepared, accelerator, cache, on_progress)
    config = replace(config, runtime=runtime, evaluation=evaluator.config)
    images = prepared.images
    return Lab(
        config=config,
        accelerator=accelerator,
        prepared=prepared,
        shape=shape,
        data=DataShape(image_size=config.data.image_size, num_classes=images.num_classes, encoder_width=encoder_width),
        evaluator=evaluator,
        final=evaluator.under(config.protocols["final"]) if "final" in config.protocols else None,
        on_progress=on_progress,
    )


def backbone_shape(config: RunConfig, prepared: PreparedData) -> BackboneShape:
    """The backbone's shape for these latents and classes."""
    _, numbers, side, _ = prepared.moments.shape
    return BackboneShape.of(
        config.model.name, input_size=side, in_channels=numbers // 2, num_classes=prepared.images.num_classes
    )


def resolve_run(lab: Lab, config: RunConfig) -> RunConfig:
    """A cell's config with the shared sections as the lab resolved them, and its method's section resolved."""
    shared = {name: getattr(lab.config, name) for name in SECTIONS}
    return resolve_sections(replace(config, **shared), lab.shape)


def check_agenda(lab: Lab, agenda: Agenda) -> None:
    """Refuse what would stop any run, before the first one trains, and make all caches on the way."""
    agenda.check_metrics(lab.evaluator.metric_names)
    for config in agenda.cells:
        check_cell(lab, config, agenda.seeds)


def check_cell(lab: Lab, config: RunConfig, seeds: Sequence[int]) -> None:
    """Make what a cell reads, and refuse what would stop it, before any cell trains.

    Raises:
        UserError: for wrong method settings, missing weights, or a folder that holds a run of another configuration.
    """
    config = resolve_run(lab, config)
    check_split(config, lab.accelerator.num_processes)
    method = outline(config.method, lambda: methods.build(config, lab.shape, lab.data))
    needs = method.needs()
    runs = [replace(config, seed=seed) for seed in seeds]
    for run in runs:
        refuse_older_run(folder_of(run))
    # A finished study needs no encoder: its table can be made again where the weights are missing.
    finished = all(is_done(folder_of(run)) for run in runs)
    if not finished:
        check_compiler(config, lab.accelerator.device)
        check_run(config, method, lab.accelerator.num_processes, lab.accelerator.device)
    prepared = lab.prepared if finished else lab.prepared.with_tokens(needs)
    for run in runs:
        refuse_other_run(folder_of(run), run, {**evaluation_digests(lab), **prepared.digests})


def evaluation_digests(lab: Lab) -> dict[str, str]:
    """Digests of the protocols, by their place in the config."""
    found = {"evaluation": lab.evaluator.digest}
    return {**found, "final": lab.final.digest} if lab.final else found


def refuse_other_run(folder: RunFolder, config: RunConfig, digests: Mapping[str, str]) -> None:
    """Raise `UserError` when the folder holds a run of another configuration, or on other data or weights."""
    if not folder.exists():
        return
    recorded = folder.manifest()
    # A run that failed while it was set up has no digests yet.
    known = {name: recorded["digests"].get(name) for name in digests} if recorded["digests"] else digests
    changed = [*differing(recorded["config"], as_plain(config)), *differing(known, digests, "digest of ")]
    if changed:
        key, before, now = changed[0]
        raise UserError(
            f"{folder.path} holds a run with another {key} ({before!r}, now {now!r}): "
            "give another --study, or remove that folder"
        )
