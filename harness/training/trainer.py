"""The trainer: set-up, loop and step of one run. No method changes any of it.

`set_up` builds a run, `train` runs it to the end of its budget and yields what happened, `train_step` is one update.

Shapes: N images, C channels, H W latent height and width.
"""

import hashlib
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from harness.config import RunConfig
from harness.data.batches import Batch
from harness.evaluation.evaluate import Evaluator
from harness.machine.processes import from_main, main_first
from harness.records.schema import (
    Clocks,
    DetailRecord,
    EvalRecord,
    RecordName,
    Status,
    TermRecord,
    TrainRecord,
)
from harness.training import checkpoint
from harness.training.checkpoint import Counters
from harness.training.divergence import Divergence
from harness.training.recorder import Recorder
from harness.training.step import Run, diagnostics, gradient_norms, train_step


@dataclass(frozen=True)
class Event:
    """What happened: `step` after every update, `train`, `eval` and `final` with their record, `end` with the
    status."""

    kind: str
    step: int
    record: Mapping[str, Any] = field(default_factory=dict)
    share: float = 0.0
    """The part of the budget that is spent so far, 0 to 1."""


# -- the loop -------------------------------------------------------------------------------------------------------


def train(run: Run, evaluator: Evaluator, recorder: Recorder, final: Evaluator | None = None) -> Iterator[Event]:
    """Train to the end of the budget, evaluating at its points; records, checkpoints and MLflow on the way.

    A run that came to its end is evaluated once more by `final`, where that is given. One that diverged ends there;
    the checkpoint that is kept of it reproduces what was not finite.

    Yields an event after every update and record. Only training time counts as such.
    """
    found = yield from spend_budget(run, evaluator, recorder)
    if not found and final and not recorder.folder.lines("final"):
        found = yield from evaluate(run, recorder, final, run.config.evaluation.points)
    if found:
        path = save_checkpoint(run, recorder, f"diverged_{found.step:08d}")
        yield end_run(run, recorder, "diverged", {"step": found.step, "parts": list(found.parts), "checkpoint": path})
    else:
        yield end_run(run, recorder, "finished", {})


Steps = Generator[Event, None, Divergence | None]
"""Events, and in the end what the run diverged by, if it did. Its counters then lead to what was not finite again."""


def spend_budget(run: Run, evaluator: Evaluator, recorder: Recorder) -> Steps:
    """Train and evaluate as long as the budget lasts and all is finite."""
    config, schedule, logged = run.config, run.schedule, run.counters
    chain = [logged.trace]
    run.watch.start()
    for batch in remaining_batches(run):
        before = run.spent
        train_step(run, batch)
        chain.append(extend_chain(chain[-1], batch.digest))
        step = batch.step + 1
        run.counters = replace(run.counters, step=step, trace=chain[-1])
        if schedule.by_clock:  # the clock of the main process decides, so every step waits for the device
            run.counters = from_main(run.accelerator, run.watch.book(run.counters, "train"))
        point, is_over = schedule.point(before, run.spent), schedule.is_over(run.spent)
        yield Event("step", step, share=run.share)
        if not (point or is_over or step % config.output.log_every == 0):
            continue
        if not schedule.by_clock:
            run.counters = run.watch.book(run.counters, "train")
        found = run.guard.found()
        if found is not None:
            run.counters = replace(logged, step=found.step, trace=chain[found.step - step - 1])
            return found
        yield log_training(run, recorder, batch, logged)
        if point:
            found = yield from evaluate(run, recorder, evaluator, point, batch)
            if found:
                return found
        if point or is_checkpoint_due(config, step, step - logged.step):
            save_checkpoint(run, recorder)
        run.counters = run.watch.book(run.counters, "io")
        chain, logged = [chain[-1]], run.counters
        if is_over:
            break
    return None


def remaining_batches(run: Run) -> Iterator[Batch]:
    """The batches of the steps that the budget still pays for; they have no end where only the clock knows it."""
    if run.schedule.is_over(run.spent):
        return iter(())
    return run.batches.batches(run.counters.step, run.schedule.last_step)


def is_checkpoint_due(config: RunConfig, step: int, steps: int) -> bool:
    """Whether `checkpoint_every` was passed within the last `steps` steps."""
    every = config.output.checkpoint_every
    return bool(every) and step // every > (step - steps) // every


def extend_chain(trace: str, digest: bytes) -> str:
    """h_s = sha256(h_(s-1) + digest of step s), hex; the chain starts at the empty string."""
    return hashlib.sha256(bytes.fromhex(trace) + digest).hexdigest()


