"""Axes of an ablation: from `--grid.block 1,2,3`, or a method's own search space, to settings that are all checked."""

import dataclasses
import difflib
import itertools
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, get_args, get_origin

import yaml

import methods
from harness.config import RunConfig, require
from harness.cost.memory import outline
from harness.errors import UserError
from harness.frozen.encoders import encoder_width
from harness.method import DataShape, Method
from harness.records.ablation import Axis
from studies.ablation.plan import PlannedSubject, Setting, axis_name
from studies.configs.sections import nominal_shape, resolve_sections
from studies.configs.settings import comma_list

MOST_SETTINGS = 10_000
"""Most settings that a grid may have."""

ALL = "all"
"""Instead of levels: the choices of the method's search space, or all values that a bool or a choice may have."""


# -- fields ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Field:
    """A field of a method's section that can be an axis."""

    name: str
    kind: Literal["int", "float", "bool", "choice", "text"]
    default: Any
    """Resolved for the backbone."""
    choices: tuple[Any, ...] = ()
    """All values of a bool or a choice."""


KINDS: Mapping[Any, Literal["int", "float", "bool", "text"]] = {int: "int", float: "float", bool: "bool", str: "text"}
"""Kinds of axes by the type of their field."""


def fields(config: RunConfig) -> dict[str, Field]:
    """The fields of a method's section or sections that can be axes, in their order, by name."""
    found = {}
    for part, section in config.sections.items():
        types = typing.get_type_hints(type(section))
        for item in dataclasses.fields(section):
            kind, choices = _kind(types[item.name])
            if kind is not None:
                name = axis_name(config.method, part, item.name)
                found[name] = Field(name=name, kind=kind, default=getattr(section, item.name), choices=choices)
    return found


def _kind(hint: Any) -> tuple[Literal["int", "float", "bool", "choice", "text"] | None, tuple[Any, ...]]:
    """Kind and choices of an axis over a field of this type; None where it cannot be one."""
    if get_origin(hint) is Literal:
        return "choice", get_args(hint)
    return KINDS.get(hint), (False, True) if hint is bool else ()


def named(known: Mapping[str, Field], name: str, method: str) -> Field:
    """The field of an axis; `UserError` lists the axes there are, the nearest first."""
    if not known:
        raise UserError(f"method is {method!r}, which has nothing to set: give --method, such as {_example()}")
    if name not in known:
        # `block` is nearest to `repa.block` in a sum.
        tails = [key for key in known if key.rpartition(".")[2] == name]
        near = tails or difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        hint = f"did you mean grid.{near[0]}? " if near else ""
        order = ", ".join(dict.fromkeys((*near, *known)))
        raise UserError(f"grid.{name} is no axis of {method}: {hint}its axes are {order}")
    return known[name]


def _example() -> str:
    return next(name for name in methods.names() if name != methods.control())


# -- levels ---------------------------------------------------------------------------------------------------------


def levels(field: Field, value: Any, space: Mapping[str, Sequence[Any]]) -> tuple[Any, ...]:
    """The levels of an axis as they were asked for, each of the field's type.

    Raises:
        UserError: for none, and for values of another type.
    """
    words = _list(value)
    if words == [ALL]:
        words = list(space.get(field.name, field.choices))
        require(
            bool(words),
            f"grid.{field.name} is 'all': the method declares no search space for it, so list its levels",
        )
    require(bool(words), f"grid.{field.name} is empty: give its levels, such as --grid.{field.name} {_sample(field)}")
    return tuple(_typed(field, word) for word in words)


def _list(value: Any) -> list[Any]:
    """A comma list, or a YAML list, whose texts may hold commas."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = yaml.safe_load(value)
        except yaml.YAMLError:
            return comma_list(value)
    return list(value) if isinstance(value, list) else comma_list(value)


def _sample(field: Field) -> str:
    return ",".join(_words(field.choices)) or {"int": "1,2,3", "float": "0.1,1.0", "text": "a,b"}[field.kind]


def _words(values: Sequence[Any]) -> list[str]:
    """Values as they are written on the command line."""
    return [str(value).lower() if isinstance(value, bool) else str(value) for value in values]


def _typed(field: Field, word: Any) -> Any:
    """One level as the field's type."""
    choices = dict(zip(_words(field.choices), field.choices, strict=True))
    convert: Callable[[str], Any] = {"int": int, "float": float, "text": str}.get(field.kind, choices.__getitem__)
    text = _words([word])[0]
    try:
        return convert(text.lower() if field.kind == "bool" else text)
    except (KeyError, ValueError):
        wanted = {"int": "whole numbers", "float": "numbers"}.get(field.kind, f"some of {', '.join(choices)}")
        raise UserError(f"grid.{field.name} is {text!r}: give {wanted}, separated by commas") from None


# -- subjects -------------------------------------------------------------------------------------------------------


