"""The shape of every record: which fields it has, and of which type. Writers and readers use these types.

A record is checked against its type once, where it is read (`read_record`, `parse_line`), so that nothing behind that
door asks again whether a field is there. Fields that are not named here are left alone: a later version may add some.
Fields that are `NotRequired` are missing in runs that failed early, or were recorded by an earlier version.
"""

import functools
import json
import math
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import (
    Any,
    Literal,
    NamedTuple,
    NotRequired,
    TypeAlias,
    TypedDict,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
)

from harness.errors import UserError

FORMAT = 2
"""The number of the format of all records. It goes up when a version writes records that an earlier one would misread,
or goes on with runs in another way than the earlier one did."""

WRITTEN_BY = {1: "0.1.0"}
"""Which version of ditbench wrote records of an earlier format."""

Number: TypeAlias = float | Literal["nan", "inf", "-inf"]
"""A measured number. JSON has no NaN and no infinity, so these are written as words; `files.number` reads both."""

Status = Literal["running", "finished", "diverged", "pruned", "failed"]

RecordName = Literal["train", "eval", "final"]
"""What a file of records holds: training at logged steps, evaluations at the points, the evaluation at the end under a
protocol of its own."""

Spacing = Literal["even", "doubling"]
"""How evaluation points lie in the budget."""

BudgetClock = Literal["step", "images", "train_gflops", "train_seconds"]
"""The fields of a line that count what a run has spent of its budget."""

Clock = Literal["step", "images", "train_gflops", "train_seconds", "evaluation_seconds", "io_seconds"]
"""The fields of a line that are counted from the start of the run."""

CLOCKS: tuple[Clock, ...] = (*("step", "images", "train_gflops", "train_seconds", "evaluation_seconds", "io_seconds"),)
"""All clocks, in the order in which they are shown."""

BudgetUnit = Literal["steps", "images", "train_gflops", "seconds"]


# -- lines of train.jsonl, eval.jsonl and final.jsonl ---------------------------------------------------------------


class Clocks(TypedDict):
    """What every line begins with: how far the run was, counted from its start."""

    step: int
    """Updates of the optimiser."""
    images: int
    """Training images that were seen."""
    train_gflops: float
    """GFLOPs that were spent on training."""
    train_seconds: float
    """Seconds that were spent on training."""
    evaluation_seconds: float
    """Seconds that were spent on evaluations."""
    io_seconds: float
    """Seconds that were spent on records, pictures and checkpoints."""


class TermRecord(TypedDict):
    """One of the method's loss terms."""

    value: Number
    """The mean of the term before its weight, since the line before."""
    weight: float
    """The weight at this step."""


class TrainRecord(Clocks):
    """A line of `train.jsonl`, written at logged steps. Means are taken over the steps since the line before."""

    loss: NotRequired[Number]
    """The mean of the whole loss."""
    base: Number
    """The mean of the velocity loss."""
    terms: Mapping[str, TermRecord]
    """The method's terms by name."""
    grad_norm: Number
    """The mean of the norm of all gradients before they are clipped."""
    images_per_s: NotRequired[Number]
    """Training images a second of training time."""
    trace: str
    """The chain of the digests of all batches so far, as hex digits."""
    diagnostics: NotRequired[Mapping[str, Number]]
    """What the method measures of itself at logged steps."""


class FinalRecord(Clocks):
    """A line of `final.jsonl`: the evaluation at the end, under a protocol of its own."""

    point: int
    """The evaluation point in the budget, counted from 1."""
    protocol: str
    """The digest of the protocol."""
    metrics: Mapping[str, Number]
    """What was measured, by the metric's name."""
    bad_images: NotRequired[int]
    """Generated images with pixels that are not finite."""
    evaluation_images_per_s: NotRequired[Mapping[str, Number]]
    """Images a second while sampling, decoding and extracting features."""
    samples: NotRequired[str]
    """The picture of the first samples, as a path in the run folder; "" where there is none."""


