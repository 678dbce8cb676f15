"""The sections of methods in a config, with their size defaults resolved."""

import dataclasses
from dataclasses import replace
from typing import Any

import methods
from harness.backbones.sit import parse_name
from harness.config import RunConfig
from harness.method import BackboneShape

SECTIONS = tuple(
    item.name
    for item in dataclasses.fields(RunConfig)
    if dataclasses.is_dataclass(item.type) and item.name != "sections"
)
"""Sections of a run that every method shares."""


def section_of(config: RunConfig) -> Any:
    """The config that the method's class takes: its section, or all parts' sections of a sum."""
    return dict(config.sections) if "+" in config.method else config.sections[config.method]


def resolve_sections(config: RunConfig, shape: BackboneShape) -> RunConfig:
    """Fill in and check the size defaults of the method's sections."""
    resolved = methods.load(config.method).resolve(section_of(config), shape)
    return replace(config, sections=resolved if "+" in config.method else {config.method: resolved})


def nominal_shape(config: RunConfig) -> BackboneShape:
    """The backbone's shape before any data is read: defaults by size need depth and width alone."""
    parts = parse_name(config.model.name)
    return BackboneShape(
        size=size_of(config),
        depth=parts["depth"],
        hidden_size=parts["hidden_size"],
        num_heads=parts["num_heads"],
        patch_size=parts["patch_size"],
        input_size=parts["patch_size"],
        in_channels=4,
        num_classes=1,
    )


def size_of(config: RunConfig) -> str:
    """The size letter of the model's name."""
    return config.model.name.removeprefix("SiT-").split("/")[0]


def as_plain(config: RunConfig) -> dict[str, Any]:
    """A config as nested plain values, for manifests and `--print_config`."""
    plain = dataclasses.asdict(replace(config, sections={}))
    plain["sections"] = {name: dataclasses.asdict(section) for name, section in config.sections.items()}
    return plain
