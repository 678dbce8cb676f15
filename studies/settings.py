"""From YAML and command line to typed configs: presets, dotted overrides, and the cells of a comparison."""

import dataclasses
import difflib
import os
import re
from argparse import ArgumentTypeError
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self, get_args

import yaml
from jsonargparse import SUPPRESS, ArgumentError, ArgumentParser, Namespace, set_parsing_settings

import methods
from harness.backbones.sit import parse_name
from harness.config import RunConfig, require
from harness.errors import UserError
from harness.method import BackboneShape
from studies import documents
from studies.agenda import Agenda, Context

PRESETS = Path(__file__).parent / "presets"
"""Shipped configs, by file name."""

SECTIONS = tuple(
    item.name
    for item in dataclasses.fields(RunConfig)
    if dataclasses.is_dataclass(item.type) and item.name != "sections"
)
"""Sections of a run that every method shares."""


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


KINDS = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text"}
"""Types of the config, in words."""


def explain(message: str, parser: ArgumentParser) -> str:
    """One line of a parser error, with the nearest known key for an unknown one, and types in words."""
    message = " ".join(message.split())
    return _explain_value(message) or _explain_key(message, parser) or message


def _explain_value(message: str) -> str:
    """What is said of a value of the wrong kind; "" for other messages."""
    if wrong := re.search(r'Parser key "([\w.+-]+)": Expected an? (.+?)\. Got value: ?(.*)', message):
        key, kind, value = wrong.groups()
        choices = re.findall(r"'([^']*)'", kind)
        wanted = f"one of {', '.join(choices)}" if "Literal" in kind else KINDS.get(choices[0] if choices else "", kind)
        return f"{key} is {value or 'empty'}: give {wanted}"
    if wrong := re.search(
        r'key "([\w.+-]+)": Does not validate against any .* Subtypes: (.*?) Errors: .* value: ?(.*)', message
    ):
        # `class 'bool'` of a type, and `Literal['auto']` of a choice.
        wanted = " or ".join(KINDS.get(kind, kind) for kind in re.findall(r"'(\w+)'", wrong[2]) if kind != "NoneType")
        return f"{wrong[1]} is {wrong[3] or 'empty'}: give {wanted}"
    if wrong := re.search(r'Parser key "([\w.+-]+)": Unable to load config (.*) - Parser key', message):
        return f"{wrong[1]} is {wrong[2]}: it is a section, so set the keys in it, as in --help"
    if wrong := re.search(r"argument --([\w.+-]+): expected one argument", message):
        return f"{wrong[1]} has no value: give one, and write --{wrong[1]}=VALUE where it begins with a dash"
    return ""


def _explain_key(message: str, parser: ArgumentParser) -> str:
    """What is said of an unknown key; "" for other messages."""
    unknown = (
        re.search(r"unrecognized arguments: --([\w.+-]+)", message)
        or re.search(r"Group '(?P<group>[\w.]+)' does not accept option '(?P<key>[\w.]+)'", message)
        or re.search(r"Option '([\w.]+)' is not accepted", message)
    )
    if unknown is None:
        return ""
    parts = unknown.groupdict()
    return _nearest(f"{parts['group']}.{parts['key']}" if parts else unknown[1], parser)


def _nearest(key: str, parser: ArgumentParser) -> str:
    """What is said of an unknown key: the nearest one there is, section by section."""
    keys = [action.dest for action in parser._actions if action.dest not in ("help", "print_config")]
    sections = {known.split(".")[0] for known in keys}
    near = difflib.get_close_matches(key, keys, n=1, cutoff=0.5)
    first = key.split(".")[0]
    if first not in sections and (section := difflib.get_close_matches(first, sections, n=1, cutoff=0.5)):
        whole = section[0] + key.removeprefix(first)
        near = [whole] if whole in keys else section
    return f"key {key!r} is not known" + (f": did you mean {near[0]!r}?" if near else ": see --help for all keys")


