"""Measured cost: what a step of each method takes on this machine, in time and memory.

The cases of one model are timed in turns, A B C A B C ..., so that what slows the machine down for a while slows all of
them, and each is compared with the control of its own round. A timed step is the trainer's own, from a batch that lies
ready on the CPU to updated weights and EMA; reading and drawing the batch goes on beside it and is not timed.
The cases of a model train one backbone, in turns, so that all of them take little more memory than one.

Shapes: N images, C channels, H W height and width, T tokens, Z encoder width.
"""

import gc
import math
import resource
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from multiprocessing.connection import Connection
from typing import Any, Literal, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor

import methods
from harness.backbones.sit import parse_name
from harness.config import BudgetConfig, DataConfig, ModelConfig, OptimizerConfig, RunConfig, RuntimeConfig, require
from harness.cost import memory
from harness.data.batches import Batch
from harness.errors import UserError
from harness.frozen.encoders import PASS_IMAGES, FrozenEncoder, encoder_width
from harness.machine import environment, ram
from harness.machine.processes import open_accelerator
from harness.machine.progress import Report
from harness.machine.ram import Part
from harness.method import BackboneShape, DataShape, Method
from harness.training.step import Run, synchronize, train_step
from studies.commands.common import quiet_libraries
from studies.display import duration
from studies.fork_server import CONTEXT, start_server
from studies.settings import resolve_sections
from studies.synthetic import backbone_shape, build_method, random_images, synthetic_run
from studies.workers import describe

LEVEL = 0.95
"""Least confidence of a ratio's interval."""
LEAST_ROUNDS = 6
"""Least and most of n values enclose the median with confidence 1 - 2 / 2^n: 96.9% for 6, and too little for 5."""
PEAK_STEPS = 2
"""The second step has the optimiser's moments beside the activations, which is the most that a step needs."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One row to measure."""

    model: str
    """SiT-<size>/<patch>."""
    label: str
    method: str
    """A method, or a sum such as repa+vae_repa."""
    sections: Mapping[str, Any]
    """The sections of the method or of its parts, by name; size defaults need not be resolved."""
    targets: Literal["cached", "online"]
    """Whether tokens of frozen encoders come with the batch, or are made inside the step."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What all cases share."""

    batch_size: int = 0
    """Images a step; 0 = 8 on a CPU, 32 elsewhere."""
    rounds: int = 0
    """Rounds that count; 0 = 6 on a CPU, where a round of SiT-S/2 takes 10 to 30 seconds, and 50 elsewhere."""
    warmup: int = 0
    """Rounds before those; 0 = 1 on a CPU, where libraries tune nothing, and 5 elsewhere."""
    input_size: int = 32
    """Side of the latents."""
    in_channels: int = 4
    """Channels of the latents."""
    num_classes: int = 1000
    """Classes, for the table of label embeddings."""
    image_size: int = 256
    """Side in pixels of the images that encoders and methods read."""

    def __post_init__(self) -> None:
        require(self.batch_size >= 0, f"batch_size is {self.batch_size}: give 1 or more images")
        enough = self.rounds == 0 or self.rounds >= LEAST_ROUNDS
        require(enough, f"rounds is {self.rounds}: give {LEAST_ROUNDS} or more, or no interval can be named")
        require(self.warmup >= 0, f"warmup is {self.warmup}: give 1 or more rounds")

    def resolved(self, device: torch.device) -> "Setting":
        """The setting without zeros."""
        batch_size, rounds, warmup = (8, 6, 1) if device.type == "cpu" else (32, 50, 5)
        return replace(
            self,
            batch_size=self.batch_size or batch_size,
            rounds=self.rounds or rounds,
            warmup=self.warmup or warmup,
        )


@dataclass(frozen=True)
class Spread:
    """Median and range of the rounds."""

    median: float
    least: float
    most: float


