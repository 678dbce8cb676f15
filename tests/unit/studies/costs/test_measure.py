"""Measured cost: turns and warm-up by a fake clock, ratios by hand, the trainer's own step, memory of known size.

Shapes: N images, C channels, H W height and width, T tokens, Z encoder width.
"""

import itertools
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import methods
from harness.backbones.sit import SiT
from harness.config import RuntimeConfig
from harness.data.batches import Batch
from harness.errors import UserError
from harness.frozen.encoders import FrozenEncoder
from harness.machine import environment, ram
from harness.machine.processes import open_accelerator
from harness.method import Needs
from harness.training.step import Run, train_step
from studies import children
from studies.costs import measure, timing
from studies.costs import peaks as costs_peaks
from studies.costs import stands as costs_stands
from studies.costs.stands import Case, Conditions, Stand, Workload
from studies.costs.synthetic import prepared_data
from studies.costs.timing import Ratio, Spread, TimeLeft

SMALL = Workload(batch_size=4, rounds=6, warmup=1, input_size=4, num_classes=5, image_size=32)
ENCODER = "dinov2_vits14"


@pytest.fixture
def conditions() -> Conditions:
    runtime = environment.resolve_runtime(RuntimeConfig(device="cpu", precision="fp32", threads=1))
    return Conditions(runtime, open_accelerator(runtime), SMALL)


def case(method: str, label: str = "", model: str = "SiT-pico/2", targets: Any = "cached", **fields: Any) -> Case:
    sections = {method: methods.load(method).Config(**fields)}
    return Case(model=model, label=label or method, method=method, sections=sections, targets=targets)


def silent(what: str, done: int, total: int) -> None:
    pass


def no_progress(steps: int = 1000) -> TimeLeft:
    return TimeLeft(silent, [1.0] * steps)


def state_of(run: Run) -> dict[str, Tensor]:
    parts = {"module": run.module.state_dict(), "ema": run.ema.backbone.state_dict()}
    return {f"{part}/{name}": value.clone() for part, values in parts.items() for name, value in values.items()}


# -- turns ----------------------------------------------------------------------------------------------------------