def clocks(run: Run) -> Clocks:
    """The four clocks at the current step, and the time that is not training."""
    counters = run.counters
    images = counters.step * run.config.optimizer.batch_size
    return {
        "step": counters.step,
        "images": images,
        "train_gflops": images * run.cost.train_gflops_per_image,
        "train_seconds": counters.train_seconds,
        "evaluation_seconds": counters.evaluation_seconds,
        "io_seconds": counters.io_seconds,
    }


def log_training(run: Run, recorder: Recorder, batch: Batch, logged: Counters) -> Event:
    """Write one line of `train.jsonl`, with means over the steps since the last one, which was at `logged`."""
    averages, counters = run.window.take(), run.counters
    images = (counters.step - logged.step) * run.config.optimizer.batch_size
    terms: dict[str, TermRecord] = {
        name.removeprefix("terms/"): {"value": value, "weight": run.weights[name.removeprefix("terms/")]}
        for name, value in averages.items()
        if name.startswith("terms/")
    }
    record: TrainRecord = {
        **clocks(run),
        "loss": averages["loss"],
        "base": averages["base"],
        "terms": terms,
        "grad_norm": averages["grad_norm"],
        "images_per_s": images / (counters.train_seconds - logged.train_seconds),
        "trace": counters.trace,
        "diagnostics": diagnostics(run, batch),
    }
    recorder.line("train", record)
    return Event("train", counters.step, record, run.share)


def evaluate(run: Run, recorder: Recorder, evaluator: Evaluator, point: int, batch: Batch | None = None) -> Steps:
    """Evaluate the EMA backbone, off the training clock, and write one line of records.

    At a point of the budget it is a line of `eval.jsonl`, with the gradients' norms on the batch of the last step; the
    EMA backbone is kept. Without a batch it is the line of `final.jsonl`.
    """
    name: RecordName = "final" if batch is None else "eval"
    run.counters = run.watch.book(run.counters, "io")
    evaluation = evaluator.evaluate(run.ema.backbone)
    norms = None if batch is None else gradient_norms(run, batch)
    run.counters = run.watch.book(run.counters, "evaluation")
    step = run.counters.step
    if name == "eval":
        recorder.ema(step, run.ema.backbone.state_dict())
    record: EvalRecord = {
        **clocks(run),
        "point": point,
        "protocol": evaluator.digest,
        "metrics": evaluation.metrics,
        "bad_images": evaluation.bad_images,
        "evaluation_images_per_s": evaluation.images_per_s,
        "samples": recorder.picture(step, evaluation.grid, "step" if name == "eval" else "final"),
    }
    if norms is not None:
        record["gradient_norms"] = norms
    recorder.line(name, record)
    yield Event(name, step, record, run.share)
    return Divergence(step, ("samples",)) if evaluation.bad_images else None


# -- checkpoints and ends -------------------------------------------------------------------------------------------


def save_checkpoint(run: Run, recorder: Recorder, name: str = "") -> str:
    """Write all that continues the run from here, and drop older checkpoints; returns its path in the run folder."""
    tensors = {
        "backbone": run.backbone.state_dict(),
        "heads": run.method.heads.state_dict(),
        "ema": run.ema.backbone.state_dict(),
        "optimizer": checkpoint.optimizer_tensors(run.optimizer),
        "method": run.method.state_dict(),
    }
    name = name or checkpoint.name_of(run.counters.step)
    return recorder.checkpoint(name, tensors, run.counters, run.config.output.keep_checkpoints)


def resume(run: Run, recorder: Recorder) -> int:
    """Continue from the last undamaged checkpoint, dropping records after it; returns the step, 0 without one."""
    with main_first(run.accelerator):
        found = checkpoint.newest(recorder.folder.checkpoints)
    run.counters, run.notices, tensors = found.counters, found.notices, found.tensors
    if tensors is not None:
        run.backbone.load_state_dict(tensors["backbone"])
        run.method.heads.load_state_dict(tensors["heads"])
        run.ema.backbone.load_state_dict(tensors["ema"])
        checkpoint.restore_optimizer(run.optimizer, tensors["optimizer"])
        run.method.load_state_dict(tensors["method"])
    recorder.truncate(run.counters.step)
    return run.counters.step


def end_run(run: Run, recorder: Recorder, status: Status, detail: DetailRecord) -> Event:
    """Write the status of a run that came to its end."""
    recorder.end(status, detail)
    return Event("end", run.counters.step, {"status": status, **detail}, run.share)