@dataclass(frozen=True)
class Ratio:
    """Median over rounds of case / control in the same round, with an order-statistic interval of 95% or more.

    The interval says how well this median is known from this run on this machine, and nothing of other machines.
    """

    median: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class MeasuredRow:
    """One case, measured."""

    model: str
    label: str
    method: str
    step_ms: Spread
    """Milliseconds of a training step of `batch` images."""
    images_per_s: float
    """Images trained on a second, at the median step."""
    forward_ms: Spread
    """Milliseconds of one forward pass of the EMA backbone on `batch` images, as in sampling: no heads, no gradient."""
    ratio: Ratio
    """Step time over the control's."""
    peak_memory_gb: float
    """What training adds to the process at its peak, in 10^9 bytes: weights, moments, EMA, heads, activations, and the
    encoder where targets are made online. On CUDA what torch has allocated; elsewhere the resident memory of a process
    of the case's own, beyond what the loaded libraries take."""
    batch: int
    precision: str
    device: str
    threads: int
    rounds: int


def measure(
    cases: Sequence[Case], runtime: RuntimeConfig, report: Report, setting: Setting | None = None
) -> list[MeasuredRow]:
    """Measure cases, one model after another; rows come in that order.

    Args:
        cases: every model among them needs its control case.
        runtime: device, precision and threads.
        report: told what is measured, with an estimate of the time left.
        setting: batch, rounds and shapes; by default those of the papers' 256-pixel images.

    Raises:
        UserError: for wrong settings of a method, a missing control, or what does not fit into memory; all are found
            before anything is measured, but for memory that another process takes meanwhile.
    """
    runtime = environment.resolve_runtime(runtime)
    environment.apply_runtime(runtime)
    accelerator = open_accelerator(runtime)
    require(accelerator.num_processes == 1, "steps are measured in one process: start the command without a launcher")
    conditions = Conditions(runtime, accelerator, (setting or Setting()).resolved(accelerator.device))
    groups = [[case for case in cases if case.model == model] for model in dict.fromkeys(c.model for c in cases)]
    for group in groups:
        control_of(group)
        check_memory(conditions, group)
    progress = Progress(report, total_work(conditions, groups))
    return [row for group in groups for row in measure_model(conditions, group, progress)]


@dataclass(frozen=True)
class Conditions:
    """What all cases are measured with, resolved."""

    runtime: RuntimeConfig
    accelerator: Accelerator
    setting: Setting

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    @property
    def data(self) -> DataShape:
        setting = self.setting
        return DataShape(image_size=setting.image_size, num_classes=setting.num_classes, encoder_width=encoder_width)

    def config(self, case: Case) -> RunConfig:
        """A run that would go on for ever, its sections resolved."""
        config = RunConfig(
            study="overhead",
            method=case.method,
            model=ModelConfig(name=case.model),
            data=DataConfig(name="digits"),  # read by nothing: the data is made up
            optimizer=OptimizerConfig(batch_size=self.setting.batch_size),
            budget=BudgetConfig(amount=10**9),
            runtime=self.runtime,
            sections=case.sections,
        )
        return resolve_sections(config, self.shape(config))

    def shape(self, config: RunConfig) -> BackboneShape:
        setting = self.setting
        return backbone_shape(config, setting.input_size, setting.in_channels, setting.num_classes)

    def run(self, case: Case) -> Run:
        """The case's run at step 0."""
        config = self.config(case)
        return synthetic_run(config, self.shape(config), self.data, self.accelerator, self.setting.batch_size)


def control_of(group: Sequence[Case]) -> int:
    """Which case of a model all are compared with."""
    found = [index for index, case in enumerate(group) if case.method == methods.control()]
    model, control = group[0].model, methods.control()
    require(bool(found), f"{model} has no row to compare with: measure {control} beside the other methods")
    return found[0]


