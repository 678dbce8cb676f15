"""The page of an ablation: its own results first, every file beside it, few lines where there are many cells."""

import itertools
import re

import pytest

from reports.page.figures import Picture
from reports.report import write_report
from tests.unit.reports.page_reader import Page, sections_of_every_study
from tests.unit.reports.records_factory import edit_trial, write_ablation

HOSTILE = "<script>x&"
DEFAULTS = {"block": 1, "loss": "smooth_l1"}
GRID = [{"block": b, "loss": name} for b, name in itertools.product(range(1, 7), ("smooth_l1", HOSTILE))]


def shift(setting, seed):
    return 2.0 * (setting["block"] - 3) ** 2 + 5 * (setting["loss"] == HOSTILE) + seed


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    study = write_ablation(tmp_path_factory.mktemp("runs"), GRID, DEFAULTS, shift)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("reports.page.figures.picture", lambda draw, look, wide: Picture([], "data:image/png;base64,"))
        patch.setattr("reports.report.SECTIONS", sections_of_every_study())
        return write_report(study)


@pytest.fixture(scope="module")
def page(written):
    return Page(written.page.read_text())


@pytest.fixture(scope="module")
def text(page):
    return " ".join("".join(page.text).split())


def test_every_table_and_figure_is_a_file(written):
    tables = ("final", "cost", "equal_cost", "axis_block", "axis_loss")
    assert {path.name for path in written.folder.iterdir()} == {
        *(f"{stem}.{kind}" for stem in tables for kind in ("csv", "md", "tex")),
        *("trials.csv", "index.html", "figures", "checks.csv", "checks.json"),
    }
    stems = ("axes", "heatmap_1", "history", "parallel_1", "main", "metrics", "clocks", "differences")
    stems += ("training", "gradients", "added_cost", "evolution")
    kinds = ("png", "svg", "pdf", "csv")
    assert {path.name for path in written.figures} == {f"{stem}.{kind}" for stem in stems for kind in kinds}
    assert all(path.stat().st_size for path in written.figures)


def test_the_ablation_comes_first_and_links_lead_somewhere(page, written, text):
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert ids[:2] == ["ablation", "result"]
    for href in page.attributes("a", "href"):
        assert href[1:] in ids if href.startswith("#") else (written.folder / href).exists()
    assert text.index("block of vae_repa, with loss = smooth_l1") < text.index("Figures of the trials")
    assert text.index("Figures of the trials") < text.rindex("All cells")
    assert "12 of 30 finished trials" in text


def test_figures_show_four_cells_and_tables_all(page, written, text):
    best, worst = "vae_repa,block=3", f"vae_repa,block=6,loss={HOSTILE}"
    assert "Of 13 cells 4 are shown: the control, the default, and the best and worst setting" in text
    methods = text[text.index("What differs between the methods") : text.index("Counted for one image")]
    assert best in methods and worst in methods and "vae_repa,block=2" not in methods
    result = text[text.rindex("All cells") : text.index("Against other clocks")]
    assert all(f"vae_repa,block={block} " in result for block in range(2, 7))
    assert text.count("Beside this page, with all 13 cells:") == 2
    costs = text[text.index("Counted for one image") : text.index("Protocol and settings")]
    assert best in costs and "vae_repa,block=2" not in costs
    curves = (written.folder / "figures" / "main.csv").read_text()
    assert best in curves and "vae_repa,block=2," not in curves


def test_hostile_levels_are_text(page, text):
    assert [tag for tag, _ in page.tags].count("script") == 1, "the page's own"
    assert text.count(HOSTILE) > 10


def test_swatches_of_one_colour_have_several_shapes(written):
    found = set(re.findall(r'<i class="(swatch[^"]*)" style="--l: (#\w+)', written.page.read_text()))
    assert len(found) == 13


def test_a_partial_search_makes_a_page(tmp_path, monkeypatch):
    monkeypatch.setattr("reports.page.figures.picture", lambda draw, look, wide: Picture([], "data:image/png;base64,"))
    monkeypatch.setattr("reports.figures.files.save", lambda draw, frame, stem, look: [])
    settings = [{"block": block} for block in (1, 2, 3)]
    study = write_ablation(tmp_path, settings, {"block": 1}, kind="search", seeds=(0,), trials=5)
    edit_trial(study, 2, state="running", workers=["host:2"])
    page = Page(write_report(study).page.read_text())
    text = " ".join("".join(page.text).split())
    assert "Not complete: 2 of 5 trials of vae_repa are over." in text
    assert "Trials of vae_repa, best first" in text and "order cannot be reproduced" in text
    assert f"ditbench compare --tuned {study}" in text and "2 of 30 finished trials" in text
