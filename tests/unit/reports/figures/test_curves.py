"""Figures: what is drawn is what the frame holds, names do not overlap, colours stay apart."""

import itertools
import re
import shutil

import numpy as np
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Polygon
from scipy.optimize import minimize

from reports.figures import files
from reports.figures.curves import CURVE_COLUMNS, clock_curves, gradient_curves, metric_curves, training_curves
from reports.figures.differences import difference_frame, differences_figure, plot_differences
from reports.figures.labels import spread
from reports.figures.lines import clocks_figure, metric_figure, panels_figure, plot_curves
from reports.figures.style import DARK, LIGHT, Look, cell_styles
from reports.study.load import load_study
from reports.study.units import UNITS, short_number
from reports.tables import results
from tests.unit.reports.records_factory import MAIN, diverge, edit_lines, fail, run_folder, write_study

CELLS = {"sit": "sit", "repa": "repa", "both": "repa+vae_repa"}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return write_study(tmp_path_factory.mktemp("runs"), CELLS)


@pytest.fixture(scope="module")
def study(written):
    return load_study(written)


@pytest.fixture(scope="module")
def look(study):
    return Look(cell_styles(study.cells, study.baseline))


def lines_of(ax, colour, width):
    return [line for line in ax.lines if line.get_color() == colour and line.get_linewidth() == width]


def pieces(line):
    """Places and values between the breaks of a line."""
    points = np.stack([line.get_xdata(), line.get_ydata()])
    breaks = np.isnan(points[0])
    return [each[:, ~np.isnan(each[0])].tolist() for each in np.split(points, np.flatnonzero(breaks), axis=1)]


def test_curves_hold_every_seed_the_mean_and_the_lines(study, look):
    ax = Figure().subplots()
    assert plot_curves(ax, metric_curves(study, MAIN), look) is ax
    (thin,) = lines_of(ax, look.colour("repa"), 0.8)
    for run, (steps, values) in zip(study.of("repa"), pieces(thin), strict=True):
        assert steps == [e["step"] for e in run.evaluations]
        assert values == [e["metrics"][MAIN] for e in run.evaluations]
    (mean,) = lines_of(ax, look.colour("repa"), 2)
    expected = np.mean([[e["metrics"][MAIN] for e in run.evaluations] for run in study.of("repa")], axis=0)
    assert mean.get_ydata() == pytest.approx(expected)
    levels = {float(np.asarray(line.get_ydata())[0]) for line in ax.lines if line.get_color() == LIGHT.muted}
    assert levels == {3.1, 6.4}
    assert ax.get_yscale() == "log"


@pytest.mark.parametrize(
    ("name", "values", "scale"),
    [
        ("kd_x_898", (0.01, 0.1), "log"),
        ("kd_x_898", (0.011, 0.1), "linear"),
        ("kd_x_898", (-0.01, 1.0), "linear"),
        ("class_accuracy", (0.01, 1.0), "linear"),
        ("term repa", (0.01, 1.0), "log"),
    ],
)
def test_large_ranges_are_drawn_on_a_logarithmic_axis_but_no_shares(name, values, scale):
    rows = [
        {"quantity": name, "series": "seed", "cell": "a", "seed": 0, "step": i, "value": v}
        for i, v in enumerate(values)
    ]
    frame = pd.DataFrame(rows, columns=CURVE_COLUMNS)
    ax = plot_curves(Figure().subplots(), frame, Look(cell_styles(["a"], "a")))
    assert ax.get_yscale() == scale


def test_a_mean_over_survivors_is_dotted(written, tmp_path, look):
    path = shutil.copytree(written, tmp_path / "digits")
    edit_lines(run_folder(path, "repa", 1), "eval", keep=6)
    ax = Figure().subplots()
    plot_curves(ax, metric_curves(load_study(path), MAIN), look)
    solid, dotted = lines_of(ax, look.colour("repa"), 2)
    assert np.isfinite(solid.get_ydata()).tolist() == [True] * 6 + [False] * 2
    assert dotted.get_linestyle() == ":"
    assert np.isfinite(dotted.get_ydata()).tolist() == [False] * 5 + [True] * 3


