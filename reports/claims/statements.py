"""The claims ledger `claims.yaml`: what papers claim, as statements that records can decide, read and checked.

A claim states a metric, a pair of settings, a direction and a margin, and what the paper prints. docs/claims.md says
how one is written; `evidence` decides them.
"""

import dataclasses
import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import yaml

from harness.records.metrics import metric
from harness.records.run_folder import UserError
from reports.study.units import short_number

CLAIMS = Path(__file__).parents[1] / "claims.yaml"

Kind = Literal["quality", "speed-up", "seconds", "count"]
Direction = Literal["better", "at least as good", "about"]
Provenance = Literal["primary", "secondary", "digitised", "unverified"]

DEPTHS = {"S": 12, "B": 12, "L": 24, "XL": 28, "pico": 4, "nano": 6, "micro": 8}
"""Blocks of every size of backbone, by the letters in the model's name."""

COUNTS = ("train_gflops_per_image", "external_parameters")
"""Fields of `cost.json` that claims of the kind `count` may be about: the change of the first, or the second itself."""

FRACTION = re.compile(r"(\d+)/(\d+)")


# -- what a ledger holds ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ClaimedCell:
    """A cell as a claim describes it: a method, and what some of its fields must be."""

    method: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    """By part and field, such as `repa.block`: a value; a fraction of the depth; or either by size of the backbone."""

    @property
    def parts(self) -> frozenset[str]:
        """The methods of a sum, in no order."""
        return frozenset(self.method.split("+"))

    def asked(self, model: str) -> dict[str, Any]:
        """What the fields must be for a backbone such as SiT-nano/2."""
        return {name: asked(condition, model) for name, condition in self.fields.items()}


def asked(condition: Any, model: str) -> Any:
    """A condition for one backbone: the value of its size, and a fraction of its depth as a block, at least 1."""
    size = model_size(model)
    if isinstance(condition, Mapping):
        condition = condition.get(size, condition["other"])
    if isinstance(condition, str) and (found := FRACTION.fullmatch(condition)):
        return max(1, round(int(found[1]) / int(found[2]) * DEPTHS[size]))
    return condition


def model_size(model: str) -> str:
    """The size in a model's name: nano in SiT-nano/2."""
    return model.partition("-")[2].partition("/")[0]


@dataclass(frozen=True, kw_only=True)
class Published:
    """What the paper prints of one model; the row stands in `reports/published/`."""

    source: str
    model: str
    steps: int = 0
    """Training steps of the claimed cell; 0 where none are stated."""
    cell: float | None = None
    against: float | None = None
    against_steps: int = 0
    """Training steps of the other cell, where they are not those of the claimed one."""
    difference: float | None = None
    """The difference, where the paper prints it in place of the values."""

    @property
    def budget(self) -> int:
        """Steps that a comparison of both trains for."""
        return max(self.steps, self.against_steps)

    def text(self, unit: str = "") -> str:
        """`28.89 against 33.02 (SiT-B/2, 400k steps)`; "" where no number is known."""
        values = [f"{value:g}{unit}" for value in (self.cell, self.against) if value is not None]
        if self.difference is not None:
            values = [f"a difference of {self.difference:g}"]
        steps = [short_number(steps) for steps in (self.steps, self.against_steps) if steps]
        where = f"{self.model}, {' against '.join(steps)} steps" if steps else self.model
        return f"{' against '.join(values)} ({where})".replace(" -", " −") if values else ""


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A statement of a paper that records can decide."""

    id: str
    paper: str
    arxiv: str
    source: str
    """Where in the paper."""
    provenance: Provenance
    text: str
    kind: Kind
    """quality: a metric at equal steps. speed-up: steps to vanilla's final value. seconds: of a step. count: exact."""
    metric: str
    """As the paper measures it; at another scale the study's own metric of that kind stands in its place."""
    cell: ClaimedCell
    against: ClaimedCell | None = None
    direction: Direction
    value: float = 0.0
    """What the claim is measured by: the factor of a speed-up; the number or the change in percent of a count."""
    margin: float = 0.0
    """In percent of vanilla's value for `at least as good`; what a count may be off by for `about`."""
    published: Sequence[Published] = ()
    note: str = ""
    """What a reader must know beside every verdict."""

    @property
    def origin(self) -> str:
        """`VAE-REPA, Table 1; secondary`."""
        return f"{self.paper}, {self.source}; {self.provenance}"

    @property
    def published_text(self) -> str:
        """All that is published, in one line."""
        unit = "%" if self.kind == "count" and self.against else ""
        return "; ".join(filter(None, (row.text(unit) for row in self.published)))


