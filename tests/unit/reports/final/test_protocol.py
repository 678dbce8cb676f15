"""The final evaluation in reports: read, checked, and kept apart from the curves."""

import itertools
import json
import math
import shutil

import numpy as np
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from harness.records.files import digest
from harness.records.run_folder import UserError
from reports.figures.labels import text_width
from reports.figures.marks import free_places, wrapped
from reports.figures.style import DARK, LIGHT, Look, cell_styles
from reports.final import figures as final_figures
from reports.final.protocol import STEM, final_rows, protocol_words, section, terminal_tables
from reports.page.figures import Picture
from reports.study.contrast import contrast
from reports.study.load import final_study, load_study
from reports.study.verify import verify
from reports.tables import results
from reports.tables.files import latex, markdown
from studies.commands import report
from tests.unit.reports.page_reader import Page
from tests.unit.reports.records_factory import (
    FINAL,
    MAIN,
    diverge,
    edit_lines,
    edit_manifest,
    final_protocol,
    run_folder,
    write_final_study,
    write_study,
)

SHORT = {"kind": "sde-euler-maruyama", "num_steps": 50, "cfg_scale": 1.0}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return write_final_study(tmp_path_factory.mktemp("runs"))


@pytest.fixture
def path(written, tmp_path):
    return shutil.copytree(written, tmp_path / "imagenet")


@pytest.fixture(scope="module")
def study(written):
    return load_study(written)


@pytest.fixture(scope="module")
def final(study):
    found = final_study(study)
    assert found is not None
    return found


# -- reading and checking -------------------------------------------------------------------------------------------


def test_the_study_under_its_final_protocol_is_a_study(study, final):
    assert final.metrics == ("fid50k", "is50k", "precision50k")
    assert MAIN in study.metrics
    assert "fid50k" not in study.metrics
    assert final.after == study.after == "after 400,000 steps"
    assert final.lines("fid50k") == {"floor": 1.8, "reconstruction": 2.3}
    assert final.reference.manifest["protocol"]["num_samples"] == 50_000
    run = final.runs[0]
    assert run.digests["evaluation"] == run.evaluations[0]["protocol"] == digest(final_protocol())
    assert [check.what for check in verify(study)][-1] == "batch trace"
    assert "final digest" in [check.what for check in verify(study)]
    assert next(c for c in verify(final) if c.what == "evaluation digest").value == digest(final_protocol())


def test_a_study_without_final_evaluations_has_none_and_nothing_is_said_of_it(tmp_path):
    plain = load_study(write_study(tmp_path, {"sit": "sit", "repa": "repa"}, seeds=(0,)))
    assert "final" not in plain.runs[0].manifest
    assert (final_study(plain), section(plain), terminal_tables(plain), final_rows(plain)) == (None, None, [], [])
    assert "final digest" not in [check.what for check in verify(plain)]


def test_only_runs_that_count_have_a_final_evaluation(path):
    for cell in FINAL:
        for seed in (0, 1, 2):
            folder = run_folder(path, cell, seed)
            edit_manifest(folder, config={"budget": {"unit": "seconds", "amount": 40.0}}, shared_device=seed > 0)
    (path / "sit" / "seed0" / "final.jsonl").unlink()
    found = final_study(load_study(path))
    assert found is not None
    rows = results.results(found)
    assert math.isnan(rows[0].metrics["fid50k"].mean)
    assert rows[1].metrics["fid50k"].finite == {0: 24.5}
    for cell in FINAL:
        (path / cell / "seed0" / "final.jsonl").unlink(missing_ok=True)
    assert final_study(load_study(path)) is None


@pytest.mark.parametrize("field", ["point", "metrics", "images"])
def test_final_lines_that_lack_a_field_are_named(path, field):
    file = path / "repa" / "seed1" / "final.jsonl"
    line = json.loads(file.read_text())
    del line[field]
    file.write_text(json.dumps(line) + "\n")
    with pytest.raises(UserError, match=rf"repa/seed1/final.jsonl, line 1, lacks {field}:"):
        load_study(path)


def test_two_final_protocols_are_not_reported_together(written, path, tmp_path):
    other = write_final_study(tmp_path / "other", seeds=(1,), sampler=SHORT)
    shutil.rmtree(path / "repa" / "seed1")
    shutil.copytree(other / "repa" / "seed1", path / "repa" / "seed1")
    loaded = load_study(path)
    with pytest.raises(UserError) as refused:
        verify(loaded)
    assert str(refused.value).startswith(
        "final digest differs between sit seed 0 and repa seed 1 (final.sampler.num_steps is 250 against 50): "
    )
    a, b = (next(run for run in loaded.runs if run.label == label) for label in ("sit seed 0", "repa seed 1"))
    found = contrast(a, b)
    assert found.obstacles == ["final digest differs"]
    assert ("config", "final.sampler.num_steps") in [
        (one.group, one.field) for one in found.differences if one.must_agree
    ]