class FakeClock:
    """Seconds that pass only when something is done."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class FakeStand:
    """Takes `seconds` a step in round 0, 1, ...; drawing a batch takes 1000, a forward pass a tenth of a step."""

    def __init__(self, name: str, seconds: list[float], clock: FakeClock, log: list[str]) -> None:
        self.name, self.work = name, 1.0
        self._seconds, self._clock, self._log, self._number = seconds, clock, log, -1

    def batch(self, number: int) -> Batch:
        self._number = number
        self._clock.now += 1000
        return None  # type: ignore[return-value]

    def step(self, batch: Batch) -> None:
        self._log.append(f"{self.name}{self._number}")
        self._clock.now += self._seconds[self._number]

    def forward(self) -> None:
        self._clock.now += self._seconds[self._number] / 10


def test_cases_take_turns_and_warm_up_rounds_do_not_count() -> None:
    clock, log = FakeClock(), list[str]()
    stands = [
        FakeStand("A", [99, 98, 1, 2, 3, 4, 5, 6], clock, log),
        FakeStand("B", [97, 96, 2, 6, 3, 8, 10, 3], clock, log),
        FakeStand("C", [95, 94, 7, 7, 7, 7, 7, 7], clock, log),
    ]
    times = timing.time_rounds(stands, replace(SMALL, warmup=2, rounds=6), clock, no_progress())
    assert log == [f"{name}{number}" for number in range(8) for name in "ABC"]
    assert [own.steps for own in times] == [[1, 2, 3, 4, 5, 6], [2, 6, 3, 8, 10, 3], [7] * 6]
    assert times[2].forwards == pytest.approx([0.7] * 6) and times[0].forwards[5] == pytest.approx(0.6)
    # Rounds of B over A: 2, 3, 1, 2, 2, 0.5. Six of them are enclosed by the least and the most.
    assert timing.paired_ratio(times[1].steps, times[0].steps) == Ratio(2, 0.5, 3)
    assert timing.paired_ratio(times[0].steps, times[0].steps) == Ratio(1, 1, 1)
    assert timing.spread_ms(times[1].steps) == Spread(4500, 2000, 10000)  # 2 3 3 6 8 10


def test_a_slow_phase_of_the_machine_leaves_paired_ratios_alone() -> None:
    clock, slow = FakeClock(), [1.0, 1.0, 1.0, 5.0, 20.0, 5.0, 1.0]
    stands = [FakeStand(name, [own * s for s in slow], clock, []) for name, own in (("A", 2.0), ("B", 3.0))]
    a, b = timing.time_rounds(stands, SMALL, clock, no_progress())
    assert timing.paired_ratio(b.steps, a.steps) == Ratio(1.5, 1.5, 1.5)


def test_the_clock_is_read_after_the_device_has_finished(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[Any] = []
    monkeypatch.setattr(timing, "synchronize", lambda device: log.append(device))
    monkeypatch.setattr(timing.time, "perf_counter", lambda: log.append("read") or 7.0)
    assert timing.synced_clock(torch.device("cuda:1"))() == 7.0
    assert log == [torch.device("cuda:1"), "read"]


@pytest.mark.parametrize(("n", "rank"), [(6, 1), (8, 1), (9, 2), (10, 2), (12, 3), (20, 6), (50, 18), (100, 40)])
def test_ranks_of_the_interval_are_those_of_the_tables(n: int, rank: int) -> None:
    """95% ranks for a median, as in tables of the sign test (n = 20: 6th and 15th; 50: 18th and 33rd)."""
    values = np.random.default_rng(n).permutation(n).tolist()
    assert timing.median_interval(values) == (rank - 1, n - rank)


@pytest.mark.parametrize(("n", "misses"), [(6, 2), (9, 20), (10, 22)])
def test_the_interval_holds_the_median_as_often_as_it_says(n: int, misses: int) -> None:
    """Over all 2^n ways in which n values can lie below and above a median of 0."""
    missed = 0
    for signs in itertools.product((-1, 1), repeat=n):
        low, high = timing.median_interval([sign * (index + 1) for index, sign in enumerate(signs)])
        missed += not low <= 0 <= high
    assert missed == misses and misses / 2**n <= 0.05


def test_too_few_rounds_are_refused() -> None:
    with pytest.raises(UserError, match="rounds is 5: give 6 or more"):
        Workload(rounds=5)
    with pytest.raises(UserError, match="warmup is -1: give 1 or more rounds"):
        Workload(warmup=-1)
    with pytest.raises(UserError, match="batch_size is -1: give 1 or more images"):
        Workload(batch_size=-1)
    sizes = [Workload().resolved(torch.device(name)) for name in ("cpu", "cuda")]
    assert [(s.batch_size, s.rounds, s.warmup) for s in sizes] == [(8, 6, 1), (32, 50, 5)]
    asked = Workload(batch_size=3, rounds=7, warmup=2)
    assert asked.resolved(torch.device("cuda")) == asked


def test_time_left_goes_by_work_and_the_speed_so_far() -> None:
    clock, told = FakeClock(), list[tuple[str, int, int]]()
    progress = TimeLeft(lambda *line: told.append(line), [2, 2, 6, 30], clock)
    clock.now += 4
    progress.tell("a", 2)  # 2 seconds a unit, 38 left
    clock.now += 20
    progress.tell("b", 2)  # 6 seconds a unit, 36 left
    progress.tell("c", 6)
    progress.tell("d", 30)
    assert told == [("a, 1:16 left", 1, 4), ("b, 3:36 left", 2, 4), ("c, 1:12 left", 3, 4), ("d, 0:00 left", 4, 4)]


# -- what is timed --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", methods.names())
def test_the_timed_step_is_the_trainers(conditions: Conditions, name: str) -> None:
    """Weights, heads and EMA after three timed steps with forward passes between, and after three of `train_step`."""
    stand, run = Stand(conditions, case(name)), conditions.run(case(name))
    start = state_of(run)
    assert stand.run.config == run.config and run.config.method == name
    for number in range(3):
        stand.step(stand.batch(number))
        stand.forward()
        train_step(run, run.batches.batch(number))
    timed, trained = state_of(stand.run), state_of(run)
    assert timed.keys() == trained.keys()
    assert all(torch.equal(timed[key], trained[key]) for key in trained)
    moved = {key.split("/")[0] for key in trained if not torch.equal(trained[key], start[key])}
    assert moved == {"module", "ema"}


def test_online_encoders_run_inside_the_step(conditions: Conditions, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each step: one pass over the batch's images, and these are the tokens that the method is given."""
    made: list[Tensor] = []
    forward = FrozenEncoder.forward

    def counted(self: FrozenEncoder, images_NCHW: Tensor) -> Tensor:
        assert images_NCHW.shape == (4, 3, 32, 32) and images_NCHW.dtype == torch.uint8
        made.append(forward(self, images_NCHW))
        return made[-1]

    monkeypatch.setattr(FrozenEncoder, "forward", counted)
    stand = Stand(conditions, case("repa", targets="online", encoders=f"{ENCODER},efficientnet_lite0"))
    given: list[Tensor] = []
    terms = stand.run.method.terms

    def seen(view: Any, hidden: Any) -> Any:
        given.extend(view.tokens[name] for name in (ENCODER, "efficientnet_lite0"))
        return terms(view, hidden)

    monkeypatch.setattr(stand.run.method, "terms", seen)
    batch = stand.batch(0)
    assert made == []
    stand.step(batch)
    assert [value.shape for value in made] == [(4, 4, 384), (4, 4, 1280)]
    assert all(torch.equal(a, b) for a, b in zip(made, given, strict=True))
    stand.step(stand.batch(1))
    assert len(made) == 4
    stand.forward()
    assert len(made) == 4, "sampling needs no encoder"