@dataclass(frozen=True, kw_only=True)
class PaperScale:
    """What the papers' numbers have in common."""

    data: str
    images: int
    image_size: int
    batch_size: int
    sampler: str
    num_steps: int
    cfg_scale: float
    encoders: Sequence[str]
    device: str
    """A part of the name of the device that seconds were taken on."""


@dataclass(frozen=True, kw_only=True)
class Ledger:
    """All claims, and what they share."""

    scale: PaperScale
    vanilla: ClaimedCell
    """Whose value margins are shares of."""
    claims: Sequence[Claim]

    @cached_property
    def papers(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(claim.paper for claim in self.claims))


# -- reading it -------------------------------------------------------------------------------------------------------

Made = TypeVar("Made")

TYPES: dict[Any, tuple[type, ...]] = {str: (str,), int: (int,), float: (int, float), float | None: (int, float)}
"""What a key may hold in YAML, by the type of its field; others are checked by themselves."""


def load_ledger(path: Path = CLAIMS) -> Ledger:
    """Read a ledger.

    Raises:
        UserError: the file is no YAML, or a key or a value of a claim cannot be; says which, and what can.
    """
    try:
        whole = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read as YAML ({' '.join(str(error).split())})") from None
    keys = ("paper_scale", "vanilla", "settings", "claims")
    top = _keys(whole, keys, keys, path.name)
    named = {
        name: _setting(value, f"{path.name}, settings {name}")
        for name, value in _mapping(top["settings"], path.name).items()
    }
    claims = [_claim(value, named, path.name) for value in _list(top["claims"], f"{path.name}, claims")]
    ids = [claim.id for claim in claims]
    if twice := [name for name in ids if ids.count(name) > 1]:
        raise UserError(f"{path.name}: the id {twice[0]} is given twice: give every claim its own")
    return Ledger(
        scale=_made(PaperScale, top["paper_scale"], f"{path.name}, paper_scale"),
        vanilla=_setting(top["vanilla"], f"{path.name}, vanilla"),
        claims=tuple(claims),
    )


def _claim(value: Any, named: Mapping[str, ClaimedCell], file: str) -> Claim:
    mapping = _mapping(value, f"{file}, a claim")
    where = f"{file}, claim {mapping.get('id', '(without id)')}"
    pair = {side: _described(mapping[side], named, where) for side in ("cell", "against") if side in mapping}
    rows = _list(mapping.get("published", []), f"{where}, published")
    published = tuple(_made(Published, row, f"{where}, published") for row in rows)
    claim = _made(Claim, {**mapping, **pair, "published": published}, where)
    if problem := _problem(claim):
        raise UserError(f"{where}: {problem}")
    return claim