def measure_model(conditions: Conditions, group: Sequence[Case], progress: "Progress") -> list[MeasuredRow]:
    """The rows of one model's cases."""
    peaks = []
    for case in group:
        peaks.append(peak_bytes(conditions, case))
        progress.tell(f"memory of {case.model} {case.label}", PEAK_STEPS * work(conditions, case))
    stands = stands_of(conditions, group)
    times = time_rounds(stands, conditions.setting, synced_clock(conditions.device), progress)
    conditions.accelerator.free_memory()  # it keeps every model that it has prepared
    control = times[control_of(group)]
    device = environment.describe(conditions.runtime)["device"]
    return [
        MeasuredRow(
            model=case.model,
            label=case.label,
            method=case.method,
            step_ms=spread(own.steps),
            images_per_s=conditions.setting.batch_size / statistics.median(own.steps),
            forward_ms=spread(own.forwards),
            ratio=paired_ratio(own.steps, control.steps),
            peak_memory_gb=peak / 1e9,
            batch=conditions.setting.batch_size,
            precision=conditions.runtime.precision,
            device=device,
            threads=conditions.runtime.threads,
            rounds=conditions.setting.rounds,
        )
        for case, own, peak in zip(group, times, peaks, strict=True)
    ]


# -- time -----------------------------------------------------------------------------------------------------------


class Timed(Protocol):
    """A case that is ready to be timed."""

    name: str
    work: float
    """Of a step, in some unit that is common to all cases."""

    def batch(self, number: int) -> Batch: ...

    def step(self, batch: Batch) -> None: ...

    def forward(self) -> None: ...


class Stand:
    """A case's run, and the frozen encoders that make its tokens where targets are made online."""

    def __init__(self, conditions: Conditions, case: Case) -> None:
        self.name, self.work = f"{case.model} {case.label}", work(conditions, case)
        self.run = run = conditions.run(case)
        batch = run.batches.batch(0)
        self._inputs = [value.to(conditions.device) for value in (batch.noise_NCHW, batch.t_N, batch.labels_N)]
        names = run.method.needs().encoders if case.targets == "online" else ()
        grid, setting = run.method.backbone.grid, conditions.setting
        self.encoders = {name: FrozenEncoder.untrained(name, grid, conditions.device) for name in names}
        images = random_images(setting.batch_size, setting.image_size if names else 0)
        self._images_NCHW = torch.from_numpy(images.values).permute(0, 3, 1, 2).contiguous()

    def batch(self, number: int) -> Batch:
        """The batch of a step, on the CPU."""
        return self.run.batches.batch(number)

    def step(self, batch: Batch) -> None:
        """One step of the trainer; online encoders run in front of it, on images that come with the batch."""
        tokens = {name: self._tokens(encoder) for name, encoder in self.encoders.items()}
        train_step(self.run, replace(batch, tokens={**batch.tokens, **tokens}))

    def _tokens(self, encoder: FrozenEncoder) -> Tensor:
        """In the run's precision, as sihyun-yu/REPA train.py does it."""
        images_NCHW = self._images_NCHW.to(self.run.device, non_blocking=True)
        together = PASS_IMAGES[self.run.device.type == "cpu"]
        with self.run.autocast():
            return torch.cat([encoder(part) for part in images_NCHW.split(together)])

    def forward(self) -> None:
        """One pass of the network that samples are made with."""
        with torch.no_grad(), self.run.autocast():
            self.run.ema.backbone(*self._inputs)


def stands_of(conditions: Conditions, group: Sequence[Case]) -> list[Stand]:
    """The stands of one model's cases. Weights, EMA and moments of the backbone are those of the first one in all.

    What a step takes does not hang on the values. Weights are shared before there are moments, and a case's own are
    dropped at once, so that building needs no more memory than training.
    """
    stands: list[Stand] = []
    for case in group:
        stands.append(Stand(conditions, case))
        share_weights(stands[0].run, stands[-1].run)
    first = stands[0]
    first.step(first.batch(0))  # AdamW makes the moments
    for stand in stands[1:]:
        share_moments(first.run, stand.run)
    return stands


