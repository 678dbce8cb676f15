"""Typed configuration of one run. Free of torch: the command line's help and the reports read it.

Every field has its unit in the docstring below it. A field that is `0` or `""` by default and says "0 = ..." is
resolved before the run starts; manifests and digests only ever hold resolved values.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from harness.errors import UserError
from harness.records.files import digest
from harness.records.schema import Spacing

SamplerKind = Literal["ode-euler", "ode-heun", "sde-euler-maruyama"]
Precision = Literal["auto", "fp32", "bf16"]
BudgetUnit = Literal["steps", "images", "train_gflops", "seconds"]


MOST_DOUBLING = 4
"""Doubling evaluation points that lie after a tenth of the budget: an eighth, a quarter, a half and the end."""


def require(ok: bool, message: str) -> None:
    """Raise `UserError(message)` unless `ok`; the message names field, value, allowed range and the way out."""
    if not ok:
        raise UserError(message)


def require_finite(config: Any, section: str) -> None:
    """Refuse infinities, NaN, and whole numbers beyond 64 bits in any field of a config section."""
    for item in dataclasses.fields(config):
        value, key = getattr(config, item.name), f"{section}.{item.name}".removeprefix(".")
        if isinstance(value, float):
            require(math.isfinite(value), f"{key} is {value}: give a finite number")
        elif isinstance(value, int):
            require(abs(value) < 2**63, f"{key} is a number of {value.bit_length()} bits: give one of at most 63")


def require_path(value: str, key: str) -> None:
    """Refuse text that can name no file: control characters, and names longer than file systems take."""
    require(value.isprintable(), f"{key} is {value!r}: a path holds no control characters, so leave them out")
    longest = max((len(part.encode()) for part in value.split("/")), default=0)
    ok = longest <= 255 and len(value.encode()) <= 4000
    require(ok, f"{key} is {len(value)} letters long: give a path of at most 4000 bytes, each name in it at most 255")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The backbone."""

    name: str = "SiT-B/2"
    """Backbone as SiT-<size>/<patch>; sizes: pico, nano, micro, S, B, L, XL."""
    qk_norm: bool = False
    """Normalise queries and keys in attention (off in the papers)."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The images, and their split into a training half and a held-out half."""

    name: Literal["digits", "imagefolder", "preprocessed", "parquet"] = "imagefolder"
    """digits: scikit-learn's 1,797 digits; imagefolder: a folder with one folder of images a class; preprocessed: what
    the tools of EDM2 and REPA write, read in place; parquet: files of a data set of Hugging Face."""
    path: str = ""
    """imagefolder: folder of class folders; preprocessed: folder or zip of images with dataset.json, or a folder that
    holds images and vae-sd; parquet: folder of the files, folder/train for the files train-*, or a part of a data set
    on Hugging Face's hub, such as ILSVRC/imagenet-1k/train."""
    latents: str = ""
    """preprocessed: folder or zip of the images' moments (mean and std); "" = vae-sd beside images, if it is there,
    else they are encoded."""
    image_size: int = 256
    """Side of the training images in pixels; images are resized (short side) and centre-cropped to it."""
    holdout: float = 0.5
    """Share of images that are never trained on; they give the floor and the held-out velocity loss."""
    split_seed: int = 0
    """Seed of the split into training and held-out images."""
    flip: bool = False
    """Mirror half of the training images, drawn anew at every step; latents and tokens of both mirror images are
    cached."""

    def __post_init__(self) -> None:
        require_finite(self, "data")
        require(8 <= self.image_size <= 2048, f"data.image_size is {self.image_size}: give 8 to 2048 pixels")
        require_path(self.path, "data.path")
        require_path(self.latents, "data.latents")
        require(0 < self.holdout < 1, f"data.holdout is {self.holdout}: give a share above 0 and below 1")
        require(self.split_seed >= 0, f"data.split_seed is {self.split_seed}: give 0 or more")
        if self.name == "digits":
            require(not self.path, "data.path has no meaning for digits: leave it out, or set data.name to imagefolder")
        else:
            held = {
                "imagefolder": "one folder of images for each class",
                "preprocessed": "images and dataset.json",
                "parquet": "parquet files, or a data set on the hub such as uoft-cs/cifar10/train",
            }
            require(bool(self.path), f"data.path is empty: name a folder that holds {held[self.name]}")
        require(
            not self.latents or self.name == "preprocessed",
            f"data.latents has no meaning for {self.name}: leave it out, or set data.name to preprocessed",
        )


