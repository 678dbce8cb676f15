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


def resolve_sections(config: RunConfig, shape: BackboneShape) -> RunConfig:
    """Fill in and check the size defaults of the method's sections."""
    return replace(config, sections=methods.resolve(config, shape))


def nominal_shape(config: RunConfig) -> BackboneShape:
    """The backbone's shape before any data is read: defaults by size need depth and width alone.

    It has four tokens, as some methods refuse a backbone that has one.
    """
    patch = parse_name(config.model.name)["patch_size"]
    return BackboneShape.of(config.model.name, input_size=2 * patch, in_channels=4, num_classes=1)


def as_plain(config: RunConfig) -> dict[str, Any]:
    """A config as nested plain values, for manifests and `--print_config`."""
    plain = dataclasses.asdict(replace(config, sections={}))
    plain["sections"] = {name: dataclasses.asdict(section) for name, section in config.sections.items()}
    return plain