def test_intervals_of_three_seeds_are_shaded_and_leave_the_axes_alone(tmp_path):
    path = write_study(tmp_path, {"sit": "sit"}, seeds=(0, 1, 2))
    for seed, value in enumerate((21.0, 27.0, 24.0)):
        edit_lines(run_folder(path, "sit", seed), "eval", metrics={MAIN: value})
    study = load_study(path)
    frame = metric_curves(study, MAIN)
    last = frame[frame["series"] == "mean"].iloc[-1]
    # sd 3, t(2) = 4.302653: 24 -+ 4.302653 x 3 / sqrt(3)
    assert (last["low"], last["high"]) == pytest.approx((24 - 7.452413, 24 + 7.452413), abs=1e-5)
    ax = Figure().subplots()
    look = Look(cell_styles(study.cells, study.baseline))
    plot_curves(ax, frame, look)
    (band,) = [artist for artist in ax.patches if isinstance(artist, Polygon)]
    corners = band.get_xy().tolist()
    assert [800, pytest.approx(last["low"])] in corners
    assert [800, pytest.approx(last["high"])] in corners
    assert band.get_facecolor() == to_rgba(look.colour("sit"), 0.14)
    without = Figure().subplots()
    plot_curves(without, frame.assign(low=np.nan, high=np.nan), look)
    assert not without.patches
    assert without.get_ylim() == ax.get_ylim()
    with_negative = frame.assign(low=frame["low"] - 1000)
    plot_curves(log := Figure().subplots(), with_negative, look)
    assert log.get_yscale() == "log"
    assert log.patches[0].get_xy().min() > 0


def test_intervals_of_two_seeds_are_not_shaded(study, look):
    frame = metric_curves(study, MAIN)
    assert frame.loc[frame["series"] == "mean", "low"].notna().all()
    ax = Figure().subplots()
    plot_curves(ax, frame, look)
    assert not ax.patches


@pytest.mark.parametrize(
    ("unit", "amount", "label"),
    [
        ("images", 51_200, "images"),
        ("train_gflops", 5000.0, "training GFLOPs"),
        ("seconds", 30.0, "training seconds"),
    ],
)
def test_the_x_axis_counts_the_budget(tmp_path, unit, amount, label):
    study = load_study(write_study(tmp_path, {"sit": "sit", "repa": "repa"}, unit=unit, amount=amount))
    look = Look(cell_styles(study.cells, study.baseline), unit=study.unit)
    figure = metric_figure(metric_curves(study, MAIN), look)
    (ax,) = figure.axes
    assert ax.get_xlabel() == label
    clock = study.unit.clock
    for cell in study.cells:
        (mean,) = lines_of(ax, look.colour(cell), 2)
        spent = [line[clock] for line in study.of(cell)[0].evaluations]
        assert mean.get_xdata() == pytest.approx(spent)
    assert ax.get_xlim()[1] == max(run.evaluations[-1][clock] for run in study.runs)
    panels = panels_figure(training_curves(study), look, has_points=False)
    assert panels.axes[-1].get_xlabel() == label
    (loss,) = lines_of(panels.axes[0], look.colour("repa"), 1.4)
    assert loss.get_xdata() == pytest.approx([line[clock] for line in study.of("repa")[0].train])


def crosses_of(ax):
    return {
        (line.get_color(), float(line.get_xdata()[0]), float(line.get_ydata()[0]))
        for line in ax.lines
        if line.get_marker() == "x"
    }


def test_a_cross_stands_where_a_run_stopped(written, tmp_path):
    path = shutil.copytree(written, tmp_path / "digits")
    diverge(run_folder(path, "repa", 1), 312, "base", kept=3)
    diverge(run_folder(path, "repa", 0), 40, "samples", kept=0)
    for seed in (0, 1):
        fail(run_folder(path, "both", seed), "no memory")
    study = load_study(path)
    look = Look(cell_styles(study.cells, study.baseline))
    figure = metric_figure(metric_curves(study, MAIN), look)
    (ax,) = figure.axes
    last = run_folder(path, "repa", 1).lines("eval")[-1]["metrics"][MAIN]
    repa, both = look.colour("repa"), look.colour("both")
    # Those without a value are placed in shares of the axes' height, a row for every cell.
    assert crosses_of(ax) == {(repa, 312, last), (repa, 40, 0.08), (both, 0, 0.03)}
    assert {text.get_text() for text in ax.texts} >= {"sit", "repa", "both: no value"}
    FigureCanvasAgg(figure).draw()
    boxes = [text.get_window_extent() for text in ax.texts]
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    assert max(box.x1 for box in boxes) <= figure.bbox.x1


