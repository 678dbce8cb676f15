"""Samples as training goes on: which images, from where, and where each is drawn."""

import shutil

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from reports.figures.evolution import MOST_CELLS, evenly, evolution, evolution_figure, evolution_plan
from reports.figures.style import DARK, Look, cell_styles
from reports.study.load import load_study
from tests.unit.reports.records_factory import edit_lines, edit_manifest, run_folder, write_study

CELLS = {"sit": "sit", "repa": "repa"}


@pytest.fixture
def study(tmp_path):
    return write_study(tmp_path, CELLS)


def look(**fields):
    return Look(cell_styles(list(CELLS), "sit"), **fields)


@pytest.mark.parametrize(
    ("num", "chosen"),
    [(2, [0, 9]), (4, [0, 3, 6, 9]), (5, [0, 2, 4, 7, 9]), (10, list(range(10))), (11, list(range(10)))],
)
def test_few_of_many_are_evenly_apart_with_both_ends(num, chosen):
    assert evenly(range(10), num) == chosen


def test_the_frame_names_the_image_and_its_file(study):
    found = evolution(load_study(study))
    assert len(found.frame) == 2 * 8 * 4
    *about, file = found.frame.iloc[-1][["cell", "seed", "point", "step", "image", "head", "file"]]
    assert about == ["repa", 0, 8, 800, 3, "step 800"]
    assert file == "repa/seed0/samples/step_00000800.png" and (study / file).is_file()
    for tiles in found.tiles.values():
        assert [tile.getpixel((0, 0)) for tile in tiles] == [(i, 0, 0) for i in range(4)]


def test_the_seed_at_which_most_cells_kept_images_is_shown(study):
    shutil.rmtree(run_folder(study, "repa", 0).samples)
    assert set(evolution(load_study(study)).frame["seed"]) == {1}


def test_shares_of_the_budget_stand_where_cells_make_different_steps(tmp_path):
    study = write_study(tmp_path, CELLS, seeds=(0,), unit="train_gflops", amount=1500.0)
    heads = evolution(load_study(study)).frame["head"].unique().tolist()
    assert heads == [f"{100 * point / 8:.0f}% of budget" for point in range(1, 9)]
    for cell in CELLS:
        folder = run_folder(study, cell, 0)
        evaluation = folder.manifest()["config"]["evaluation"] | {"points": 4, "spacing": "doubling"}
        edit_manifest(folder, config={"evaluation": evaluation})
        edit_lines(folder, "eval", keep=4)
    heads = evolution(load_study(study)).frame["head"].unique().tolist()
    assert heads == ["12% of budget", "25% of budget", "50% of budget", "100% of budget"]


def test_one_evaluation_is_no_evolution(study):
    for cell in CELLS:
        for seed in (0, 1):
            edit_lines(run_folder(study, cell, seed), "eval", keep=1)
    assert evolution_plan(load_study(study)) is None


def test_many_cells_are_cut_and_the_caption_says_so(tmp_path):
    study = write_study(tmp_path, {f"cell{i:02}": "sit" for i in range(MOST_CELLS + 1)}, seeds=(0,), baseline="cell00")
    plan = evolution_plan(load_study(study))
    assert plan.frame["cell"].nunique() == MOST_CELLS
    assert plan.caption.endswith("The first 12 of 13 cells.")


@pytest.mark.parametrize(("is_narrow", "num_columns"), [(False, 8), (True, 4)])
def test_rows_are_cells_and_columns_are_evaluations(study, is_narrow, num_columns):
    """Every drawn square is asked for its colours: tile i has a background of its own, and noise is darker later."""
    found = evolution(load_study(study))
    found = type(found)(found.frame, {key: _flat(*key) for key in found.tiles})
    figure = evolution_figure(found.frame, look(is_narrow=is_narrow), found.tiles)
    images = figure.axes[0].get_images()
    assert len(images) == 2 * num_columns
    places = [(image.get_extent()[3], image.get_extent()[0]) for image in images]
    assert places == sorted(places), "row by row, from the top left"
    points = evenly(range(1, 9), num_columns)
    for number, image in enumerate(images):
        row, column = divmod(number, num_columns)
        colours = np.asarray(image.get_array())
        assert colours[0, 0].tolist() == [row, points[column], 0]
        assert [colours[0, -1, 2], colours[-1, 0, 2], colours[-1, -1, 2]] == [1, 2, 3]
    names = [text.get_text() for text in figure.axes[0].texts]
    assert names == [*(f"step {100 * point}" for point in points), "sit", "repa"]
    width, height = figure.get_size_inches()
    for left, right, bottom, top in (image.get_extent() for image in images):
        assert -0.001 <= left < right <= width + 0.001 and 0 <= top < bottom <= height


@pytest.mark.parametrize(("num", "is_narrow", "beside"), [(2, False, 2), (3, False, 2), (4, False, 1), (3, True, 1)])
def test_cells_with_few_evaluations_stand_side_by_side(study, num, is_narrow, beside):
    for cell in CELLS:
        edit_lines(run_folder(study, cell, 0), "eval", keep=num)
    found = evolution(load_study(study))
    figure = evolution_figure(found.frame, look(is_narrow=is_narrow), found.tiles)
    extents = [image.get_extent() for image in figure.axes[0].get_images()]
    assert len(extents) == 2 * num and len({extent[3] for extent in extents}) == 2 // beside
    width, height = figure.get_size_inches()
    assert all(
        -0.001 <= left < right <= width + 0.001 and 0 <= top < bottom <= height for left, right, bottom, top in extents
    )
    if beside == 2:
        assert extents[num][0] - extents[num - 1][1] > extents[1][0] - extents[0][1], "cells are set apart"
    steps = [f"step {100 * point}" for point in range(1, num + 1)]
    heads = [text.get_text() for text in figure.axes[0].texts if text.get_text().startswith("step")]
    assert sorted(heads) == sorted(beside * steps)


def _flat(cell, point):
    """Four images of one colour: (row, evaluation, number)."""
    return [Image.new("RGB", (32, 32), (list(CELLS).index(cell), point, i)) for i in range(4)]


def test_gaps_have_the_colour_of_the_page_and_a_missing_run_is_a_dash(study):
    edit_lines(run_folder(study, "repa", 0), "eval", keep=3)
    edit_lines(run_folder(study, "repa", 1), "eval", keep=3)
    found = evolution(load_study(study))
    figure = evolution_figure(found.frame, look(theme=DARK), found.tiles)
    ax = figure.axes[0]
    assert [text.get_text() for text in ax.texts].count("–") == 5
    square = np.asarray(ax.get_images()[0].get_array())
    assert square[square.shape[0] // 2, 0].tolist() == [0x16, 0x19, 0x1D]
    FigureCanvasAgg(figure).draw()
