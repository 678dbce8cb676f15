"""The claims ledger as text and numbers: for the terminal, for files, and as a section of a study's page."""

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from harness.records.files import canonical, read_json, storing, write_atomic
from harness.records.run_folder import UserError
from reports.claims.evidence import LEAST_SEEDS, CountedRows, Evidence, Judged, Source, judge
from reports.claims.statements import Claim, Ledger, load_ledger
from reports.sections import Part, Section, Table
from reports.study.load import Study, load_study
from reports.study.words import count, listed
from reports.tables.cells import Row
from reports.tables.formats import latex_table, markdown_table, markdown_text
from reports.tables.results import BIAS_MARK, MINUS, MISSING, Digits, shared_digits_of

OVERHEAD = "overhead.json"

RULE = (
    "Reproduced: the 95% t interval of the differences paired by seed lies wholly on the claimed side; contradicted: "
    f"wholly on the other; undecided: neither, or fewer than {LEAST_SEEDS} pairs of seeds, unequal budgets or "
    "protocols, or a run that diverged. “At least as good” has a margin, a share of vanilla's value. Counts are exact "
    "and need no seeds. At another scale than the paper's the words are “holds” and “does not hold” with data and "
    "size, and say nothing of the paper's scale."
)
MULTIPLE = (
    "Each interval is taken by itself: where settings make no difference at all, one claim in 40 would come out on the "
    "claimed side and one in 40 on the other."
)


# -- what is judged ---------------------------------------------------------------------------------------------------


def read_source(path: Path) -> Source:
    """A study, or a folder with the record of `ditbench overhead`.

    Raises:
        UserError: it is neither, or holds nothing that was evaluated.
    """
    record = path / OVERHEAD
    if not record.is_file():
        return load_study(path)
    whole = read_json(record)
    try:
        return CountedRows(path, whole["counted"], whole["shapes"])
    except (KeyError, TypeError):
        raise UserError(f"{record} is no record of ditbench overhead: give that command again") from None


def judge_paths(paths: Sequence[Path]) -> list[Judged]:
    """All claims against the given folders, each folder once."""
    once = {path.resolve(): path for path in paths}
    return judge(load_ledger(), [read_source(path) for path in once.values()])


# -- text -------------------------------------------------------------------------------------------------------------


def ours(one: Evidence) -> str:
    """The numbers, as `−3.1 [−5.0, −1.2]`, with the means behind them."""
    if not one.has_data:
        return MISSING
    kind = one.claim.kind
    if kind == "count":
        return f"{one.interval.mean:+.1f}%".replace("-", MINUS) if one.against else f"{one.interval.mean:,.0f}"
    show = shared_digits_of((*one.values, one.interval.mean)) if kind != "speed-up" else Digits(2)
    signed = kind != "speed-up"
    text = show(one.interval.mean, signed) + _bounds(one, show, signed)
    mark = f" {BIAS_MARK}" if one.favoured else ""
    if kind == "speed-up":
        return f"{text} times{mark} ({one.values[0]:,.0f} against {one.values[1]:,.0f} steps)"
    first, second = (show(value) for value in one.values)
    return f"{text}{mark} ({first} against {second}){' ms a step' if kind == 'seconds' else ''}"


def _bounds(one: Evidence, show: Digits, signed: bool) -> str:
    if not math.isfinite(one.interval.low):
        return ""
    return f" [{show(one.interval.low, signed)}, {show(one.interval.high, signed)}]"


def seeds(one: Evidence) -> str:
    """How many pairs, and how many of them are on the claimed side."""
    if one.claim.kind == "count":
        return "exact"
    num = one.interval.num
    left_out = f"; {'; '.join(one.left_out)}" if one.left_out and not one.missing else ""
    return f"{num}, {one.num_claimed} as claimed{left_out}" if num else "0"


def pair_text(one: Evidence) -> str:
    """`vae_repa − sit, fd_efficientnet_lite0_898`."""
    cells = f"{one.cell} {'/' if one.claim.kind == 'speed-up' else MINUS} {one.against}" if one.against else one.cell
    return f"{cells}, {one.metric}"


def statement(claim: Claim) -> str:
    """What is claimed, and where."""
    return f"{claim.text} ({claim.origin})"


def rows(judged: Sequence[Judged]) -> list[Row]:
    """A row for every pair that says something of a claim, and one for each claim that none speaks of."""
    return [row for one in judged for row in _rows(one)]