def share_weights(first: Run, other: Run) -> None:
    """Let another run's backbone and EMA lie where the first one's do."""
    for theirs, own in ((first.backbone, other.backbone), (first.ema.backbone, other.ema.backbone)):
        for there, here in zip(theirs.parameters(), own.parameters(), strict=True):
            here.data = there.data


def share_moments(first: Run, other: Run) -> None:
    """Let another run's optimizer use what the first one's keeps of the backbone."""
    for there, here in zip(first.backbone.parameters(), other.backbone.parameters(), strict=True):
        if here.requires_grad:
            other.optimizer.state[here] = first.optimizer.state[there]


@dataclass
class Times:
    """Seconds of a case, a number for each round that counts."""

    steps: list[float] = field(default_factory=list)
    forwards: list[float] = field(default_factory=list)


def time_rounds(
    stands: Sequence[Timed], setting: Setting, clock: Callable[[], float], progress: "Progress"
) -> list[Times]:
    """Time a step and a forward pass of each case in turn, round by round; warm-up rounds are dropped."""
    times = [Times() for _ in stands]
    for number in range(setting.warmup + setting.rounds):
        for stand, own in zip(stands, times, strict=True):
            batch = stand.batch(number)
            started = clock()
            stand.step(batch)
            stepped = clock()
            stand.forward()
            ended = clock()
            if number >= setting.warmup:
                own.steps.append(stepped - started)
                own.forwards.append(ended - stepped)
            progress.tell(f"timing {stand.name}", stand.work)
    return times


def synced_clock(device: torch.device) -> Callable[[], float]:
    """Seconds, read when the device has finished its work."""

    def read() -> float:
        synchronize(device)
        return time.perf_counter()

    return read


def spread(seconds: Sequence[float]) -> Spread:
    """Of times in seconds, in milliseconds."""
    return Spread(*(1000 * value for value in (statistics.median(seconds), min(seconds), max(seconds))))


