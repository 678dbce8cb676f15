"""Figures of an ablation: what is drawn is what the frames hold."""

import itertools
import math
from dataclasses import replace
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from harness.records.ablation import Axis
from reports.ablation import figures as ablation_figures
from reports.ablation import report as ablation_report
from reports.ablation import trial_figures
from reports.ablation.trials import load_ablation
from reports.figures.style import DARK, LIGHT, Look, cell_styles
from reports.study.load import load_study
from tests.unit.reports.records_factory import MAIN, edit_trial, prune, run_folder, set_values, write_ablation

DEFAULTS = {"block": 1, "loss": "smooth_l1"}
GRID = [{"block": b, "loss": name} for b, name in itertools.product((1, 2, 4), ("smooth_l1", "l2"))]
AXES = (
    Axis(name="block", kind="int", default=1, levels=()),
    Axis(name="loss", kind="choice", default="smooth_l1", levels=()),
)
MEANS = {(1, "smooth_l1"): 20.0, (1, "l2"): 26.0, (2, "smooth_l1"): 15.0, (2, "l2"): 30.0, (4, "smooth_l1"): 24.0}


def load(study: Path):
    found = load_ablation(load_study(study))
    assert found is not None
    return found


@pytest.fixture(scope="module")
def ablation(tmp_path_factory):
    """A grid in which (4, l2) is waiting; seeds lie 1 below and above the means."""
    settings = GRID[:-1]
    study = write_ablation(tmp_path_factory.mktemp("runs"), settings, DEFAULTS)
    set_values(study, "sit", 27.0, 29.0)
    for trial, mean in zip(load(study).trials, MEANS.values(), strict=True):
        set_values(study, trial.cell, mean - 1, mean + 1)
    return load(study)


@pytest.fixture(scope="module")
def look(ablation):
    cells = ablation.shown_cells()
    return Look(cell_styles(cells, "sit"))


@pytest.fixture(scope="module")
def frame(ablation):
    return ablation_figures.level_frame(ablation, ablation.subjects[0])


# -- curves over levels ---------------------------------------------------------------------------------------------


def test_a_numeric_axis_is_a_curve_with_seeds_interval_default_and_control(frame, look):
    ax = ablation_figures.plot_levels(Figure().subplots(), frame[frame["axis"] == "block"], look)
    (control,) = [line for line in ax.lines if line.get_color() == look.colour("sit")]
    assert list(control.get_ydata()) == [28.0, 28.0]
    curves = {line.get_linewidth(): line for line in ax.lines if len(line.get_xdata()) == 3}
    assert list(curves[2].get_xdata()) == [1, 2, 4] and list(curves[2].get_ydata()) == [20, 15, 24]
    seeds = [list(line.get_ydata()) for line in ax.lines if line.get_linewidth() == 0.8 and line.get_marker() == "o"]
    assert seeds == [[19, 14, 23], [21, 16, 25]]
    # +- 12.7062 * sqrt(2) / sqrt(2)
    intervals = [line.get_ydata() for line in ax.lines if line.get_linewidth() == 2.2]
    assert np.array(intervals) == pytest.approx(np.array([[m - 12.7062, m + 12.7062] for m in (20, 15, 24)]), abs=1e-3)
    rings = [line for line in ax.lines if line.get_markersize() == 7]
    hollow = [line.get_xdata()[0] for line in rings if line.get_markerfacecolor() == LIGHT.background]
    assert len(rings) == 3 and hollow == [1]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["1", "2", "4"]


def test_levels_that_are_words_stand_in_their_order_without_a_curve(frame, look):
    ax = ablation_figures.plot_levels(Figure().subplots(), frame[frame["axis"] == "loss"], look)
    assert [label.get_text() for label in ax.get_xticklabels()] == ["smooth_l1", "l2"]
    curve = next(line for line in ax.lines if line.get_linewidth() == 2)
    assert list(curve.get_ydata()) == [20, 26] and curve.get_linestyle() == "None"


def test_numbers_over_a_decade_stand_on_a_logarithmic_axis(tmp_path, look):
    settings = [{"weight": value} for value in (1.0, 0.1, 0.5)]
    ablation = load(write_ablation(tmp_path, settings, {"weight": 1.0}, seeds=(0,)))
    frame = ablation_figures.level_frame(ablation, ablation.subjects[0])
    ax = ablation_figures.plot_levels(Figure().subplots(), frame, look)
    assert ax.get_xscale() == "log"
    assert [label.get_text() for label in ax.get_xticklabels()] == ["0.1", "0.5", "1.0"]


