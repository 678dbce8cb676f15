"""What the blocks of a study's runs represent: the records of `ditbench analyze`, their curves, pictures and table.

A run's newest analysis stands for it. Runs that were analysed under different settings are not shown together.
"""

import io
import json
import math
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from harness.records.files import canonical, file_digest, number
from harness.records.run_folder import UserError
from harness.records.schema import AnalysisSettings, AnalysisValues, Quantity, RunAnalysisRecord, read_record
from reports.analysis import figures as analysis_figures
from reports.figures.plans import Plan
from reports.sections import Part, Section, Table
from reports.statistics.intervals import paired_difference
from reports.study.load import RecordedRun, Study
from reports.study.verify import flatten, short_text
from reports.study.words import be, count, listed
from reports.tables.cells import Cell
from reports.tables.results import MINUS, MISSING

FOLDER = "analysis"
"""In the folder of a run."""
FIGURES: Mapping[str, tuple[Quantity, ...]] = {
    "alignment_encoder": ("cknna_encoder", "cka_encoder"),
    "alignment_latent": ("cknna_latent", "cka_latent"),
    "probe": ("probe_accuracy",),
}
"""Quantities that are drawn together, by the name of the figure. More is more alike, or more classes named."""
SHORT = {
    "cknna_encoder": "CKNNA, encoder",
    "cka_encoder": "CKA, encoder",
    "cknna_latent": "CKNNA, latents",
    "cka_latent": "CKA, latents",
    "probe_accuracy": "probe",
}
"""Quantities as panels and columns are headed."""
NUM_BLOCKS = 8
"""Blocks with pictures on the page, at most; records hold those of all."""
COLOURS = ("red", "green", "blue")
"""Columns of the frame of pictures: what the first, second and third component are drawn as."""
AGAIN = "run `ditbench analyze` on it again"


@dataclass(frozen=True)
class Analysed:
    """A run and its newest analysis."""

    run: RecordedRun
    path: Path
    record: RunAnalysisRecord

    @property
    def settings(self) -> AnalysisSettings:
        return self.record["settings"]

    @property
    def step(self) -> int:
        return self.record["step"]

    def values(self, source: str) -> list[AnalysisValues]:
        """The lines of a source: block, input or encoder."""
        return [line for line in self.record["values"] if line["source"] == source]

    def pictures(self) -> Mapping[str, np.ndarray] | None:
        """What the .npz holds; None where it is not there, as records may be copied without it.

        `UserError` for one that does not belong to the record.
        """
        path = self.path.with_suffix(".npz")
        if not path.is_file():
            return None
        content = path.read_bytes()
        try:
            if file_digest(path) == self.record["pictures"]["sha256"]:
                with np.load(io.BytesIO(content), allow_pickle=False) as held:
                    return {name: held[name] for name in held.files}
        except (ValueError, OSError, zipfile.BadZipFile):
            pass  # said below
        raise UserError(f"{path} does not belong to the record beside it: {AGAIN}")


def analysed(study: Study) -> list[Analysed]:
    """The runs that have an analysis; `UserError` names a record that cannot be read."""
    found = []
    for run in study.runs:
        paths = sorted((run.folder / FOLDER).glob("*.json"))
        if paths:
            every = [Analysed(run, path, read_record(path, RunAnalysisRecord, AGAIN)) for path in paths]
            found.append(max(every, key=lambda each: each.step))
    return found


# -- the section ----------------------------------------------------------------------------------------------------


def section(study: Study) -> Section | None:
    """Curves over blocks, pictures and a table; without figures where the runs were analysed in different ways."""
    found = analysed(study)
    if not found:
        return None
    about: dict[str, Any] = {"name": "representations", "title": "Representations"}
    if differing := _differing(found):
        return Section(**about, sentences=[differing])
    frame = block_frame(study, found)
    return Section(
        **about,
        sentences=_sentences(study, found, frame),
        plans=[*_curve_plans(found, frame), *_picture_plans(study, found)],
        parts=[Part(table) for stem in FIGURES if (table := _table(stem, found, frame))],
    )