class EvalRecord(FinalRecord):
    """A line of `eval.jsonl`, written at evaluation points."""

    gradient_norms: NotRequired[Mapping[str, Number]]
    """Norms of the gradients in the backbone of the velocity loss and of every term."""


# -- manifest.json --------------------------------------------------------------------------------------------------


class RecordedModel(TypedDict):
    """The backbone that was asked for."""

    name: str
    """Such as `SiT-B/2`."""


class RecordedData(TypedDict):
    """The data that was asked for."""

    name: str
    """Such as `digits`."""
    path: NotRequired[str]
    """The folder or file of the images; "" for data that installs with a package."""
    image_size: int
    """Pixels along a side of an image."""


class RecordedOptimizer(TypedDict):
    """The settings of the optimiser."""

    batch_size: int
    """Images of one update."""


class RecordedBudget(TypedDict):
    """What a run may spend."""

    unit: BudgetUnit
    """What is counted."""
    amount: float
    """How many of them."""


class RecordedEvaluation(TypedDict):
    """When a run is evaluated."""

    points: int
    """Number of evaluations in the budget."""
    spacing: NotRequired[Spacing]
    """How they lie in it; missing in records made before there was a choice, which are even."""


class RecordedOutput(TypedDict, total=False):
    """Where things go."""

    log_every: int
    """Steps between two lines of `train.jsonl`."""
    mlflow_uri: str
    """MLflow's address; "" = a file beside the studies."""


class ConfigRecord(TypedDict):
    """The run's config with all defaults resolved. The sections have the fields of `harness.config`; those that readers
    rely on stand here."""

    model: RecordedModel
    data: RecordedData
    optimizer: RecordedOptimizer
    budget: RecordedBudget
    evaluation: RecordedEvaluation
    output: NotRequired[RecordedOutput]
    runtime: NotRequired[Mapping[str, Any]]
    """Device, precision and threads, without `auto`."""
    sections: NotRequired[Mapping[str, Mapping[str, Any]]]
    """The method's own settings, by the name of the method or of a part of a sum."""


class DetailRecord(TypedDict, total=False):
    """Why a run did not finish; empty for one that did."""

    step: int
    """Updates that a diverged or pruned run made before it was stopped."""
    parts: list[str]
    """Losses and norms of a diverged run that were not finite."""
    checkpoint: str
    """The state that reproduces what diverged, as a path in the run folder; "" where none was kept."""
    point: int
    """The last evaluation point of a pruned run."""
    error: str
    """The error of a failed run, in one line."""
    trace: str
    """Python's traceback of a failed run."""
    log: str
    """The log of a failed run, as a path in the run folder."""
    ended: str
    """The time at which a failed run ended, in UTC."""


class HeadRecord(TypedDict):
    """A trainable head of a method."""

    parameters: int
    shapes: list[list[int]]
    """Shapes of its weights, in order."""


class NeedsRecord(TypedDict, total=False):
    """What a method is given."""

    images: bool
    """Whether it reads the images of a batch."""
    encoders: list[str]
    """Frozen encoders whose tokens it reads."""
    ema: bool
    """Whether it runs the EMA backbone as a teacher."""


class MethodRecord(TypedDict, total=False):
    """What a method says about itself."""

    summary: str
    """What it adds to plain training, in one sentence."""
    paper: str
    """The title or name, and the arXiv number."""
    pretrained: list[str]
    """Pretrained models beyond the autoencoder, with their licences."""
    outside_data: list[str]
    """Data beyond the training set that those models have seen."""
    note: str
    """What stands beside every result."""
    heads: Mapping[str, HeadRecord]
    """Its trainable heads by name."""
    head_parameters: int
    """Parameters of all its heads."""
    taps: list[int]
    """Blocks that it reads at the start of training, counted from 1."""
    terms: Mapping[str, float]
    """The weight of each term at the start of training."""
    needs: NeedsRecord
    encoder_families: list[str]
    """The family of each encoder, to be compared with that of the metric's extractor."""


