"""What checkpoints represent: which encoder the runs of a study are compared with, and one analysis after another."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harness.analysis.blocks import AnalysisConfig, Subjects, analyse, chosen_blocks, gather, store
from harness.backbones.sit import parse_name
from harness.config import require
from harness.data.prepare import PreparedData
from harness.machine.processes import is_main
from harness.records.files import digest
from harness.records.run_folder import RunFolder
from harness.records.schema import AnalysisRecord, Manifest, MethodRecord, read_record
from harness.training import checkpoint
from reports.analysis.section import FOLDER
from studies.runs.saved import Opened

PACKAGED = "efficientnet_lite2"
"""The encoder of a study whose methods have none: its weights install as a package."""


def study_encoder(run: Path) -> str:
    """The encoder that all runs of a run's study are compared with: the one that its methods were trained towards.

    Raises:
        UserError: when they were trained towards several.
    """
    study = run.resolve().parents[1]
    manifests = {path.resolve() for path in (run / "manifest.json", *study.glob("*/seed*/manifest.json"))}
    facts = [read_record(path, Manifest).get("method_facts", MethodRecord()) for path in sorted(manifests)]
    names = sorted({name for each in facts for name in each.get("needs", {}).get("encoders", [])})
    require(
        len(names) <= 1,
        f"the methods of {study} were trained towards several encoders ({', '.join(names)}): name one with --encoder",
    )
    return names[0] if names else PACKAGED


def require_weights(run: Path) -> None:
    """Refuse a run that has no EMA backbone."""
    has_weights = bool(checkpoint.ema_steps(RunFolder(run).checkpoints))
    require(has_weights, f"{run} has no EMA backbone: leave it out, or train it up to its first evaluation")


class Analyst:
    """Analyses one backbone after another under one setting. Images, latents and the encoder's features are made once
    for all that share them."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        """`options` are the fields of `AnalysisConfig` without the encoder."""
        self._options = options
        self._subjects: tuple[str, Subjects] | None = None

    def analyse(self, opened: Opened, encoder: str) -> AnalysisRecord | None:
        """Analyse a backbone and write its record; returns it, or None in processes that do not write."""
        lab, config = opened.lab, AnalysisConfig(encoder=encoder, **self._options)
        if not is_main(lab.accelerator):
            return None
        chosen_blocks(config, opened.backbone)  # refused before the encoder runs
        device, runtime = lab.accelerator.device, lab.config.runtime
        patch_size = parse_name(lab.config.model.name)["patch_size"]
        key = _key(lab.prepared, config, patch_size)
        if self._subjects is None or self._subjects[0] != key:
            self._subjects = key, gather(lab.prepared, config, patch_size, device, lab.on_progress)
        found = analyse(opened.backbone, self._subjects[1], runtime.precision, runtime.tf32, device, lab.on_progress)
        return store(found, opened.folder / FOLDER, opened.file, opened.facts)


def _key(prepared: PreparedData, config: AnalysisConfig, patch_size: int) -> str:
    """Equal keys mean equal subjects."""
    rows = {"train": prepared.train_rows.tolist(), "held_out": prepared.holdout_rows.tolist()}
    return digest({"config": dataclasses.asdict(config), "data": prepared.digests, "rows": rows, "patch": patch_size})