def _differing(found: Sequence[Analysed]) -> str:
    """Which setting the runs do not share, in words; "" where they share all."""
    every = [flatten(each.settings) for each in found]
    for name in dict.fromkeys(name for settings in every for name in settings):
        values: dict[str, Analysed] = {}
        for each, settings in zip(found, every, strict=True):
            values.setdefault(canonical(settings.get(name)), each)
        if len(values) > 1:
            (first, one), (second, other) = list(values.items())[:2]
            return (
                f"The runs were analysed under different settings, so they are not shown together: {name} is "
                f"{short_text(json.loads(first))} for {one.run.label} and {short_text(json.loads(second))} for "
                f"{other.run.label}. Analyse all of them in one call."
            )
    return ""


def block_frame(study: Study, found: Sequence[Analysed]) -> pd.DataFrame:
    """What the curves are drawn from.

    `series` is seed, mean (over the seeds of a cell) or line: what the blocks see (`input`) and the encoder itself,
    which are the same for all runs and stand in the column `cell`.
    """
    names = [name for group in FIGURES.values() for name in group]
    seeds = [
        {"quantity": name, "t": line["t"], "series": "seed", "cell": each.run.cell, "seed": each.run.seed}
        | {"block": line["block"], "value": number(line[name])}
        for each in found
        for line in each.values("block")
        for name in names
        if name in line
    ]
    columns = ["quantity", "t", "series", "cell", "seed", "block", "value", "num_seeds", "of_seeds"]
    frame = pd.DataFrame(seeds, columns=columns)
    by = ["quantity", "t", "cell", "block"]
    means = frame.groupby(by, sort=False, as_index=False).agg(value=("value", "mean"), num_seeds=("value", "count"))
    means = means.assign(series="mean", of_seeds=len(study.seeds))
    lines = pd.DataFrame(_lines(found[0], names), columns=columns)
    frame = pd.concat([part.astype(object) for part in (frame, means, lines)], ignore_index=True)
    kinds = {"t": float, "value": float} | dict.fromkeys(("seed", "block", "num_seeds", "of_seeds"), "Int64")
    return frame.astype(kinds)


def _lines(one: Analysed, names: Sequence[Quantity]) -> list[dict[str, Any]]:
    """The reference lines of every quantity and time."""
    return [
        {"quantity": name, "t": t, "series": "line", "cell": source, "value": number(line[name])}
        for t in one.settings["times"]
        for source in ("input", "encoder")
        for line in one.values(source)
        for name in names
        if name in line and line.get("t", t) == t
    ]


# -- words ----------------------------------------------------------------------------------------------------------


def _sentences(study: Study, found: Sequence[Analysed], frame: pd.DataFrame) -> list[str]:
    settings = found[0].settings
    times = listed([f"{t:g}" for t in settings["times"]])
    said = [
        f"What the blocks of the EMA weights make of {settings['images']['num']} held-out images, noised to t = "
        f"{times} (0 is data, 1 is noise) with one noise an image, and without their label. Features are means over "
        "an image's tokens."
    ]
    said += [_highest(study, frame, name) for name in ("cknna_encoder", "cknna_latent", "probe_accuracy")]
    said += [_trained_towards(study, found), _absent(study, found), _steps(found)]
    return [sentence for sentence in said if sentence]


def _highest(study: Study, frame: pd.DataFrame, name: str) -> str:
    """Where the mean of a quantity is highest, and how far from the baseline at the same block and time."""
    means = frame[(frame["series"] == "mean") & (frame["quantity"] == name)].dropna(subset=["value"])
    if means.empty:
        return ""
    top = _largest(means)
    text = (
        f"The highest mean of {TOLD[name]} is {top['value']:.3f}, at block {top['block']} of {top['cell']} at t = "
        f"{top['t']:g} ({count(int(top['num_seeds']), 'seed')})"
    )
    there = frame[(frame["quantity"] == name) & (frame["t"] == top["t"]) & (frame["block"] == top["block"])]
    own, control = (_by_seed(there[there["cell"] == cell]) for cell in (top["cell"], study.baseline))
    difference = paired_difference(own, control, "higher")
    if top["cell"] == study.baseline or not difference.by_seed:
        return f"{text}."
    interval = difference.interval
    text += f"; minus {study.baseline} at that block, paired by seed: {_signed(interval.mean)}"
    text += f" [{_signed(interval.low)}, {_signed(interval.high)}]" if interval.num > 1 else ""
    return f"{text}, {difference.reading}."


def _by_seed(rows: pd.DataFrame) -> dict[int, float]:
    """Values of single seeds."""
    seeds = rows[rows["series"] == "seed"].dropna(subset=["value"])
    return dict(zip(seeds["seed"].astype(int), seeds["value"], strict=True))