def test_cached_tokens_come_with_the_batch(conditions: Conditions, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FrozenEncoder, "untrained", None)
    stand = Stand(conditions, case("repa", encoders=ENCODER))
    batch = stand.batch(0)
    stand.step(batch)
    assert batch.tokens[ENCODER].shape == (4, 4, 384) and batch.tokens[ENCODER].dtype == torch.float16


def test_forward_latency_is_one_pass_of_the_sampled_network(
    conditions: Conditions, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand = Stand(conditions, case("sra"))
    calls: list[tuple[SiT, int, bool, bool]] = []
    forward = SiT.forward

    def watched(self: SiT, x: Tensor, t: Tensor, y: Tensor, **taps: Any) -> Any:
        calls.append((self, len(x), torch.is_grad_enabled(), self.training))
        return forward(self, x, t, y, **taps)

    monkeypatch.setattr(SiT, "forward", watched)
    stand.forward()
    assert calls == [(stand.run.ema.backbone, 4, False, False)]


def test_made_up_data_has_the_shapes_of_a_cache_and_is_the_same_every_time(conditions: Conditions) -> None:
    shape = conditions.shape(conditions.config(case("sit")))
    needs = Needs(images=True, encoders=(ENCODER,))
    one, two = (prepared_data(shape, conditions.data, needs, 3) for _ in range(2))
    assert one.moments.shape == (3, 8, 4, 4) and one.tokens[ENCODER].shape == (3, 4, 384)
    rows = np.array([2, 0])
    assert np.array_equal(one.moments.rows(rows), two.moments.rows(rows)) and (one.moments.rows(rows)[:, 4:] >= 0).all()
    assert one.images.rows(rows).shape == (2, 32, 32, 3) and one.images.rows(rows).dtype == np.uint8


# -- the whole ------------------------------------------------------------------------------------------------------


def test_rows_stand_by_model_and_the_controls_ratio_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a step of 3 seconds for the larger model's control, as the machine would have it, and 6 for the other."""
    clock = FakeClock()
    seconds = {("SiT-nano/2", "control"): 3.0, ("SiT-nano/2", "other"): 6.0, ("SiT-pico/2", "control"): 0.5}

    def step(self: Stand, batch: Batch) -> None:
        model, _, label = self.name.partition(" ")
        clock.now += seconds[model, label]

    def forward(self: Stand) -> None:
        clock.now += 0.25

    monkeypatch.setattr(Stand, "step", step)
    monkeypatch.setattr(Stand, "forward", forward)
    monkeypatch.setattr(measure, "synced_clock", lambda device: clock)
    monkeypatch.setattr(measure, "peak_bytes", lambda conditions, case: 2_500_000_000)
    cases = [case("vae_repa", "other", "SiT-nano/2"), case("sit", "control"), case("sit", "control", "SiT-nano/2")]
    told: list[int] = []
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    runtime = RuntimeConfig(device="cpu", precision="fp32", threads=threads)

    rows = measure.measure(cases, runtime, lambda what, done, total: told.append(total - done), SMALL)

    assert [(row.model, row.label) for row in rows] == [
        *(("SiT-nano/2", "other"), ("SiT-nano/2", "control"), ("SiT-pico/2", "control")),
    ]
    other, control, small = rows
    assert other.step_ms == Spread(6000, 6000, 6000) and other.forward_ms == Spread(250, 250, 250)
    assert other.images_per_s == 4 / 6 and small.images_per_s == 8
    assert other.ratio == Ratio(2, 2, 2) and control.ratio == small.ratio == Ratio(1, 1, 1)
    assert [row.peak_memory_gb for row in rows] == [2.5, 2.5, 2.5]
    assert (other.batch, other.precision, other.threads, other.rounds) == (4, "fp32", threads, 6)
    assert other.method == "vae_repa" and other.device.startswith("cpu")
    assert told == list(reversed(range(3 + 3 * 7))), "a line for each memory, and for each case in each of 7 rounds"
    assert torch.equal(torch.get_rng_state(), before)


def test_a_model_without_its_control_is_refused_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "measure_model", None)
    cases = [case("sit"), case("sra"), case("sra", model="SiT-nano/2")]
    with pytest.raises(UserError, match=r"SiT-nano/2 has no row to compare with: measure sit beside"):
        measure.measure(cases, RuntimeConfig(device="cpu", threads=torch.get_num_threads()), silent, SMALL)


