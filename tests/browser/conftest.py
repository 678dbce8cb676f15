"""Reports of hand-made records, and a browser to see them in. What it saw stays in build/screenshots."""

import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from harness.records.files import digest
from reports import report
from reports.joint.report import write_joint
from reports.sections import Part, Section, Table
from reports.study.load import Study
from reports.tables.cells import Cell, Row
from tests.browser.chromium import Chromium, Tab
from tests.programs import needed
from tests.unit.reports.records_factory import (
    diverge,
    edit_lines,
    edit_manifest,
    fail,
    run_folder,
    write_ablation,
    write_final_study,
    write_study,
)

SCREENSHOTS = Path(__file__).parents[2] / "build" / "screenshots"
HOSTILE = "<script>alert(1)<|script>&\"' " + "m" * 80


@pytest.fixture(scope="session")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    """One browser for all tests."""
    program = needed("chromium", "chromium", "chromium-browser", "google-chrome")
    shutil.rmtree(SCREENSHOTS, ignore_errors=True)
    SCREENSHOTS.mkdir(parents=True)
    with Chromium(program, tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@dataclass
class Screen:
    """Opens tabs, which are closed at the end of a test."""

    browser: Chromium
    tabs: list[Tab] = field(default_factory=list)

    def show(self, path: Path, width: int = 1440, **how: bool) -> Tab:
        self.tabs.append(Tab(self.browser))
        self.tabs[-1].show(path, width, **how)
        return self.tabs[-1]


@pytest.fixture
def screen(chromium: Chromium) -> Iterator[Screen]:
    opened = Screen(chromium)
    yield opened
    for tab in opened.tabs:
        tab.close()


def comparison(runs: Path) -> Path:
    return write_study(runs, {name: name for name in ("sit", "repa", "sra", "vae_repa")}, (0, 1, 2), study="comparison")


def partial(runs: Path) -> Path:
    """Cells that run, failed and diverged, one with a label that is no label."""
    study = write_study(runs, {"sit": "sit", "repa": "repa", "sra": "sra", HOSTILE: "vae_repa"}, study="partial")
    diverge(run_folder(study, "sra", 1), 312, "base", kept=3)
    fail(run_folder(study, "repa", 0), "no memory " * 20)
    edit_manifest(run_folder(study, "repa", 1), status="running")
    edit_lines(run_folder(study, "repa", 1), "eval", keep=5)
    return study


def ablation(runs: Path) -> Path:
    settings = [{"block": block, "loss": loss} for block in (1, 2, 3, 4) for loss in ("smooth_l1", "cosine")]
    return write_ablation(runs, settings, settings[0], lambda setting, seed: 3.0 * setting["block"], study="ablation")


def everything(runs: Path) -> Path:
    """A final protocol, and a section whose table holds every kind of cell."""
    return write_final_study(runs, study="everything")


def extra_section(study: Study) -> Section:
    rows: list[Row] = [
        {
            "cell": "sit",
            "cost": Cell("1,200", 1200),
            "change": Cell("−3.5 [−4.0, −3.0]", -3.5),
            "share": Cell("12%", 12),
            "reading": "baseline",
            "no.": Cell("2", 2),
        },
        {
            "cell": "repa",
            "cost": Cell("> budget", math.inf),
            "change": Cell("+0.25", 0.25),
            "share": "–",
            "reading": Cell("better, 3 of 3", mark="better", lines=("better", "3 of 3")),
            "no.": Cell("10", 10),
        },
        {
            "cell": "sra",
            "cost": Cell("900", 900),
            "change": "–",
            "share": Cell("+5.5%", 5.5),
            "reading": Cell("worse, 0 of 3", mark="worse", lines=("worse", "0 of 3")),
            "no.": "–",
        },
        {
            "cell": "vae_repa",
            "cost": Cell("85.5", 85.5),
            "change": Cell("−12", -12),
            "share": Cell("−3%", -3),
            "reading": Cell("not separated", mark="unclear"),
            "no.": Cell("1", 1),
        },
    ]
    numbers = [{"cell": row["cell"]} for row in rows]
    table = Table("extra", "A table of every kind of cell", rows, numbers, ["A note."])
    wide = [{f"a column with a long name {i}": f"value {i}" for i in range(30)}] * 2
    second = Table("wide", "A wide table", wide, [{"x": 1}, {"x": 2}], [])
    return Section(name="extra", title="Extra", sentences=["A sentence."], parts=[Part(table), Part(second)])


JOINT = "joint"
"""The page of several studies."""


def write_joint_page(folder: Path) -> Path:
    """Two settings, which differ in their data, each with its own page."""
    cells = {name: name for name in ("sit", "repa", "sra")}
    paths = [write_study(folder, cells, (0, 1, 2), study=name) for name in ("first", "second")]
    for seed in (0, 1, 2):
        for cell in cells:
            edit_manifest(run_folder(paths[1], cell, seed), digests={"data": digest("second")})
    written = [report.write_report(path) for path in paths]
    return write_joint([one.study for one in written], [one.page for one in written], folder / "joint")


STUDIES: dict[str, Callable[[Path], Path]] = {f.__name__: f for f in (comparison, partial, ablation, everything)}


@pytest.fixture(scope="session")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The page of a study by the study's name, written when it is asked for first."""
    runs, written = tmp_path_factory.mktemp("runs"), dict[str, Path]()

    def page(name: str) -> Path:
        if name == JOINT and name not in written:
            written[name] = write_joint_page(runs / JOINT)
        if name not in written:
            with pytest.MonkeyPatch.context() as patch:
                if name == "everything":
                    patch.setattr(report, "SECTIONS", (*report.SECTIONS, extra_section))
                written[name] = report.write_report(STUDIES[name](runs)).page
        return written[name]

    return page
