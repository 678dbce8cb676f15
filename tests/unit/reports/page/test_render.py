"""The whole report of a study that has everything at once: a diverged cell, a running one, hostile labels."""

import base64
import hashlib
import io
import json
import math
import re
import shutil
import urllib.parse

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from harness.records.run_folder import UserError
from reports.costs import clocks, targets
from reports.figures import samples
from reports.figures.plans import Plan
from reports.page.figures import Picture
from reports.page.render import TEMPLATES
from reports.report import write_report
from reports.result import section as result
from reports.sections import Part, Section, Table
from reports.study.load import load_study
from reports.study.verify import short_text
from reports.tables.cells import Cell
from tests.unit.reports.page_reader import Page, sections_of_every_study
from tests.unit.reports.records_factory import (
    MAIN,
    TILE,
    diverge,
    edit_lines,
    edit_manifest,
    fail,
    run_folder,
    tile_level,
    write_study,
)

HOSTILE = "<script>alert(1)<|script>&\"'"
CELLS = {"sit": "sit", "repa+vae_repa": "repa+vae_repa", "repa,block=3": "repa", "sra": "sra", HOSTILE: "vae_repa"}
PICTURE = Picture([], "data:,")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The fixed parts of a report: what only some studies have is tested beside each of it."""
    study = write_study(tmp_path_factory.mktemp("runs"), CELLS)
    diverge(run_folder(study, "sra", 1), 312, "base", kept=3)
    edit_manifest(run_folder(study, "repa,block=3", 1), status="running")
    edit_lines(run_folder(study, "repa,block=3", 1), "eval", keep=5)
    edit_manifest(run_folder(study, HOSTILE, 0), warnings=["<b>beware</b>"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("reports.report.SECTIONS", sections_of_every_study())
        return study, write_report(study)


@pytest.fixture(scope="module")
def page(written):
    return Page(written[1].page.read_text())


@pytest.fixture
def unpainted(monkeypatch):
    """Figures are neither drawn nor saved, which is most of a report's time: for tests that read the page's text."""
    monkeypatch.setattr("reports.page.figures.picture", lambda draw, look, wide: PICTURE)
    monkeypatch.setattr("reports.figures.files.save", lambda draw, frame, stem, look: [])


def test_every_file_is_there(written):
    study, paths = written
    assert paths.folder == study / "report"
    stems = ("main", "metrics", "clocks", "differences", "training", "gradients", "added_cost", "evolution")
    kinds = ("png", "svg", "pdf", "csv")
    assert {p.name for p in paths.figures} == {f"{stem}.{kind}" for stem in stems for kind in kinds}
    tables = {f"{stem}.{kind}" for stem in ("final", "equal_cost", "cost") for kind in ("csv", "md", "tex")}
    assert {path.name for path in paths.folder.iterdir()} == tables | {
        *("index.html", "figures", "checks.csv", "checks.json")
    }
    assert all(
        path.is_file()
        for path in (
            paths.page,
            paths.table_csv,
            paths.table_markdown,
            paths.checks_csv,
            paths.checks_json,
            *paths.figures,
        )
    )
    with Image.open(paths.folder / "figures" / "main.png") as image:
        assert image.info["dpi"] == pytest.approx((200, 200), abs=0.1)
        assert image.width == 1680
        assert len(np.unique(np.asarray(image.convert("RGB")).reshape(-1, 3), axis=0)) > 100
    table = pd.read_csv(paths.table_csv)
    assert table["cell"].tolist() == ["sit", HOSTILE, "repa+vae_repa", "repa,block=3", "sra"]
    assert not list(study.glob(".report*"))


def test_the_page_asks_for_nothing_from_outside(page):
    for tag, name in (("img", "src"), ("source", "srcset")):
        values = page.attributes(tag, name)
        assert values
        assert all(value.startswith("data:image/png;base64,") for value in values)
    assert not page.attributes("link", "href")
    assert all(
        re.match(r"#|figures/|(final|equal_cost|cost|checks)\.|\.\./", href) for href in page.attributes("a", "href")
    )


def test_one_script_may_run_and_it_is_ours(page, written):
    (script,) = re.findall(r"<script>(.*?)</script>", written[1].page.read_text(), re.DOTALL)
    assert script == (TEMPLATES / "page.js").read_text()
    assert [attrs for tag, attrs in page.tags if tag == "script"] == [{}]
    (policy,) = [content for content in page.attributes("meta", "content") if content.startswith("default-src")]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy.split("; ") == [
        "default-src 'none'",
        "img-src data:",
        "style-src 'unsafe-inline'",
        f"script-src 'sha256-{digest}'",
        "base-uri 'none'",
        "form-action 'none'",
    ]
    assert not any(name.startswith("on") for _, attrs in page.tags for name in attrs)


def test_labels_and_warnings_are_text_never_markup(page, written):
    text = "".join(page.text)
    assert HOSTILE in text
    assert "<b>beware</b>" in text
    assert "&lt;script&gt;alert(1)" in written[1].page.read_text()


def test_links_inside_the_page_lead_somewhere(page, written):
    ids = {attrs.get("id") for _, attrs in page.tags}
    for href in page.attributes("a", "href"):
        assert href[1:] in ids if href.startswith("#") else (written[1].folder / href).exists()


def test_images_have_a_text_in_their_place(page):
    assert all(attrs.get("alt") for tag, attrs in page.tags if tag == "img")


def test_figures_fit_light_and_dark_wide_and_narrow_pages(page):
    queries = page.attributes("source", "media")
    assert len(queries) == 8 * 3
    for scheme in ("dark", "light"):
        assert sum("max-width" in query and f"prefers-color-scheme: {scheme}" in query for query in queries) == 8


def test_the_summary_says_when_the_baseline_was_reached(page, written):
    text = " ".join("".join(page.text).split())
    summary = text[: text.index("Read this first")]
    sentences = targets.sentences(load_study(written[0]))
    assert len(sentences) == len(CELLS) - 1
    assert all(" ".join(sentence.split()) in summary for sentence in sentences)


def test_what_did_not_finish_is_said(page):
    text = "".join(page.text)
    assert "sra seed 1 diverged at step 312 of 800: velocity loss not finite" in text
    assert "repa,block=3 seed 1 not finished yet at step 800 of 800." in text
    assert "Means of repa,block=3 and sra are over 1 of 2 seeds" in text


def test_runs_that_are_not_finished_stand_in_a_table_with_their_files(page):
    assert "../sra/seed1/checkpoints/diverged_00000312" in page.attributes("a", "href")
    text = "".join(page.text)
    table = text[text.index("Runs that are not finished") : text.index("Against other clocks")]
    assert [line.strip() for line in table.splitlines() if line.strip()][7:] == [
        *("repa,block=3", "1", "running", "step 800 of 800", "–", "–"),
        *("sra", "1", "diverged", "step 312 of 800", "velocity loss not finite"),
        "sra/seed1/checkpoints/diverged_00000312",
    ]


@pytest.mark.usefixtures("unpainted")
def test_a_section_has_its_place_its_figures_and_its_tables(tmp_path, monkeypatch):
    rows = [
        {
            "cell": "sit",
            "mean": Cell("20.0", 20.0),
            "cost": Cell("1,200", 1200),
            "reading": "baseline",
            "block": "block 1",
        },
        {
            "cell": "repa",
            "mean": Cell("−1.5", -1.5),
            "cost": Cell("> budget", math.inf),
            "reading": "better, 2 of 2",
            "block": "–",
        },
    ]
    table = Table("extra", "An extra table", rows, [{"cell": "sit"}, {"cell": "repa"}], ["A note."])
    plan = Plan("drawn", pd.DataFrame({"x": [1]}), lambda frame, look: None, "an alt text", "A caption.")
    section = Section(name="more", title="More", sentences=["One."], plans=[plan], parts=[Part(table, ["Two."])])
    made = (result.section, lambda study: None, lambda study: section, clocks.section)
    monkeypatch.setattr("reports.report.SECTIONS", made)
    study = write_study(tmp_path, {"sit": "sit", "repa": "repa"}, seeds=(0,))
    source = write_report(study).page.read_text()
    page = Page(source)
    text = " ".join("".join(page.text).split())
    assert re.search(r"Result.*Against other clocks", text)
    more = text[text.index("More One. A caption.") : text.index("Against other clocks", text.index("More One."))]
    assert more.index("A caption.") < more.index("An extra table Two.") < more.index("A note.")
    assert '<a href="#more">More</a>' in source and '<img src="data:," alt="an alt text">' in source
    heads = re.findall(r'<th scope="col"( class="number")?>\s*(\w+)\s*</th>', source[source.index("An extra table") :])[
        :5
    ]
    assert heads == [
        ("", "cell"),
        (' class="number"', "mean"),
        (' class="number"', "cost"),
        ("", "reading"),
        ("", "block"),
    ]
    assert [key for key in page.attributes("td", "data-sort") if key in ("-1.5", "1200", "Infinity")] == [
        *("1200", "-1.5", "Infinity"),
    ]
    assert (study / "report" / "extra.tex").is_file()


@pytest.mark.usefixtures("unpainted")
def test_a_log_is_linked_where_it_is(tmp_path):
    study = write_study(tmp_path, {"sit": "sit", "repa#1 %": "repa"}, seeds=(0,))
    fail(run_folder(study, "repa#1 %", 0), "no memory")
    page = Page(write_report(study).page.read_text())
    (link,) = [href for href in page.attributes("a", "href") if href.startswith("../")]
    assert (study / "report" / urllib.parse.unquote(link)).is_file()
    assert "no memory" in "".join(page.text)
    run_folder(study, "repa#1 %", 0).path.joinpath("log.txt").unlink()
    page = Page(write_report(study).page.read_text())
    assert not [href for href in page.attributes("a", "href") if href.startswith("../")]
    assert "repa#1 %/seed0/log.txt" in "".join(page.text)


def test_the_checks_are_on_the_page_and_beside_it(page, written):
    paths = written[1]
    table = pd.read_csv(paths.checks_csv).fillna("")
    assert json.loads(paths.checks_json.read_text()) == table.to_dict("records")
    assert table["what"].tolist()[:2] == ["data digest", "autoencoder digest"]
    assert set(table.loc[table["what"] == "initial weights digest", "scope"]) == {"seed 0", "seed 1"}
    assert table["value"].str.len().max() == 64
    text = "".join(page.text)
    for what, value in zip(table["what"], table["value"].astype(str), strict=True):
        assert what in text and short_text(value) in text


@pytest.mark.usefixtures("unpainted")
@pytest.mark.parametrize(("unit", "amount"), [("train_gflops", 1500.0), ("seconds", 30)])
def test_steps_are_shown_where_cells_make_different_numbers(tmp_path, unit, amount):
    study = write_study(tmp_path, {"sit": "sit", "repa": "repa"}, seeds=(0,), unit=unit, amount=amount)
    page = Page(write_report(study).page.read_text())
    text = " ".join("".join(page.text).split())
    steps = [f"{run.evaluation(8)['step']:,}" for run in load_study(study).runs]
    assert "steps" in text and all(number in text for number in steps) and steps[0] != steps[1]
    assert load_study(study).after in text


@pytest.mark.usefixtures("unpainted")
@pytest.mark.parametrize(("unit", "figure", "other"), [("steps", "clocks", "main"), ("seconds", "main", "clocks")])
def test_the_figure_with_seconds_says_which_do_not_count_and_why(tmp_path, unit, figure, other):
    study = write_study(tmp_path, {"sit": "sit", "repa": "repa"}, unit=unit, amount=400)
    edit_manifest(run_folder(study, "repa", 0), shared_device=True)
    edit_manifest(run_folder(study, "repa", 1), environment={"threads": 4})
    source = write_report(study).page.read_text()
    captions = {
        found[1]: found[0] for found in re.findall(r"<figcaption>(.*?)<a href=\"figures/(\w+).png", source, re.DOTALL)
    }
    assert (
        "repa seed 0 shared its device with another run and is left out of training seconds. Training seconds are not "
        "comparable: runs differ in threads (2: sit seed 0 and sit seed 1; 4: repa seed 1)." in captions[figure]
    )
    assert "comparable" not in captions[other]
    assert re.findall(r"<h3>At [\d,.]+ training (\w+)</h3>", source) == ["GFLOPs"]


def test_numbers_on_the_page_are_those_of_the_table(page, written):
    table = pd.read_csv(written[1].table_csv).set_index("cell")
    text = "".join(page.text)
    for cell in ("sit", "repa+vae_repa"):
        assert f"{table[MAIN][cell]:.2f}" in text


def test_row_i_of_the_samples_is_tile_i_of_every_cell(page, written):
    study = load_study(written[0])
    for grid in samples.grids(study):
        assert [column.cell for column in grid.columns] == list(study.cells)
        for column in grid.columns:
            assert len(column.images) == 10
            for i, png in enumerate(column.images):
                image = Image.open(io.BytesIO(png))
                assert image.size == (TILE, TILE)
                assert image.getpixel((0, 0)) == (i, 0, 0)
    shown = [attrs for tag, attrs in page.tags if tag == "img" and ", image 7" in (attrs["alt"] or "")]
    assert len(shown) == 2 * len(CELLS)
    for attrs in shown:
        image = Image.open(io.BytesIO(base64.b64decode(attrs["src"].partition(",")[2])))
        assert image.getpixel((0, 0)) == (7, 0, 0)


def test_cells_sort_by_their_numbers(page, written):
    table = pd.read_csv(written[1].table_csv).set_index("cell")
    keys = page.attributes("td", "data-sort")
    for value in table[MAIN].dropna():
        assert f"{value:.15g}" in keys
    assert all(key in ("", "Infinity") or math.isfinite(float(key)) for key in keys)


def test_settings_that_differ_and_commands_stand_on_the_page(page):
    text = " ".join("".join(page.text).split())
    differing = text[text.index("Settings that differ") : text.index("Counted for one image")]
    assert "vae_repa.head_layers – 5 5 – –" in differing
    assert "These commands spell out every setting" in text and "that of the study was digits." in text
    assert "ditbench train --study digits --cell repa+vae_repa --method repa+vae_repa --seed 0" in text
    assert "repa,block=3, seed 0; with another --seed also 1" in text


def test_tiles_are_read_row_by_row(written):
    path = run_folder(written[0], "sit", 0).samples / "step_00000800.png"
    tiles = samples.read_tiles(path, TILE, 30)
    assert [np.asarray(tile)[0, 0, 0] for tile in tiles] == list(range(30))
    assert np.asarray(tiles[23])[-1, -1, 0] == pytest.approx(tile_level(23), abs=2)
    with pytest.raises(UserError, match="a grid of 33 px tiles was expected"):
        samples.read_tiles(path, 33, 10)


def test_large_images_are_scaled_down_and_missing_ones_left_out(tmp_path):
    study = write_study(tmp_path, {"sit": "sit", "repa": "repa"}, seeds=(0,))
    config = run_folder(study, "sit", 0).manifest()["config"]
    config["data"]["image_size"] = 320
    edit_manifest(run_folder(study, "sit", 0), config=config)
    Image.new("RGB", (640, 320), "red").save(run_folder(study, "sit", 0).samples / "step_00000800.png")
    shutil.rmtree(run_folder(study, "repa", 0).samples)
    (grid,) = samples.grids(load_study(study))
    (column,) = grid.columns
    assert [Image.open(io.BytesIO(png)).size for png in column.images] == [(128, 128)] * 2


def test_a_refused_report_leaves_the_old_one(written, tmp_path):
    study = tmp_path / "digits"
    for cell in ("sit", "sra"):
        shutil.copytree(written[0] / cell, study / cell)
    (study / "report").mkdir()
    (study / "report" / "index.html").write_text("old")
    edit_manifest(run_folder(study, "sra", 0), digests={"data": "0" * 64})
    with pytest.raises(UserError, match="data digest differs between sit seed 0 and sra seed 0"):
        write_report(study)
    assert [path.name for path in (study / "report").iterdir()] == ["index.html"]
    assert (study / "report" / "index.html").read_text() == "old"


def test_one_cell_with_one_seed_makes_a_report(tmp_path, monkeypatch):
    monkeypatch.setattr("reports.report.SECTIONS", sections_of_every_study())
    study = write_study(tmp_path, {"sra": "sra"}, seeds=(4,))
    edit_lines(run_folder(study, "sra", 4), "train", keep=0)
    edit_manifest(run_folder(study, "sra", 4), lines={"floor": {}, "reconstruction": {}})
    paths = write_report(study)
    text = "".join(Page(paths.page.read_text()).text)
    assert "1 training method for SiT-nano/2 on digits, 1 seed," in text
    assert "No cell is the baseline of the others" in text
    assert {path.stem for path in paths.figures} == {"main", "metrics", "clocks", "gradients", "evolution"}