class BackboneRecord(TypedDict, total=False):
    """The backbone that was trained."""

    name: str
    parameters: int
    """Trained parameters of the backbone."""
    num_classes: int


class EnvironmentRecord(TypedDict, total=False):
    """Where a run was trained, as it was when the run last began or went on."""

    device: str
    """The name of the device."""
    precision: str
    """fp32 or bf16."""
    threads: int
    """CPU threads of torch."""
    git_commit: str
    """The commit of ditbench; "" outside a checkout."""
    git_dirty: bool
    """Whether the checkout had changes that were not committed."""
    python: str
    platform: str
    packages: Mapping[str, str]
    """Versions of the packages that decide numbers."""


class SamplerRecord(TypedDict):
    """How images are generated."""

    cfg_scale: float
    """The scale of guidance; 1 = none."""
    kind: NotRequired[str]
    num_steps: NotRequired[int]
    guidance_low: NotRequired[float]
    guidance_high: NotRequired[float]


class ProtocolRecord(TypedDict, total=False):
    """All that decides the numbers of an evaluation; its digest stands in every line. The rest of it is only shown."""

    sampler: SamplerRecord
    num_samples: int
    """Generated images."""
    extractor: Mapping[str, Any]
    """The network whose features are compared, and how it sees images."""


LinesRecord: TypeAlias = Mapping[str, Mapping[str, Number]]
"""Metrics of real images (`floor`) and of their reconstructions (`reconstruction`), by the metric's name."""


class FinalProtocolRecord(TypedDict, total=False):
    """The protocol of `final.jsonl`; empty for a run without an evaluation of that kind."""

    protocol: ProtocolRecord
    lines: LinesRecord


class TuningRecord(TypedDict):
    """The ablation that a cell's settings were chosen in."""

    study: str
    id: str
    """The id of the ablation."""
    kind: str
    objective: str
    """The metric that trials were ranked by."""
    seeds: list[int]
    """Seeds of its runs, which reports refuse to count as results."""
    setting: Mapping[str, Any]
    """The chosen value of every axis."""
    value: NotRequired[Number | None]
    """The objective's mean of that trial."""
    trials: int
    """Trials that the method had."""


class ManifestNotes(TypedDict, total=False):
    """Fields of a manifest that the study around a run adds."""

    tuning: TuningRecord


class Manifest(ManifestNotes):
    """`manifest.json`: what a run is, and how it stands."""

    format: NotRequired[int]
    """The number of the format; `RunFolder.write_manifest` adds it."""
    study: NotRequired[str]
    cell: str
    """The label of the cell."""
    method: str
    """The method's name, `a+b` for a sum."""
    seed: int
    status: Status
    status_detail: NotRequired[DetailRecord]
    baseline: NotRequired[str]
    """The label of the control that the run is compared with."""
    command: NotRequired[list[str]]
    """The words of the command that began the run or went on with it, without passwords."""
    config: ConfigRecord
    digests: NotRequired[Mapping[str, str]]
    """SHA-256 of what must agree between compared runs, by its name."""
    shared_device: NotRequired[bool]
    """Whether another run used the device at the same time, so that seconds say little."""
    started: NotRequired[str]
    """When the run began, in UTC."""
    protocol: NotRequired[ProtocolRecord]
    lines: NotRequired[LinesRecord]
    final: NotRequired[FinalProtocolRecord]
    method_facts: NotRequired[MethodRecord]
    model: NotRequired[BackboneRecord]
    environment: NotRequired[EnvironmentRecord]
    extractor_family: NotRequired[str]
    """The family of the metric's extractor."""
    warnings: NotRequired[list[str]]
    """What a reader of the metrics must know, in sentences."""
    mlflow_run: NotRequired[str]
    """The run's id in MLflow; "" where it has none."""
    mlflow_uri: NotRequired[str]
    """The address of that MLflow."""
    mlflow_failure: NotRequired[str]
    """Why MLflow lacks a part of the run; "" where it does not."""