def grid_subject(config: RunConfig, asked: Mapping[str, Any]) -> PlannedSubject:
    """The method of a grid with its axes, for levels as they were asked for.

    Args:
        config: the method's cell as `compare` would run it.
        asked: axis name -> levels, as a comma list or a list.

    Raises:
        UserError: for an unknown axis, for a value of another type or out of range, and for one that is given twice.
    """
    base = resolve_sections(config, nominal_shape(config))
    known, space = fields(base), search_space(base)
    found = {name: named(known, name, base.method) for name in asked}
    wanted = {name: levels(field, asked[name], space) for name, field in found.items()}
    bare = PlannedSubject(method=base.method, base=base, space=space, axes=_axes(known, dict.fromkeys(asked, ())))
    resolved = {name: _resolved_levels(bare, name, values) for name, values in wanted.items()}
    return replace(bare, axes=_axes(known, resolved))


def search_subject(config: RunConfig) -> PlannedSubject:
    """A method with the search space that it declares; the default is one of the choices.

    Raises:
        UserError: for a method that declares none.
    """
    base = resolve_sections(config, nominal_shape(config))
    known, space = fields(base), search_space(base)
    require(bool(space), f"method {base.method!r} declares no search space: use --grid.FIELD, or leave it out")
    with_default = {
        name: _with_default(known[name], levels(known[name], [*choices], {})) for name, choices in space.items()
    }
    subject = PlannedSubject(method=base.method, base=base, space=with_default, axes=_axes(known, with_default))
    for axis in subject.axes:
        for level in axis.levels:
            check(subject, {axis.name: level})
    return subject


def _with_default(field: Field, choices: Sequence[Any]) -> tuple[Any, ...]:
    """The choices, with the default among them; numbers in ascending order."""
    found = tuple(dict.fromkeys((*choices, field.default)))
    return tuple(sorted(found)) if field.kind in ("int", "float") else found


def _axes(known: Mapping[str, Field], wanted: Mapping[str, Sequence[Any]]) -> tuple[Axis, ...]:
    """Axes with these levels, in the order of the fields."""
    return tuple(
        Axis(name=name, default=field.default, levels=tuple(wanted[name]), kind=field.kind, choices=field.choices)
        for name, field in known.items()
        if name in wanted
    )


def _resolved_levels(subject: PlannedSubject, name: str, values: Sequence[Any]) -> tuple[Any, ...]:
    """The levels with `0 = by size` filled in."""
    found: dict[Any, Any] = {}
    for value in values:
        try:
            resolved = subject.setting_of(check(subject, {name: value}))[name]
        except UserError as error:
            raise UserError(f"grid.{name}: {error}") from None
        if resolved in found:
            spelt = f", as {found[resolved]!r} and as {value!r}" if found[resolved] != value else ""
            raise UserError(f"grid.{name} names {resolved!r} twice{spelt}: leave one out")
        found[resolved] = value
    return tuple(found)


def search_space(base: RunConfig) -> dict[str, tuple[Any, ...]]:
    """The search space that a method declares for a resolved cell: axis name -> choices."""
    declared = _outline(base).search_space()
    return {name: tuple(choices) for name, choices in declared.items()}


def check(subject: PlannedSubject, setting: Setting) -> RunConfig:
    """The cell of a setting, whose method could be built; `UserError` names what is wrong."""
    cell = subject.cell(setting)
    _outline(cell)
    return cell


def _outline(config: RunConfig) -> Method:
    """The method of a resolved cell, its heads without numbers."""
    shape = nominal_shape(config)
    data = DataShape(image_size=config.data.image_size, num_classes=1, encoder_width=encoder_width)
    return outline(config.method, partial(methods.build, config, shape, data))


# -- settings of a grid ---------------------------------------------------------------------------------------------


def grid_settings(subject: PlannedSubject, one_at_a_time: bool) -> tuple[Setting, ...]:
    """The settings of a grid, each once, the default first; `UserError` for one that the method refuses.

    Args:
        subject: the method with its axes.
        one_at_a_time: whether all axes but one are at their default in every setting.
    """
    default = subject.default()
    count = 1
    for axis in subject.axes:
        count = count + len(axis.levels) if one_at_a_time else count * len(axis.levels)
    require(count <= MOST_SETTINGS, f"grid has {count} settings: give fewer levels, for at most {MOST_SETTINGS}")
    asked = _rows(subject, default) if one_at_a_time else _product(subject)
    found: dict[str, Setting] = {}
    for setting in (default, *asked):
        cell = subject.cell(setting)
        found.setdefault(cell.label, subject.setting_of(cell))
    return tuple(found.values())


def _rows(subject: PlannedSubject, default: Setting) -> Iterator[Setting]:
    for axis in subject.axes:
        for level in axis.levels:
            yield {**default, axis.name: level}


def _product(subject: PlannedSubject) -> Iterator[Setting]:
    names = [axis.name for axis in subject.axes]
    for values in itertools.product(*(axis.levels for axis in subject.axes)):
        yield dict(zip(names, values, strict=True))
