"""Representations in reports: records written by hand, and curves, pictures, table and sentences from them."""

import hashlib
import io
import json
import math
from dataclasses import replace

import matplotlib
import numpy as np
import pandas as pd
import pytest

from harness.records.files import digest, write_json
from harness.records.run_folder import UserError
from reports.analysis import figures as analysis_figures
from reports.analysis import section as analysis
from reports.analysis.section import analysed, block_frame, section
from reports.figures.style import Look, cell_styles
from reports.report import write_report
from reports.study.load import load_study
from tests.unit.reports.records_factory import run_folder, write_study
from tests.unit.reports.table_files import table_files

TIMES = (0.1, 0.5)
BLOCKS = 3
NAMES = ("cka_encoder", "cka_latent", "cknna_encoder", "cknna_latent", "probe_accuracy")


def settings(**fields):
    return {
        "data": "d",
        "autoencoder": "a",
        "encoder": {"name": "efficientnet_lite2", "family": "efficientnet", "digest": "e"},
        "images": {"num": 20, "rows": "r"},
        "probe_images": {"num": 30, "rows": "p"},
        "pictures": [4, 9],
        "blocks": list(range(1, BLOCKS + 1)),
        "times": list(TIMES),
        "cknna": {"neighbours": 5, "estimator": "unbiased", "features": "at length 1"},
        "seed": 0,
        **dict.fromkeys(("noise", "backbone", "labels", "latents", "features", "cka", "probe"), "as always"),
        "precision": "fp32",
        "tf32": False,
        **fields,
    }


def pictures(num_blocks=BLOCKS, seed=0):
    generator = np.random.default_rng(seed)
    return {
        "images": generator.integers(0, 256, (2, 32, 32, 3), dtype=np.uint8),
        "encoder": generator.normal(size=(2, 4, 4, 3)).astype(np.float32),
        "latent": generator.normal(size=(2, 8, 8, 3)).astype(np.float32),
        "blocks": generator.normal(size=(len(TIMES), num_blocks, 2, 4, 4, 3)).astype(np.float32),
    }


def value(name, t, block, base=0.0):
    """A different number for every quantity, time and block; the probe's is highest at block 2, others' at the last."""
    height = {1: 0.1, 2: 0.3, 3: 0.2}[block] if name == "probe_accuracy" else 0.1 * block
    return base + height + 0.01 * NAMES.index(name) - 0.05 * t


def analyse(study, cell, seed, base=0.0, step=800, values=(), held=None, **fields):
    """Write an analysis of a run; `values` are added behind the plain ones."""
    folder = run_folder(study, cell, seed).path / "analysis"
    folder.mkdir(exist_ok=True)
    lines = [{"source": "encoder", "cka_latent": 0.07, "cknna_latent": 0.08, "probe_accuracy": 0.95}]
    for t in TIMES:
        lines.append({"source": "input", "t": t, **dict.fromkeys(NAMES, 0.02 + t / 10)})
        for block in range(1, BLOCKS + 1):
            own = {name: value(name, t, block, base) for name in NAMES}
            lines.append({"source": "block", "t": t, "block": block, **own})
    content = io.BytesIO()
    np.savez_compressed(content, **(held or pictures()))
    record = {
        "format": 1,
        "step": step,
        "settings": settings(**fields),
        "protocol": digest(settings(**fields)),
        "values": [*lines, *values],
        "pictures": {"sha256": hashlib.sha256(content.getvalue()).hexdigest(), "shares": {}},
    }
    path = folder / f"step_{step:08d}.json"
    path.with_suffix(".npz").write_bytes(content.getvalue())
    write_json(path, record)
    return path


@pytest.fixture
def study(tmp_path):
    """sit and repa at two seeds, all analysed; repa has 0.2 more at seed 0 and 0.4 more at seed 1."""
    path = write_study(tmp_path, {"sit": "sit", "repa": "repa"})
    for seed in (0, 1):
        analyse(path, "sit", seed)
        analyse(path, "repa", seed, base=0.2 + 0.2 * seed)
    return path