# -- configs --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Comparison(Agenda):
    """What `compare` runs: every cell at every seed."""

    cells: tuple[RunConfig, ...]
    """One config a cell, at seed 0."""
    seeds: tuple[int, ...]
    baseline: str
    """Label of the control cell."""
    notes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Further fields of the manifests of a cell's runs, by its label."""

    def runs(self) -> list[RunConfig]:
        """All runs, seed by seed, so that a comparison is complete at one seed before the next begins."""
        return [replace(cell, seed=seed) for seed in self.seeds for cell in self.cells]

    @property
    def total(self) -> int:
        return len(self.seeds) * len(self.cells)

    def run(self, number: int) -> RunConfig:
        seed, cell = divmod(number - 1, len(self.cells))
        return replace(self.cells[cell], seed=self.seeds[seed])

    def context(self, number: int) -> Context:
        return Context(baseline=self.baseline, facts=self.notes.get(self.run(number).label, {}))

    def with_threads(self, threads: int) -> Self:
        runtime = replace(self.cells[0].runtime, threads=threads)
        return replace(self, cells=tuple(replace(cell, runtime=runtime) for cell in self.cells))


def run_config(parser: ArgumentParser, namespace: Namespace) -> RunConfig:
    """The config of a single run."""
    return _config(parser, namespace, namespace.method, namespace.cell, namespace.seed)


def comparison(parser: ArgumentParser, namespace: Namespace) -> Comparison:
    """The cells of a comparison; `UserError` for labels, methods or a baseline that do not exist."""
    asked = _cells(namespace)
    labels = list(asked)
    control = next((label for label, cell in asked.items() if cell["method"] == methods.control()), labels[0])
    baseline = namespace.baseline or control
    require(baseline in labels, f"baseline is {baseline!r}: the cells are {', '.join(labels)}")
    cells = []
    for label, cell in asked.items():
        changed = _with_overrides(parser, namespace, label, cell)
        cells.append(_config(parser, changed, cell["method"], label, 0))
    return Comparison(cells=tuple(cells), seeds=checked_seeds(namespace.seeds), baseline=baseline)


def checked_seeds(seeds: Sequence[int]) -> tuple[int, ...]:
    """The seeds; `UserError` when there are none, or one is named twice."""
    require(bool(seeds), "seeds is empty: give at least one, such as --seeds 0,1")
    require(len(set(seeds)) == len(seeds), f"seeds {list(seeds)} name a seed twice")
    return tuple(seeds)


def was_given(argv: Sequence[str], option: str) -> bool:
    """Whether an option stands on the command line itself, not in a config alone."""
    return any(word == f"--{option}" or word.startswith(f"--{option}=") for word in argv)


def _cells(namespace: Namespace) -> dict[str, dict[str, Any]]:
    """Label -> {method, and overrides of methods' sections}."""
    if namespace.cells:
        for label, cell in namespace.cells.items():
            known = isinstance(cell, Mapping) and "method" in cell
            require(known, f"cells.{label} is {cell!r}: give at least its method, as {{method: name}}")
        return {str(label): dict(cell) for label, cell in namespace.cells.items()}
    require(
        bool(namespace.methods), f"methods is empty: give --methods or --config; there are {_known(methods.names())}"
    )
    require(len(set(namespace.methods)) == len(namespace.methods), f"methods {namespace.methods} name one twice")
    return {name: {"method": name} for name in namespace.methods}


def _with_overrides(parser: ArgumentParser, namespace: Namespace, label: str, cell: Mapping[str, Any]) -> Namespace:
    """The namespace with a cell's own method settings."""
    overrides = {key: value for key, value in cell.items() if key != "method"}
    if not overrides:
        return namespace
    strange = [key for key in overrides if key not in methods.names()]
    require(
        not strange,
        f"cells.{label} sets {', '.join(strange)}: a cell may set its method and methods' own sections only",
    )
    try:
        return _checked(parser, parser.parse_object(overrides, namespace.clone()))
    except ArgumentError as error:
        raise UserError(f"cells.{label}: {explain(str(error), parser)}") from None


def _config(parser: ArgumentParser, namespace: Namespace, method: str, cell: str, seed: int) -> RunConfig:
    """Build the typed config of one run, with every section checked and only the method's own sections kept."""
    methods.load(method)
    made = parser.instantiate(namespace)
    sections = {name: made[name] for name in method.split("+")}
    shared = {name: made[name] for name in SECTIONS}
    return RunConfig(study=namespace.study, cell=cell or method, method=method, seed=seed, sections=sections, **shared)


# -- sections of a method -------------------------------------------------------------------------------------------


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
