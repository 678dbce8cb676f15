"""One step against an explicit re-implementation; the loop's records; divergence; continuing to the bit.

Shapes: N images, C channels, H W latent height and width, T tokens, P numbers of a token's patch.
"""

import hashlib
import itertools
import json
import math
import time
from collections.abc import Generator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor

from harness.config import RunConfig
from harness.data.batches import Batch
from harness.errors import UserError
from harness.evaluation.evaluate import Evaluation, Evaluator
from harness.method import Term
from harness.records.run_folder import RunFolder
from harness.tracking.feed import Feed
from harness.training import checkpoint, trainer
from harness.training import step as training_step
from harness.training.recorder import Recorder
from harness.training.step import Run, gradient_norms, step_views, train_step
from harness.training.trainer import Event, resume, train
from tests.bench_setting import Bench
from tests.unit.harness.records.plain_records import manifest, train_line

TIMES = ("train_seconds", "evaluation_seconds", "io_seconds", "images_per_s", "evaluation_images_per_s")
"""Fields of a record that no two runs share."""


class StandIn:
    """An evaluator that scores nothing: one number of the EMA's weights, and a grey picture."""

    def __init__(self, mark: str = "0") -> None:
        self.digest = mark * 64

    def evaluate(self, backbone: torch.nn.Module) -> Evaluation:
        total = sum(float(p.double().sum()) for p in backbone.parameters())
        grid = np.full((3, 4, 4, 3), 128, np.uint8)
        return Evaluation(metrics={"velocity_loss": total}, grid=grid, bad_images=0, images_per_s={"sampling": 8.0})


def settings(bench: Bench, name: str, *words: str, points: int = 2, **output: Any) -> RunConfig:
    """A resolved config with overrides, and with two evaluations, evenly spaced."""
    config = bench.config(name, *words)
    evaluation = replace(config.evaluation, points=points, spacing="even")
    return replace(config, evaluation=evaluation, output=replace(config.output, **output))


def open_folder(path: Path) -> RunFolder:
    folder = RunFolder(path)
    folder.create()
    folder.write_manifest(manifest())
    return folder


def events(run: Run, folder: RunFolder, feed: Feed | None = None, final: StandIn | None = None) -> Generator[Event]:
    """The run's loop, which a test may close in the middle."""
    recorder = recorder_of(run, folder, feed)
    return cast(Generator[Event], train(run, cast(Evaluator, StandIn()), recorder, cast(Evaluator | None, final)))


def recorder_of(run: Run, folder: RunFolder, feed: Feed | None = None) -> Recorder:
    return Recorder(folder, feed or Feed(run.config.output, folder))


def state_of(run: Run) -> dict[str, Tensor]:
    """Every tensor that a continued run starts from, cloned."""
    groups = {
        "backbone": run.backbone.state_dict(),
        "heads": run.method.heads.state_dict(),
        "ema": run.ema.backbone.state_dict(),
        "optimizer": checkpoint.optimizer_tensors(run.optimizer),
    }
    return {f"{group}/{name}": value.clone() for group, values in groups.items() for name, value in values.items()}