def paired_ratio(own: Sequence[float], control: Sequence[float]) -> Ratio:
    """Of two cases' times by round."""
    ratios = [mine / theirs for mine, theirs in zip(own, control, strict=True)]
    return Ratio(statistics.median(ratios), *median_interval(ratios))


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """The k-th value from below and from above, k as large as a confidence of `LEVEL` allows.

    The median lies outside of them when fewer than k of n values fall on one side of it: 2 P(Binomial(n, 1/2) < k),
    whatever the distribution. No resampling: with so few values that would give intervals that are too short.
    """
    n = len(values)
    assert n >= LEAST_ROUNDS, f"{n} values are too few"
    outside = [2 * sum(math.comb(n, i) for i in range(k)) / 2**n for k in range(n // 2 + 1)]
    k = max(k for k, share in enumerate(outside) if share <= 1 - LEVEL)
    ordered = sorted(values)
    return ordered[k - 1], ordered[-k]


# -- memory ---------------------------------------------------------------------------------------------------------


def check_memory(conditions: Conditions, group: Sequence[Case]) -> None:
    """Refuse a model whose cases cannot be held together: one of them trains while the heads of the others rest."""
    outlines = []
    for case in group:
        config = conditions.config(case)
        build = partial(build_method, config, conditions.shape(config), conditions.data)
        outlines.append((config, memory.outline(case.method, build)))
    resting = [heads_bytes(method) for _, method in outlines]
    for (config, method), own in zip(outlines, resting, strict=True):
        others = Part(
            name="heads of the other rows",
            num_bytes=sum(resting) - own,
            way_out="name fewer methods at a time",
            on_device=True,
        )
        weights = [replace(p, way_out="choose a smaller model") for p in memory.weight_parts(config, method)]
        training = [replace(p, way_out="lower batch_size") for p in memory.training_parts(config, method, 1)]
        ram.check([others, *weights, *training], conditions.device)


def heads_bytes(method: Method) -> int:
    """Weights and two moments of a method's heads."""
    return 3 * memory.FLOAT * memory.head_parameters(method)


def peak_bytes(conditions: Conditions, case: Case) -> int:
    """Peak memory of a case: on CUDA by torch's counters, else in a process of its own, as resident memory has none."""
    if conditions.device.type == "cuda":
        return peak_of_steps(conditions.runtime, conditions.setting, case)
    return in_own_process(peak_of_steps, conditions.runtime, conditions.setting, case)


def peak_of_steps(runtime: RuntimeConfig, setting: Setting, case: Case) -> int:
    """Bytes that the first steps of a case need at their peak, beyond what a tiny run needed before.

    The tiny run loads the libraries' code and makes their workspaces, which belong to no case.
    """
    environment.apply_runtime(runtime)
    conditions = Conditions(runtime, open_accelerator(runtime), setting)
    control = methods.control()
    tiny = replace(
        case,
        model=f"SiT-pico/{parse_name(case.model)['patch_size']}",
        method=control,
        sections={control: methods.load(control).Config()},
    )
    train_some(replace(conditions, setting=replace(setting, batch_size=1)), tiny)
    if conditions.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(conditions.device)
    before = most_bytes(conditions.device)
    train_some(conditions, case)
    return most_bytes(conditions.device) - before


def train_some(conditions: Conditions, case: Case) -> None:
    """The first steps of a case, of which nothing is left."""
    stand = Stand(conditions, case)
    for number in range(PEAK_STEPS):
        stand.step(stand.batch(number))
    synchronize(conditions.device)
    del stand
    conditions.accelerator.free_memory()  # it keeps every model that it has prepared
    gc.collect()


def most_bytes(device: torch.device) -> int:
    """Peak so far: of torch's memory on a CUDA device since the last reset, else of this process's resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage(2) of the two systems
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def in_own_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function returns or raises in a process that has run nothing else; it ends with the call, come what may.

    Raises:
        UserError: the process was killed, as a rule for want of memory.
    """
    start_server()
    heard, told = CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(target=_answer, args=(told, function, arguments))
    process.start()
    told.close()  # so that the end of the process is the end of what is heard
    try:
        answer = heard.recv()
    except EOFError:
        process.join()
        reason = describe(process.exitcode or 0)
        raise UserError(f"memory cannot be measured ({reason}): lower batch_size, or choose a smaller model") from None
    finally:
        process.terminate()
        process.join()
    if isinstance(answer, Exception):
        raise answer
    return answer


def _answer(told: Connection, function: Callable[..., Any], arguments: Sequence[Any]) -> None:
    quiet_libraries()
    try:
        answer = function(*arguments)
    except Exception as error:
        error.add_note(traceback.format_exc())
        answer = error
    told.send(answer)


# -- progress -------------------------------------------------------------------------------------------------------


def work(conditions: Conditions, case: Case) -> float:
    """Roughly how long a step takes, in an unknown unit: parameters of the backbone."""
    return memory.backbone_parameters(conditions.shape(conditions.config(case)))


def total_work(conditions: Conditions, groups: Sequence[Sequence[Case]]) -> list[float]:
    """The work of everything that is measured, in order."""
    rounds = conditions.setting.warmup + conditions.setting.rounds
    total = []
    for group in groups:
        steps = [work(conditions, case) for case in group]
        total += [PEAK_STEPS * step for step in steps] + rounds * steps
    return total


class Progress:
    """Tells what was measured, how much of all, and how long the rest will take at the speed so far."""

    def __init__(self, report: Report, total: Sequence[float], clock: Callable[[], float] = time.monotonic) -> None:
        self._report, self._clock, self._started = report, clock, clock()
        self._work, self._num = sum(total), len(total)
        self._done, self._count = 0.0, 0

    def tell(self, what: str, work: float) -> None:
        """Something that was `work` is measured."""
        self._done += work
        self._count += 1
        left = (self._clock() - self._started) / self._done * (self._work - self._done)
        self._report(f"{what}, {duration(left)} left", self._count, self._num)
