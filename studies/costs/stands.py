"""Methods made ready to be measured, on made-up data and with shared weights."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from accelerate import Accelerator
from torch import Tensor

from harness.config import BudgetConfig, DataConfig, ModelConfig, OptimizerConfig, RunConfig, RuntimeConfig, require
from harness.cost import memory
from harness.data.batches import Batch
from harness.frozen.encoders import PASS_IMAGES, FrozenEncoder, encoder_width
from harness.method import BackboneShape, DataShape
from harness.training.step import Run, train_step
from studies.configs.sections import resolve_sections
from studies.costs.synthetic import random_images, synthetic_run

LEAST_ROUNDS = 6
"""Least and most of n values enclose the median with confidence 1 - 2 / 2^n: 96.9% for 6, and too little for 5."""


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
class Workload:
    """The sizes of data and batch, and the rounds, that all cases are measured with."""

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

    def resolved(self, device: torch.device) -> "Workload":
        """The setting without zeros."""
        batch_size, rounds, warmup = (8, 6, 1) if device.type == "cpu" else (32, 50, 5)
        return replace(
            self,
            batch_size=self.batch_size or batch_size,
            rounds=self.rounds or rounds,
            warmup=self.warmup or warmup,
        )


@dataclass(frozen=True)
class Conditions:
    """The machine and the workload that all cases are measured on, with every `auto` resolved."""

    runtime: RuntimeConfig
    accelerator: Accelerator
    setting: Workload

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
        return BackboneShape.of(
            config.model.name,
            input_size=setting.input_size,
            in_channels=setting.in_channels,
            num_classes=setting.num_classes,
        )

    def run(self, case: Case) -> Run:
        """The case's run at step 0."""
        config = self.config(case)
        return synthetic_run(config, self.shape(config), self.data, self.accelerator, self.setting.batch_size)


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
        """Tokens of the images, made in the run's precision, as sihyun-yu/REPA train.py does it."""
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


def work(conditions: Conditions, case: Case) -> float:
    """Roughly how long a step takes, in an unknown unit: parameters of the backbone."""
    return memory.backbone_parameters(conditions.shape(conditions.config(case)))