def look(study, **fields):
    loaded = load_study(study)
    return replace(Look(cell_styles(loaded.cells, loaded.baseline)), **fields)


def frame_of(study):
    loaded = load_study(study)
    return block_frame(loaded, analysed(loaded))


def only(frame, **fields):
    for name, wanted in fields.items():
        frame = frame[frame[name] == wanted]
    return frame


# -- reading --------------------------------------------------------------------------------------------------------


def test_a_study_without_analyses_has_no_section(tmp_path):
    assert section(load_study(write_study(tmp_path, {"sit": "sit"}, seeds=(0,)))) is None


def test_the_newest_analysis_of_a_run_stands_for_it(study):
    analyse(study, "sit", 0, step=400, base=9.0)
    analyse(study, "sit", 1, step=1200, base=9.0)
    steps = {(each.run.cell, each.run.seed): each.step for each in analysed(load_study(study))}
    assert steps == {("sit", 0): 800, ("sit", 1): 1200, ("repa", 0): 800, ("repa", 1): 800}
    assert "The analysed weights are of different steps: 800 and 1,200." in section(load_study(study)).sentences


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text[:-20], "is not valid JSON"),
        (lambda text: "[]", "is a list where an object belongs"),
        (lambda text: text.replace('"format": 1', '"format": 3'), "has format 3"),
        (lambda text: text.replace('"values"', '"worth"'), "lacks values"),
        (lambda text: text.replace('"step"', '"stop"'), "lacks step"),
    ],
)
def test_records_that_cannot_be_read_are_named(study, change, message):
    path = analyse(study, "repa", 1)
    path.write_text(change(path.read_text()))
    with pytest.raises(UserError, match=rf"repa/seed1/analysis/step_00000800.json {message}"):
        section(load_study(study))


def test_pictures_of_another_analysis_are_refused_and_missing_ones_left_out(study):
    path = analyse(study, "repa", 0).with_suffix(".npz")
    content = path.read_bytes()
    for other in (b"PK", content[:-9] + b"x" + content[-8:]):
        path.write_bytes(other)
        with pytest.raises(UserError, match=r"repa/seed0/analysis/step_00000800.npz does not belong to the record"):
            section(load_study(study))
    path.unlink()
    found = section(load_study(study))
    assert set(found.plans[-1].frame["cell"]) == {"sit"}
    for each in study.glob("*/*/analysis/*.npz"):
        each.unlink()
    assert [plan.stem for plan in section(load_study(study)).plans] == list(analysis.FIGURES)


def test_pictures_that_are_no_arrays_are_refused(study):
    path = analyse(study, "sit", 0)
    path.with_suffix(".npz").write_bytes(b"no zip")
    record = json.loads(path.read_text())
    record["pictures"]["sha256"] = hashlib.sha256(b"no zip").hexdigest()
    write_json(path, record)
    with pytest.raises(UserError, match="does not belong to the record"):
        section(load_study(study))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"images": {"num": 21, "rows": "r"}}, "images.num is 20 for sit seed 0 and 21 for repa seed 1"),
        ({"times": [0.1, 0.6]}, "times is [0.1, 0.5] for sit seed 0 and [0.1, 0.6] for repa seed 1"),
        ({"encoder": {"name": "efficientnet_lite0", "family": "efficientnet", "digest": "e"}}, "encoder.name is"),
        ({"precision": "bf16"}, "precision is fp32 for sit seed 0 and bf16 for repa seed 1"),
    ],
)
def test_runs_analysed_under_different_settings_are_not_shown_together(study, fields, said):
    analyse(study, "repa", 1, **fields)
    found = section(load_study(study))
    assert not found.plans and not found.parts
    (sentence,) = found.sentences
    assert said in sentence and "different settings" in sentence and "in one call" in sentence


# -- curves ---------------------------------------------------------------------------------------------------------