def _rows(judged: Judged) -> list[Row]:
    claim = judged.claim
    start = {"claim": claim.id, "says": statement(claim), "published": claim.published_text or MISSING}
    if not judged.evidence:
        nothing = dict.fromkeys(("numbers", "pairs of seeds", "study", "of", "scale"), MISSING)
        return [{**start, "verdict": "undecided", **nothing, "missing": "; ".join(judged.missing), "page": MISSING}]
    return [
        {
            **start,
            "verdict": one.words,
            "numbers": ours(one),
            "pairs of seeds": seeds(one),
            "study": one.study,
            "of": pair_text(one),
            "scale": one.place.text,
            "missing": "; ".join(one.missing) or MISSING,
            "page": one.page or MISSING,
        }
        for one in judged.evidence
    ]


TERMINAL = ("says", "published", "numbers", "pairs of seeds", "of", "study", "scale", "missing", "page")
SECTION = ("says", "published", "verdict", "numbers", "pairs of seeds", "of", "missing")
PRINTED = ("claim", "verdict", "numbers", "pairs of seeds", "scale")
"""Fields of a claim on a terminal; columns on a study's own page and in LaTeX."""


def blocks(judged: Sequence[Judged]) -> list[tuple[str, dict[str, str]]]:
    """The rows for a terminal, which is too narrow for their columns: a heading with the verdict, and what is known."""
    return [
        (f"{row['claim']}: {row['verdict']}", {name: row[name] for name in TERMINAL if row[name] != MISSING})
        for row in rows(judged)
    ]


def only(table: Sequence[Row], columns: Sequence[str]) -> list[dict[str, str]]:
    """These columns of the rows."""
    return [{name: row[name] for name in columns} for row in table]


def summary(judged: Sequence[Judged]) -> list[str]:
    """How many claims stand how, and which are decided both ways, in sentences."""
    stands = Counter(word for one in judged for word in dict.fromkeys(_standing(one)))
    parts = [f"{num} {word}" for word, num in sorted(stands.items(), key=lambda found: ORDER.index(found[0]))]
    found = [f"{count(len(judged), 'claim')}: {listed(parts)}."]
    for one in judged:
        if one.is_contested:
            sides = [f"{e.words} (study {e.study})" for e in one.evidence if e.verdict != "undecided"]
            found.append(f"{one.claim.id} is decided both ways: {listed(sides)}.")
    return found


ORDER = ("reproduced", "contradicted", "holding at another scale", "not holding at another scale", "undecided")


def _standing(judged: Judged) -> list[str]:
    """In which ways a claim is decided; undecided only where no pair decides it."""
    found = []
    for one in judged.evidence:
        if one.verdict != "undecided":
            is_reproduced = one.verdict == "reproduced"
            found.append(ORDER[(0 if one.place.is_papers else 2) + (0 if is_reproduced else 1)])
    return found or ["undecided"]


# -- numbers ----------------------------------------------------------------------------------------------------------


def record(judged: Sequence[Judged]) -> list[dict[str, Any]]:
    """Every claim with its evidence, for programs. Values that are not finite are null."""
    found = [
        {
            **{name: getattr(one.claim, name) for name in ABOUT},
            "published": [dataclasses.asdict(row) for row in one.claim.published],
            "evidence": [evidence_record(each) for each in one.evidence],
            "missing": list(one.missing),
            "contested": one.is_contested,
        }
        for one in judged
    ]
    return _finite(found)


ABOUT = (
    *("id", "paper", "arxiv", "source", "provenance", "text"),
    *("kind", "metric", "direction", "value", "margin", "note"),
)