def test_panels_share_a_scale_on_which_wide_intervals_are_cut(frame, look):
    first, second = (ax.get_ylim() for ax in ablation_figures.levels_figure(frame, look).axes)
    # values lie from 14 (a seed) to 28 (the control): 8.4 beyond at most, where intervals reach 12.7
    assert first == second == pytest.approx((14 - 8.4, 28 + 8.4))
    assert ablation_figures.is_cut(frame)
    alone = frame.assign(low=frame["value"] - 0.5, high=frame["value"] + 0.5)
    assert not ablation_figures.is_cut(alone)


# -- heatmaps -------------------------------------------------------------------------------------------------------


def heatmap(ablation, look):
    (pair,) = ablation_figures.pairs(ablation, ablation.subjects[0])
    frame = ablation_figures.pair_frame(ablation, ablation.subjects[0], *pair)
    return frame, ablation_figures.heatmap_figure(frame, look)


def test_a_heatmap_has_every_mean_in_its_field_and_nothing_where_there_is_none(ablation, look):
    frame, figure = heatmap(ablation, look)
    ax = figure.axes[0]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("block", "loss")
    texts = {(int(t.get_position()[0]), int(t.get_position()[1])): t.get_text() for t in ax.texts if t.get_text()}
    assert texts == {(0, 0): "20.00", (0, 1): "26.00", (1, 0): "15.00", (1, 1): "30.00", (2, 0): "24.00"}
    assert [label.get_text() for label in ax.get_xticklabels()] == ["1", "2", "4"]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["smooth_l1", "l2"]
    (ring,) = ax.patches
    assert (round(ring.get_x() + 0.46), round(ring.get_y() + 0.44)) == (0, 0)
    assert frame["is_asked"].tolist() == [True, True, True, True, True, False]


@pytest.mark.parametrize(("quantity", "best"), [(MAIN, 15.0), ("class_accuracy", 30.0)])
def test_the_brightest_field_is_the_best_whatever_the_direction(ablation, look, quantity, best):
    frame, _ = heatmap(ablation, look)
    figure = ablation_figures.heatmap_figure(frame.assign(quantity=quantity), look)
    image = figure.axes[0].images[0]
    shades = {value: sum(image.cmap(image.norm(value))[:3]) for value in frame["value"].dropna()}
    assert max(shades, key=shades.__getitem__) == best
    assert figure.axes[1].yaxis_inverted() == (quantity == MAIN)


def test_axes_varied_in_turn_have_no_heatmap(tmp_path):
    turns = [DEFAULTS, {**DEFAULTS, "block": 2}, {**DEFAULTS, "loss": "l2"}]
    for kind in ("one_at_a_time", "grid"):
        ablation = load(write_ablation(tmp_path, turns, DEFAULTS, kind=kind, study=kind, seeds=(0,)))
        assert ablation_figures.pairs(ablation, ablation.subjects[0]) == []


# -- figures of the trials ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trials(ablation):
    return trial_figures.trial_frame(ablation, ablation.subjects[0])


def test_pruned_and_waiting_trials_keep_their_numbers_and_have_no_value(tmp_path):
    settings = [{"block": block} for block in (1, 2, 3, 4)]
    study_path = write_ablation(tmp_path, settings, {"block": 1}, kind="search", seeds=(0,))
    prune(run_folder(study_path, "vae_repa,block=2", 0), 3)
    edit_trial(study_path, 1, state="pruned")
    edit_trial(study_path, 2, state="running")
    ablation = load(study_path)
    frame = trial_figures.trial_frame(ablation, ablation.subjects[0])
    assert frame["trial"].tolist() == [0, 1, 2, 3] and frame["setting.block"].tolist() == [1, 2, 3, 4]
    assert frame["value"].notna().tolist() == [True, False, False, True]


@pytest.mark.parametrize(
    ("direction", "best"), [("lower", [20, 20, 15, 15, 15]), ("higher", [20, 26, 26, 30, 30])], ids=lambda x: str(x)
)
def test_history_shows_values_and_the_best_so_far(trials, look, direction, best):
    ax = trial_figures.history_figure(trials.assign(direction=direction), look).axes[0]
    (dots,) = ax.collections
    assert dots.get_offsets().tolist() == [[i, mean] for i, mean in enumerate(MEANS.values())]
    assert list(ax.lines[0].get_ydata()) == best
    assert MAIN in ax.get_title("right") and not ax.texts