@dataclass(frozen=True, kw_only=True)
class AutoencoderConfig:
    """Stage 1: the frozen autoencoder whose latents the backbone learns."""

    path: str = "digits"
    """A folder in diffusers' AutoencoderKL format, one file of such weights, an id on Hugging Face's hub such as
    stabilityai/sd-vae-ft-ema, or the name of a shipped autoencoder (digits)."""

    def __post_init__(self) -> None:
        require_path(self.path, "autoencoder.path")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW at a constant rate, the same for every method and for heads."""

    lr: float = 1e-4
    """Learning rate, constant."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.999
    """Decay of the second moment."""
    eps: float = 1e-8
    """Term added to the denominator."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    clip_norm: float = 1.0
    """Largest joint gradient norm of backbone and heads; 0 = no clipping."""
    batch_size: int = 256
    """Images an optimiser step, over all processes."""
    micro_batch: int = 0
    """Images a forward pass in one process; smaller than its share accumulates gradients; 0 = its whole share."""
    label_drop: float = 0.1
    """Probability that a label is replaced by the null class."""

    def __post_init__(self) -> None:
        require_finite(self, "optimizer")
        require(self.lr > 0, f"optimizer.lr is {self.lr}: give a rate above 0")
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            require(0 <= value < 1, f"optimizer.{name} is {value}: give 0 or more and less than 1")
        for name in ("eps", "weight_decay", "clip_norm"):
            value = getattr(self, name)
            require(value >= 0, f"optimizer.{name} is {value}: give 0 or more")
        require(self.batch_size >= 1, f"optimizer.batch_size is {self.batch_size}: give 1 or more images")
        require(self.micro_batch >= 0, f"optimizer.micro_batch is {self.micro_batch}: give 0 or more images")
        require(0 <= self.label_drop < 1, f"optimizer.label_drop is {self.label_drop}: give 0 or more and less than 1")


@dataclass(frozen=True, kw_only=True)
class EmaConfig:
    """The moving average of the weights that is evaluated and that teaches."""

    decay: float = 0.9999
    """Decay a step."""
    warmup: int = 0
    """With w > 0 the decay at update s (from 1) is min(decay, s / (w + s)); 0 = constant decay."""

    def __post_init__(self) -> None:
        require_finite(self, "ema")
        require(0 <= self.decay < 1, f"ema.decay is {self.decay}: give 0 or more and less than 1")
        require(self.warmup >= 0, f"ema.warmup is {self.warmup}: give 0 or more steps")


@dataclass(frozen=True, kw_only=True)
class BudgetConfig:
    """What every cell may spend."""

    unit: BudgetUnit = "steps"
    """Optimiser steps, training images, counted training GFLOPs (2 x GMACs, teacher and heads too), or seconds of
    training. A budget in seconds cannot be continued to the bit."""
    amount: int | float = 400_000
    """Budget of a cell in that unit; a run ends with the first step that has spent it."""

    def __post_init__(self) -> None:
        require_finite(self, "budget")
        whole = self.unit in ("steps", "images")
        least = 1 if whole else 0
        require(
            self.amount >= least and self.amount > 0,
            f"budget.amount is {self.amount}: give {'1 or more' if whole else 'more than 0'} {self.unit}",
        )
        # Above it steps have no exact double, so that no step would be found to end the budget.
        require(self.amount <= 1e15, f"budget.amount is {self.amount}: give at most 1e15 {self.unit}")
        require(
            not whole or self.amount == int(self.amount),
            f"budget.amount is {self.amount}: give a whole number of {self.unit}",
        )


@dataclass(frozen=True, kw_only=True)
class SamplerConfig:
    """How latents are generated. Times run from 1 (noise) to 0 (data)."""

    kind: SamplerKind = "sde-euler-maruyama"
    """Integrator."""
    num_steps: int = 250
    """Integration steps: Euler and Euler-Maruyama make as many network calls, Heun 2 n - 1."""
    cfg_scale: float = 1.0
    """Classifier-free guidance scale s in v_null + s (v_label - v_null); 1 = no guidance."""
    guidance_low: float = 0.0
    """Guidance acts only in steps whose start time is at least this."""
    guidance_high: float = 1.0
    """Guidance acts only in steps whose start time is at most this."""

    def __post_init__(self) -> None:
        require_finite(self, "sampler")
        kinds = SamplerKind.__args__  # type: ignore[attr-defined]
        require(self.kind in kinds, f"sampler.kind is {self.kind!r}: give one of {', '.join(kinds)}")
        least = 2 if self.kind == "sde-euler-maruyama" else 1
        require(
            self.num_steps >= least,
            f"sampler.num_steps is {self.num_steps}: {self.kind} needs {least} or more",
        )
        require(self.cfg_scale >= 0, f"sampler.cfg_scale is {self.cfg_scale}: give 0 or more")
        require(
            0 <= self.guidance_low <= self.guidance_high <= 1,
            f"sampler.guidance_low {self.guidance_low} and guidance_high {self.guidance_high}: "
            "give 0 <= low <= high <= 1",
        )


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """The frozen evaluation protocol; its digest stands beside every number."""

    points: int = 8
    """Evaluations, the last at the end of the budget; those before a tenth of it are left out."""
    spacing: Spacing = "even"
    """How they lie in the budget: even; doubling = each at half of the next, such as 50K, 100K, 200K and 400K steps."""
    num_samples: int = 0
    """Generated images, at most as many as training images; 0 = as many as there are held-out images (then capped)."""
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    """How the images are generated."""
    seed: int = 0
    """Seed of the generated images' noise."""
    chunk: int = 64
    """Images generated together; fixed, so that samples do not depend on processes or memory."""
    precision: Precision = "auto"
    """Precision of the backbone while sampling; the decoder runs in fp32."""
    extractor: str = "efficientnet_lite0"
    """Feature extractor of the Frechet and kernel distances; inception, with its standard weights, gives FID."""
    extractor_size: int = 64
    """Side in pixels to which images are resized (bicubic) for the extractor; Inception has its own 299."""
    reference: str = ""
    """What samples are compared with: a folder of images, or an ADM reference batch (.npz with mu and sigma, images in
    arr_0, or both); "" = the training images."""
    kid_subset: int = 500
    """Images a kernel-distance subset (100 subsets)."""
    classifier: bool = True
    """Fit a scikit-learn classifier on the real training images and score how often it names the asked class."""
    velocity_images: int = 256
    """Held-out images of the velocity loss; each is scored at 4 fixed times, one in each quarter of [0, 1)."""
    grid_images: int = 30
    """Samples kept as a picture at every evaluation."""

    def __post_init__(self) -> None:
        require_finite(self, "evaluation")
        for name in ("points", "chunk", "extractor_size", "kid_subset", "velocity_images", "grid_images"):
            value = getattr(self, name)
            require(value >= 1, f"evaluation.{name} is {value}: give 1 or more")
        require(self.points <= 10_000, f"evaluation.points is {self.points}: give 1 to 10000")
        require(
            self.points <= MOST_DOUBLING or self.spacing == "even",
            f"evaluation.points is {self.points} with evaluation.spacing doubling, and {MOST_DOUBLING} lie after a "
            f"tenth of the budget: give 1 to {MOST_DOUBLING}, or evaluation.spacing even",
        )
        require_path(self.reference, "evaluation.reference")
        for name in ("num_samples", "seed"):
            value = getattr(self, name)
            require(value >= 0, f"evaluation.{name} is {value}: give 0 or more")