# -- memory ---------------------------------------------------------------------------------------------------------


def test_a_row_adds_weights_and_moments_of_its_heads_alone(conditions: Conditions) -> None:
    """Bytes of all that three rows hold between steps, against those of one row and the heads of the others."""
    stands = costs_stands.stands_of(conditions, [case("sit"), case("repa", encoders=ENCODER), case("vae_repa")])
    for stand in stands:
        stand.step(stand.batch(1))

    def held(*runs: Run) -> int:
        values = [value for run in runs for value in (*run.module.parameters(), *run.ema.backbone.parameters())]
        values += [value for run in runs for state in run.optimizer.state.values() for value in state.values()]
        return sum({v.untyped_storage()._cdata: v.untyped_storage().nbytes() for v in values}.values())

    runs = [stand.run for stand in stands]
    counters = 4 * sum(len(list(run.method.heads.parameters())) for run in runs)  # AdamW's step of each tensor
    heads = sum(costs_peaks.heads_bytes(run.method) for run in runs)
    assert heads > 0 and held(*runs) == held(runs[0]) + heads + counters


def test_rows_of_a_model_train_its_one_backbone_in_turns(conditions: Conditions) -> None:
    """One step of the first, then of the second, as if the second had been loaded with what the first left."""
    first, second = costs_stands.stands_of(conditions, [case("sit"), case("vae_repa")])
    alone, loaded = conditions.run(case("sit")), conditions.run(case("vae_repa"))
    train_step(alone, alone.batches.batch(0))
    assert all(torch.equal(value, state_of(alone)[key]) for key, value in state_of(first.run).items())
    loaded.backbone.load_state_dict(alone.backbone.state_dict())
    loaded.ema.backbone.load_state_dict(alone.ema.backbone.state_dict())
    groups = [run.optimizer.state_dict() for run in (alone, loaded)]
    loaded.optimizer.load_state_dict({"state": groups[0]["state"], "param_groups": groups[1]["param_groups"]})

    second.step(second.batch(1))
    train_step(loaded, loaded.batches.batch(1))
    assert all(torch.equal(value, state_of(loaded)[key]) for key, value in state_of(second.run).items())
    backbone = [key for key in state_of(first.run) if "heads" not in key]
    assert all(torch.equal(state_of(first.run)[key], state_of(loaded)[key]) for key in backbone)