def test_a_final_line_of_another_protocol_than_the_manifest_names_is_refused(path):
    edit_lines(run_folder(path, "repa", 2), "final", protocol="0" * 64)
    with pytest.raises(
        UserError, match=r"^repa seed 2: the final evaluation at step 400000 was made under another pro"
    ):
        verify(load_study(path))


def test_a_final_line_without_a_digest_in_the_manifest_is_refused(path):
    folder = run_folder(path, "repa", 2)
    manifest = folder.manifest()
    del manifest["digests"]["final"]
    folder.write_manifest({name: value for name, value in manifest.items() if name != "format"})
    with pytest.raises(UserError, match=r"^repa seed 2: the manifest has no final digest"):
        verify(load_study(path))


def test_final_settings_never_stand_behind_a_training_digest(path):
    edit_manifest(run_folder(path, "repa", 0), digests={"training": "1" * 64}, config={"final": {"num_samples": 7}})
    with pytest.raises(UserError, match=r"^training digest differs between sit seed 0 and repa seed 0 \([0-9a-f]{12} "):
        verify(load_study(path))


# -- tables and words -----------------------------------------------------------------------------------------------


def test_the_table_pairs_final_values_by_seed(study):
    found = section(study)
    assert found is not None
    main, others, published = (part.table for part in found.parts)
    assert main.title == "fid50k after 400,000 steps"
    assert [row["cell"] for row in main.rows] == ["sit", "repa", "vae_repa"]
    # repa minus sit: -8.6, -9.3, -7.9; sd 0.7, t(2) = 4.3027: -8.6 -+ 4.3027 x 0.7 / sqrt(3)
    assert main.rows[1] == {
        "cell": "repa",
        "mean": "24.50",
        "every seed": "24.50, 24.10, 24.90",
        "minus sit [95%]": "−8.60 [−10.34, −6.86]",
        "reading": "better",
        "runs": "3 finished",
    }
    half = 4.302653 * 0.7 / math.sqrt(3)
    assert main.numbers[1]["fid50k_low"] == pytest.approx(-8.6 - half, abs=1e-5)
    assert main.numbers[1]["fid50k_seed2"] == 24.9
    assert [(row["cell"], row["metric"]) for row in others.rows[:4]] == [
        *((cell, "is50k") for cell in FINAL),
        ("sit", "precision50k"),
    ]
    # 50.2 - 43.6 and so on: 5.8, 6.6, 5.8
    assert others.numbers[2]["difference"] == pytest.approx((5.8 + 6.6 + 5.8) / 3)
    assert others.numbers[2]["seeds_better"] == 3
    assert published.stem == "published_marks"
    assert all(MAIN not in str(table.rows) + str(table.numbers) for table in (main, others, published))
    assert not any(name.startswith("fid50k") for name in results.final_table(study).columns)
    assert r"\toprule" in latex([main])
    assert "| repa |" in markdown([main])


def test_the_words_name_both_protocols_and_what_is_separated(study):
    found = section(study)
    assert found is not None
    assert found.sentences == [
        "The EMA weights at the end of each run, evaluated once more: 50,000 samples, SDE Euler-Maruyama, 250 steps, "
        "no guidance, evaluation seed 0.",
        "This is another protocol than that of the curves and of all other tables (898 samples, SDE Euler-Maruyama, "
        "50 steps, no guidance), so no number here is to be set beside one there.",
        "By the 95% intervals of the differences to sit: repa better; vae_repa not separated.",
    ]


@pytest.mark.parametrize(
    ("sampler", "words"),
    [
        ({"kind": "ode-heun", "num_steps": 1, "cfg_scale": 1.0}, "1 sample, ODE Heun, 1 step, no guidance"),
        ({"kind": "ode-euler", "num_steps": 50, "cfg_scale": 1.5}, "1 sample, ODE Euler, 50 steps, guidance 1.5"),
        (
            {"kind": "x", "num_steps": 1000, "cfg_scale": 1.8, "guidance_low": 0.0, "guidance_high": 0.7},
            "1 sample, x, 1,000 steps, guidance 1.8 for t in [0, 0.7]",
        ),
    ],
)
def test_protocols_in_words(sampler, words):
    assert protocol_words({"sampler": sampler, "num_samples": 1}) == words