def test_curves_hold_seeds_means_and_lines(study):
    frame = frame_of(study)
    own = only(frame, quantity="cka_encoder", t=0.5, cell="repa", block=3)
    seeds = only(own, series="seed").set_index("seed")["value"].to_dict()
    plain = value("cka_encoder", 0.5, 3)
    assert seeds == pytest.approx({0: plain + 0.2, 1: plain + 0.4})
    (mean,) = only(own, series="mean").itertuples()
    assert mean.value == pytest.approx(plain + 0.3) and (mean.num_seeds, mean.of_seeds) == (2, 2)
    lines = only(frame, series="line", quantity="cka_latent")
    found = {(row.cell, row.t): row.value for row in lines.itertuples()}
    assert found == pytest.approx(
        {("input", 0.1): 0.03, ("input", 0.5): 0.07, ("encoder", 0.1): 0.07, ("encoder", 0.5): 0.07}
    )
    assert set(only(frame, series="line", quantity="cka_encoder")["cell"]) == {"input"}
    assert len(frame) == 5 * 2 * (4 * 3 + 2 * 3) + 5 * 2 + 3 * 2


def test_means_are_over_the_seeds_that_have_a_value(study):
    path = analyse(study, "repa", 1)
    record = json.loads(path.read_text())
    for line in record["values"]:
        if line["source"] == "block":
            line["cka_encoder"] = "nan"
    write_json(path, record)
    own = only(frame_of(study), quantity="cka_encoder", cell="repa", series="mean", block=3, t=0.1)
    assert own["num_seeds"].tolist() == [1]
    assert own["value"].tolist() == pytest.approx([value("cka_encoder", 0.1, 3, 0.2)])


def test_figures_draw_what_the_frame_holds(study):
    plan = section(load_study(study)).plans[0]
    assert plan.stem == "alignment_encoder" and set(plan.frame["quantity"]) == {"cknna_encoder", "cka_encoder"}
    figure = plan.drawn(look(study))
    titles = [ax.get_title(loc="left") for ax in figure.axes]
    assert titles == [f"{quantity}, encoder, t = {t}" for quantity in ("CKNNA", "CKA") for t in ("0.1", "0.5")]
    ax = figure.axes[3]
    assert ax.get_ylim() == figure.axes[2].get_ylim() != figure.axes[1].get_ylim()
    drawn = [tuple(line.get_ydata()) for line in ax.lines]
    means = [tuple(value("cka_encoder", 0.5, block, base) for block in (1, 2, 3)) for base in (0.0, 0.3)]
    for mean in means:
        assert any(len(line) == 3 and line == pytest.approx(mean) for line in drawn)
    assert any(len(line) == 2 and line == pytest.approx((0.07, 0.07)) for line in drawn)
    assert {line.get_color() for line in ax.lines if len(line.get_ydata()) == 3} == {
        look(study).colour("sit"),
        look(study).colour("repa"),
    }
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["sit", "repa"]
    narrow = plan.drawn(look(study, is_narrow=True))
    assert len(narrow.axes) == 4 and len({round(ax.get_position().x0, 6) for ax in narrow.axes}) == 1


def test_cells_without_an_analysis_are_not_in_the_key(study):
    for path in (study / "repa").glob("*/analysis/*"):
        path.unlink()
    figure = section(load_study(study)).plans[0].drawn(look(study))
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["sit"]


# -- pictures -------------------------------------------------------------------------------------------------------


def test_pictures_have_the_colours_of_their_components(study):
    held = pictures(seed=1)
    held["blocks"][1, 2, ..., 1] = 5.0
    analyse(study, "repa", 0, held=held)
    plan = section(load_study(study)).plans[-1]
    assert plan.stem == "pictures_2" and set(plan.frame["t"]) == {0.5} and set(plan.frame["seed"]) == {0}
    own = only(plan.frame, cell="repa", source="block 3")
    scores = held["blocks"][1, 2].astype(float)
    red = (scores[..., 0] - scores[..., 0].min()) / (scores[..., 0].max() - scores[..., 0].min())
    np.testing.assert_allclose(own["red"].to_numpy().reshape(2, 4, 4), red, atol=1e-4)
    assert own["red"].min() == 0 and own["red"].max() == 1, "one scale for all images"
    assert set(own["green"]) == {0.5}, "a component that does not vary is grey"
    assert list(dict.fromkeys(plan.frame["source"])) == ["latent", "encoder", "block 1", "block 2", "block 3"]