# -- cost.json and overhead.json ------------------------------------------------------------------------------------


class NetworkRecord(TypedDict):
    """A frozen network."""

    forward_gmacs: float
    """GMACs of a forward pass of one image."""
    parameters: int


class CostRecord(TypedDict, total=False):
    """`cost.json`: what one training image costs, counted. GMACs are those of one forward pass of one image.

    Every run writes all fields; readers show one that an earlier version did not count as a dash.
    """

    backbone_forward_gmacs: float
    head_forward_gmacs: float
    """All that the method computes in its terms, passes of teachers apart."""
    teacher_forward_gmacs: float
    """Passes without gradient through the EMA backbone."""
    norm_forward_gmacs: float
    """What fvcore would add for normalisations; in no other number."""
    encoder_forward_gmacs: float
    """Frozen encoders, which run when caches are made."""
    encoders: Mapping[str, NetworkRecord]
    """The frozen encoders by name."""
    vae_encode_gmacs: float
    """The autoencoder's encoder, which runs when caches are made."""
    backbone_parameters: int
    head_parameters: int
    external_parameters: int
    """Parameters of the frozen encoders."""
    term_weights: Mapping[str, float]
    """The weight of each term at the start of training."""
    train_gflops_per_image: float
    """GFLOPs of a training image, with cached targets."""
    train_gflops_per_image_online: float
    """GFLOPs of a training image, with the encoders in every step."""
    cache_images: int
    """Images that went through the frozen networks when caches were made."""
    cache_gflops_per_image: float
    cache_gflops: float
    """GFLOPs of making the caches."""


Targets = Literal["cached", "online"]
"""Whether tokens of encoders come from caches or are made in every step."""


class CountedRow(CostRecord):
    """A row of `overhead.json`: what a method costs on a backbone, counted."""

    model: str
    """The name of the backbone."""
    method: str
    is_control: bool
    note: str
    """What must stand beside the method."""
    label: str
    """The method with what is special about the row."""
    targets: Targets
    settings: Mapping[str, Mapping[str, Any]]
    """The method's resolved settings, by its name or that of a part."""


class CountedRecord(CountedRow):
    """A row of `overhead.json`, compared with the control's."""

    change_percent: float
    """The change in training GFLOPs against the control of the same backbone."""


class SpreadRecord(TypedDict):
    """A quantity that was measured several times."""

    median: float
    least: float
    most: float


class RatioRecord(TypedDict):
    """A ratio of times to the control's, with an interval for its median."""

    median: float
    low: Number
    high: Number


class MeasuredRecord(TypedDict):
    """A row of `overhead.json`: what a method costs on a backbone, measured."""

    model: str
    method: str
    label: str
    batch: int
    """Images of one step."""
    precision: str
    device: str
    threads: int
    rounds: int
    """How often the row was timed."""
    step_ms: SpreadRecord
    """Milliseconds of a training step."""
    ratio: RatioRecord
    forward_ms: SpreadRecord
    """Milliseconds of a forward pass of the backbone without gradient."""
    images_per_s: float
    peak_memory_gb: float
    """What training adds to the memory of the process, in GB."""


class ShapesRecord(TypedDict):
    """What all rows of `overhead.json` share."""

    input_size: int
    """Numbers along a side of a latent."""
    in_channels: int
    """Channels of a latent."""
    num_classes: int
    image_size: int
    """Pixels along a side of an image."""


class OverheadRecord(TypedDict):
    """`overhead.json`: what methods cost, without training."""

    control: str
    """The name of the method that all are compared with."""
    shapes: ShapesRecord
    counted: list[CountedRecord]
    measured: list[MeasuredRecord]
    """Empty where nothing was timed."""


# -- ablation.json --------------------------------------------------------------------------------------------------

AblationKind = Literal["grid", "one_at_a_time", "search"]
AxisKind = Literal["int", "float", "bool", "choice", "text"]
TrialState = Literal["waiting", "running", "complete", "pruned", "diverged"]
Pruner = Literal["none", "median", "hyperband"]


