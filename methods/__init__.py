"""Training methods, one file each, found by listing this folder and the entry-point group `ditbench.methods`.

Files that begin with `_` are shared parts. A sum is written `repa+vae_repa`; each part reads its own section.
"""

import difflib
import importlib
import importlib.metadata
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from harness.errors import UserError
from harness.method import BackboneShape, DataShape, Disclosure, Method, Needs, Progress, StepView, Term
from harness.rng import global_state_kept

ENTRY_POINTS = "ditbench.methods"


def names() -> list[str]:
    """Names of all methods, sorted."""
    return sorted({*_own_names(), *_outside()})


def _own_names() -> set[str]:
    return {path.stem for path in Path(__file__).parent.glob("*.py") if not path.stem.startswith("_")}


def _outside() -> dict[str, importlib.metadata.EntryPoint]:
    return {point.name: point for point in importlib.metadata.entry_points(group=ENTRY_POINTS)}


def parts(name: str) -> tuple[str, ...]:
    """Names of the methods that a name such as `repa` or `repa+vae_repa` adds up."""
    return tuple(name.split("+"))


def load(name: str) -> type[Method]:
    """The class of a method, or of a sum of methods such as `repa+vae_repa`.

    Raises:
        UserError: for an unknown name (lists those there are) and for a sum that names a part twice.
    """
    own = parts(name)
    if len(set(own)) != len(own):
        raise UserError(f"method {name!r} names a part twice: write each part of a sum once")
    return _load_one(name) if len(own) == 1 else _sum([_load_one(part) for part in own])


def _load_one(name: str) -> type[Method]:
    if name not in _own_names() and name not in names():  # in this order: entry points take milliseconds to list
        near = difflib.get_close_matches(name, names(), n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise UserError(f"method {name!r} is not known{hint}: there are {', '.join(names())}, and sums such as a+b")
    if name in _own_names():
        module = importlib.import_module(f"{__name__}.{name}")
        found = [c for _, c in inspect.getmembers(module, inspect.isclass) if issubclass(c, Method)]
        found = [c for c in found if c.__module__ == module.__name__]
        if len(found) != 1:
            raise UserError(f"methods/{name}.py defines {len(found)} methods: define one subclass of Method in it")
        method = found[0]
    else:
        method = _outside()[name].load()
    method.name = name
    return method


class Configured(Protocol):
    """What says how a method is set, such as the config of a run."""

    @property
    def method(self) -> str:
        """The method, or a sum."""

    @property
    def sections(self) -> Mapping[str, Any]:
        """The section of each part, by the part's name: a single method has one."""


def resolve(config: Configured, shape: BackboneShape) -> dict[str, Any]:
    """The section of each part, with its size defaults filled in and checked."""
    return {part: load(part).resolve(config.sections[part], shape) for part in parts(config.method)}


def build(config: Configured, shape: BackboneShape, data: DataShape) -> Method:
    """The method of a config whose sections are resolved: its heads have the right shapes, and no weights are drawn."""
    sections = {part: config.sections[part] for part in parts(config.method)}
    with global_state_kept():
        # A single method takes its own section, a sum those of its parts.
        return load(config.method)(sections.get(config.method, sections), shape, data)


def control() -> str:
    """Name of the method that is the default baseline."""
    found = [name for name in names() if load(name).is_control]
    assert len(found) == 1, f"one method must be the control, found {found}"
    return found[0]


class _Sum(Method):
    """Several methods at once: the union of their taps, heads, needs and terms."""

    part_types: tuple[type[Method], ...] = ()

    def __init__(self, config: Mapping[str, Any], backbone: BackboneShape, data: DataShape) -> None:
        super().__init__(config, backbone, data)
        self.parts = [part(config[part.name], backbone, data) for part in self.part_types]
        for part in self.parts:
            self.heads[part.name] = part.heads

    @classmethod
    def resolve(cls, config: Mapping[str, Any], backbone: BackboneShape) -> dict[str, Any]:
        return {part.name: part.resolve(config[part.name], backbone) for part in cls.part_types}

    def needs(self) -> Needs:
        all_needs = [part.needs() for part in self.parts]
        return Needs(
            images=any(n.images for n in all_needs),
            encoders=tuple(dict.fromkeys(name for n in all_needs for name in n.encoders)),
            ema=any(n.ema for n in all_needs),
        )

    def taps(self, progress: Progress) -> tuple[int, ...]:
        return tuple(sorted({tap for part in self.parts for tap in part.taps(progress)}))

    def terms(self, view: StepView, hidden: Mapping[int, Tensor]) -> dict[str, Term]:
        merged: dict[str, Term] = {}
        for part in self.parts:
            terms = part.terms(view.of(part.name), hidden)
            assert not merged.keys() & terms.keys(), f"two parts of {self.name} share a term name"
            merged |= terms
        return merged

    def diagnostics(self, view: StepView, hidden: Mapping[int, Tensor]) -> dict[str, float]:
        return {k: v for part in self.parts for k, v in part.diagnostics(view.of(part.name), hidden).items()}

    def search_space(self) -> dict[str, Any]:
        return {f"{part.name}.{k}": v for part in self.parts for k, v in part.search_space().items()}

    def state_dict(self) -> dict[str, Tensor]:
        return {f"{part.name}.{k}": v for part in self.parts for k, v in part.state_dict().items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        for part in self.parts:
            prefix = f"{part.name}."
            part.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})

    def initialize(self, seed: int) -> None:
        for part in self.parts:
            part.initialize(seed)


def _sum(parts: list[type[Method]]) -> type[Method]:
    disclosures = [part.disclosure for part in parts]
    disclosure = Disclosure(
        summary=" ".join(d.summary for d in disclosures),
        paper="; ".join(d.paper for d in disclosures),
        pretrained=tuple(p for d in disclosures for p in d.pretrained),
        outside_data=tuple(p for d in disclosures for p in d.outside_data),
        note="; ".join(d.note for d in disclosures if d.note),
    )
    name = "+".join(part.name for part in parts)
    body = {"part_types": tuple(parts), "disclosure": disclosure, "name": name, "Config": dict}
    return type("Sum", (_Sum,), body)