@pytest.mark.parametrize(
    ("names", "setting", "share", "message"),
    [
        (["sit"], SMALL, 0.9, "weights, moments and EMA take .*: choose a smaller model"),
        (["sit", *2 * ["repa"], "vae_repa"], SMALL, 2, "heads of the other rows .*: name fewer methods at a time"),
        (["sit"], replace(SMALL, batch_size=10_000), 3, "of a forward pass take .*: lower batch_size"),
    ],
)
def test_what_does_not_fit_is_refused(
    conditions: Conditions,
    monkeypatch: pytest.MonkeyPatch,
    names: list[str],
    setting: Workload,
    share: float,
    message: str,
) -> None:
    """Free: `share` times what the weights of one case need in a step."""
    group, conditions = [case(name) for name in names], replace(conditions, setting=setting)
    one = 20 * sum(p.numel() for p in conditions.run(group[0]).backbone.parameters() if p.requires_grad)
    monkeypatch.setattr(ram, "free_ram", lambda: int(share * one))
    with pytest.raises(UserError, match=f"^not enough memory: .*{message}$"):
        costs_peaks.check_memory(conditions, group)
    monkeypatch.setattr(ram, "free_ram", lambda: 1000 * one)
    costs_peaks.check_memory(conditions, group)


def allocate(num_bytes: int) -> int:
    """How far this process's peak rises when it fills an array that is then dropped."""
    before = costs_peaks.most_bytes(torch.device("cpu"))
    np.ones(num_bytes, dtype=np.uint8)
    return costs_peaks.most_bytes(torch.device("cpu")) - before


def test_memory_of_a_known_allocation() -> None:
    assert children.in_own_process(allocate, 300_000_000) == pytest.approx(300_000_000, rel=0.02)


def test_memory_of_a_case_grows_by_what_its_head_needs(conditions: Conditions) -> None:
    """4 numbers a weight (weight, gradient, two moments) of a head of 64 -> W -> W -> 16, at next to no activations."""
    peaks = []
    for width in (64, 4000):
        asked = case("vae_repa", head_layers=3, head_width=width)
        peaks.append(costs_peaks.peak_bytes(conditions, asked))
    weights = {width: (64 + 1) * width + (width + 1) * width + (width + 1) * 16 for width in (64, 4000)}
    expected = 16 * (weights[4000] - weights[64])
    assert expected > 250_000_000
    assert peaks[1] - peaks[0] == pytest.approx(expected, rel=0.05)


def test_memory_on_cuda_is_read_from_its_counters(conditions: Conditions, monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process, from a reset after the tiny run on."""
    log: list[str] = []
    levels = iter([700, 5700])

    def peak(device: torch.device) -> int:
        log.append("read")
        return next(levels)

    accelerator = type("OnCuda", (), {"device": torch.device("cuda")})()
    monkeypatch.setattr(costs_peaks, "open_accelerator", lambda runtime: accelerator)
    monkeypatch.setattr(
        costs_peaks, "train_some", lambda conditions, case: log.append(f"{case.model}: {conditions.setting.batch_size}")
    )
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: log.append("reset"))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", peak)
    on_cuda = replace(conditions, accelerator=accelerator)
    assert costs_peaks.peak_bytes(on_cuda, case("sra", model="SiT-S/4")) == 5000
    assert log == ["SiT-pico/4: 1", "reset", "read", "SiT-S/4: 4", "read"]


def refuse() -> None:
    raise UserError("sizes do not fit")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    ("function", "message"), [(refuse, "^sizes do not fit"), (die, "killed by SIGKILL .*: lower batch_size")]
)
def test_what_goes_wrong_in_the_other_process_is_told(function: Callable[[], None], message: str) -> None:
    with pytest.raises(UserError, match=message):
        children.in_own_process(function)


class Interrupted:
    """A connection on which Ctrl-C is heard first."""

    def recv(self) -> None:
        raise KeyboardInterrupt


def test_an_interrupt_ends_the_other_process(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Any] = []
    make, pipe = children.CONTEXT.Process, children.CONTEXT.Pipe

    def process(**arguments: Any) -> Any:
        started.append(make(**arguments))
        return started[-1]

    monkeypatch.setattr(children.CONTEXT, "Process", process)
    monkeypatch.setattr(children.CONTEXT, "Pipe", lambda duplex: (Interrupted(), pipe(duplex=duplex)[1]))
    with pytest.raises(KeyboardInterrupt):
        children.in_own_process(signal.pause)
    assert started[0].exitcode == -signal.SIGTERM