class AxisRecord(TypedDict):
    """A field of a method's settings that varies."""

    name: str
    """The field's name, in a sum `part.field`."""
    default: Any
    """The value of the default cell."""
    levels: list[Any]
    """The values that were asked for; of a search those that it chooses from."""
    kind: AxisKind
    choices: NotRequired[list[Any]]
    """All values that a bool or a choice may have."""


class SubjectRecord(TypedDict):
    """A method whose settings are tried."""

    default_cell: str
    """The label of the cell with all axes at their defaults."""
    section: Mapping[str, Any]
    """The resolved settings of that cell; of a sum by the name of the part."""
    space: Mapping[str, list[Any]]
    """The search space that the method declares: choices by axis."""
    axes: list[AxisRecord]


class SpentRecord(TypedDict):
    """What the runs of a trial have spent."""

    budget: float
    """The mean share of their budgets, from 0 to 1."""


class TrialRecord(TypedDict):
    """One setting of a method that was, or will be, run at every seed."""

    method: str
    number: int
    """From 0, within the method."""
    cell: str
    """The label of its cell."""
    setting: Mapping[str, Any]
    """A value for every axis of the method."""
    state: TrialState
    value: Number | None
    """The mean of the objective over the seeds, once the trial is complete."""
    intermediate: Mapping[str, Number]
    """The objective of the first seed by evaluation point, where a pruner looks at it."""
    started: str
    """When its first run began, in UTC; "" before that."""
    ended: str
    """When it was over, in UTC; "" before that."""
    workers: list[str]
    """Processes that worked on it, as host:pid."""
    spent: SpentRecord


class DepthRecord(TypedDict):
    """The backbone of an ablation."""

    name: str
    depth: int
    """Number of blocks."""


class PlanRecord(TypedDict):
    """What is known of an ablation before any trial."""

    format: int
    """The number of the format."""
    study: str
    kind: AblationKind
    objective: str
    """The full name of the metric that trials are ranked by; "" until the first evaluation."""
    objective_asked: NotRequired[str]
    """The metric or family that was asked for; "" = the main metric."""
    seeds: list[int]
    control: str
    """The label of the control's cell."""
    trials: int
    """Trials of each method of a search; 0 for grids."""
    sampler: Mapping[str, Any]
    """The sampler of a search and its seed; empty for grids."""
    pruner: Pruner
    storage: str
    """`journal`, or the kind of the database."""
    workers: int | Literal["auto"]
    """Runs side by side as asked for; 0 = as many as the machine has places for."""
    budget: RecordedBudget
    points: int
    """Evaluation points of each run."""
    model: DepthRecord
    base: Mapping[str, Any]
    """The config that all cells share."""
    methods: Mapping[str, SubjectRecord]


class AblationRecord(PlanRecord):
    """`ablation.json`, in the folder of a study that is an ablation: all that is known of it besides its runs."""

    id: str
    """Tells the trials of this ablation in a database from those of others."""
    direction: Literal["lower", "higher"]
    """Which values of the objective are better."""
    mlflow_run: NotRequired[str]
    """The id of the MLflow run that all runs are children of; "" where there is none."""
    commands: list[list[str]]
    """The words of every command on the study, without passwords."""
    trial_list: list[TrialRecord]


# -- analysis/<name>.json -------------------------------------------------------------------------------------------


class AnalysedImages(TypedDict):
    """Images of an analysis."""

    num: int
    rows: str
    """The digest of their rows in the data set."""


class AnalysedEncoder(TypedDict):
    """The frozen encoder that blocks are compared with."""

    name: str
    family: str
    digest: str
    """The digest of its weights."""


class NeighbourSettings(TypedDict):
    """How CKNNA was taken."""

    neighbours: int
    estimator: str
    features: str