@dataclass(frozen=True, kw_only=True)
class FinalConfig:
    """A second protocol, for one evaluation at the end of the budget; what is not named here is as in evaluation."""

    num_samples: int = 0
    """Generated images, such as 50000; 0 = no final evaluation."""
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    """How they are generated."""
    seed: int = 0
    """Seed of the generated images' noise."""

    def __post_init__(self) -> None:
        for name in ("num_samples", "seed"):
            value = getattr(self, name)
            require(0 <= value < 2**63, f"final.{name} is {value}: give 0 or more, in at most 63 bits")


@dataclass(frozen=True, kw_only=True)
class RuntimeConfig:
    """The machine. Precision, compile and TF32 must agree between compared runs; the rest is recorded."""

    device: str = "auto"
    """auto = cuda where there is one, else cpu; or cpu, cuda, mps."""
    precision: Precision = "auto"
    """auto = bf16 autocast where the device is fast at it, else fp32."""
    compile: bool = False
    """torch.compile of the backbone's blocks, which changes the last bits; its warm-up pays in budgets of some minutes
    or more."""
    checkpoint_activations: bool = False
    """Keep only the input of each block for the backward pass, and run the block once more there: less memory for about
    a third more time, and the same numbers. Counted GFLOPs do not hold the second pass."""
    tf32: bool = True
    """TF32 matrix products on CUDA."""
    threads: int = 0
    """CPU threads of torch; 0 = torch's own choice."""

    def __post_init__(self) -> None:
        require(0 <= self.threads <= 1024, f"runtime.threads is {self.threads}: give 0 to 1024")