def _signed(value: float) -> str:
    return f"{value:+.3f}".replace("-", MINUS)


def _largest(rows: pd.DataFrame) -> pd.Series:
    """The row with the largest value; the first of equal ones."""
    return rows.iloc[int(rows["value"].to_numpy().argmax())]


TOLD = {
    "cknna_encoder": "CKNNA with the encoder",
    "cknna_latent": "CKNNA with the clean latents",
    "probe_accuracy": "probe accuracy",
}
"""Quantities as sentences name them."""


def _trained_towards(study: Study, found: Sequence[Analysed]) -> str:
    """Cells whose methods were trained towards the encoder's family, which alignment with it then favours."""
    encoder = found[0].settings["encoder"]
    cells = dict.fromkeys(each.run.cell for each in found)
    favoured = [cell for cell in cells if encoder["family"] in study.first(cell).facts.get("encoder_families", [])]
    if not favoured:
        return ""
    return (
        f"{listed(favoured)} {be(favoured)} trained towards features of the {encoder['family']} family, to which "
        f"{encoder['name']} belongs: {'its' if len(favoured) == 1 else 'their'} alignment with it was an aim of the "
        "training, and says nothing of other encoders."
    )


def _absent(study: Study, found: Sequence[Analysed]) -> str:
    labels = [run.label for run in study.runs if run not in [each.run for each in found]]
    return f"Not analysed: {listed(labels)}." if labels else ""


def _steps(found: Sequence[Analysed]) -> str:
    """Where the weights are not of one step."""
    steps = sorted({each.step for each in found})
    if len(steps) == 1:
        return ""
    return f"The analysed weights are of different steps: {listed([f'{step:,}' for step in steps])}."


# -- figures --------------------------------------------------------------------------------------------------------


def _curve_plans(found: Sequence[Analysed], frame: pd.DataFrame) -> list[Plan]:
    settings = found[0].settings
    encoder, num = settings["encoder"]["name"], settings["images"]["num"]
    k = settings["cknna"]["neighbours"]
    ways = f"CKNNA ({k} neighbours) and linear CKA, both with the unbiased estimator, of image means; N = {num}."
    captions = {
        "alignment_encoder": f"Alignment of every block with the tokens of {encoder}: {ways}",
        "alignment_latent": f"Alignment of every block with the clean latents: {ways}",
        "probe": f"Share of {num} held-out images whose class a linear probe names, fitted on "
        f"{settings['probe_images']['num']} training images.",
    }
    shared = (
        " Thick lines are means over seeds, thin ones single seeds. Input: the noised latents, of which a probe has "
        "all numbers; encoder: its own tokens of the clean images."
    )
    plans = []
    for stem, names in FIGURES.items():
        own = frame[frame["quantity"].isin(names)]
        if own["value"].notna().any():
            draw = partial(analysis_figures.blocks_figure, titles=SHORT)
            alt = f"{listed([SHORT[name] for name in names])} over blocks, a line for every cell"
            plans.append(Plan(stem, own, draw, alt, captions[stem] + shared))
    return plans


def _picture_plans(study: Study, found: Sequence[Analysed]) -> list[Plan]:
    """A figure for every time: the cells at the seed at which most of them have pictures."""
    held = {(each.run.cell, each.run.seed): each for each in found}
    seed = max(study.seeds, key=lambda seed: (sum(at == seed for _, at in held), -seed))
    loaded = [(each, pictures) for (_, at), each in held.items() if at == seed and (pictures := each.pictures())]
    if not loaded:
        return []
    settings = loaded[0][0].settings
    images = loaded[0][1]["images"]
    plans = []
    for place, t in enumerate(settings["times"]):
        parts = [_picture_frame(each, pictures, place) for each, pictures in loaded]
        caption = (
            f"The first three principal components of every block's tokens as red, green and blue, at t = {t:g}; "
            f"beside them those of the clean latent and of the tokens of {settings['encoder']['name']}. Components are "
            f"those of all {len(images)} images together, and colours cannot be compared between pictures. "
            f"Seed {seed}; the first held-out images of an even spread, not picked."
        )
        draw = partial(analysis_figures.pictures_figure, images_KHWC=images)
        alt = f"Principal components of blocks at t = {t:g}, a row for every cell and image"
        plans.append(Plan(f"pictures_{place + 1}", pd.concat(parts, ignore_index=True), draw, alt, caption))
    return plans


