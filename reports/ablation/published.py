"""Published ablations beside ours: what each level changes against the default, in sign and relative size.

Another data set, scale and metric, so only changes are set side by side. Levels of an axis that counts blocks are
matched by their fraction of the depth, the others by equal value.
"""

import csv
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from harness.records.ablation import Axis, Subject
from harness.records.metrics import metric
from reports.ablation.tables import Level, levels
from reports.ablation.trials import Ablation, level_text
from reports.sections import Table
from reports.study.words import listed
from reports.tables.results import MINUS, MISSING

FOLDER = Path(__file__).parents[1] / "published"

DEPTHS = {"S": 12, "B": 12, "L": 24, "XL": 28}
"""Blocks of the published sizes, by the letters in the model's name."""

ABOUT = (
    *("source", "arxiv", "method", "model", "iterations", "images_seen", "axis", "level"),
    *("metric", "value", "cfg", "is_default", "provenance"),
)
"""Columns that are no settings."""

LEAST_LEVELS = 4
"""Common levels from which a rank correlation is given."""


@dataclass(frozen=True)
class Pair:
    """A level that both have varied: the published row and ours."""

    row: Mapping[str, str]
    axis: Axis
    level: Level

    @property
    def is_reference(self) -> bool:
        """Whether changes are counted from here: it is the published default."""
        return self.row["is_default"] == "True"

    @property
    def their_level(self) -> str:
        return self.row[self.axis.name]


@dataclass(frozen=True)
class Comparison:
    """An axis that both have varied, over their common levels, the published default first."""

    axis: Axis
    pairs: Sequence[Pair]
    sign: int
    """-1 where the better direction of our metric is not that of theirs, else 1."""

    @property
    def reference(self) -> Pair:
        return self.pairs[0]

    def change(self, pair: Pair) -> float:
        """(value - default) / default, ours."""
        return _relative(pair.level.result.mean, self.reference.level.result.mean)

    def published_change(self, pair: Pair) -> float:
        """The same, theirs."""
        return _relative(float(pair.row["value"]), float(self.reference.row["value"]))

    def agrees(self, pair: Pair) -> bool:
        """Whether both call the level better than the default, or both worse."""
        return self.sign * self.change(pair) * self.published_change(pair) > 0

    @property
    def rank_correlation(self) -> float:
        """Spearman's, over the common levels with the default; NaN for fewer than `LEAST_LEVELS`."""
        if len(self.pairs) < LEAST_LEVELS:
            return math.nan
        ours = pd.Series([self.sign * pair.level.result.mean for pair in self.pairs])
        theirs = pd.Series([float(pair.row["value"]) for pair in self.pairs])
        return float(ours.rank().corr(theirs.rank()))


def _relative(value: float, default: float) -> float:
    return (value - default) / abs(default) if default else math.nan


# -- matching -------------------------------------------------------------------------------------------------------


def comparisons(ablation: Ablation) -> list[Comparison]:
    """Every axis of a grid that a published ablation of the same method has varied as well, with a common level."""
    if ablation.is_search:
        return []
    (subject,) = ablation.subjects
    rows = [row for row in published_rows() if row["method"] == subject.method]
    tables = dict.fromkeys((row["source"], row["metric"], row["axis"]) for row in rows)
    found = []
    for table in tables:
        own = [row for row in rows if (row["source"], row["metric"], row["axis"]) == table]
        axis = _axis(subject, own)
        if axis and (comparison := _comparison(ablation, subject, axis, own)):
            found.append(comparison)
    return found


def published_rows() -> list[dict[str, str]]:
    """All rows of the published ablations."""
    found = []
    for path in sorted(FOLDER.glob("*_ablation.csv")):
        with path.open(newline="") as file:
            found += list(csv.DictReader(file))
    return found


def _axis(subject: Subject, rows: Sequence[Mapping[str, str]]) -> Axis | None:
    """Our axis of the one setting in which the rows differ."""
    varied = [name for name in rows[0] if name not in ABOUT and len({row[name] for row in rows}) > 1]
    return next((axis for axis in subject.axes if [axis.name] == varied), None)


def _comparison(
    ablation: Ablation, subject: Subject, axis: Axis, rows: Sequence[Mapping[str, str]]
) -> Comparison | None:
    """The common levels, if the published default and another one are among them."""
    ours = [level for level in levels(ablation, subject, axis) if level.result.finite]
    pairs = sorted(_pairs(ablation, axis, rows, ours), key=lambda pair: not pair.is_reference)
    if len(pairs) < 2 or not pairs[0].is_reference:
        return None
    same = metric(rows[0]["metric"]).direction == ablation.direction
    return Comparison(axis, pairs, 1 if same else -1)


def _pairs(ablation: Ablation, axis: Axis, rows: Sequence[Mapping[str, str]], ours: Sequence[Level]) -> Iterator[Pair]:
    """Every published level with the nearest of ours, each of ours once: with the published level nearest to it."""
    near: dict[Any, tuple[float, Mapping[str, str], Level]] = {}
    for row in rows:
        distances = [(_distance(ablation, axis, row, level), level) for level in ours]
        distance, level = min(distances, key=lambda found: found[0], default=(math.inf, None))
        if level is not None and distance < near.get(level.value, (math.inf,))[0]:
            near[level.value] = (distance, row, level)
    return (Pair(row, axis, level) for _, row, level in near.values())