def test_a_study_without_any_finite_value_is_drawn(written, tmp_path):
    path = shutil.copytree(written, tmp_path / "digits")
    for cell in CELLS:
        for seed in (0, 1):
            diverge(run_folder(path, cell, seed), 120, "samples", kept=1)
            edit_lines(run_folder(path, cell, seed), "eval", metrics={MAIN: "nan"})
    study = load_study(path)
    look = Look(cell_styles(study.cells, study.baseline))
    figure = metric_figure(metric_curves(study, MAIN), look)
    assert files.png(figure).startswith(b"\x89PNG")
    assert len(crosses_of(figure.axes[0])) == 3


@pytest.mark.parametrize("is_narrow", [False, True])
def test_direct_labels_are_inside_the_figure_and_apart(study, look, is_narrow):
    figure = metric_figure(metric_curves(study, MAIN), Look(look.styles, LIGHT, is_narrow))
    FigureCanvasAgg(figure).draw()
    texts = [text for text in figure.axes[0].texts if text.get_text()]
    assert {text.get_text() for text in texts} == {*CELLS, "floor", "reconstruction"}
    boxes = [text.get_window_extent() for text in texts]
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    assert all(figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1 for box in boxes)


def test_labels_move_apart_as_little_as_possible():
    assert spread([0.5, 0.5], 0.1) == pytest.approx([0.45, 0.55])
    assert spread([0.9, 0.1], 0.1) == [0.9, 0.1]
    assert spread([], 0.1) == []
    for seed in range(6):
        heights = np.random.default_rng(seed).uniform(0, 0.5, 7)
        order = np.argsort(heights)
        apart = {"type": "ineq", "fun": lambda x: np.diff(x) - 0.06}
        best = minimize(lambda x, h=heights[order]: np.sum((x - h) ** 2), heights[order], constraints=apart, tol=1e-12)
        assert np.array(spread(heights.tolist(), 0.06))[order] == pytest.approx(best.x, abs=1e-5)


def test_differences_are_drawn_as_recorded(study, look):
    rows = results.results(study)
    frame = difference_frame(rows, MAIN)
    ax = Figure().subplots()
    assert plot_differences(ax, frame, look) is ax
    for row in rows[1:]:
        drawn = [
            np.asarray(line.get_xdata()).tolist() for line in ax.lines if line.get_color() == look.colour(row.cell)
        ]
        difference = row.metrics[MAIN].difference
        assert difference is not None
        assert drawn[0] == [difference.interval.low, difference.interval.high]
        assert drawn[1] == [difference.interval.mean]
        assert drawn[2] == list(difference.by_seed.values())
    assert [label.get_text() for label in ax.get_yticklabels()] == ["repa", "both"]


@pytest.mark.parametrize("is_narrow", [False, True])
def test_the_other_clocks_have_a_panel_each(study, look, is_narrow):
    frame = clock_curves(study, MAIN)
    figure = clocks_figure(frame, Look(look.styles, LIGHT, is_narrow, study.unit), ("seconds",))
    labels = ["images", "training GFLOPs", "training seconds, not comparable"]
    assert [ax.get_xlabel() for ax in figure.axes] == labels
    for ax, clock in zip(figure.axes, ("images", "train_gflops", "train_seconds"), strict=True):
        for cell in study.cells:
            (mean,) = lines_of(ax, look.colour(cell), 1.4)
            assert mean.get_xdata() == pytest.approx([line[clock] for line in study.of(cell)[0].evaluations])
    FigureCanvasAgg(figure).draw()
    boxes = [ax.get_tightbbox() for ax in figure.axes]
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    assert all(figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1 and box.y0 >= 0 for box in boxes)