def test_trials_without_a_value_have_no_dot_and_leave_the_best_as_it_is(trials, look):
    ax = trial_figures.history_figure(trials.assign(value=[math.nan, 26.0, 15.0, math.nan, 24.0]), look).axes[0]
    assert [place for place, _ in ax.collections[0].get_offsets().tolist()] == [1, 2, 4]
    assert list(ax.lines[0].get_ydata())[1:] == [26, 15, 15, 15]


def test_a_history_of_several_methods_names_each_in_its_colour(trials, look):
    both = pd.concat([trials, trials.assign(method="other", value=trials["value"] + 1)], ignore_index=True)
    ax = trial_figures.history_figure(both, look).axes[0]
    assert [list(line.get_ydata())[-1] for line in ax.lines] == [15, 16]
    named = [(text.get_text(), text.get_color()) for text in ax.texts]
    assert named == [("vae_repa", LIGHT.cells[0]), ("other", LIGHT.cells[1])]
    assert [line.get_color() for line in ax.lines] == list(LIGHT.cells[:2])


def test_parallel_lines_cross_every_axis_where_their_level_is_named(trials, look):
    ax = trial_figures.parallel_figure(trials, look, AXES).axes[0]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["value", "block", "loss"]
    named = {(place, height): text.get_text() for text in ax.texts for place, height in [text.xy]}
    assert set(named.values()) == {"1", "2", "4", "smooth_l1", "l2"}
    (lines,) = ax.collections
    drawn = {segment[0][1]: [named[tuple(point)] for point in segment[1:]] for segment in lines.get_segments()}
    assert drawn == {mean: [str(block), loss] for (block, loss), mean in MEANS.items()}


@pytest.mark.parametrize(("direction", "best"), [("lower", 15), ("higher", 30)])
@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=lambda theme: theme.name)
def test_the_best_line_stands_out_most_and_lies_on_top(trials, look, theme, direction, best):
    figure = trial_figures.parallel_figure(trials.assign(direction=direction), replace(look, theme=theme), AXES)
    (lines,) = figure.axes[0].collections
    ground = matplotlib.colors.to_rgb(theme.background)
    contrasts = [abs(sum(shade[:3]) - sum(ground)) for shade in lines.get_colors()]
    assert contrasts == sorted(contrasts) and lines.get_segments()[-1][0][1] == best


def test_many_axes_take_panels_on_phones_and_close_levels_are_not_all_named(look):
    axes = tuple(Axis(name=f"a_rather_long_name_{i}", kind="float", default=0.5, levels=()) for i in range(6))
    rows = [{f"setting.{axis.name}": 0.5 + 0.001 * i for axis in axes} for i in range(100)]
    about = {"quantity": MAIN, "direction": "lower", "method": "vae_repa"}
    frame = pd.DataFrame([{**about, "value": float(i), **row} for i, row in enumerate(rows)])
    assert len(trial_figures.parallel_figure(frame, look, axes).axes) == 1
    figure = trial_figures.parallel_figure(frame, replace(look, is_narrow=True), axes)
    assert [len(ax.get_xticks()) for ax in figure.axes] == [5, 3]
    ax = figure.axes[0]
    heights = sorted(text.xy[1] for text in ax.texts if text.xy[0] == 1)
    low, high = ax.get_ylim()
    assert (heights[0], heights[-1]) == (0, 99)
    assert min(np.diff(heights)) >= trial_figures.LEVEL_GAP * (high - low)
    figure.draw_without_rendering()
    boxes = [label.get_window_extent() for label in ax.get_xticklabels()]
    for line in (boxes[::2], boxes[1::2]):  # every other name is a line lower
        assert not any(one.overlaps(other) for one, other in itertools.combinations(line, 2))


def test_numbers_over_a_decade_stand_by_their_logarithm():
    axis = Axis(name="weight", kind="float", default=1.0, levels=())
    assert trial_figures._heights(axis, [0.01, 0.1, 1.0]) == pytest.approx([0, 0.5, 1])
    assert trial_figures._heights(axis, [0.2, 0.6, 1.0]) == pytest.approx([0, 0.5, 1])


def test_an_axis_at_one_level_is_drawn_without_a_warning(trials, look, recwarn):
    figure = trial_figures.parallel_figure(trials.assign(**{"setting.block": 2, "value": 3.0}), look, AXES)
    assert [text.get_text() for text in figure.axes[0].texts if text.xy[0] == 1] == ["2"]
    assert not recwarn.list


