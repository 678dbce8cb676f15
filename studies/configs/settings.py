"""From YAML and command line to typed configs: presets, dotted overrides, and the cells of a comparison."""

import dataclasses
import os
from argparse import ArgumentTypeError
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from jsonargparse import SUPPRESS, ArgumentError, ArgumentParser, Namespace, set_parsing_settings

import methods
from harness.config import RunConfig, require
from harness.errors import UserError
from studies.configs import documents
from studies.configs.refusals import explain
from studies.configs.sections import SECTIONS

PRESETS = Path(__file__).parents[1] / "presets"
"""Shipped configs, by file name."""


ONE_RUN = ("method", "seed", "cell")
WHAT_RUNS = {"compare": ("methods", "cells", "seeds", "baseline"), "ablate": ("method", "methods", "seeds")}
"""What a command runs is said by these options. It takes the others as well, as one config serves all commands."""


class WrongValue(ArgumentTypeError, ValueError):
    """A value of the wrong kind. argparse shows the text of the first base only, jsonargparse that of the second."""


def comma_list(value: Any) -> list[str]:
    """A list written as `a,b` on the command line or as a YAML list."""
    if isinstance(value, str):
        value = [part.strip() for part in value.split(",")]
    if not isinstance(value, (list, tuple)):
        value = [value]
    return [str(part) for part in value if str(part)]


def whole_numbers(value: Any) -> list[int]:
    """A comma list of whole numbers, 0 or more."""
    try:
        numbers = [int(part) for part in comma_list(value)]
    except ValueError:
        raise WrongValue(f"{value!r} is not a list of whole numbers such as 0,1,2") from None
    if any(number < 0 for number in numbers):
        raise WrongValue(f"{value!r} holds a negative number: give 0 or more")
    return numbers


def mapping(value: Any) -> dict[str, Any]:
    """A YAML mapping."""
    parsed = yaml.safe_load(value) if isinstance(value, str) else value
    if not isinstance(parsed, Mapping):
        raise WrongValue(f"{value!r} is not a mapping of labels to settings")
    return dict(parsed)


# -- parsing --------------------------------------------------------------------------------------------------------


def build_parser(command: str, description: str) -> ArgumentParser:
    """Parser of a command that trains: the shared sections, every method's own section, and what to run."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(
        prog=f"ditbench {command}", description=description, exit_on_error=False, allow_abbrev=False
    )
    parser.add_argument("--config", action="config", help=f"YAML file, or a preset: {', '.join(preset_names())}")
    parser.add_argument("--study", type=str, default="study", help="name of the study's folder in --output.runs")
    names = methods.names()  # once, as entry points take milliseconds to list
    known = _known(names)
    for name, kind, default, text in (
        ("method", str, "sit", f"one of {known}"),
        ("seed", int, 0, "training seed"),
        ("cell", str, "", "label of the cell (default: the method)"),
        ("methods", comma_list, [], f"several methods, of {known}"),
        ("cells", mapping, {}, "{label: {method: m, m: {field: value}}}; wins over methods"),
        ("seeds", whole_numbers, [0], "training seeds, such as 0,1,2"),
        ("baseline", str, "", "label of the control cell"),
    ):
        shown = text if name in WHAT_RUNS.get(command, ONE_RUN) else SUPPRESS
        parser.add_argument(f"--{name}", type=kind, default=default, help=shown)
    for item in dataclasses.fields(RunConfig):
        if item.name in SECTIONS:
            parser.add_class_arguments(item.type, item.name)
    for name in names:
        parser.add_class_arguments(methods.load(name).Config, name)
    return parser


def _known(names: Sequence[str]) -> str:
    return f"{', '.join(names)}, or a sum such as {'+'.join(names[:2])}"


def preset_names() -> list[str]:
    """Names that `--config` knows."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def parse(parser: ArgumentParser, argv: Sequence[str]) -> Namespace:
    """Parse; `UserError` names the nearest key for an unknown one. The last `--config` and overrides win."""
    words = [_preset_path(word, before) for before, word in zip(["", *argv], argv, strict=False)]
    try:
        return _checked(parser, parser.parse_args(words))
    except ArgumentError as error:
        raise UserError(explain(str(error), parser)) from None


def _checked(parser: ArgumentParser, namespace: Namespace) -> Namespace:
    """Refuse what the parser lets pass: a section that is given as one value, and a key with nothing behind it."""
    inner = {action.dest.rpartition(".")[0] for action in parser._actions}
    for name in dict.fromkeys((*SECTIONS, *methods.names(), *sorted(inner - {""}))):
        value = namespace.get(name, Namespace())  # a section without keys is not there
        ok = isinstance(value, Namespace)
        require(ok, f"{name} is {value!r}: it is a section, so set the keys in it, as in --help")
    for action in parser._actions:
        # Lists of what to run are refused where they are read.
        optional = isinstance(action.default, (list, dict, type(None)))
        optional |= type(None) in get_args(getattr(action, "_typehint", None))
        empty = namespace.get(action.dest, action.default) is None and not optional
        require(not empty, f"{action.dest} is empty: give it a value, or leave the key out for its default")
    return namespace


def _preset_path(word: str, before: str) -> str:
    """`--config digits` and `--config=digits` as the path of the preset."""
    name = word.removeprefix("--config=") if word.startswith("--config=") else word if before == "--config" else ""
    if not name:
        option, _, value = word.partition("=") if word.startswith("--") else (before, "", word)
        documents.check_word(value, option.removeprefix("--"))
        return word
    if os.path.isfile(name):  # noqa: PTH113 - False, not an error, for what no path can be
        documents.check_file(Path(name))
        return word
    if name not in preset_names():
        raise UserError(f"--config {name}: neither a file nor a preset; presets are {', '.join(preset_names())}")
    return word.replace(name, str(PRESETS / f"{name}.yaml"))


# -- configs --------------------------------------------------------------------------------------------------------


def was_given(argv: Sequence[str], option: str) -> bool:
    """Whether an option stands on the command line itself, not in a config alone."""
    return any(word == f"--{option}" or word.startswith(f"--{option}=") for word in argv)