def _picture_frame(one: Analysed, pictures: Mapping[str, np.ndarray], place: int) -> pd.DataFrame:
    """Colours of every place of every picture of a run at the time of that place, 0 to 1."""
    blocks = one.settings["blocks"]
    chosen = np.unique(np.linspace(0, len(blocks) - 1, NUM_BLOCKS).round().astype(int))
    sources = {"latent": pictures["latent"], "encoder": pictures["encoder"]}
    sources |= {f"block {blocks[i]}": pictures["blocks"][place, i] for i in chosen}
    parts = []
    for source, scores in sources.items():
        num, side = scores.shape[:2]
        image, row, column = np.indices((num, side, side)).reshape(3, -1)
        colours = _colours(scores.astype(np.float64)).reshape(-1, 3).round(4)
        about = {"t": one.settings["times"][place], "cell": one.run.cell, "seed": one.run.seed, "source": source}
        where = {"image": image, "row": row, "column": column}
        parts.append(
            pd.DataFrame({**about, **where, "red": colours[:, 0], "green": colours[:, 1], "blue": colours[:, 2]})
        )
    return pd.concat(parts, ignore_index=True)


def _colours(scores_KSS3: np.ndarray) -> np.ndarray:
    """Each component from its least to its largest score over all images; grey where it does not vary or is not
    finite."""
    low, high = scores_KSS3.min(axis=(0, 1, 2)), scores_KSS3.max(axis=(0, 1, 2))
    with np.errstate(divide="ignore", invalid="ignore"):
        scaled = (scores_KSS3 - low) / (high - low)
    return np.where(np.isfinite(scaled), scaled, 0.5)


# -- the table ------------------------------------------------------------------------------------------------------


TITLES = {
    "alignment_encoder": "Alignment with the encoder",
    "alignment_latent": "Alignment with the clean latents",
    "probe": "Linear probes",
}
"""Titles of the tables, by the names that they share with the figures."""


def _table(stem: str, found: Sequence[Analysed], frame: pd.DataFrame) -> Table | None:
    """For every cell and time the highest mean of each quantity over the blocks, every seed there, and the block; None
    where no run has such quantities."""
    names = [name for name in FIGURES[stem] if frame.loc[frame["quantity"] == name, "value"].notna().any()]
    if not names:
        return None
    texts, numbers = [], []
    for cell in dict.fromkeys(each.run.cell for each in found):
        for t in found[0].settings["times"]:
            own = frame[(frame["cell"] == cell) & (frame["t"] == t)]
            tops = {name: _top(own[own["quantity"] == name]) for name in names}
            texts.append({"cell": cell, "t": Cell(f"{t:g}", t)} | {SHORT[name]: tops[name].text for name in names})
            line: dict[str, Any] = {"cell": cell, "t": t}
            for name in names:
                line |= tops[name].numbers(name)
            numbers.append(line)
    num_blocks = len(found[0].settings["blocks"])
    notes = [
        f"The highest mean over seeds among {count(num_blocks, 'block')}, every seed's value at that block, and the "
        "block. The highest of several is a little too high by chance; the curves show all of them."
    ]
    return Table(stem, f"{TITLES[stem]}, at the highest block", texts, numbers, notes)


@dataclass(frozen=True)
class Top:
    """The highest mean of a quantity over blocks."""

    block: int
    mean: float
    by_seed: Mapping[int, float]

    @property
    def text(self) -> Cell:
        if not self.by_seed:
            return Cell(MISSING)
        each = ", ".join(f"{value:.3f}" for value in self.by_seed.values())
        values = f"{self.mean:.3f} ({each})" if len(self.by_seed) > 1 else each
        return Cell(f"{values} at {self.block}", self.mean)

    def numbers(self, name: str) -> dict[str, Any]:
        seeds = {f"{name}_seed{seed}": value for seed, value in self.by_seed.items()}
        return {name: self.mean, f"{name}_block": self.block, f"{name}_num_seeds": len(self.by_seed), **seeds}


def _top(own: pd.DataFrame) -> Top:
    """The best block of one cell, time and quantity; block 0 where nothing is finite."""
    means = own[own["series"] == "mean"].dropna(subset=["value"])
    if means.empty:
        return Top(0, math.nan, {})
    top = _largest(means)
    return Top(int(top["block"]), float(top["value"]), _by_seed(own[own["block"] == top["block"]]))