def test_panels_show_every_quantity(study, look):
    frame = training_curves(study)
    figure = panels_figure(frame, look, has_points=False)
    titles = [ax.get_title(loc="left") for ax in figure.axes]
    assert titles == ["velocity loss", "gradient norm", "term repa", "term vae_repa"]


def test_many_values_are_not_marked_one_by_one(study, look):
    frame = metric_curves(study, MAIN)
    means = frame["series"] == "mean"
    many = pd.concat([frame[means & (frame["cell"] == "sit")]] * 6)  # 48 values, in place of 8
    for shown, has_marks in ((frame, True), (many, False)):
        ax = plot_curves(Figure().subplots(), shown, look)
        (mean,) = lines_of(ax, look.colour("sit"), 2)
        assert (mean.get_marker() == "o") is has_marks


def test_gradient_norms_have_a_panel_for_each_part_of_the_loss(written, look, tmp_path):
    path = shutil.copytree(written, tmp_path / "digits")
    edit_lines(run_folder(path, "repa", 1), "eval", gradient_norms={"velocity": 3.0, "repa": 0.5})
    study = load_study(path)
    frame = gradient_curves(study)
    last = frame[(frame["series"] == "mean") & (frame["step"] == 800)].set_index(["quantity", "cell"])["value"]
    recorded = study.of("repa")[0].evaluations[-1]["gradient_norms"]
    assert last["velocity loss", "repa"] == pytest.approx((recorded["velocity"] + 3) / 2)
    assert last["weighted term repa", "repa"] == pytest.approx((0.2 * 0.5 + 0.5) / 2)
    assert ("weighted term repa", "sit") not in last.index
    figure = panels_figure(frame, look)
    titles = [ax.get_title(loc="left") for ax in figure.axes]
    assert titles == ["velocity loss", "weighted term repa", "weighted term vae_repa"]
    (line,) = lines_of(figure.axes[1], look.colour("repa"), 1.4)
    assert line.get_xdata().tolist() == list(range(100, 801, 100))
    assert line.get_ydata()[-1] == pytest.approx(0.3)


def test_a_run_that_diverged_has_a_cross_among_gradient_norms(written, look, tmp_path):
    path = shutil.copytree(written, tmp_path / "digits")
    diverge(run_folder(path, "repa", 1), 312, "base", kept=3)
    frame = gradient_curves(load_study(path))
    stops = frame[frame["series"] == "stop"]
    assert sorted(stops["quantity"]) == ["velocity loss", "weighted term repa"]
    assert set(stops["step"]) == {312}


def test_the_fonts_of_pdfs_are_truetype(study, look, tmp_path):
    """Type 3 fonts, matplotlib's default, are refused by many venues."""
    frame = metric_curves(study, MAIN)
    printed = files.save(lambda one: metric_figure(frame, one), frame, tmp_path / "fd", look)[2].read_bytes()
    kinds = set(re.findall(rb"/Type /Font\b.*?/Subtype /(\w+)", printed, re.DOTALL))
    assert kinds == {b"Type0", b"CIDFontType2"}
    assert b"/FontFile2" in printed, "the letters are part of the file"


def test_saved_files_are_images_and_equal_records_give_equal_bytes(study, look, tmp_path):
    frame = metric_curves(study, MAIN)
    paths = files.save(lambda one: metric_figure(frame, one), frame, tmp_path / "fd.x", look)
    assert [path.name for path in paths] == ["fd.x.png", "fd.x.svg", "fd.x.pdf", "fd.x.csv"]
    image, vector, printed, _ = paths
    assert image.read_bytes().startswith(b"\x89PNG")
    assert vector.read_text().rstrip().endswith("</svg>")
    assert printed.read_bytes().startswith(b"%PDF")
    assert b"Date" not in printed.read_bytes()
    (tmp_path / "again").mkdir()
    again = files.save(lambda one: metric_figure(frame, one), frame, tmp_path / "again" / "fd.x", look)
    assert [path.read_bytes() for path in again] == [path.read_bytes() for path in paths]


