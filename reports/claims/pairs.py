"""Which cells of a study, or rows of an overhead record, are the pair that a claim speaks of; else what is missing."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from reports.claims.statements import Claim, ClaimedCell
from reports.study.load import Study
from reports.study.verify import flatten
from reports.study.words import listed


@dataclass(frozen=True)
class Candidate:
    """A cell with its settings and what was counted for it."""

    label: str
    method: str
    model: str
    fields: Mapping[str, Any]
    """The resolved sections of its method, by part and field."""
    cost: Mapping[str, Any]
    """Fields of `cost.json`; empty where no run got that far."""

    @property
    def parts(self) -> frozenset[str]:
        return frozenset(self.method.split("+"))


@dataclass(frozen=True)
class Pair:
    """The claimed cell, and the one that it is compared with, if the claim compares."""

    cell: Candidate
    against: Candidate | None = None

    @property
    def labels(self) -> tuple[str, ...]:
        return (self.cell.label, self.against.label) if self.against else (self.cell.label,)


def cells_of(study: Study) -> list[Candidate]:
    """Every cell of a study."""
    firsts = [(cell, study.first(cell)) for cell in study.cells]
    return [
        Candidate(
            label=cell,
            method=run.manifest["method"],
            model=run.config["model"]["name"],
            fields=flatten(run.config.get("sections", {})),
            cost=study.cost(cell),
        )
        for cell, run in firsts
    ]


def rows_of(rows: Iterable[Mapping[str, Any]]) -> list[Candidate]:
    """Every counted row of `overhead.json` whose targets are cached, as those of runs are."""
    return [
        Candidate(row["label"], row["method"], row["model"], flatten(row["settings"]), row)
        for row in rows
        if row["targets"] == "cached"
    ]


# -- finding ----------------------------------------------------------------------------------------------------------


def pairs(claim: Claim, candidates: Sequence[Candidate]) -> list[Pair]:
    """Every pair that the claim describes, alike in all that it does not vary."""
    cells = [cell for cell in candidates if not unmet(claim.cell, cell)]
    if claim.against is None:
        return [Pair(cell) for cell in cells]
    others = [cell for cell in candidates if not unmet(claim.against, cell)]
    found = [(a, b) for a in cells for b in others if a is not b and a.model == b.model]
    return [Pair(a, b) for a, b in found if not differing(claim, a, b)]


def unmet(setting: ClaimedCell, candidate: Candidate) -> dict[str, Any]:
    """What the cell is not, by field, with what it must be; the method itself stands under `method`."""
    if candidate.parts != setting.parts:
        return {"method": setting.method}
    wanted = setting.asked(candidate.model)
    return {name: value for name, value in wanted.items() if not _equal(candidate.fields.get(name), value)}


def _equal(value: Any, wanted: Any) -> bool:
    """Whether a recorded value is the wanted one: numbers by value, and no number is a truth value."""
    return isinstance(value, bool) == isinstance(wanted, bool) and value == wanted


def differing(claim: Claim, a: Candidate, b: Candidate) -> list[str]:
    """Fields of the methods that both have, in which the two differ and which the claim does not vary."""
    assert claim.against is not None
    first, second = claim.cell.asked(a.model), claim.against.asked(b.model)
    shared = a.parts & b.parts
    names = [name for name in sorted(a.fields.keys() | b.fields.keys()) if name.partition(".")[0] in shared]
    varied = {name for name in first.keys() & second.keys() if first[name] != second[name]}
    return [name for name in names if name not in varied and a.fields.get(name) != b.fields.get(name)]


# -- what is missing --------------------------------------------------------------------------------------------------


def gaps(claim: Claim, candidates: Sequence[Candidate]) -> list[str]:
    """What a study lacks of the pair, in words; empty where it has one."""
    settings = [claim.cell] if claim.against is None else [claim.cell, claim.against]
    lacking = list(dict.fromkeys(text for setting in settings if (text := _lacking(setting, candidates))))
    if lacking or pairs(claim, candidates):
        return lacking
    cells, others = ([c for c in candidates if not unmet(setting, c)] for setting in settings)
    named = [name for a in cells for b in others for name in differing(claim, a, b)]
    return [f"the two differ in {listed(list(dict.fromkeys(named)))} too" if named else "one cell is both of the pair"]


def _lacking(setting: ClaimedCell, candidates: Sequence[Candidate]) -> str:
    """`no cell of a with block 2 (nearest: b)`; "" where there is one."""
    found = [(unmet(setting, candidate), candidate) for candidate in candidates]
    same = [(wanted, candidate) for wanted, candidate in found if "method" not in wanted]
    if not same:
        return f"no cell of {setting.method}"
    wanted, nearest = min(same, key=lambda one: len(one[0]))
    if not wanted:
        return ""
    is_sum = len(setting.parts) > 1
    conditions = [f"{name if is_sum else name.partition('.')[2]} {value}" for name, value in wanted.items()]
    return f"no cell of {setting.method} with {listed(conditions)} (nearest: {nearest.label})"
