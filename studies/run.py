"""One run, from config to records: what the cells of a study share, and one cell at one seed."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

from accelerate import Accelerator

import methods
from harness.backbones.sit import parse_name
from harness.config import RunConfig, training_digest
from harness.cost.memory import check_run, outline
from harness.cost.operations import cache_cost, cost_record
from harness.data.cache import cache_folder
from harness.data.prepare import PreparedData, prepare
from harness.errors import UserError
from harness.evaluation.evaluate import Evaluator
from harness.frozen.encoders import encoder_width, family
from harness.machine import environment
from harness.machine.processes import from_main, is_main, main_first, open_accelerator
from harness.machine.progress import Report
from harness.method import BackboneShape, DataShape, Method, Needs, Progress
from harness.records.files import digest, write_json
from harness.records.run_folder import RunFolder
from harness.rng import global_state_kept
from harness.tracking.live import PARENT_TAG, Tracker, tracking_uri
from harness.training.compilation import check_compiler, resolve_compile
from harness.training.recorder import Recorder
from harness.training.step import Run, check_split, set_up
from harness.training.trainer import Event, end_run, resume, train
from studies.agenda import Agenda, Context
from studies.folders import folder_of, is_done
from studies.recorded_command import recorded_command
from studies.settings import SECTIONS, as_plain, resolve_sections, section_of, size_of


@dataclass(frozen=True, kw_only=True)
class Lab:
    """What all cells of a study share: device, data, autoencoder, and the evaluator with its reference."""

    config: RunConfig
    """The shared sections, with every `auto` and 0 resolved."""
    accelerator: Accelerator
    prepared: PreparedData
    """Without the tokens of any encoder."""
    shape: BackboneShape
    data: DataShape
    evaluator: Evaluator
    final: Evaluator | None
    """That of the protocol at the end of a run, where there is one."""
    report: Report


def open_lab(config: RunConfig, report: Report) -> Lab:
    """Read data and autoencoder, and build the evaluator.

    Raises:
        UserError: for a device that is not there, and for data, autoencoder and protocol that do not fit.
    """
    runtime = environment.resolve_runtime(config.runtime)
    environment.apply_runtime(runtime)
    accelerator = open_accelerator(runtime)
    with main_first(accelerator):
        prepared = prepare(config, Needs(), accelerator.device, report)
    shape = backbone_shape(config, prepared)
    runtime = replace(runtime, compile=resolve_compile(config, shape, accelerator.device))
    cache = cache_folder(config.output)
    evaluator = Evaluator(config.evaluation, runtime, prepared, accelerator, cache, report)
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
        report=report,
    )


def backbone_shape(config: RunConfig, prepared: PreparedData) -> BackboneShape:
    """The backbone's shape for these latents and classes."""
    parts = parse_name(config.model.name)
    _, numbers, side, _ = prepared.moments.shape
    return BackboneShape(
        size=size_of(config),
        input_size=side,
        in_channels=numbers // 2,
        num_classes=prepared.images.num_classes,
        **parts,
    )


def resolve_run(lab: Lab, config: RunConfig) -> RunConfig:
    """A cell's config with the shared sections as the lab resolved them, and its method's section resolved."""
    shared = {name: getattr(lab.config, name) for name in SECTIONS}
    return resolve_sections(replace(config, **shared), lab.shape)


def build_method(lab: Lab, config: RunConfig) -> Method:
    """The method of a resolved config, with heads of the right shapes and no weights drawn yet."""
    with global_state_kept():
        return methods.load(config.method)(section_of(config), lab.shape, lab.data)


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
    method = outline(config.method, lambda: build_method(lab, config))
    needs = method.needs()
    runs = [replace(config, seed=seed) for seed in seeds]
    # A finished study needs no encoder: its table can be made again where the weights are missing.
    finished = all(is_done(folder_of(run)) for run in runs)
    if not finished:
        check_compiler(config, lab.accelerator.device)
        check_run(config, method, lab.accelerator.num_processes, lab.accelerator.device)
    prepared = lab.prepared if finished else prepare(config, needs, lab.accelerator.device, lab.report)
    for run in runs:
        refuse_other_run(folder_of(run), run, {**evaluation_digests(lab), **prepared.digests})


def evaluation_digests(lab: Lab) -> dict[str, str]:
    """Digests of the protocols, by their place in the config."""
    found = {"evaluation": lab.evaluator.digest}
    return {**found, "final": lab.final.digest} if lab.final else found


Watch = Callable[[Event], bool]
"""Whether to stop a run after an evaluation; the main process is asked."""