class AnalysisFacts(TypedDict):
    """The part of the settings that is about data, autoencoder, encoder and images."""

    data: str
    """The digest of the data."""
    autoencoder: str
    """The digest of the autoencoder."""
    encoder: AnalysedEncoder
    images: AnalysedImages
    """Held-out images of alignment and probe scores."""
    probe_images: AnalysedImages
    """Training images that probes were fitted on."""
    pictures: list[int]
    """Rows of the held-out images with pictures."""


class AnalysisSettings(AnalysisFacts):
    """All that decides the numbers of an analysis, readable."""

    blocks: list[int]
    """Counted from 1."""
    times: list[float]
    """Times at which latents were noised: 0 is data, 1 is noise."""
    seed: int
    """The seed of the noise."""
    noise: str
    backbone: str
    labels: str
    latents: str
    features: str
    cka: str
    cknna: NeighbourSettings
    probe: str
    precision: str
    tf32: bool


Quantity = Literal["probe_accuracy", "cka_encoder", "cknna_encoder", "cka_latent", "cknna_latent"]


class AnalysisValues(TypedDict, total=False):
    """What was measured of the encoder, or of the input or a block at one time."""

    source: Literal["encoder", "input", "block"]
    block: int
    """The number of a block, counted from 1."""
    t: float
    """The time t of the input and of blocks."""
    probe_accuracy: Number
    """The share of held-out images whose class a linear probe names."""
    cka_encoder: Number
    cknna_encoder: Number
    cka_latent: Number
    cknna_latent: Number


class AnalysisPictures(TypedDict):
    """The file of pictures beside the record."""

    sha256: str
    """The digest of the file."""
    shares: Mapping[str, Any]
    """The shares of the variance that components hold, by picture; those of blocks as [times][blocks][components]."""


class AnalysisBody(TypedDict):
    """What every analysis holds."""

    format: int
    """The number of the format."""
    protocol: str
    """The digest of the settings: records with different ones are not compared."""
    settings: AnalysisSettings
    values: list[AnalysisValues]
    pictures: AnalysisPictures


class Origin(TypedDict, total=False):
    """Where a backbone is from."""

    step: int
    """The updates of the optimiser that a run's backbone had."""
    checkpoint: Mapping[str, str]
    """The name and digest of a released checkpoint's file, and whose it is."""


class AnalysisRecord(AnalysisBody, Origin):
    """`analysis/<name>.json`: what the blocks of a backbone represent."""


class RunAnalysisRecord(AnalysisBody):
    """`analysis/<name>.json` in the folder of a run."""

    step: int
    """Updates of the optimiser that the backbone had."""


# -- the door -------------------------------------------------------------------------------------------------------

RecordT = TypeVar("RecordT")

AGAIN = "remove the folder and run the cell again"
"""The way out of a damaged record of a run."""


class Misfit(NamedTuple):
    """Why a value has not the type that its place asks for."""

    field: str
    """Dotted; "" for the value itself."""
    what: str

    def within(self, name: str) -> "Misfit":
        """The same, seen from one level further out."""
        return Misfit(f"{name}.{self.field}" if self.field else name, self.what)

    def __str__(self) -> str:
        return f"{self.field} {self.what}" if self.field else self.what


Check = Callable[[object], Misfit | None]


def misfit(value: object, kind: object) -> Misfit | None:
    """The first place where a value read from JSON is not of a type made of TypedDicts, lists, dicts and plain values;
    None where it fits."""
    return _check_of(kind)(value)


def read_record(path: Path, kind: type[RecordT], way_out: str = AGAIN) -> RecordT:
    """Read a record that is one JSON file.

    Raises:
        UserError: the file is missing, is no JSON object, has a newer format, or has a field that is missing or wrong.
    """
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path} is missing: is this a run folder of ditbench?") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): make it readable") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error}): {way_out}") from None
    if isinstance(value, dict) and "format" in get_type_hints(kind):
        _check_format(path, value.get("format"))
    return _fitting(value, kind, str(path), way_out)


