"""How every cell can be trained again: the command of the study, and for each cell one that stands by itself.

A study's command reads a config, and what was not given in it depends on the version of the program. So the command of
a cell spells out every setting as it was resolved for its runs, and needs no file but data and weights.
"""

import itertools
import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from reports.sections import Part, Section
from reports.study.load import RecordedRun, Study
from reports.study.verify import flatten
from reports.study.words import listed

PLACES = ("output.runs", "output.cache", "output.mlflow", "output.mlflow_uri")
"""Where things go: they differ from machine to machine, and a tracking server's address may hold a password."""


@dataclass(frozen=True)
class CellCommand:
    """One command that trains a cell at a seed."""

    cell: str
    seed: int
    others: tuple[int, ...]
    """Further seeds of the cell, at which `--seed` alone differs."""
    lines: tuple[str, ...]
    """Parts of the command, each with options of one section."""

    @property
    def title(self) -> str:
        """What the command trains, and with which other seeds it trains the cell's other runs."""
        others = f"; with another --seed also {', '.join(map(str, self.others))}" if self.others else ""
        return f"{self.cell}, seed {self.seed}{others}"

    @property
    def text(self) -> str:
        """The command for a shell, a line a part."""
        return " \\\n  ".join(self.lines)


def section(shown: Study) -> Section:
    """The commands of the study, and one for each of its cells."""
    study = shown.whole
    commands = [Part(title=each.title, commands=[each.text], is_folded=True) for each in cell_commands(study)]
    return Section(
        name="reproduce",
        title="Reproduce",
        sentences=["Finished cells are skipped and interrupted ones continue, so the same command may be given again."],
        parts=[
            Part(commands=study_commands(study)),
            Part(title="Each cell by itself", sentences=[_about(configs_read(study))]),
            *commands,
        ],
    )


def _about(configs: list[str]) -> str:
    """How a cell's own command stands to the study's."""
    read = f", so they need no config; that of the study was {listed(configs)}" if configs else ""
    return (
        f"These commands spell out every setting as it was resolved for the runs{read}. A run that is finished in "
        "--output.runs (default: runs) is left as it is: to train it again, name another folder."
    )


def cell_commands(study: Study) -> list[CellCommand]:
    """A command for every cell; several for one whose settings are not the same at all seeds."""
    found = []
    for cell in study.cells:
        alike: dict[tuple[str, ...], list[int]] = {}
        for run in study.of(cell):
            alike.setdefault(_options(run), []).append(run.seed)
        for options, (seed, *others) in alike.items():
            first = ["ditbench", "train", "--study", study.name, *_option("cell", cell)]
            first += [*_option("method", study.of(cell)[0].manifest["method"]), *_option("seed", seed)]
            found.append(CellCommand(cell, seed, tuple(others), (shlex.join(first), *options)))
    return found


def _options(run: RecordedRun) -> tuple[str, ...]:
    """The options of a run besides its names and its seed, those of a section in one line."""
    shared = {name: value for name, value in run.config.items() if isinstance(value, Mapping) and name != "sections"}
    sections = {**shared, **run.config.get("sections", {})}
    lines = []
    for section, values in sections.items():
        options = [(name, value) for name, value in flatten(values, section).items() if name not in PLACES]
        if options:
            lines.append(shlex.join(word for name, value in options for word in _option(name, value)))
    return tuple(lines)


def _option(name: str, value: Any) -> list[str]:
    """An option as words; a value that begins with a dash would be read as another option."""
    text = value if isinstance(value, str) else json.dumps(value)
    return [f"--{name}={text}"] if text.startswith("-") or not text else [f"--{name}", text]


def study_commands(study: Study) -> list[str]:
    """Every command that made runs of the study, as one would type it."""
    commands = [run.manifest.get("command", []) for run in study.runs]
    return list(dict.fromkeys(shlex.join(command) for command in commands if command))


def configs_read(study: Study) -> list[str]:
    """What the study's commands gave as `--config`: names of presets, or files."""
    found = []
    for run in study.runs:
        words = run.manifest.get("command", [])
        found += [word.partition("=")[2] for word in words if word.startswith("--config=")]
        found += [word for before, word in itertools.pairwise(words) if before == "--config"]
    return list(dict.fromkeys(found))
