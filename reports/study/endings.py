"""Runs that did not come to their end: where each stopped and why. Diverging or failing is a result, not a gap.

Pruned runs are none of them: they were meant to end where they did, and the table of trials counts them.
"""

import math
from dataclasses import dataclass

from harness.records.schema import Clocks
from reports.study.load import RecordedRun, Study
from reports.study.units import UNITS, rounded_text

PARTS = {"base": "velocity loss", "grad_norm": "gradient norm", "loss": "total loss"}
"""Names of what was not finite, where the record's own name is short; `terms/x` is the term x."""

ERROR_CHARS = 300
"""Letters of an error that are quoted; the log holds all."""


@dataclass(frozen=True)
class Ending:
    """How a run stands that is not finished."""

    cell: str
    seed: int
    status: str
    step: int
    where: str
    """The step, and what was spent of the budget by then."""
    why: str
    """What was not finite, or the error; one line, "" for a run that only goes on."""
    file: str
    """What to look at, as a path from the study's folder: the log of a failed run, the dump of a diverged one."""


def endings(study: Study) -> list[Ending]:
    """Every run that is neither finished nor pruned, in the study's order."""
    return [_ending(run) for run in study.runs if run.status not in ("finished", "pruned")]


def _ending(run: RecordedRun) -> Ending:
    clocks = stopped_at(run)
    return Ending(
        cell=run.cell,
        seed=run.seed,
        status=run.status,
        step=clocks["step"],
        where=_where(run, clocks),
        why=_why(run),
        file=_file(run),
    )


START: Clocks = {
    "step": 0,
    "images": 0,
    "train_gflops": 0,
    "train_seconds": 0,
    "evaluation_seconds": 0,
    "io_seconds": 0,
}
"""The clocks of a run that has not begun."""


def stopped_at(run: RecordedRun) -> Clocks:
    """The clocks where a run stopped: at the step that was not finite, else at the last one on record.

    Seconds are those of the last record.
    """
    lines = (*run.train[-1:], *run.evaluations[-1:])
    last: Clocks = max(lines, key=lambda line: line["step"], default=START)
    step = run.detail.get("step", last["step"])
    images = step * run.config["optimizer"]["batch_size"]
    gflops = images * run.cost.get("train_gflops_per_image", math.nan) if step else 0
    return {
        "step": step,
        "images": images,
        "train_gflops": gflops,
        "train_seconds": last["train_seconds"],
        "evaluation_seconds": last["evaluation_seconds"],
        "io_seconds": last["io_seconds"],
    }


def _where(run: RecordedRun, clocks: Clocks) -> str:
    unit, amount = UNITS[run.config["budget"]["unit"]], run.config["budget"]["amount"]
    if unit.name == "steps":
        return f"step {clocks['step']:,} of {amount:,}"
    return f"step {clocks['step']:,}, {rounded_text(clocks[unit.clock])} of {unit.amount(amount)}"


def _why(run: RecordedRun) -> str:
    if run.status == "diverged":
        parts = [PARTS.get(part, part.replace("terms/", "term ")) for part in run.detail.get("parts", [])]
        return f"{', '.join(parts)} not finite" if parts else ""
    error = one_line(run.detail.get("error", ""))
    return error if len(error) <= ERROR_CHARS else f"{error[:ERROR_CHARS]}…"


def _file(run: RecordedRun) -> str:
    folder = f"{run.folder.parent.name}/{run.folder.name}"
    if run.status == "diverged":
        return f"{folder}/{run.detail['checkpoint']}" if run.detail.get("checkpoint") else ""
    return f"{folder}/{run.detail['log']}" if run.detail.get("log") else ""


def one_line(text: str) -> str:
    """Text without line breaks and other characters that print nothing or turn the text around."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())