def parse_line(line: bytes, kind: type[RecordT], where: str) -> RecordT:
    """Read a record that is one line of a file; `where` names file and line in the `UserError` for a wrong one."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        raise UserError(f"{where}, is damaged: {AGAIN}") from None
    return _fitting(value, kind, f"{where},", AGAIN)


def _fitting(value: object, kind: type[RecordT], where: str, way_out: str) -> RecordT:
    if wrong := misfit(value, kind):
        raise UserError(f"{where} {wrong}: {way_out}")
    return value  # type: ignore[return-value]  # which is what has just been checked


def _check_format(path: Path, found: object) -> None:
    """Refuse a record that a later version has written, or whose format cannot be told."""
    if type(found) is not int or not 1 <= found <= FORMAT:
        raise UserError(
            f"{path} has format {found} and this version reads 1 to {FORMAT}: "
            "use the version of ditbench that made it, or a later one"
        )


@functools.cache
def _check_of(kind: Any) -> Check:
    """The check of a type, built once: lines are many."""
    if is_typeddict(kind):
        return _fields_check(kind)
    if kind in (Any, object):
        return lambda value: None
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return _union_check(arguments)
    if origin is Literal:
        return _literal_check(arguments)
    if origin is list:
        return _list_check(*arguments)
    if origin is Mapping:
        return _dict_check(arguments[1])
    return PLAIN[kind]


def _fields_check(kind: Any) -> Check:
    fields = [(name, _check_of(own), name in kind.__required_keys__) for name, own in get_type_hints(kind).items()]

    def check(value: object) -> Misfit | None:
        if type(value) is not dict:
            return Misfit("", f"is {_shown(value)} where an object belongs")
        for name, own, is_required in fields:
            if name in value:
                if wrong := own(value[name]):
                    return wrong.within(name)
            elif is_required:
                return Misfit("", f"lacks {name}")
        return None

    return check


def _dict_check(kind: Any) -> Check:
    own = _check_of(kind)

    def check(value: object) -> Misfit | None:
        if type(value) is not dict:
            return Misfit("", f"is {_shown(value)} where an object belongs")
        for name, item in value.items():
            if wrong := own(item):
                return wrong.within(name)
        return None

    return check


def _list_check(kind: Any) -> Check:
    own = _check_of(kind)

    def check(value: object) -> Misfit | None:
        if type(value) is not list:
            return Misfit("", f"is {_shown(value)} where a list belongs")
        for place, item in enumerate(value):
            if wrong := own(item):
                return wrong.within(str(place))
        return None

    return check


def _union_check(kinds: Sequence[Any]) -> Check:
    checks = [_check_of(kind) for kind in kinds]

    def check(value: object) -> Misfit | None:
        found: Misfit | None = None
        for own in checks:
            wrong = own(value)
            if wrong is None:
                return None
            found = found or wrong
        return found

    return check


def _literal_check(values: Sequence[object]) -> Check:
    def check(value: object) -> Misfit | None:
        if type(value) is str and value in values:
            return None
        return Misfit("", f"is {_shown(value)} where one of {', '.join(map(str, values))} belongs")

    return check


def _is_finite(value: object) -> bool:
    return (type(value) is float and math.isfinite(value)) or type(value) is int


def _plain_check(what: str, fits: Callable[[object], bool]) -> Check:
    return lambda value: None if fits(value) else Misfit("", f"is {_shown(value)} where {what} belongs")


PLAIN: Mapping[Any, Check] = {
    float: _plain_check("a finite number", _is_finite),
    int: _plain_check("a whole number", lambda value: type(value) is int),
    str: _plain_check("text", lambda value: type(value) is str),
    bool: _plain_check("true or false", lambda value: type(value) is bool),
    type(None): _plain_check("null", lambda value: value is None),
}
"""The checks of plain types."""


def _shown(value: object) -> str:
    """A value as a message shows it, which a stranger may have made very long."""
    if isinstance(value, (dict, list)):
        return "an object" if isinstance(value, dict) else "a list"
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