def _problem(claim: Claim) -> str:
    """What keeps a claim of its kind from being decided, with the way out; "" for nothing."""
    for name, allowed in (("kind", Kind), ("direction", Direction), ("provenance", Provenance)):
        if getattr(claim, name) not in get_args(allowed):
            return f"{name} is {getattr(claim, name)!r}: give one of {', '.join(get_args(allowed))}"
    directions, metrics = {
        "quality": (("better", "at least as good"), ()),
        "speed-up": (("better",), ()),
        "seconds": (("better",), ("step_ms",)),
        "count": (("about",), COUNTS),
    }[claim.kind]
    if claim.direction not in directions:
        return f"direction is {claim.direction!r}: a claim of the kind {claim.kind} takes {' or '.join(directions)}"
    if metrics and claim.metric not in metrics:
        return f"metric is {claim.metric!r}: a claim of the kind {claim.kind} takes {' or '.join(metrics)}"
    if not metrics:
        metric(claim.metric)  # refuses a name of no family
    needs_pair = claim.metric != "external_parameters"
    if needs_pair != (claim.against is not None):
        how, of = ("missing", "two cells") if needs_pair else ("given", "one cell")
        return f"against is {how}: {claim.metric} is of {of}"
    if (claim.direction == "at least as good") != (claim.margin > 0) and claim.direction != "about":
        return f"margin is {claim.margin:g}: give more than 0 with `at least as good`, and none with `better`"
    if claim.kind == "speed-up" and claim.value < 1:
        return f"value is {claim.value:g}: give the factor of the speed-up, 1 or more"
    return ""


def _described(value: Any, named: Mapping[str, ClaimedCell], where: str) -> ClaimedCell:
    """A setting by name, or by name with some fields changed: `{of: NAME, with: {part.field: value}}`."""
    mapping = {"of": value} if isinstance(value, str) else value
    found = _keys(mapping, ("of",), ("of", "with"), where)
    if found["of"] not in named:
        raise UserError(f"{where}: there is no setting {found['of']!r}: there are {', '.join(named)}")
    base = named[found["of"]]
    changed = _mapping(found.get("with", {}), f"{where}, with")
    for name, condition in changed.items():
        _check_condition(name, condition, base.parts, where)
    return dataclasses.replace(base, fields={**base.fields, **changed})


def _setting(value: Any, where: str) -> ClaimedCell:
    """A method with a section for some of its parts."""
    mapping = _mapping(value, where)
    parts = tuple(str(mapping.get("method", "")).split("+"))
    _keys(mapping, ("method",), ("method", *parts), where)
    fields = {
        f"{part}.{name}": condition
        for part in parts
        for name, condition in _mapping(mapping.get(part, {}), where).items()
    }
    for name, condition in fields.items():
        _check_condition(name, condition, parts, where)
    return ClaimedCell(method=mapping["method"], fields=fields)


def _check_condition(name: str, condition: Any, parts: Sequence[str] | frozenset[str], where: str) -> None:
    part, _, field_name = str(name).partition(".")
    if part not in parts or not field_name:
        raise UserError(f"{where}: {name} is no field of {', '.join(sorted(parts))}: write part.field")
    if isinstance(condition, Mapping):
        if unknown := condition.keys() - DEPTHS.keys() - {"other"}:
            raise UserError(f"{where}: {name} has the size {sorted(unknown)[0]!r}: there are {', '.join(DEPTHS)}")
        if "other" not in condition:
            raise UserError(f"{where}: {name} lacks `other`: say what it is for sizes that are not named")


def _made(kind: type[Made], value: Any, where: str) -> Made:
    """A dataclass from a mapping with its fields as keys and values of their types."""
    fields = {item.name: item for item in dataclasses.fields(kind)}  # type: ignore[arg-type]
    needed = [
        name
        for name, item in fields.items()
        if item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
    ]
    found = _keys(value, needed, tuple(fields), where)
    for name, given in found.items():
        wanted = TYPES.get(fields[name].type, (object,))
        if isinstance(given, bool) or not isinstance(given, wanted):
            raise UserError(f"{where}: {name} is {given!r}: give {'text' if str in wanted else 'a number'}")
    return kind(**found)


def _keys(value: Any, needed: Sequence[str], known: Sequence[str], where: str) -> dict[str, Any]:
    """The mapping; `UserError` for unknown keys, with the nearest known one, and for missing ones."""
    mapping = _mapping(value, where)
    for key in mapping:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise UserError(f"{where}: the key {key!r} is not known{hint}: there are {', '.join(known)}")
    if missing := [key for key in needed if key not in mapping]:
        raise UserError(f"{where}: lacks {', '.join(missing)}")
    return mapping


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{where}: {value!r} is no mapping of keys to values")
    return value


def _list(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise UserError(f"{where}: {value!r} is no list")
    return value