def test_runs_without_a_final_evaluation_are_named(path):
    folder = run_folder(path, "repa", 1)
    (folder.path / "final.jsonl").unlink()
    edit_manifest(folder, status="running")
    diverged = run_folder(path, "vae_repa", 0)
    diverge(diverged, 150_000, "base", kept=2)
    (diverged.path / "final.jsonl").unlink()
    loaded = load_study(path)
    verify(loaded)
    found = section(loaded)
    assert found is not None
    assert found.sentences[-1] == "repa seed 1 and vae_repa seed 0 are without a final evaluation."
    rows = {row["cell"]: row for row in found.parts[0].table.rows}
    assert rows["repa"]["every seed"] == "24.50, unfinished, 24.90; 2 of 3 seeds"
    assert rows["vae_repa"]["every seed"] == "diverged, 28.70, 32.90; 2 of 3 seeds"


def test_the_command_prints_the_final_evaluation_apart(path, monkeypatch, capsys):
    monkeypatch.setattr("reports.page.figures.picture", lambda draw, look, wide: Picture([], "data:,"))
    monkeypatch.setattr("reports.figures.files.save", lambda draw, frame, stem, look: [])
    assert report.main([str(path)]) == 0
    printed = capsys.readouterr().out
    title = "final evaluation, 50,000 samples, SDE Euler-Maruyama, 250 steps, no guidance: fid50k after 400,000 steps"
    curves, final = printed.split(title)
    assert "24.50, 24.10, 24.90" in final
    assert "24.50" not in curves
    page = (path / "report" / "index.html").read_text()
    assert f"#{STEM}" in Page(page).attributes("a", "href")
    assert f"{STEM}_fid50k_published" in page
    assert "Published values" in page
    report.main([str(path), "--published", "none", "--format", "json"])
    found = json.loads(capsys.readouterr().out)
    assert [row["fid50k"] for row in found["final"]] == pytest.approx([33.1, 24.5, 30.2])
    assert "fid50k" not in found["rows"][0]
    assert {item.name for item in (path / "report").iterdir() if item.suffix == ".csv"} >= {f"{STEM}.csv"}
    assert not (path / "report" / "published_marks.csv").exists()
    page = (path / "report" / "index.html").read_text()
    assert "fid50k_published" not in page
    assert "Published values" not in page


# -- figures --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=list(itertools.product((LIGHT, DARK), (False, True))))
def look(request, study):
    theme, is_narrow = request.param
    return Look(cell_styles(study.cells, study.baseline), theme=theme, is_narrow=is_narrow)


def test_bars_dots_and_intervals_are_the_values(final, look):
    frame = final_figures.value_frame(final, results.results(final), "fid50k")
    figure = final_figures.values_figure(frame, look)
    (ax,) = figure.axes
    widths = [bar.get_width() for bar in ax.patches]
    assert widths == pytest.approx([30.2, 24.5, 33.1])  # from the bottom up
    dots = {line.get_color(): list(line.get_xdata()) for line in ax.lines if line.get_marker() == "o"}
    assert dots == {look.colour(cell): list(values["fid50k"]) for cell, values in FINAL.items()}
    # sit: 33.1, 33.4, 32.8: sd 0.3
    (interval,) = [
        line
        for line in ax.lines
        if line.get_color() == look.colour("sit") and line.get_linewidth() == 2 and len(line.get_xdata()) == 2
    ]
    assert list(interval.get_xdata()) == pytest.approx([33.1 - 0.745242, 33.1 + 0.745242], abs=1e-5)
    FigureCanvasAgg(figure).draw()
    boxes = [text.get_window_extent() for text in (*ax.texts, *ax.get_yticklabels(), ax.title)]
    assert [text.get_text() for text in ax.texts] == ["floor, reconstruction"]
    assert min(box.x0 for box in boxes) >= 0 and max(box.x1 for box in boxes) <= figure.bbox.x1
    assert ax.get_tightbbox().y1 <= figure.bbox.y1


def images_plan(study):
    found = section(study)
    assert found is not None
    return next(plan for plan in found.plans if plan.stem == f"{STEM}_fid50k_published")


@pytest.fixture(scope="module")
def drawn(study, look):
    figure = images_plan(study).drawn(look)
    FigureCanvasAgg(figure).draw()
    return figure