def test_the_csv_holds_what_was_drawn(study, look, tmp_path):
    frame = metric_curves(study, MAIN)
    files.save(lambda one: metric_figure(frame, one), frame, tmp_path / "fd", look)
    read = pd.read_csv(tmp_path / "fd.csv")
    seeds = read[read["series"] == "seed"]
    recorded = [e["metrics"][MAIN] for run in study.runs for e in run.evaluations]
    assert sorted(seeds["value"]) == pytest.approx(sorted(recorded))
    assert len(read[read["series"] == "mean"]) == len(CELLS) * 8


@pytest.mark.parametrize("label", ["$\\frac{", "_hidden", "<script>", "m" * 60, "repa,block=3", "größe 模型"])
@pytest.mark.filterwarnings("ignore:Glyph")
def test_hostile_labels_are_drawn_as_they_are(label, tmp_path):
    study = load_study(write_study(tmp_path, {"sit": "sit", label: "repa"}, seeds=(0,)))
    look = Look(cell_styles(study.cells, study.baseline))
    frame = metric_curves(study, MAIN)
    differences = difference_frame(results.results(study), MAIN)
    drawn = [
        metric_figure(frame, look),
        panels_figure(frame, look),
        differences_figure(differences, look, study.baseline),
    ]
    for figure in drawn:
        assert files.png(figure).startswith(b"\x89PNG")
    texts = [text.get_text() for text in (*drawn[0].axes[0].texts, *drawn[1].legends[0].get_texts())]
    assert len([text for text in texts if text == label or (text[:9] == label[:9] and "…" in text)]) == 2
    for figure, names in ((drawn[0], drawn[0].axes[0].texts), (drawn[2], drawn[2].axes[0].get_yticklabels())):
        FigureCanvasAgg(figure).draw()
        boxes = [text.get_window_extent() for text in names]
        assert min(box.x0 for box in boxes) >= 0 and max(box.x1 for box in boxes) <= figure.bbox.x1


# -- style ------------------------------------------------------------------------------------------------------------

DICHROMATS = {
    "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritan": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}
"""Linear RGB as seen without one kind of cone: Machado, Oliveira and Fernandes 2009, table 1, severity 1."""


def linear_rgb(colour: str) -> np.ndarray:
    srgb = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)


def lab(rgb: np.ndarray) -> np.ndarray:
    """CIE L*a*b* under D65."""
    to_xyz = np.array([[0.41246, 0.35758, 0.18044], [0.21267, 0.71515, 0.07218], [0.01933, 0.11919, 0.95030]])
    x, y, z = np.cbrt(np.clip(to_xyz @ rgb / [0.95047, 1.0, 1.08883], 0.008856, None))
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=lambda theme: theme.name)
@pytest.mark.parametrize("sight", DICHROMATS)
def test_the_first_colours_stay_apart_for_every_sight(theme, sight):
    # A difference of 2.3 is just noticeable; 10 is plain at a glance.
    seen = [lab(np.clip(np.array(DICHROMATS[sight]) @ linear_rgb(c), 0, 1)) for c in (theme.baseline, *theme.cells[:4])]
    assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(seen, 2)) > 10


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (0.5, "0.5"), (9000, "9000"), (20_000, "20k"), (4e6, "4M"), (2.5e9, "2.5G")]
)
def test_ticks_are_short(value, text):
    assert short_number(value) == text


@pytest.mark.parametrize(
    ("unit", "value", "text"),
    [
        ("steps", 1, "1 step"),
        ("images", 13_440, "13,440 images"),
        ("train_gflops", 1000.0, "1,000 training GFLOPs"),
        ("train_gflops", 1234.5, "1,234.5 training GFLOPs"),
        ("train_gflops", 4.2e13, "42,000,000,000,000 training GFLOPs"),
        ("seconds", 0.25, "0.25 training seconds"),
    ],
)
def test_amounts_in_words(unit, value, text):
    assert UNITS[unit].amount(value) == text


def test_no_two_cells_look_alike():
    cells = [f"cell {i}" for i in range(20)]
    styles = cell_styles(cells, "cell 3")
    assert next(iter(styles)) == "cell 3"
    assert len({(style.light, style.dashes) for style in styles.values()}) == 20
    assert cell_styles(cells, "")["cell 0"].light == LIGHT.cells[0]
