"""Figures of a page: two processes draw what one does, and neither outlives the report's."""

import dataclasses
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from reports.figures.curves import metric_curves
from reports.figures.evolution import evolution_plan
from reports.figures.lines import metric_figure
from reports.figures.plans import Plan
from reports.figures.style import Look, cell_styles
from reports.page import figures
from reports.study.load import load_study
from tests.unit.reports.records_factory import MAIN, write_study

ROOT = Path(__file__).parents[4]


def test_two_processes_draw_what_one_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = load_study(write_study(tmp_path / "runs", {"sit": "sit", "repa": "repa"}))
    look = Look(cell_styles(study.cells, study.baseline))
    evolution = evolution_plan(study)
    assert evolution is not None
    plans = [Plan("main", metric_curves(study, MAIN), metric_figure, "alt", "caption"), evolution]
    found = {}
    for name, many_rows in (("one", figures.MANY_ROWS), ("two", 0)):
        monkeypatch.setattr(figures, "MANY_ROWS", many_rows)
        folder = tmp_path / name
        folder.mkdir()
        shown = figures.write_figures(plans, look, folder)
        files = {path.name: path.read_bytes() for path in sorted(folder.joinpath("figures").iterdir())}
        assert [path for figure in shown for path in figure.files] == [folder / "figures" / file for file in ORDER]
        found[name] = ([dataclasses.replace(figure, files=()) for figure in shown], files)
    assert found["one"] == found["two"]
    assert set(found["two"][1]) == set(ORDER)


ORDER = [f"{stem}.{kind}" for stem in ("main", "evolution") for kind in ("png", "svg", "pdf", "csv")]

CODE = """
import multiprocessing, os, time
from concurrent.futures import ProcessPoolExecutor
from reports.page.figures import end_with_parent

pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"), initializer=end_with_parent)
print(pool.submit(os.getpid).result(), flush=True)
time.sleep(60)
"""


def test_a_drawing_process_ends_with_a_report_that_is_killed() -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", CODE], stdout=subprocess.PIPE, text=True, env=environment) as report:
        assert report.stdout is not None
        drawing = int(report.stdout.readline())
        assert is_running(drawing)
        report.kill()
        deadline = time.monotonic() + 30
        while is_running(drawing) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not is_running(drawing)


def is_running(pid: int) -> bool:
    """Whether a process is there and is not one that ended and nobody asked for."""
    status = Path(f"/proc/{pid}/stat")
    return status.is_file() and status.read_text().rpartition(")")[2].split()[0] != "Z"