def grid_of(tmp_path, num_levels: int):
    """num_levels x 6 settings in one axis's hand: the value is that of `block` alone."""
    settings = [{"block": b, "head_layers": h} for b in range(1, num_levels + 1) for h in range(1, 7)]
    study = write_ablation(tmp_path, settings[:1], {"block": 1, "head_layers": 1}, seeds=(0,))
    ablation = load(study)
    trials = [
        replace(ablation.trials[0], number=i, setting=setting, cell=f"c{i}") for i, setting in enumerate(settings)
    ]
    return replace(ablation, trials=tuple(trials)), {f"c{i}": float(s["block"]) for i, s in enumerate(settings)}


def test_importance_is_all_of_the_axis_that_alone_matters_and_the_same_each_time(tmp_path, look):
    ablation, values = grid_of(tmp_path, 5)
    subject = ablation.subjects[0]
    frame = trial_figures.trial_frame(ablation, subject).assign(value=list(values.values()), state="complete")
    found = [trial_figures.importance_frame(frame, subject.axes) for _ in range(2)]
    assert found[0]["axis"].tolist() == ["block", "head_layers"]
    assert found[0]["importance"].tolist() == pytest.approx([1.0, 0.0], abs=1e-6)
    assert found[0]["num_trials"].tolist() == [30, 30]
    pd.testing.assert_frame_equal(*found)
    figure = trial_figures.importance_figure(found[0], look)
    widths = {bar.get_width() for bar in figure.axes[0].patches}
    assert widths == set(found[0]["importance"])
    constant = frame.assign(value=3.0)
    assert trial_figures.importance_frame(constant, subject.axes).empty


def test_importance_is_shown_from_thirty_finished_trials_up(ablation):
    assert "importance_1" not in [plan.stem for plan in ablation_report.section(ablation).all_plans]
    assert ablation_report.importance_notes(ablation) == [
        "Importance of the axes of vae_repa: 5 of 30 finished trials. From fewer it would be noise, so it is not shown."
    ]


def test_thirty_finished_trials_have_a_figure_of_importance(tmp_path):
    settings = [{"block": b, "head_layers": h} for b in range(1, 6) for h in range(1, 7)]
    study = write_ablation(tmp_path, settings, settings[0], lambda s, seed: 3.0 * s["block"], seeds=(0,))
    ablation = load(study)
    plans = {plan.stem: plan for plan in ablation_report.section(ablation).all_plans}
    assert plans["importance_1"].frame["axis"].iloc[0] == "block"
    assert "over 30 finished trials (Optuna, seed 0)" in plans["importance_1"].caption
    assert ablation_report.importance_notes(ablation) == []


def test_importances_leave_no_message_and_drawing_no_style_behind(tmp_path, look, capfd, recwarn):
    before = dict(matplotlib.rcParams)
    ablation, values = grid_of(tmp_path, 5)
    subject = ablation.subjects[0]
    frame = trial_figures.trial_frame(ablation, subject).assign(value=list(values.values()), state="complete")
    importances = trial_figures.importance_frame(frame, subject.axes)
    dark = replace(look, theme=DARK, is_narrow=True)
    figure = trial_figures.importance_figure(importances, dark)
    assert matplotlib.colors.to_hex(figure.get_facecolor()) == DARK.background
    assert dict(matplotlib.rcParams) == before and not recwarn.list
    assert capfd.readouterr() == ("", "")


# -- all figures ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_narrow", [False, True])
def test_every_figure_can_be_drawn_for_every_page(ablation, look, is_narrow):
    plans = ablation_report.section(ablation).all_plans
    assert [plan.stem for plan in plans] == ["axes", "heatmap_1", "history", "parallel_1"]
    for plan in plans:
        figure = plan.drawn(replace(look, theme=DARK, is_narrow=is_narrow))
        assert figure.get_figwidth() == (4.2 if is_narrow else 8.4)
        assert len(plan.frame) and plan.alt and plan.caption.endswith(".")


def test_marks_do_not_repeat_before_the_36th_cell_nor_looks_before_the_72nd():
    styles = cell_styles([f"cell{i}" for i in range(72)], "")
    marks = {(style.light, style.marker) for style in list(styles.values())[:36]}
    looks = {(style.light, style.marker, style.dashes) for style in styles.values()}
    assert (len(marks), len(looks)) == (36, 72)
    assert [style.turn for style in styles.values()][::6] == list(range(12))