def test_the_sheet_shows_image_latent_encoder_and_blocks(study):
    plan = section(load_study(study)).plans[-1]
    figure = plan.drawn(look(study))
    assert len(figure.axes) == 2, "one for every cell"
    sheet = np.asarray(figure.axes[0].images[0].get_array())
    step = analysis_figures.TILE + analysis_figures.GAP
    assert sheet.shape == (2 * step - analysis_figures.GAP, 6 * step - analysis_figures.GAP, 3)
    # The second image's picture of block 2 at its third row and fourth column.
    (pixel,) = only(plan.frame, cell="sit", source="block 2", image=1, row=2, column=3).itertuples()
    quarter = analysis_figures.TILE / 4
    y, x = int(step + 2.5 * quarter), int(4 * step + 3.5 * quarter)
    assert sheet[y, x] == pytest.approx([pixel.red, pixel.green, pixel.blue], abs=0.005)
    np.testing.assert_allclose(sheet[1, 1] * 255, pictures()["images"][0, 0, 0], atol=0.5)
    background = matplotlib.colors.to_rgb(look(study).theme.background)
    assert tuple(sheet[step - 1, step - 1]) == pytest.approx(background)
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert texts == ["sit", "image", "latent", "encoder", "block 1", "block 2", "block 3"]


def test_of_many_blocks_a_spread_has_pictures(study):
    many = list(range(1, 29))
    for cell in ("sit", "repa"):
        for seed in (0, 1):
            analyse(study, cell, seed, held=pictures(28), blocks=many)
    sources = list(dict.fromkeys(section(load_study(study)).plans[-1].frame["source"]))[2:]
    assert len(sources) == 8 and sources[0] == "block 1" and sources[-1] == "block 28"


def test_pictures_are_those_of_the_seed_that_most_cells_have(study):
    for path in (study / "sit" / "seed0" / "analysis").glob("*"):
        path.unlink()
    plan = section(load_study(study)).plans[-1]
    assert set(plan.frame["seed"]) == {1} and set(plan.frame["cell"]) == {"sit", "repa"}
    assert "Seed 1" in plan.caption


def test_scores_that_are_not_finite_are_grey(study):
    held = pictures()
    held["blocks"][:] = math.nan
    for cell in ("sit", "repa"):
        analyse(study, cell, 0, held=held)
    plan = section(load_study(study)).plans[-1]
    assert (plan.frame.loc[plan.frame["source"].str.startswith("block"), ["red", "green", "blue"]] == 0.5).all(
        axis=None
    )
    plan.drawn(look(study))


# -- words and table ------------------------------------------------------------------------------------------------


def test_sentences_say_where_the_highest_means_are(study):
    said = section(load_study(study)).sentences
    # repa, block 3, t = 0.1: 0.3 + 0.3 + 0.02 - 0.005. Differences are 0.2 and 0.4: 0.3 -+ 12.706 * 0.1414 / sqrt(2).
    assert (
        "The highest mean of CKNNA with the encoder is 0.615, at block 3 of repa at t = 0.1 (2 seeds); minus sit at "
        "that block, paired by seed: +0.300 [−0.971, +1.571], not separated." in said
    )
    # The probe's is at block 2: 0.3 + 0.3 + 0.04 - 0.005.
    assert any("probe accuracy is 0.635, at block 2 of repa" in sentence for sentence in said)
    assert "20 held-out images, noised to t = 0.1 and 0.5" in said[0]
    assert any("repa is trained towards features of the efficientnet family" in sentence for sentence in said)
    assert not any("Not analysed" in sentence for sentence in said)


