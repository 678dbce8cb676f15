"""What cells add to the baseline's cost: percent by hand, times that do not count, and the bars as drawn."""

import shutil

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from reports.costs.added import COUNTED, MEASURED, added_figure, added_frame, added_plan, plot_added
from reports.figures.style import LIGHT, Look, cell_styles
from reports.study.load import load_study
from tests.unit.reports.records_factory import edit_lines, edit_manifest, run_folder, write_study

CELLS = {"sit": "sit", "repa": "repa", "sra": "sra"}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return write_study(tmp_path_factory.mktemp("runs"), CELLS, seeds=(0, 1, 2))


@pytest.fixture
def path(written, tmp_path):
    """A copy in which repa takes 30, 40 and 50 ms more than the 50 of the baseline's step, at seeds 0, 1 and 2."""
    path = shutil.copytree(written, tmp_path / "digits")
    for seed, time_s in enumerate((0.08, 0.09, 0.10)):
        edit_lines(run_folder(path, "repa", seed), "eval", train_seconds=800 * time_s)
    return path


def values(frame, cell, series):
    return frame[(frame["cell"] == cell) & (frame["series"] == series)]["value"].tolist()


def test_percent_by_hand(path):
    frame = added_frame(load_study(path))
    # Training: 3 x 0.0226 + 0.011 (sra) over 3 x 0.0206.
    assert values(frame, "repa", "counted") == pytest.approx([100 * (0.0226 / 0.0206 - 1)])
    assert values(frame, "sra", "counted") == pytest.approx([100 * ((3 * 0.0226 + 0.011) / (3 * 0.0206) - 1)])
    assert values(frame, "repa", "seed") == pytest.approx([60, 80, 100])
    (mean,) = frame[(frame["cell"] == "repa") & (frame["series"] == "mean")].itertuples()
    # sd 20, t(2) = 4.302653: 80 -+ 4.302653 x 20 / sqrt(3)
    assert (mean.value, mean.low, mean.high) == pytest.approx((80, 80 - 49.6828, 80 + 49.6828), abs=1e-3)
    assert set(frame["quantity"]) == {COUNTED, MEASURED}
    assert "sit" not in set(frame["cell"])


def test_runs_that_shared_their_device_have_no_time(path):
    edit_manifest(run_folder(path, "repa", 1), shared_device=True)
    edit_manifest(run_folder(path, "sit", 2), shared_device=True)
    study = load_study(path)
    assert values(added_frame(study), "repa", "seed") == pytest.approx([60])
    plan = added_plan(study)
    assert "sit seed 2 and repa seed 1 shared their device with another run" in plan.caption


def test_counted_bars_stand_alone_where_no_time_counts(path):
    for cell in CELLS:
        for seed in range(3):
            edit_manifest(run_folder(path, cell, seed), shared_device=True)
    study = load_study(path)
    plan = added_plan(study)
    assert set(plan.frame["series"]) == {"counted"}
    assert plan.caption.endswith(
        "Every run shared its device with another, so there are no training seconds to compare."
    )
    assert "measured" not in plan.caption
    (legend,) = plan.drawn(Look(cell_styles(study.cells, study.baseline))).legends
    assert [text.get_text() for text in legend.get_texts()] == [COUNTED]


def test_times_of_different_machines_are_left_out(path):
    environment = run_folder(path, "repa", 0).manifest()["environment"]
    edit_manifest(run_folder(path, "repa", 0), environment={**environment, "threads": 4})
    plan = added_plan(load_study(path))
    assert set(plan.frame["series"]) == {"counted"}
    assert "Training seconds are not comparable: runs differ in threads" in plan.caption


def test_there_is_nothing_without_a_baseline(tmp_path):
    assert added_plan(load_study(write_study(tmp_path, {"sra": "sra"}, seeds=(0,)))) is None


def test_bars_are_as_long_as_recorded(path):
    study = load_study(path)
    look = Look(cell_styles(study.cells, study.baseline))
    ax = plot_added(Figure().subplots(), added_frame(study), look)
    widths = [bar.get_width() for bar in ax.patches]
    # From the bottom: sra, then repa; the counted bar first.
    assert widths == pytest.approx([27.508, 50, 9.709, 80], abs=1e-3)
    dots = [line for line in ax.lines if line.get_marker() == "o"]
    assert [np.asarray(line.get_xdata()).tolist() for line in dots][1] == pytest.approx([60, 80, 100])
    assert [label.get_text() for label in ax.get_yticklabels()] == ["sra", "repa"]


@pytest.mark.parametrize("is_narrow", [False, True])
def test_everything_is_inside_the_figure(path, is_narrow):
    study = load_study(path)
    look = Look(cell_styles(study.cells, study.baseline), LIGHT, is_narrow)
    figure = added_figure(added_frame(study), look, study.baseline)
    FigureCanvasAgg(figure).draw()
    boxes = [figure.axes[0].get_tightbbox(), figure.legends[0].get_window_extent(), figure.texts[0].get_window_extent()]
    assert all(box.x0 >= 0 and box.x1 <= figure.bbox.x1 and box.y0 >= 0 for box in boxes)
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