def evidence_record(one: Evidence) -> dict[str, Any]:
    """What one pair says, flat but for lists."""
    plain = ("study", "cell", "against", "metric", "verdict", "words", "border", "page")
    return {
        **{name: getattr(one, name) for name in plain},
        "pairs": one.interval.num if one.claim.kind != "count" else 0,
        "pairs_as_claimed": one.num_claimed,
        "difference": one.interval.mean,
        "low": one.interval.low,
        "high": one.interval.high,
        "cell_value": one.values[0],
        "against_value": one.values[1],
        "by_seed": dict(one.by_seed),
        "data": one.place.data,
        "model": one.place.model,
        "scale": one.place.text,
        "at_paper_scale": one.place.is_papers,
        "differs_from_paper": list(one.place.differences),
        "favoured_by_metric": list(one.favoured),
        "missing": list(one.missing),
        "left_out": list(one.left_out),
    }


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def numbers(judged: Sequence[Judged]) -> list[dict[str, Any]]:
    """The rows of the CSV: a claim's statement, then what one pair says of it."""
    found: list[dict[str, Any]] = []
    for one in judged:
        start: dict[str, Any] = {name: getattr(one.claim, name) for name in ABOUT}
        start = {("claim" if name == "id" else f"claimed_{name}"): value for name, value in start.items()}
        start["published"] = one.claim.published_text
        if not one.evidence:
            undecided = {"verdict": "undecided", "words": "undecided", "pairs": 0, "pairs_as_claimed": 0}
            found.append({**start, **undecided, "missing": "; ".join(one.missing)})
        for each in one.evidence:
            flat = evidence_record(each)
            found.append({**start, **{name: _flat(value) for name, value in flat.items()}})
    return found


def _flat(value: Any) -> Any:
    if isinstance(value, dict):
        return canonical(value)
    return "; ".join(value) if isinstance(value, list) else value


# -- files ------------------------------------------------------------------------------------------------------------


def notes(judged: Sequence[Judged]) -> list[str]:
    """How to read the table: the rule, and what stands beside some claims."""
    favoured = dict.fromkeys(cell for one in judged for each in one.evidence for cell in each.favoured)
    bias = f"{BIAS_MARK} The metric's network is of the family that {listed(list(favoured))} was trained towards."
    told = dict.fromkeys(f"{one.claim.id}: {one.claim.note}" for one in judged if one.claim.note)
    return [RULE, MULTIPLE, *([bias] if favoured else []), *told]


def markdown(judged: Sequence[Judged]) -> str:
    """The ledger in Markdown."""
    sentences = "\n\n".join(map(markdown_text, summary(judged)))
    told = "".join(f"\n{markdown_text(note)}\n" for note in notes(judged))
    return f"# Claims\n\n{sentences}\n\n{markdown_table(rows(judged))}\n{told}"


def latex(judged: Sequence[Judged]) -> str:
    """The ledger in LaTeX."""
    return latex_table(only(rows(judged), PRINTED), notes(judged))


def write(judged: Sequence[Judged], folder: Path) -> list[Path]:
    """Save the ledger in four forms, each whole or not at all; returns the paths.

    Raises:
        UserError: the folder cannot be made.
        StorageError: the disk refuses.
    """
    texts = {
        "claims.json": json.dumps(record(judged), indent=1, ensure_ascii=False) + "\n",
        "claims.csv": pd.DataFrame(numbers(judged)).to_csv(index=False),
        "claims.md": markdown(judged),
        "claims.tex": latex(judged),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"--out: cannot write to {folder} ({reason}): name a folder you may write to") from None
    with storing(folder):
        for name, text in texts.items():
            write_atomic(folder / name, text.encode())
    return [folder / name for name in texts]


# -- a study's page ---------------------------------------------------------------------------------------------------


def _on_page(one: Evidence) -> Evidence:
    """With the place that it has beside the page: a report can be moved, and its page may not be written yet."""
    return dataclasses.replace(one, page=f"index.html#{one.anchor}")


def section(study: Study) -> Section | None:
    """The claims that a study says something of; None where it says nothing of any."""
    ledger: Ledger = load_ledger()
    judged = judge(ledger, [study.whole])  # a page shows some cells of an ablation, and claims are about all of them
    told = [
        dataclasses.replace(one, evidence=found)
        for one in judged
        if (found := [_on_page(each) for each in one.evidence if each.has_data])
    ]
    if not told:
        return None
    rest = len(judged) - len(told)
    places = [each.place for one in told for each in one.evidence]
    scale = next((place for place in places if place.after), places[0]).text
    about = f"What this study says of claims of the papers {listed(ledger.papers)}, at its own scale: {scale}."
    sentences = [about, *summary(told)]
    if rest:
        sentences.append(f"Of {count(rest, 'further claim')} it holds no pair: ditbench claims says what is missing.")
    table = Table(
        stem="claims",
        title="What each pair of cells says",
        rows=[{"claim" if name == "says" else name: row[name] for name in SECTION} for row in rows(told)],
        numbers=numbers(told),
        notes=notes(told),
    )
    return Section(name="claims", title="Claims of the papers", sentences=sentences, parts=[Part(table)])