def test_sentences_compare_with_the_baseline_only_where_there_is_a_pair(study):
    for path in (study / "repa" / "seed1" / "analysis").glob("*"):
        path.unlink()
    said = section(load_study(study)).sentences
    assert any("(1 seed); minus sit at that block, paired by seed: +0.200, one seed." in text for text in said)
    for path in (study / "sit" / "seed0" / "analysis").glob("*"):
        path.unlink()
    said = section(load_study(study)).sentences
    assert "The highest mean of CKNNA with the encoder is 0.515, at block 3 of repa at t = 0.1 (1 seed)." in said
    for seed in (0, 1):
        analyse(study, "sit", seed, base=5.0)
    said = section(load_study(study)).sentences
    assert "The highest mean of CKNNA with the encoder is 5.315, at block 3 of sit at t = 0.1 (2 seeds)." in said


def test_bias_and_missing_runs_are_named_only_where_there_are_any(study):
    for cell in ("sit", "repa"):
        for seed in (0, 1):
            analyse(study, cell, seed, encoder={"name": "dinov2", "family": "dinov2", "digest": "d"})
    for path in (study / "repa" / "seed1" / "analysis").glob("*"):
        path.unlink()
    said = section(load_study(study)).sentences
    assert not any("trained towards" in sentence for sentence in said)
    assert "Not analysed: repa seed 1." in said


def test_tables_have_the_highest_mean_every_seed_and_the_block(study):
    found = section(load_study(study))
    tables = {part.table.stem: part.table for part in found.parts}
    assert list(tables) == ["alignment_encoder", "alignment_latent", "probe"]
    for table in tables.values():
        assert [(row["cell"], row["t"]) for row in table.rows] == [
            (cell, t) for cell in ("sit", "repa") for t in ("0.1", "0.5")
        ]
    assert tables["alignment_encoder"].rows[2]["CKNNA, encoder"] == "0.615 (0.515, 0.715) at 3"
    assert tables["probe"].rows[2]["probe"] == "0.635 (0.535, 0.735) at 2"
    numbers, markdown, latex = table_files(found)["alignment_latent"]
    line = numbers.iloc[3]
    assert line["t"] == 0.5 and line["cka_latent"] == pytest.approx(value("cka_latent", 0.5, 3, 0.3))
    assert (line["cka_latent_block"], line["cka_latent_num_seeds"]) == (3, 2)
    assert line["cka_latent_seed1"] == pytest.approx(value("cka_latent", 0.5, 3, 0.4))
    assert "| repa | 0.1 |" in markdown and r"\toprule" in latex and "among 3 blocks" in markdown


def test_what_nothing_has_stands_in_no_table_and_what_one_lacks_is_a_dash(study):
    for cell in ("sit", "repa"):
        for seed in (0, 1):
            path = analyse(study, cell, seed)
            record = json.loads(path.read_text())
            for line in record["values"]:
                line.pop("probe_accuracy", None)
                if line["source"] == "block" and cell == "sit":
                    line["cka_encoder"] = "nan"
            write_json(path, record)
    found = section(load_study(study))
    assert "probe" not in [plan.stem for plan in found.plans]
    tables = {block.table.stem: block.table for block in found.parts}
    assert list(tables) == ["alignment_encoder", "alignment_latent"]
    rows = tables["alignment_encoder"].rows
    assert rows[0]["CKA, encoder"] == "–" and rows[2]["CKA, encoder"] != "–"
    assert not any("probe accuracy" in sentence for sentence in found.sentences)


def test_the_page_and_the_folder_hold_the_section(study, monkeypatch):
    drawn = []
    monkeypatch.setattr("reports.page.figures.picture", lambda draw, look, wide: drawn.append(draw) or _picture())
    monkeypatch.setattr("reports.figures.files.save", lambda draw, frame, stem, look: [stem.with_suffix(".csv")])
    paths = write_report(study)
    text = paths.page.read_text()
    assert 'id="representations"' in text and "0.615 (0.515, 0.715) at 3" in text
    stems = {path.stem for path in paths.figures}
    assert {*analysis.FIGURES, "pictures_1", "pictures_2"} <= stems
    table = pd.read_csv(paths.folder / "probe.csv")
    assert table["cell"].tolist() == ["sit", "sit", "repa", "repa"]
    assert (paths.folder / "probe.tex").is_file() and (paths.folder / "probe.md").is_file()


def _picture():
    from reports.page.figures import Picture

    return Picture([], "data:,")