def _distance(ablation: Ablation, axis: Axis, row: Mapping[str, str], level: Level) -> float:
    """How far our level is from a published one; infinite where they do not match."""
    if counts_blocks(axis):
        distance = abs(level.value - ablation.depth * float(row[axis.name]) / published_depth(row))
        return distance if distance <= 0.5 else math.inf
    return 0.0 if _equal(level.value, row[axis.name]) else math.inf


def _equal(value: Any, text: str) -> bool:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return re.fullmatch(r"-?[\d.]+(e-?\d+)?", text) is not None and float(value) == float(text)
    return level_text(value) == text.lower()


def counts_blocks(axis: Axis) -> bool:
    """Whether levels are blocks of the backbone, and so fractions of its depth."""
    return axis.kind == "int" and axis.name.endswith("block")


def published_depth(row: Mapping[str, str]) -> int:
    """Blocks of a published model, such as 12 of SiT-B/2."""
    return DEPTHS[row["model"].partition("-")[2].partition("/")[0]]


# -- text -----------------------------------------------------------------------------------------------------------


def table(ablation: Ablation, found: Sequence[Comparison]) -> Table:
    """The common levels of all axes: published and ours, value and change, and whether the signs agree."""
    return Table(
        stem="published",
        title="Published ablation beside ours",
        rows=[_texts(ablation, comparison, pair) for comparison in found for pair in comparison.pairs],
        numbers=[_numbers(ablation, comparison, pair) for comparison in found for pair in comparison.pairs],
        notes=[*_notes(ablation, found), *(_summary(comparison) for comparison in found)],
    )


def _texts(ablation: Ablation, comparison: Comparison, pair: Pair) -> dict[str, str]:
    theirs = their_text(pair)
    difference = pair.level.result.difference
    reference = pair.is_reference
    return {
        "axis": comparison.axis.name,
        "published level": theirs,
        "our level": our_text(ablation, pair),
        "published": pair.row["value"],
        "change": "reference" if reference else percent(comparison.published_change(pair)),
        "ours": ablation.show(pair.level.result.mean),
        "our change": "reference" if reference else percent(comparison.change(pair)),
        "signs agree": MISSING if reference else ("yes" if comparison.agrees(pair) else "no"),
        "our reading against our default": difference.reading if difference and not pair.level.is_default else MISSING,
    }


def their_text(pair: Pair) -> str:
    """The published level, a block with the depth that it is of."""
    of = f" of {published_depth(pair.row)}" if counts_blocks(pair.axis) else ""
    return pair.their_level + of


def our_text(ablation: Ablation, pair: Pair) -> str:
    of = f" of {ablation.depth}" if counts_blocks(pair.axis) else ""
    return level_text(pair.level.value) + of


def percent(share: float) -> str:
    """A change such as `−3.1%`."""
    return f"{100 * share:+.1f}%".replace("-", MINUS) if math.isfinite(share) else MISSING


def _numbers(ablation: Ablation, comparison: Comparison, pair: Pair) -> dict[str, Any]:
    difference = pair.level.result.difference
    return {
        **{f"published_{name}": pair.row[name] for name in ("source", "arxiv", "model", "metric", "provenance")},
        "axis": comparison.axis.name,
        "published_level": pair.their_level,
        "level": level_text(pair.level.value),
        "is_published_default": pair.is_reference,
        "is_our_default": pair.level.is_default,
        "published_value": float(pair.row["value"]),
        "published_change": comparison.published_change(pair),
        "objective": ablation.objective,
        "value": pair.level.result.mean,
        "n": len(pair.level.result.finite),
        "change": comparison.change(pair),
        "signs_agree": "" if pair.is_reference else comparison.agrees(pair),
        "reading": difference.reading if difference and not pair.level.is_default else "",
        "rank_correlation": comparison.rank_correlation,
        "num_levels": len(comparison.pairs),
    }


def _notes(ablation: Ablation, found: Sequence[Comparison]) -> list[str]:
    rows = [pair.row for comparison in found for pair in comparison.pairs]
    sources = [f"{s} ({a}, {p})" for s, a, p in dict.fromkeys((r["source"], r["arxiv"], r["provenance"]) for r in rows)]
    models, metrics = sorted({row["model"] for row in rows}), sorted({row["metric"] for row in rows})
    config = ablation.study.reference.config
    return [
        f"Published: {listed(sources)}, {listed(models)} on ImageNet, {listed(metrics)}. "
        f"Ours: {config['model']['name']} on {config['data']['name']}, {ablation.objective}. Another data set, scale "
        "and metric: only the direction and the relative size of changes can be compared, and a published value has "
        "no interval.",
        "Changes are (value − default) / default, from the published default and the level of ours that matches it. "
        "Blocks are matched by fraction of depth, within half a block of ours; other levels by equal value.",
    ]


def _summary(comparison: Comparison) -> str:
    """At how many levels the signs agree, and the rank correlation where there are levels enough."""
    others = [pair for pair in comparison.pairs if not pair.is_reference]
    agree = sum(comparison.agrees(pair) for pair in others)
    text = f"{comparison.axis.name}: the signs agree at {agree} of {len(others)} common levels besides the default"
    num = len(comparison.pairs)
    if num < LEAST_LEVELS:
        return f"{text}; {num} common levels are too few for a rank correlation."
    rank = comparison.rank_correlation
    value = f"{rank:.2f}".replace("-", MINUS) if math.isfinite(rank) else MISSING
    return f"{text}; rank correlation {value} (Spearman, n = {num} levels)."