@dataclass(frozen=True, kw_only=True)
class OutputConfig:
    """Where things go, and how often."""

    runs: str = "runs"
    """Folder of all studies."""
    cache: str = ""
    """Folder of the caches; "" = $DITBENCH_CACHE, else ./cache."""
    log_every: int = 50
    """Steps between two lines of train.jsonl, which hold means over those steps."""
    checkpoint_every: int = 0
    """Steps between two whole checkpoints, rounded up to a logged step; 0 = at evaluation points only."""
    keep_checkpoints: int = 1
    """Whole checkpoints kept; the EMA backbone is kept at every evaluation point."""
    mlflow: bool = True
    """Log to MLflow as well (the JSONL records are always written)."""
    mlflow_uri: str = ""
    """MLflow tracking URI; "" = an SQLite file in the folder of studies."""

    def __post_init__(self) -> None:
        require_finite(self, "output")
        for name in ("runs", "cache"):
            require_path(getattr(self, name), f"output.{name}")
        require(bool(self.runs), "output.runs is empty: name a folder")
        require(self.mlflow_uri.isprintable(), "output.mlflow_uri holds control characters: leave them out")
        require(self.log_every >= 1, f"output.log_every is {self.log_every}: give 1 or more steps")
        require(self.checkpoint_every >= 0, f"output.checkpoint_every is {self.checkpoint_every}: give 0 or more steps")
        require(self.keep_checkpoints >= 1, f"output.keep_checkpoints is {self.keep_checkpoints}: give 1 or more")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One run: one method, one seed, one budget."""

    study: str = "study"
    """Name of the study; its runs lie in <output.runs>/<study>."""
    cell: str = ""
    """Label of the cell in tables and figures; "" = the method's name."""
    method: str = "sit"
    """Method, or a sum such as repa+vae_repa."""
    seed: int = 0
    """Training seed: initial weights, data order, t, noise and label drop depend on it alone."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The backbone."""
    data: DataConfig = field(default_factory=DataConfig)
    """The images."""
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    """Stage 1."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """The optimiser."""
    ema: EmaConfig = field(default_factory=EmaConfig)
    """The moving average."""
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    """What the run may spend."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """The evaluation protocol, at every point."""
    final: FinalConfig = field(default_factory=FinalConfig)
    """The protocol at the end."""
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    """The machine."""
    output: OutputConfig = field(default_factory=OutputConfig)
    """Where things go."""
    sections: Mapping[str, Any] = field(default_factory=dict)
    """Each method's own section, by the method's name, as that method's Config."""

    def __post_init__(self) -> None:
        require_finite(self, "")
        for name in ("study", "cell"):
            value = getattr(self, name)
            ok = "/" not in value and "\\" not in value and not value.startswith(".") and value.isprintable()
            require(
                ok,
                f"{name} is {value!r}: it names a folder, so leave out slashes, a leading dot and control characters",
            )
            require(
                len(value.encode()) <= 200, f"{name} is {len(value)} letters long: it names a folder, so shorten it"
            )
        # The report of a study lies beside its cells, and is replaced as a whole.
        require(self.cell != "report", "cell is 'report', where the study's report goes: give the cell another label")
        require(bool(self.study), "study is empty: give the study a name")
        require(self.seed >= 0, f"seed is {self.seed}: give 0 or more")

    @property
    def label(self) -> str:
        """The cell's label."""
        return self.cell or self.method

    @property
    def protocols(self) -> dict[str, EvaluationConfig]:
        """What the run is evaluated under, by section: at every point, and, where that is asked for, at its end."""
        if not self.final.num_samples:
            return {"evaluation": self.evaluation}
        return {"evaluation": self.evaluation, "final": dataclasses.replace(self.evaluation, **vars(self.final))}


def training_digest(config: RunConfig) -> str:
    """Digest of what must agree between compared runs at a seed: everything but the method's own section.

    The config must be resolved: `auto` has no place in a digest.
    """
    runtime = config.runtime
    return digest(
        {
            "model": dataclasses.asdict(config.model),
            "data": _data_facts(config.data),
            "optimizer": {k: v for k, v in dataclasses.asdict(config.optimizer).items() if k != "micro_batch"},
            "ema": dataclasses.asdict(config.ema),
            "budget": dataclasses.asdict(config.budget),
            "precision": runtime.precision,
            "compile": runtime.compile,
            "tf32": runtime.tf32,
        }
    )


def _data_facts(data: DataConfig) -> dict[str, Any]:
    """The facts of the data's section that must agree: not where files lie, and flips only where there are any."""
    facts = {name: value for name, value in dataclasses.asdict(data).items() if name not in ("path", "latents")}
    if not data.flip:
        facts.pop("flip")
    return facts