def run_cell(lab: Lab, config: RunConfig, context: Context, watch: Watch = lambda event: False) -> Iterator[Event]:
    """Train and evaluate one checked cell at one seed that is not over; an interrupted one goes on.

    A run that `watch` stops ends as `pruned`.
    """
    config = resolve_run(lab, config)
    folder, main = folder_of(config), is_main(lab.accelerator)
    previous = folder.manifest() if folder.exists() else {}
    if main and not previous:
        # What fails from here on has a place on record.
        folder.create()
        folder.write_manifest(first_manifest(config, context))
    method = build_method(lab, config)
    prepared = prepare(config, method.needs(), lab.accelerator.device, lab.report)
    run = set_up(config, method, prepared, lab.accelerator)
    facts = manifest(lab, run, context)
    tracker = open_tracker(config, previous.get("mlflow_run", ""), main, context.mlflow_parent)
    recorder = Recorder(folder, tracker, writes=main)
    step = resume(run, recorder)
    for name, record in folder.all_lines():
        tracker.log(record, name)  # sends what an earlier process did not get through, and nothing twice
    if main:
        kept = {"shared_device": previous.get("shared_device", False), "started": previous.get("started", now())}
        places = {"mlflow_run": tracker.run_id, "mlflow_uri": tracking_uri(config.output)}
        folder.write_manifest({**facts, **kept, **places})
        caches = cache_cost(prepared.autoencoder.network, method)
        write_json(folder.path / "cost.json", cost_record(run.cost, caches, prepared.num_encoded))
    yield Event("start", step, {"notices": run.notices}, share=run.share)
    for event in train(run, lab.evaluator, recorder, lab.final):
        yield with_notice(event, tracker, folder) if event.kind == "end" else event
        if may_be_stopped(event, config) and from_main(lab.accelerator, main and watch(event)):
            end = end_run(run, recorder, "pruned", {"step": event.step, "point": event.record["point"]})
            yield with_notice(end, tracker, folder)
            return


def may_be_stopped(event: Event, config: RunConfig) -> bool:
    """Whether a run goes on after this evaluation, if nobody stops it."""
    record = event.record
    return event.kind == "eval" and record["point"] < config.evaluation.points and not record["bad_images"]


def with_notice(event: Event, tracker: Tracker, folder: RunFolder) -> Event:
    """The end of a run, with a line on what MLflow lacks of it."""
    if not tracker.failure:
        return event
    study = folder.path.parents[1]
    notice = f"MLflow lacks a part of this run ({tracker.failure}); send it with: ditbench sync {study}"
    return replace(event, record={**event.record, "notices": [notice]})


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


MAY_CHANGE = (
    *("output.", "runtime.threads", "runtime.device", "runtime.checkpoint_activations", "optimizer.micro_batch"),
)
"""Settings that a continued run may change: they decide where things go and how fast, not what is trained. Another
number of threads or another device may still change the last bits of what is computed."""


def differing(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any, Any]]:
    """Dotted keys whose values differ, with both values; those that may change are left out."""
    found = []
    for key in {**before, **now}:
        name, a, b = f"{prefix}{key}", before.get(key), now.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found += differing(a, b, f"{name}.")
        elif digest(a) != digest(b) and not name.startswith(MAY_CHANGE):
            found.append((name, a, b))
    return found


def open_tracker(config: RunConfig, run_id: str, main: bool, parent: str) -> Tracker:
    """The run in MLflow: one a cell and seed, grouped by study, and below the run `parent` where that is not empty.

    Of several processes the main one alone has it.
    """
    tags = {"study": config.study, "cell": config.label, "method": config.method, "seed": str(config.seed)}
    tags |= {PARENT_TAG: parent} if parent else {}
    output = config.output if main else replace(config.output, mlflow=False)
    tracker = Tracker(output, config.study, f"{config.label}/seed{config.seed}", tags, run_id)
    tracker.config(as_plain(config))
    return tracker


# -- the manifest ---------------------------------------------------------------------------------------------------


def first_manifest(config: RunConfig, context: Context) -> dict[str, Any]:
    """What is known of a run from its resolved config and the study around it alone."""
    return {
        "study": config.study,
        "cell": config.label,
        "method": config.method,
        "seed": config.seed,
        "baseline": context.baseline or config.label,
        "status": "running",
        "status_detail": {},
        "command": recorded_command(),
        "config": as_plain(config),
        "digests": {},
        "shared_device": False,
        "started": now(),
        **context.facts,
    }


def now() -> str:
    """The time in UTC, as it stands in manifests."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def manifest(lab: Lab, run: Run, context: Context) -> dict[str, Any]:
    """All that a report needs to know of a run besides its curves."""
    config, evaluator = run.config, lab.evaluator
    return {
        **first_manifest(config, context),
        "digests": {
            "training": training_digest(config),
            **evaluation_digests(lab),
            "initial_weights": run.initial_weights,
            **run.batches.prepared.digests,
        },
        "protocol": evaluator.protocol,
        "lines": evaluator.lines(),
        "final": {"protocol": lab.final.protocol, "lines": lab.final.lines()} if lab.final else {},
        "method_facts": method_facts(run),
        "model": {
            "name": config.model.name,
            "parameters": run.cost.backbone_parameters,
            "num_classes": lab.data.num_classes,
        },
        "environment": environment.describe(config.runtime),
        "extractor_family": lab.evaluator.scorer.extractor.family,
        "warnings": list(evaluator.warnings),
    }


def method_facts(run: Run) -> dict[str, Any]:
    """What the method adds: disclosure, heads, taps, terms with their first weights, and needs."""
    method, start = run.method, Progress(step=0, images=0)
    needs = method.needs()
    disclosure = dataclasses.asdict(method.disclosure)
    return {
        **disclosure,
        "heads": {name: head_facts(head) for name, head in method.heads.items()},
        "head_parameters": run.cost.head_parameters,
        "taps": list(method.taps(start)),
        "terms": run.cost.term_weights,
        "needs": dataclasses.asdict(needs),
        "encoder_families": [family(name) for name in needs.encoders],
    }


def head_facts(head: Any) -> dict[str, Any]:
    """Parameters of a head, and the shapes of its weights in order."""
    return {
        "parameters": sum(p.numel() for p in head.parameters()),
        "shapes": [list(p.shape) for p in head.parameters() if p.ndim > 1],
    }
