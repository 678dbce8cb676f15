"""The manifest of a run: config, digests, environment, and what its method is."""

from datetime import UTC, datetime
from typing import cast

from torch import nn

from harness.config import RunConfig, training_digest
from harness.evaluation.evaluate import Evaluator
from harness.frozen.encoders import family
from harness.machine import environment
from harness.method import Progress
from harness.records.schema import ConfigRecord, FinalProtocolRecord, HeadRecord, Manifest, MethodRecord, ProtocolRecord
from harness.training.step import Run
from studies.agenda import Context
from studies.configs.recorded_command import recorded_command
from studies.configs.sections import as_plain
from studies.runs.lab import Lab, evaluation_digests


def first_manifest(config: RunConfig, context: Context) -> Manifest:
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
        "config": cast(ConfigRecord, as_plain(config)),
        "digests": {},
        "shared_device": False,
        "started": now(),
        **context.facts,
    }


def now() -> str:
    """The time in UTC, as it stands in manifests."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def manifest(lab: Lab, run: Run, context: Context) -> Manifest:
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
        "protocol": cast(ProtocolRecord, evaluator.protocol),
        "lines": evaluator.lines(),
        "final": final_protocol(lab.final) if lab.final else {},
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


def final_protocol(final: Evaluator) -> FinalProtocolRecord:
    """The protocol of the evaluation at the end, and its reference lines."""
    return {"protocol": cast(ProtocolRecord, final.protocol), "lines": final.lines()}


def method_facts(run: Run) -> MethodRecord:
    """What the method adds: disclosure, heads, taps, terms with their first weights, and needs."""
    method, start = run.method, Progress(step=0, images=0)
    needs, disclosure = method.needs(), method.disclosure
    return {
        "summary": disclosure.summary,
        "paper": disclosure.paper,
        "pretrained": list(disclosure.pretrained),
        "outside_data": list(disclosure.outside_data),
        "note": disclosure.note,
        "heads": {name: head_facts(head) for name, head in method.heads.items()},
        "head_parameters": run.cost.head_parameters,
        "taps": list(method.taps(start)),
        "terms": run.cost.term_weights,
        "needs": {"images": needs.images, "encoders": list(needs.encoders), "ema": needs.ema},
        "encoder_families": [family(name) for name in needs.encoders],
    }


def head_facts(head: nn.Module) -> HeadRecord:
    """Parameters of a head, and the shapes of its weights in order."""
    return {
        "parameters": sum(p.numel() for p in head.parameters()),
        "shapes": [list(p.shape) for p in head.parameters() if p.ndim > 1],
    }