def test_rings_stand_at_published_values_and_numbers_apart(drawn, look):
    (ax,) = drawn.axes
    rings = [line for line in ax.lines if line.get_markerfacecolor() == look.theme.background]
    places = {(float(ring.get_xdata()[0]), float(ring.get_ydata()[0])) for ring in rings}
    assert {(102_400_000, 24.4), (12_800_000, 64.7), (102_400_000, 36.49)} <= places
    assert len(rings) == 19
    assert {ring.get_color() for ring in rings} == {look.colour("repa"), look.colour("sit"), look.theme.muted}
    numbers = [text for text in ax.texts if text.get_text().isdigit()]
    assert len(numbers) == 19
    boxes = [text.get_window_extent() for text in numbers]
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    names = [text.get_window_extent() for text in ax.texts if not text.get_text().isdigit()]
    assert len(names) == 3
    assert not any(a.overlaps(b) for a in names for b in boxes)
    lines = [text.get_window_extent() for text in drawn.texts]
    assert not any(a.overlaps(b) for a, b in itertools.combinations(lines, 2))
    assert min(box.y0 for box in lines) >= 0 and max(box.x1 for box in (*lines, *names)) <= drawn.bbox.x1
    assert max(box.y1 for box in lines) < ax.xaxis.label.get_window_extent().y0


def test_our_points_lie_inside_beside_their_images(drawn, look):
    (ax,) = drawn.axes
    at = ax.transData.transform((102_400_000, 30))[0]
    places = {}
    for cell in FINAL:
        (mean,) = [line for line in ax.lines if line.get_markersize() == 6.5 and line.get_color() == look.colour(cell)]
        (value,) = mean.get_ydata()
        assert value == pytest.approx(np.mean(FINAL[cell]["fid50k"]))
        places[cell] = mean.get_window_extent().x0 + mean.get_window_extent().width / 2
    assert at < places["sit"] < places["repa"] < places["vae_repa"] < ax.bbox.x1


def test_the_key_says_what_every_number_is(drawn):
    text = " ".join(" ".join(line.get_text().split()) for line in reversed(drawn.texts))
    assert "2 reg 64.7, 36.1, 22.1, 15.2. REG Table 9 (primary): SDE Euler-Maruyama, 250 steps, no guidance" in text
    assert "7 sit 36.49. Dispersive repository README (primary): ODE, no guidance" in text


def test_the_frame_beside_the_figure_has_ours_and_theirs(study):
    frame = images_plan(study).frame
    ours = frame[frame["series"] == "mean"].set_index("cell")
    assert ours.loc["repa", "value"] == pytest.approx(24.5)
    assert ours.loc["repa", "images"] == 102_400_000
    theirs = frame[frame["series"] == "published"]
    assert len(theirs) == 19
    assert set(theirs.columns) >= {"source", "arxiv", "sampler", "cfg", "provenance", "row", "note"}


@pytest.mark.parametrize(("least", "scale"), [(20_000_000, "linear"), (10_000_000, "log")])
def test_wide_ranges_of_images_are_logarithmic(study, least, scale):
    frame = images_plan(study).frame
    mark = frame[frame["series"] == "published"].head(1)
    ours = frame[frame["series"] != "published"]
    frame = pd.concat([ours, mark.assign(images=least)], ignore_index=True)
    ax = final_figures.plot_against_images(Figure().subplots(), frame, Look(cell_styles(study.cells, study.baseline)))
    assert ax.get_xscale() == scale
    assert ax.get_xlim()[0] < least


def test_labels_take_the_first_place_that_covers_nothing():
    # The middle of a label 4 wide, 5 right of its point, is 7 right of it.
    assert free_places([(0, 0)], [4], []) == [(7, 0)]
    assert free_places([(0, 0)], [4], [(7, 2)]) == [(-7, 0)]
    assert free_places([(0, 0), (0, 0)], [4, 4], []) == [(7, 0), (-7, 0)]
    assert free_places([(0, 0)], [4], [(7, 0), (-7, 0), (0, 8)]) == [(0, -8)]
    crowd = [(x, y) for x in range(-40, 41, 4) for y in range(-40, 41, 4)]
    assert free_places([(0, 0)], [4], crowd) == [(7, 0)]


def test_long_lines_are_wrapped_at_words():
    words = "one two three four five six seven"
    assert wrapped(words, 100) == [words]
    lines = wrapped(words, 1.0)
    assert " ".join(" ".join(lines).split()) == words
    assert len(lines) > 2
    assert all(text_width([line]) <= 1.0 for line in lines)
    assert all(line.startswith("    ") for line in lines[1:])
    assert wrapped("m" * 60, 1.0) == ["m" * 60]
