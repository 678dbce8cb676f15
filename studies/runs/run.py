"""One run, from config to records: what the cells of a study share, and one cell at one seed."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import methods
from harness.config import RunConfig
from harness.cost.operations import cache_cost, cost_record
from harness.machine.processes import from_main, is_main
from harness.records.files import write_json
from harness.records.run_folder import RunFolder
from harness.tracking.feed import Feed
from harness.tracking.store import tracking_uri
from harness.training.recorder import Recorder
from harness.training.step import set_up
from harness.training.trainer import Event, end_run, resume, train
from studies.agenda import Context
from studies.runs.folders import folder_of
from studies.runs.lab import Lab, resolve_run
from studies.runs.manifest import first_manifest, manifest, now

Watch = Callable[[Event], bool]
"""Whether to stop a run after an evaluation; the main process is asked."""


def run_cell(lab: Lab, config: RunConfig, context: Context, watch: Watch = lambda event: False) -> Iterator[Event]:
    """Train and evaluate one checked cell at one seed that is not over; an interrupted one goes on.

    A run that `watch` stops ends as `pruned`.
    """
    config = resolve_run(lab, config)
    folder, main = folder_of(config), is_main(lab.accelerator)
    previous: Mapping[str, Any] = folder.manifest() if folder.exists() else {}
    if main and not previous:
        # What fails from here on has a place on record.
        folder.create()
        folder.write_manifest(first_manifest(config, context))
    method = methods.build(config, lab.shape, lab.data)
    prepared = lab.prepared.with_tokens(method.needs())
    run = set_up(config, method, prepared, lab.accelerator)
    facts = manifest(lab, run, context)
    if main:
        kept = {"shared_device": previous.get("shared_device", False), "started": previous.get("started", now())}
        places = {"mlflow_run": previous.get("mlflow_run", ""), "mlflow_uri": tracking_uri(config.output)}
        folder.write_manifest({**facts, **kept, **places})
    feed = Feed(config.output if main else replace(config.output, mlflow=False), folder, context.mlflow_parent)
    if feed.run_id:
        folder.update_manifest(mlflow_run=feed.run_id)
    recorder = Recorder(folder, feed, writes=main)
    step = resume(run, recorder)
    for name, record in folder.all_lines():
        feed.add(name, record)  # sends what an earlier process did not get through, and nothing twice
    if main:
        caches = cache_cost(prepared.autoencoder.network, method)
        write_json(folder.cost_path, cost_record(run.cost, caches, prepared.num_encoded))
    yield Event("start", step, {"notices": run.notices}, share=run.share)
    for event in train(run, lab.evaluator, recorder, lab.final):
        yield with_notice(event, feed, folder) if event.kind == "end" else event
        if may_be_stopped(event, config) and from_main(lab.accelerator, main and watch(event)):
            end = end_run(run, recorder, "pruned", {"step": event.step, "point": event.record["point"]})
            yield with_notice(end, feed, folder)
            return


def may_be_stopped(event: Event, config: RunConfig) -> bool:
    """Whether a run goes on after this evaluation, if nobody stops it."""
    record = event.record
    return event.kind == "eval" and record["point"] < config.evaluation.points and not record["bad_images"]


def with_notice(event: Event, feed: Feed, folder: RunFolder) -> Event:
    """The end of a run, with a line on what MLflow lacks of it."""
    if not feed.failure:
        return event
    study = folder.path.parents[1]
    notice = f"MLflow lacks a part of this run ({feed.failure}); send it with: ditbench sync {study}"
    return replace(event, record={**event.record, "notices": [notice]})