def assert_bitwise(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(found[name], value), name


def records(folder: RunFolder, name: str) -> list[dict[str, Any]]:
    """Lines of a record file without what no two runs share."""
    lines = [json.loads(line) for line in (folder.path / f"{name}.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


# -- one step, written out ------------------------------------------------------------------------------------------


def explicit_losses(run: Run, batch: Batch) -> dict[str, Tensor]:
    """Velocity loss and VAE-REPA's term from their formulas, on the run's own modules; elements of one batch."""
    x0, noise = batch.x0_NCHW, batch.noise_NCHW
    t = batch.t_N[:, None, None, None]
    blocks = (run.method.config.block,) if run.method.name == "vae_repa" else ()
    v, hidden = run.backbone((1 - t) * x0 + t * noise, batch.t_N, batch.labels_N, taps=blocks)
    losses = {"base": torch.mean((v - (noise - x0)) ** 2)}
    if blocks:
        n, c, h, w = x0.shape
        # Tokens row by row; inside a token row p, column q, then channel.
        target_NTP = torch.stack(
            [
                x0[:, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2].permute(0, 2, 3, 1).reshape(n, 4 * c)
                for row in range(h // 2)
                for column in range(w // 2)
            ],
            dim=1,
        )
        d = run.method.heads["latent"](hidden[blocks[0]]) - target_NTP
        losses["terms/vae_repa"] = torch.where(d.abs() < 0.05, d * d / (2 * 0.05), d.abs() - 0.05 / 2).mean()
    return losses


def explicit_step(run: Run, batch: Batch) -> tuple[dict[str, Tensor], dict[str, float]]:
    """State after one step and its losses, from the formulas in float64; gradients are torch's. Changes nothing."""
    config, before = run.config, state_of(run)
    named = [(f"backbone/{n}", p) for n, p in run.backbone.named_parameters() if p.requires_grad]
    named += [(f"heads/{n}", p) for n, p in run.method.heads.named_parameters()]
    losses = explicit_losses(run, batch)
    loss = losses["base"] + sum(value for name, value in losses.items() if name != "base")
    gradients = torch.autograd.grad(loss, [p for _, p in named])
    norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradients))
    optimizer, update = config.optimizer, batch.step + 1
    scale = min(1.0, optimizer.clip_norm / (norm + 1e-6)) if optimizer.clip_norm else 1.0
    decay = min(config.ema.decay, update / (config.ema.warmup + update))
    after: dict[str, Tensor] = {}
    for index, ((name, p), gradient) in enumerate(zip(named, gradients, strict=True)):
        g, w = scale * gradient.double(), p.detach().double()
        m = optimizer.beta1 * before[f"optimizer/{index}.exp_avg"].double() + (1 - optimizer.beta1) * g
        s = optimizer.beta2 * before[f"optimizer/{index}.exp_avg_sq"].double() + (1 - optimizer.beta2) * g * g
        m_hat, s_hat = m / (1 - optimizer.beta1**update), s / (1 - optimizer.beta2**update)
        w = w - optimizer.lr * optimizer.weight_decay * w - optimizer.lr * m_hat / (s_hat.sqrt() + optimizer.eps)
        after |= {name: w, f"optimizer/{index}.exp_avg": m, f"optimizer/{index}.exp_avg_sq": s}
        if name.startswith("backbone/"):
            average = name.replace("backbone/", "ema/")
            after[average] = decay * before[average].double() + (1 - decay) * w
    found = {name: float(value.detach()) for name, value in losses.items()}
    return after, {**found, "loss": float(loss.detach()), "grad_norm": norm}


UNUSUAL = (
    *("--optimizer.lr", "1e-3", "--optimizer.weight_decay", "0.02", "--optimizer.beta1", "0.8"),
    *("--optimizer.beta2", "0.95", "--optimizer.eps", "1e-6", "--ema.decay", "0.9", "--ema.warmup", "7"),
)
"""No setting at its default, so that each must arrive at its place."""


@pytest.mark.parametrize("clip_norm", ["0", "0.05", "100"])
@pytest.mark.parametrize("name", ["sit", "vae_repa"])
def test_a_step_against_its_formulas(bench: Bench, name: str, clip_norm: str) -> None:
    run = bench.start(bench.config(name, *UNUSUAL, "--optimizer.clip_norm", clip_norm))
    bench.train(run, 3)  # gates open, moments filled
    run.window.take()
    batch = run.batches.batch(3)
    expected, losses = explicit_step(run, batch)
    start = state_of(run)

    train_step(run, batch)

    measured = run.window.take()
    assert measured.keys() == losses.keys()
    for key, value in losses.items():
        assert measured[key] == pytest.approx(value, rel=1e-5), key
    after = state_of(run)
    for key, wanted in expected.items():
        assert not torch.equal(after[key], start[key]) or bool((wanted == start[key]).all()), f"{key} did not move"
        torch.testing.assert_close(after[key].double(), wanted, rtol=2e-5, atol=2e-7, msg=f"{key} differs")
    assert after.keys() - expected.keys() == {
        *("backbone/pos_embed", "ema/pos_embed"),
        *(key for key in after if key.endswith(".step")),
    }
    assert {float(value) for key, value in after.items() if key.endswith(".step")} == {4.0}
    clipped = losses["grad_norm"] > float(clip_norm) > 0
    assert clipped == (clip_norm == "0.05"), "clipping is active in one case of three"


def test_micro_batches_add_up_to_the_whole_batch(bench: Bench) -> None:
    """5 + 5 + 5 + 1 images give the gradient of 16 (float32 sums in another order), and the same trace."""
    runs = [bench.start(bench.config("vae_repa", "--optimizer.micro_batch", micro)) for micro in ("0", "5")]
    traces = []
    for run in runs:
        assert [len(view.t_N) for view in step_views(run, bench.batch(run))] == (
            [5, 5, 5, 1] if run.config.optimizer.micro_batch else [16]
        )
        traces.append(bench.train(run, 1))
    whole, split = runs
    assert traces[0] == traces[1]
    measured = split.window.take()
    for key, value in whole.window.take().items():
        assert measured[key] == pytest.approx(value, rel=1e-5), key
    states = [state_of(run) for run in runs]
    # The moments are linear and quadratic in the gradient; Adam's quotient would magnify rounding where it is small.
    for key in states[0]:
        if key.endswith(("exp_avg", "exp_avg_sq")):
            scale = float(states[0][key].abs().max())
            torch.testing.assert_close(states[1][key], states[0][key], rtol=1e-4, atol=1e-5 * scale)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["sra", "repa+vae_repa"])
def test_checkpointed_activations_change_no_bit(bench: Bench, name: str, precision: str) -> None:
    """Weights, heads, EMA and moments after three steps of accumulated gradients, and the norms of each loss."""
    states, norms = [], []
    words = ("--optimizer.micro_batch", "8", "--optimizer.clip_norm", "0.05")
    for asked in (False, True):
        run = bench.start(bench.config(name, *words, precision=precision, checkpoint_activations=asked))
        assert run.backbone.checkpoint_activations == asked
        bench.train(run, 3)
        states.append(state_of(run))
        norms.append(gradient_norms(run, bench.batch(run)))
    assert_bitwise(*states)
    assert norms[0] == norms[1] and min(norms[0].values()) > 0


def test_accumulation_reduces_gradients_once(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    run = bench.start(bench.config("sit", "--optimizer.micro_batch", "5"))
    asked: list[bool] = []
    reduced = training_step.gradients_reduced

    def counted(run: Run, last: bool) -> Any:
        asked.append(last)
        return reduced(run, last)

    monkeypatch.setattr(training_step, "gradients_reduced", counted)
    train_step(run, bench.batch(run))
    assert asked == [False, False, False, True]


def test_loss_falls(bench: Bench) -> None:
    run = bench.start(bench.config("vae_repa", "--optimizer.lr", "1.5e-3"))
    losses = []
    for batch in run.batches.batches(0, 60):
        train_step(run, batch)
        losses.append(run.window.take())
    for name in ("base", "terms/vae_repa"):
        first, last = (np.mean([step[name] for step in part]) for part in (losses[:10], losses[-10:]))
        assert last < 0.8 * first, f"{name}: {first} -> {last}"


# -- set-up ---------------------------------------------------------------------------------------------------------


def test_the_initial_weights_are_recorded(bench: Bench) -> None:
    run = bench.start(bench.config("repa"))
    digest = hashlib.sha256()
    for name in sorted(run.backbone.state_dict()):
        digest.update(name.encode() + run.backbone.state_dict()[name].numpy().tobytes())
    assert run.initial_weights == digest.hexdigest()
    other = bench.start(replace(bench.config("repa"), seed=1))
    assert other.initial_weights != run.initial_weights


def test_heads_share_the_optimizers_settings(bench: Bench) -> None:
    run = bench.start(bench.config("vae_repa", *UNUSUAL))
    backbone, heads = run.optimizer.param_groups
    assert [id(p) for p in heads["params"]] == [id(p) for p in run.method.heads.parameters()]
    for group in (backbone, heads):
        shown = {key: group[key] for key in ("lr", "betas", "eps", "weight_decay")}
        assert shown == {"lr": 1e-3, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.02}


def test_a_batch_that_processes_cannot_share_is_refused(bench: Bench) -> None:
    config = bench.config("sit")
    training_step.check_split(config, 4)
    with pytest.raises(UserError, match=r"optimizer\.batch_size is 16: give a multiple of the 3 processes"):
        training_step.check_split(config, 3)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_teacher_is_the_ema_without_gradient(bench: Bench, precision: str) -> None:
    run = bench.run("sra", precision=precision)
    bench.train(run, 2)
    view = step_views(run, bench.batch(run, 2))[0]
    arguments = (view.xt_NCHW, view.t_N, view.labels_N)
    with run.autocast():
        hidden = run.teacher(*arguments, block=3)
        full = run.teacher(*arguments, block=3, full_pass=True)
        fp32 = run.teacher(*arguments, block=3, fp32=True)
    assert torch.equal(hidden, full)
    assert not hidden.requires_grad
    with torch.no_grad():
        expected = run.ema.backbone(*arguments, taps=(3,))[1][3]
        student = run.backbone(*arguments, taps=(3,))[1][3]
    assert torch.equal(fp32, expected)
    assert not torch.equal(fp32, student)
    assert torch.equal(hidden, fp32) == (precision == "fp32"), "bf16 is the run's precision unless fp32 is asked for"


# -- the loop -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("every", "step", "steps", "expected"),
    # (step - steps, step] holds a multiple of `every`
    [(0, 8, 4, False), (3, 4, 4, True), (3, 5, 1, False), (3, 6, 1, True), (10, 9, 9, False), (10, 11, 2, True)],
)
def test_checkpoints_are_due_by_hand(bench: Bench, every: int, step: int, steps: int, expected: bool) -> None:
    config = settings(bench, "sit", checkpoint_every=every)
    assert trainer.is_checkpoint_due(config, step, steps) == expected


def test_records_of_a_run(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clocks, window means, trace and term weights at logged steps 4, 5, 8 and 10."""
    run = bench.start(settings(bench, "vae_repa", "--budget.amount", "10", log_every=4))
    seen: list[dict[str, float]] = []
    add = run.window.add

    def counted(parts: Mapping[str, Tensor]) -> None:
        seen.append({name: float(value) for name, value in parts.items()})
        add(parts)

    monkeypatch.setattr(run.window, "add", counted)
    folder = open_folder(tmp_path / "run")
    happened = [(event.kind, event.step) for event in events(run, folder)]

    stops = [4, 5, 8, 10]
    expected = [("step", step) for step in range(1, 11)]
    for kind, steps in (("eval", [5, 10]), ("train", stops)):
        for step in steps:
            expected.insert(expected.index(("step", step)) + 1, (kind, step))
    assert happened == [*expected, ("end", 10)]
    assert folder.status() == "finished"
    traces, chain = [], b""
    for step in range(10):
        chain = hashlib.sha256(chain + run.batches.batch(step).digest).digest()
        traces.append(chain.hex())
    lines = folder.lines("train")
    assert [line["step"] for line in lines] == stops
    for start, line in zip([0, *stops], lines, strict=False):
        step = line["step"]
        mean = {name: np.mean([parts[name] for parts in seen[start:step]]) for name in seen[0]}
        for name in ("loss", "base", "grad_norm"):
            assert line[name] == pytest.approx(mean[name], rel=1e-5)
        assert line["terms"] == {"vae_repa": {"value": pytest.approx(mean["terms/vae_repa"], rel=1e-5), "weight": 1.0}}
        assert line["images"] == 16 * step
        assert line["train_gflops"] == pytest.approx(16 * step * run.cost.train_gflops_per_image, rel=1e-12)
        assert line["trace"] == traces[step - 1]
        assert line["images_per_s"] > 0
        assert line["diagnostics"].keys() == {"vae_repa_student_norm"}
    seconds = [line["train_seconds"] for line in lines]
    assert seconds == sorted(seconds)
    assert_evaluations(run, folder, lines)


def assert_evaluations(run: Run, folder: RunFolder, lines: list[dict[str, Any]]) -> None:
    clocks = ("step", "images", "train_gflops", "train_seconds")
    found = folder.lines("eval")
    assert [[line[c] for c in clocks] for line in found] == [[lines[i][c] for c in clocks] for i in (1, 3)]
    for line in found:
        assert line["protocol"] == StandIn().digest
        assert line["point"] == (1 if line["step"] == 5 else 2)
        assert line["bad_images"] == 0 and line["evaluation_images_per_s"] == {"sampling": 8.0}
        assert line["gradient_norms"].keys() == {"velocity", "vae_repa"}
        assert (folder.path / line["samples"]).is_file()
        saved, _ = checkpoint.load_ema(folder.checkpoints, line["step"])
        assert line["metrics"]["velocity_loss"] == pytest.approx(sum(float(v.double().sum()) for v in saved.values()))
    assert [path.name for path in checkpoint.whole(folder.checkpoints)] == ["step_00000010"]
    assert_bitwise(checkpoint.load_ema(folder.checkpoints)[0], run.ema.backbone.state_dict())


def test_a_term_that_ends_within_a_window_is_still_logged(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A method may end a term by its schedule; the line holds its mean over the steps that had it."""
    run = bench.start(settings(bench, "vae_repa", "--budget.amount", "4", points=1, log_every=4))
    terms = run.method.terms
    values: list[float] = []

    def until_step_2(view: Any, hidden: Any) -> dict[str, Term]:
        if view.progress.step >= 2:
            return {}
        made = terms(view, hidden)
        values.append(float(made["vae_repa"].value.detach()))
        return made

    monkeypatch.setattr(run.method, "terms", until_step_2)
    folder = open_folder(tmp_path / "run")
    list(events(run, folder))
    (line,) = folder.lines("train")
    assert line["terms"]["vae_repa"] == {"value": pytest.approx(np.mean(values[:2]), rel=1e-6), "weight": 1.0}


def test_gradient_norms_by_a_backward_pass_each(bench: Bench) -> None:
    run = bench.start(bench.config("vae_repa", "--vae_repa.weight", "0.3"))
    bench.train(run, 3)
    batch = run.batches.batch(3)
    expected = {}
    for name, weight in (("base", 1.0), ("terms/vae_repa", 0.3)):
        run.module.zero_grad()
        (weight * explicit_losses(run, batch)[name]).backward()
        gradients = [p.grad for p in run.backbone.parameters() if p.grad is not None]
        expected[name] = math.sqrt(sum(float(g.double().square().sum()) for g in gradients))
    run.module.zero_grad()
    norms = gradient_norms(run, batch)
    assert norms["velocity"] == pytest.approx(expected["base"], rel=1e-5)
    assert norms["vae_repa"] == pytest.approx(expected["terms/vae_repa"], rel=1e-5)
    assert all(p.grad is None for p in run.module.parameters()), "measuring leaves no gradient behind"


def test_measuring_leaves_training_as_it_was(bench: Bench, tmp_path: Path) -> None:
    """Logging and evaluating at every step, or at the end alone, gives the same bits."""
    states = []
    for log_every, points in ((1, 6), (50, 1)):
        run = bench.start(settings(bench, "sra", "--budget.amount", "6", points=points, log_every=log_every))
        list(events(run, open_folder(tmp_path / str(log_every))))
        states.append(state_of(run))
    assert_bitwise(*states)


@pytest.mark.parametrize(
    ("unit", "amount", "stops"), [("images", 100, [4, 7]), ("train_gflops", None, [4, 7]), ("seconds", 1e-9, [1])]
)
def test_budgets_end_where_their_unit_says(
    bench: Bench, tmp_path: Path, unit: str, amount: float | None, stops: list[int]
) -> None:
    """16 images a step, two evaluations; 6.5 steps' worth of GFLOPs; a budget of no time is one step."""
    cost = bench.start(settings(bench, "sra")).cost.train_gflops_per_image
    words = ("--budget.unit", unit, "--budget.amount", repr(amount or 6.5 * 16 * cost))
    run = bench.start(settings(bench, "sra", *words, log_every=50))
    folder = open_folder(tmp_path / "run")
    happened = list(events(run, folder))
    assert [line["step"] for line in folder.lines("train")] == stops
    assert [(line["step"], line["point"]) for line in folder.lines("eval")] == list(
        zip(stops, (1, 2) if len(stops) == 2 else (2,), strict=True)
    )
    assert happened[-1].kind == "end" and happened[-1].share == 1.0
    shares = [event.share for event in happened if event.kind == "step"]
    assert shares == sorted(shares) and all(0 < share <= 1 for share in shares)


def test_a_budget_in_seconds_goes_on_where_it_stopped(bench: Bench, tmp_path: Path) -> None:
    """The time before the interruption counts, and no point is evaluated twice."""
    config = settings(bench, "sit", "--budget.unit", "seconds", "--budget.amount", "1.5", points=3, log_every=10_000)
    folder = open_folder(tmp_path / "run")
    stopped = events(bench.start(config), folder)
    next(event for event in stopped if event.kind == "eval")
    next(event for event in stopped if event.kind == "step")
    stopped.close()
    run = bench.start(config)
    step = resume(run, recorder_of(run, folder))
    assert step == folder.lines("eval")[0]["step"] and 0.5 <= run.counters.train_seconds < 1.0
    list(events(run, folder))
    lines = folder.lines("eval")
    assert [line["point"] for line in lines] == [1, 2, 3]
    assert 1.5 <= lines[-1]["train_seconds"] < 2.5


def test_time_is_booked_to_what_took_it(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that runs only inside training steps, evaluations and writing, at 1, 100 and 10,000 seconds a call."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def slow(function: Any, seconds: float) -> Any:
        def slowed(*arguments: Any) -> Any:
            now[0] += seconds
            return function(*arguments)

        return slowed

    monkeypatch.setattr(trainer, "train_step", slow(trainer.train_step, 1))
    monkeypatch.setattr(StandIn, "evaluate", slow(StandIn.evaluate, 100))
    monkeypatch.setattr(checkpoint, "save", slow(checkpoint.save, 10_000))
    run = bench.start(settings(bench, "sit", "--budget.amount", "4", log_every=1))
    folder = open_folder(tmp_path / "run")
    list(events(run, folder))
    clocks = ("train_seconds", "evaluation_seconds", "io_seconds")
    found = [tuple(line[clock] for clock in clocks) for line in folder.lines("train")]
    assert found == [(1, 0, 0), (2, 0, 0), (3, 100, 10_000), (4, 100, 10_000)]
    assert [tuple(line[clock] for clock in clocks) for line in folder.lines("eval")] == [(2, 100, 0), (4, 200, 10_000)]
    assert [line["images_per_s"] for line in folder.lines("train")] == [16.0] * 4


# -- divergence -----------------------------------------------------------------------------------------------------


def poison(run: Run, bad_step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the method's term NaN from a step on."""
    terms = run.method.terms

    def poisoned(view: Any, hidden: Any) -> dict[str, Term]:
        made = terms(view, hidden)
        bad = math.nan if view.progress.step >= bad_step else 1.0
        return {name: Term(term.value * bad, term.weight) for name, term in made.items()}

    monkeypatch.setattr(run.method, "terms", poisoned)


# The bad step is the first of all, inside a window of four, and the first after a logged step.
@pytest.mark.parametrize("bad_step", [0, 5, 8])
def test_a_step_that_is_not_finite_stops_the_run_before_it(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bad_step: int
) -> None:
    config = settings(bench, "vae_repa", "--budget.amount", "24", log_every=4)
    clean = bench.start(config)
    trace = bench.train(clean, bad_step)
    run = bench.start(config)
    poison(run, bad_step, monkeypatch)
    folder = open_folder(tmp_path / "run")

    end = list(events(run, folder))[-1]

    assert (end.kind, end.step, end.record["status"]) == ("end", bad_step, "diverged")
    manifest = folder.manifest()
    name = f"checkpoints/diverged_{bad_step:08d}"
    assert manifest["status"] == "diverged"
    parts = ["loss", "terms/vae_repa", "grad_norm"]
    assert manifest["status_detail"] == {"step": bad_step, "parts": parts, "checkpoint": name}
    logged = [step for step in (4, 8) if step <= bad_step]
    assert [line["step"] for line in folder.lines("train")] == logged, "no line holds a step that was not finite"
    if bad_step:
        assert_bitwise(state_of(run), state_of(clean))

    groups, counters = checkpoint.load(folder.path / name)
    assert (counters.step, counters.trace) == (bad_step, trace)
    again = bench.start(config)
    poison(again, bad_step, monkeypatch)
    restore(again, groups)
    assert_bitwise(without_optimizer(again), without_optimizer(clean))
    train_step(again, again.batches.batch(bad_step))
    divergence = again.guard.found()
    assert divergence is not None
    assert (divergence.step, list(divergence.parts)) == (bad_step, parts)


def without_optimizer(run: Run) -> dict[str, Tensor]:
    return {name: value for name, value in state_of(run).items() if not name.startswith("optimizer/")}


def restore(run: Run, groups: Mapping[str, Mapping[str, Tensor]]) -> None:
    run.backbone.load_state_dict(groups["backbone"])
    run.method.heads.load_state_dict(groups["heads"])
    run.ema.backbone.load_state_dict(groups["ema"])
    checkpoint.restore_optimizer(run.optimizer, groups["optimizer"])


def test_samples_that_are_not_finite_end_the_run(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training may stay finite while the sampler does not: the state that made the samples is kept."""
    run = bench.start(settings(bench, "vae_repa", "--budget.amount", "8", log_every=3))

    def evaluate(self: StandIn, backbone: torch.nn.Module) -> Evaluation:
        grid = np.zeros((3, 4, 4, 3), np.uint8)
        return Evaluation(metrics={"velocity_loss": 1.0}, grid=grid, bad_images=2, images_per_s={})

    monkeypatch.setattr(StandIn, "evaluate", evaluate)
    folder = open_folder(tmp_path / "run")
    happened = list(events(run, folder))
    assert [(event.kind, event.step) for event in happened[-2:]] == [("eval", 4), ("end", 4)]
    name = "checkpoints/diverged_00000004"
    assert folder.manifest()["status"] == "diverged"
    assert folder.manifest()["status_detail"] == {"step": 4, "parts": ["samples"], "checkpoint": name}
    assert [line["bad_images"] for line in folder.lines("eval")] == [2]
    groups, counters = checkpoint.load(folder.path / name)
    assert (counters.step, counters.trace) == (4, folder.lines("train")[-1]["trace"])
    assert_bitwise(groups["ema"], run.ema.backbone.state_dict())


def test_samples_of_the_end_that_are_not_finite_are_a_divergence(bench: Bench, tmp_path: Path) -> None:
    class Bad(StandIn):
        def evaluate(self, backbone: torch.nn.Module) -> Evaluation:
            return replace(super().evaluate(backbone), bad_images=1)

    run, folder = bench.start(settings(bench, "sit", "--budget.amount", "2")), open_folder(tmp_path / "run")
    happened = list(events(run, folder, final=Bad("f")))
    assert [(event.kind, event.step) for event in happened[-2:]] == [("final", 2), ("end", 2)]
    assert folder.status() == "diverged"
    assert [line["bad_images"] for line in folder.lines("final")] == [1]
    assert folder.manifest()["status_detail"]["parts"] == ["samples"]


def test_a_gradient_that_is_not_finite_is_found_as_well(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """A finite loss with an infinite slope: sqrt at 0."""
    run = bench.start(bench.config("vae_repa"))
    bench.train(run, 2)
    before = state_of(run)
    terms = run.method.terms

    def steep(view: Any, hidden: Any) -> dict[str, Term]:
        (name, term), *_ = terms(view, hidden).items()
        return {name: Term((term.value - term.value.detach()).sqrt(), term.weight)}

    monkeypatch.setattr(run.method, "terms", steep)
    train_step(run, run.batches.batch(2))
    divergence = run.guard.found()
    assert divergence is not None
    assert (divergence.step, divergence.parts) == (2, ("grad_norm",))
    assert_bitwise(state_of(run), before)


class OnDevice(Tensor):
    """A flag that says it lies on a GPU, where it may not be read back."""

    device = torch.device("cuda")

    def __bool__(self) -> bool:
        raise AssertionError("the flag was read back")


@pytest.mark.parametrize("stopped", [0.0, 1.0])
def test_the_optimiser_reads_the_flag_where_it_lies(stopped: float) -> None:
    """On a device the fused optimiser masks the update itself; on the CPU the update is left out. The same bits."""
    states = []
    for flag in (torch.tensor(stopped), torch.tensor(stopped).as_subclass(OnDevice)):
        weight = torch.nn.Parameter(torch.linspace(-1, 1, 5))
        optimizer = torch.optim.AdamW([weight], lr=0.1, fused=True)
        for step in range(3):
            weight.grad = torch.cos(torch.arange(5.0) + step) if step < 2 or not stopped else torch.full((5,), math.nan)
            training_step.update_weights(optimizer, flag if step == 2 else torch.zeros(()))
            assert weight.grad is None
        states.append({"weight": weight.detach().clone(), **checkpoint.optimizer_tensors(optimizer)})
    assert_bitwise(*states)
    assert float(states[0]["0.step"]) == (2 if stopped else 3)
    assert bool(states[0]["weight"].isfinite().all())


# -- continuing -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sra", "repa+vae_repa"])
def test_a_continued_run_equals_an_uninterrupted_one(bench: Bench, tmp_path: Path, name: str) -> None:
    """Stopped after step 7 of 12, with records and half a line beyond the checkpoint of step 6."""
    config = settings(bench, name, "--budget.amount", "12", log_every=1, checkpoint_every=3)
    whole, straight = bench.start(config), open_folder(tmp_path / "whole")
    list(events(whole, straight))

    folder = open_folder(tmp_path / "parts")
    stopped = events(bench.start(config), folder)
    for event in stopped:
        if (event.kind, event.step) == ("train", 7):
            break
    stopped.close()
    assert [line["step"] for line in folder.lines("train")] == [1, 2, 3, 4, 5, 6, 7]
    with (folder.path / "train.jsonl").open("a") as lines:
        lines.write('{"step":8,"loss"')
    run = bench.start(config)

    assert resume(run, recorder_of(run, folder)) == 6
    assert [line["step"] for line in folder.lines("train")] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in folder.lines("eval")] == [6]
    list(events(run, folder))

    assert_bitwise(state_of(run), state_of(whole))
    for file in ("train", "eval"):
        assert records(folder, file) == records(straight, file)
    kept = [checkpoint.load(checkpoint.whole(f.checkpoints)[-1]) for f in (folder, straight)]
    assert kept[0][1].trace == kept[1][1].trace
    assert folder.status() == "finished"


def test_the_end_has_a_protocol_of_its_own(bench: Bench, tmp_path: Path) -> None:
    """Stopped between the last point and the final evaluation: that alone is left to do, and it is done once."""
    config = settings(bench, "sit", "--budget.amount", "4", log_every=2)
    folder = open_folder(tmp_path / "run")
    stopped = events(bench.start(config), folder, final=StandIn("f"))
    for event in stopped:
        if event.kind == "final":
            break
    stopped.close()
    for expected in (["final", "end"], ["end"]):
        run = bench.start(config)
        assert resume(run, recorder_of(run, folder)) == 4
        if expected[0] == "final":
            (folder.path / "final.jsonl").unlink()
        assert [event.kind for event in events(run, folder, final=StandIn("f"))] == expected

    (line,), last = folder.lines("final"), folder.lines("eval")[-1]
    assert line.keys() == last.keys() - {"gradient_norms"}
    assert (line["protocol"], line["point"], line["step"]) == ("f" * 64, 2, 4)
    assert line["metrics"] == last["metrics"]
    assert (line["train_seconds"], line["samples"]) == (last["train_seconds"], "samples/final_00000004.png")
    assert (folder.path / line["samples"]).is_file() and folder.status() == "finished"


def test_what_a_checkpoint_holds_is_in_mlflow(bench: Bench, tmp_path: Path) -> None:
    """A continued run logs nothing before its checkpoint again, so no point may still be waiting then."""
    run = bench.start(settings(bench, "sit", "--budget.amount", "6", log_every=1, checkpoint_every=2))
    folder = open_folder(tmp_path / "run")
    feed = Feed(run.config.output, folder)
    waiting: list[int] = []
    sent: dict[int, list[int]] = {}

    def flush() -> None:
        (newest,) = checkpoint.whole(folder.checkpoints)
        sent[int(newest.name.removeprefix("step_"))] = sorted(set(waiting))
        waiting.clear()

    feed.add = lambda name, record: waiting.append(record["step"])  # type: ignore[method-assign]
    feed.flush = flush  # type: ignore[method-assign]
    stopped = events(run, folder, feed)
    next(event for event in stopped if (event.kind, event.step) == ("step", 6))
    stopped.close()
    assert sent == {2: [1, 2], 3: [3], 4: [4]}


def test_the_trained_time_goes_on(bench: Bench, tmp_path: Path) -> None:
    config = settings(bench, "sit", "--budget.amount", "4", log_every=1, checkpoint_every=1)
    folder = open_folder(tmp_path / "run")
    stopped = events(bench.start(config), folder)
    next(event for event in stopped if (event.kind, event.step) == ("train", 3))
    stopped.close()
    run = bench.start(config)
    resume(run, recorder_of(run, folder))
    list(events(run, folder))
    seconds = [line["train_seconds"] for line in folder.lines("train")]
    assert len(seconds) == 4
    assert all(a < b for a, b in itertools.pairwise(seconds))


def test_without_a_checkpoint_a_run_begins_anew(bench: Bench, tmp_path: Path) -> None:
    config = settings(bench, "sit", "--budget.amount", "4", log_every=1)
    folder = open_folder(tmp_path / "run")
    folder.append("train", train_line(1, loss=9.0))
    run = bench.start(config)
    assert resume(run, recorder_of(run, folder)) == 0
    assert folder.lines("train") == []


@pytest.mark.parametrize("keep", [1, 2])
def test_a_damaged_checkpoint_is_passed_over_when_a_run_continues(bench: Bench, tmp_path: Path, keep: int) -> None:
    """It goes on from the checkpoint before it, or from the start, to the same bits."""
    config = settings(bench, "sit", "--budget.amount", "4", log_every=1, keep_checkpoints=keep)
    whole, straight = bench.start(config), open_folder(tmp_path / "whole")
    list(events(whole, straight))
    folder = open_folder(tmp_path / "run")
    list(events(bench.start(config), folder))
    file = folder.checkpoints / "step_00000004" / "ema.safetensors"
    file.write_bytes(file.read_bytes()[:-8])

    run = bench.start(config)
    assert resume(run, recorder_of(run, folder)) == (0, 2)[keep - 1]
    assert run.notices[0] == f"{file} is damaged: its checkpoint is set aside as .step_00000004.damaged"
    list(events(run, folder))

    assert_bitwise(state_of(run), state_of(whole))
    for name in ("train", "eval"):
        assert records(folder, name) == records(straight, name)
    assert not list(folder.checkpoints.glob(".*"))
