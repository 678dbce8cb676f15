"""What methods cost: rows of counted costs for any backbones and methods, without weights and without training."""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import methods
from harness.backbones.sit import SiT, parse_name
from harness.config import RuntimeConfig, require
from harness.cost.operations import CacheCost, Passes, StepCost, cache_cost, cost_record, hollow, step_cost
from harness.frozen.autoencoder import SD_RECIPE, build_network
from harness.frozen.encoders import encoder_width
from harness.machine.progress import OnProgress
from harness.method import BackboneShape, DataShape, Method
from harness.records.schema import CountedRecord, CountedRow, MeasuredRecord, ShapesRecord, Targets

if TYPE_CHECKING:
    from studies.costs.measure import MeasuredRow

MOST_SIDE = 256
"""Largest side of a latent: that of 2048 pixels, the largest images that a config allows."""
DOWNSAMPLING = 2 ** (len(SD_RECIPE.block_channels) - 1)
"""Pixels along one side of a latent's number."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is to be counted."""

    models: tuple[str, ...]
    methods: tuple[str, ...]
    sections: Mapping[str, Any]
    """The section of every method that is named, alone or in a sum, as that method's Config."""
    input_size: int = 32
    in_channels: int = 4
    num_classes: int = 1000

    def __post_init__(self) -> None:
        for name in ("models", "methods"):
            values = getattr(self, name)
            require(bool(values), f"{name} is empty: name at least one")
            require(len(set(values)) == len(values), f"{name} {', '.join(values)} name one twice: name each once")
        require(1 <= self.input_size <= MOST_SIDE, f"input_size is {self.input_size}: give latents of 1 to {MOST_SIDE}")
        for name in ("in_channels", "num_classes"):
            value = getattr(self, name)
            require(1 <= value <= 10**6, f"{name} is {value}: give 1 to 1000000")
        for model in self.models:
            patch = parse_name(model)["patch_size"]
            require(
                self.input_size % patch == 0,
                f"input_size is {self.input_size}: {model} cuts latents into {patch} x {patch} patches, "
                f"so give a multiple of {patch}",
            )

    @property
    def image_size(self) -> int:
        """Pixels, with an autoencoder of Stable Diffusion's shapes."""
        return DOWNSAMPLING * self.input_size

    @property
    def data(self) -> DataShape:
        return DataShape(image_size=self.image_size, num_classes=self.num_classes, encoder_width=encoder_width)

    def shape(self, model: str) -> BackboneShape:
        """The shape of a named backbone."""
        return BackboneShape.of(
            model, input_size=self.input_size, in_channels=self.in_channels, num_classes=self.num_classes
        )


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A method with its sections: as configured, or as one of its `cost_variants`."""

    method: str
    label: str
    sections: Mapping[str, Any]


def control_first(names: Sequence[str]) -> tuple[str, ...]:
    """The methods, with the control in front: every other row is compared with it."""
    control = methods.control()
    return (control, *(name for name in names if name != control))


def variants(request: Request) -> Iterator[Variant]:
    """The rows of a model, but for their targets."""
    for name in control_first(request.methods):
        own = {part: request.sections[part] for part in methods.parts(name)}
        yield Variant(method=name, label=name, sections=own)
        for part, section in own.items():
            for label, fields in methods.load(part).cost_variants.items():
                changed = replace(section, **fields)
                if changed != section:
                    yield Variant(method=name, label=f"{name}, {label}", sections={**own, part: changed})


def resolved(variant: Variant, shape: BackboneShape) -> Variant:
    """The variant with its size defaults filled in for this backbone."""
    return replace(variant, sections=methods.resolve(variant, shape))


# -- counted --------------------------------------------------------------------------------------------------------


def counted_rows(request: Request, on_progress: OnProgress | None = None) -> list[CountedRecord]:
    """One record a model, method, variant and kind of targets: what `cost.json` holds of a run, and who it is.

    Raises:
        UserError: for wrong settings of a method, and for products that have no count.
    """
    vae = hollow(lambda: build_network(replace(SD_RECIPE, latent_channels=request.in_channels)))
    own = list(variants(request))
    rows: list[CountedRow] = []
    for model, variant in itertools.product(request.models, own):
        resolved(variant, request.shape(model))  # refuses wrong settings before minutes of counting
    for model in request.models:
        shape = request.shape(model)
        passes = Passes(hollow(partial(SiT.of, shape)))
        for number, each in enumerate(own, start=1):
            variant = resolved(each, shape)
            method = methods.build(variant, shape, request.data)
            rows += rows_of(variant, model, method, step_cost(passes, method), cache_cost(vae, method))
            if on_progress is not None:
                done = number + request.models.index(model) * len(own)
                on_progress(f"counted {model} {variant.label}", done, len(request.models) * len(own))
    return with_change(rows)


def rows_of(variant: Variant, model: str, method: Method, step: StepCost, cache: CacheCost) -> list[CountedRow]:
    """A row with cached targets, and one with online targets where the method reads tokens of encoders."""
    record = cost_record(step, cache)
    totals = record.pop("train_gflops_per_image"), record.pop("train_gflops_per_image_online")
    settings = {part: dataclasses.asdict(section) for part, section in variant.sections.items()}
    return [
        {
            "model": model,
            "method": variant.method,
            "is_control": method.is_control,
            "note": method.disclosure.note,
            "label": label,
            "targets": targets,
            **record,
            "train_gflops_per_image": total,
            "settings": settings,
        }
        for (label, targets), total in zip(labels(variant, method), totals, strict=False)
    ]


def labels(variant: Variant, method: Method) -> list[tuple[str, Targets]]:
    """Label and targets of a variant's rows."""
    if not method.needs().encoders:
        return [(variant.label, "cached")]
    return [(f"{variant.label}, cached targets", "cached"), (f"{variant.label}, online targets", "online")]


def with_change(rows: Sequence[CountedRow]) -> list[CountedRecord]:
    """The rows with their change in training GFLOPs against the control of their model, in percent."""
    controls = {row["model"]: row["train_gflops_per_image"] for row in rows if row["is_control"]}
    return [
        {**row, "change_percent": 100 * (row["train_gflops_per_image"] / controls[row["model"]] - 1)} for row in rows
    ]


# -- measured -------------------------------------------------------------------------------------------------------


def measured_rows(
    request: Request, runtime: RuntimeConfig, on_progress: OnProgress, batch_size: int = 0, rounds: int = 0
) -> list[MeasuredRecord]:
    """The same rows, timed on this machine; 0 leaves batch and rounds to the kind of device."""
    from studies.costs.measure import measure
    from studies.costs.stands import Case, Workload

    cases = [
        Case(model=model, label=label, method=variant.method, sections=variant.sections, targets=targets)
        for model in request.models
        for variant in variants(request)
        for label, targets in labels(
            variant, methods.build(resolved(variant, request.shape(model)), request.shape(model), request.data)
        )
    ]
    setting = Workload(batch_size=batch_size, rounds=rounds, **shapes(request))
    return [measured_record(row) for row in measure(cases, runtime, on_progress, setting)]


def measured_record(row: "MeasuredRow") -> MeasuredRecord:
    """A measured row as it stands in `overhead.json`."""
    return cast(MeasuredRecord, dataclasses.asdict(row))


def shapes(request: Request) -> ShapesRecord:
    """What all rows share, as it stands in `overhead.json`."""
    return {
        "input_size": request.input_size,
        "in_channels": request.in_channels,
        "num_classes": request.num_classes,
        "image_size": request.image_size,
    }
