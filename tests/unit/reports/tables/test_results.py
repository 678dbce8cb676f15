"""The final table, its renderings, and the sentences that are made from it."""

import math
import shutil
from pathlib import Path

import pandas as pd
import pytest

from reports.result import findings
from reports.result import section as result
from reports.setup import methods
from reports.study.endings import endings
from reports.study.load import load_study
from reports.tables import results
from tests.unit.reports.records_factory import MAIN, diverge, edit_lines, edit_manifest, fail, run_folder, write_study
from tests.unit.reports.table_files import table_files

CELLS = {"sit": "sit", "repa": "repa", "sra": "sra"}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return write_study(tmp_path_factory.mktemp("runs"), CELLS, seeds=(0, 1, 2))


@pytest.fixture
def study(written, tmp_path) -> Path:
    """Last values: sit 20, 30, 40; repa 19, 27, 38 (differences -1, -3, -2); sra 10, 20, 30 (all -10)."""
    path = Path(shutil.copytree(written, tmp_path / "digits"))
    for cell, values in {"sit": (20, 30, 40), "repa": (19, 27, 38), "sra": (10, 20, 30)}.items():
        for seed, value in enumerate(values):
            edit_lines(
                run_folder(path, cell, seed), "eval", metrics={MAIN: float(value), "class_accuracy": value / 100}
            )
    return path


def row(table: pd.DataFrame, cell: str) -> pd.Series:
    return table[table["cell"] == cell].iloc[0]


def shown_row(study, cell: str) -> dict[str, str]:
    return next(texts for texts in results.display_rows(study) if texts["cell"] == cell)


def test_the_table_by_hand(study):
    table = results.final_table(load_study(study))
    repa = row(table, "repa")
    assert (repa[MAIN], repa["step"], repa["num_seeds"], repa["num_finished"]) == (28.0, 800, 3, 3)
    assert (repa["budget_unit"], repa["budget_spent"], repa["point"]) == ("steps", 800, 8)
    assert [repa[f"{MAIN}_seed{k}"] for k in (0, 1, 2)] == [19, 27, 38]
    assert repa[f"{MAIN}_difference"] == -2
    assert repa[f"{MAIN}_low"] == pytest.approx(-2 - 2.484138, abs=1e-6)
    assert repa[f"{MAIN}_high"] == pytest.approx(-2 + 2.484138, abs=1e-6)
    assert (repa[f"{MAIN}_pairs"], repa[f"{MAIN}_seeds_better"]) == (3, 3)
    assert repa[f"{MAIN}_reading"] == "not separated"
    assert repa["head_parameters"] == 506_240
    assert repa["train_gflops"] == pytest.approx(2 * 3 * (0.0206 + 0.002) * 64 * 800)


def test_direction_decides_what_is_better(study):
    sra = row(results.final_table(load_study(study)), "sra")
    assert sra[f"{MAIN}_reading"] == "better"
    assert sra["class_accuracy_reading"] == "worse"
    assert sra["class_accuracy_seeds_better"] == 0


def test_the_baseline_has_no_difference_to_itself(study):
    sit = row(results.final_table(load_study(study)), "sit")
    assert math.isnan(sit[f"{MAIN}_difference"])
    assert sit[f"{MAIN}_reading"] == ""


def test_a_diverged_run_stays_and_its_mean_says_so(study):
    diverge(run_folder(study, "repa", 1), 640, "base", "terms/repa", "grad_norm", kept=6)
    loaded = load_study(study)
    repa = row(results.final_table(loaded), "repa")
    assert (repa[MAIN], repa["num_seeds"], repa["num_diverged"]) == (28.5, 3, 1)
    assert (repa[f"{MAIN}_pairs"], repa[f"{MAIN}_difference"]) == (2, -1.5)
    shown = shown_row(loaded, "repa")
    assert shown["runs"] == "2 finished, 1 diverged"
    assert shown[MAIN] == "28.50 † (19.00, diverged, 38.00; 2 of 3 seeds)"
    notes = findings.notes(loaded)
    assert "repa seed 1 diverged at step 640 of 800: velocity loss, term repa, gradient norm not finite." in notes
    assert [ending.file for ending in endings(loaded)] == ["repa/seed1/checkpoints/diverged_00000640"]
    assert any(note.startswith("Means of repa are over 2 of 3 seeds") for note in notes)


def test_a_cell_without_any_value_stays(study):
    for seed in (0, 1, 2):
        edit_lines(run_folder(study, "sra", seed), "eval", keep=2, metrics={MAIN: "nan"})
        edit_manifest(run_folder(study, "sra", seed), status="diverged")
    loaded = load_study(study)
    sra = row(results.final_table(loaded), "sra")
    assert math.isnan(sra[MAIN]) and math.isnan(sra["train_gflops"])
    assert sra[f"{MAIN}_reading"] == "no pair"
    shown = shown_row(loaded, "sra")
    assert shown[MAIN] == "– (diverged, diverged, diverged)"
    assert shown[f"{MAIN} minus sit"] == "–; no pair of seeds"


def test_one_seed_has_no_interval(study):
    for cell in CELLS:
        for seed in (1, 2):
            shutil.rmtree(study / cell / f"seed{seed}")
    loaded = load_study(study)
    repa = shown_row(loaded, "repa")
    assert repa[f"{MAIN} minus sit"] == "−1.00; one pair, no interval; better at 1 of 1 seed"
    assert "With one pair of seeds there is no interval" in findings.headline(loaded)[-1]


def test_the_text_of_a_difference(study):
    sra = shown_row(load_study(study), "sra")
    assert sra[f"{MAIN} minus sit"] == "−10.00 [−10.00, −10.00]; better; better at 3 of 3 seeds"


def test_a_cell_without_a_run_at_a_seed_says_so(study):
    shutil.rmtree(study / "sra" / "seed1")
    loaded = load_study(study)
    assert shown_row(loaded, "sra")[MAIN] == "20.00 (10.00, –, 30.00; 2 of 3 seeds)"
    assert row(results.final_table(loaded), "sra")["num_seeds"] == 2
    assert any("Means of sra are over 2 of 3 seeds" in note for note in findings.notes(loaded))


def test_a_step_that_only_some_runs_reached_is_compared_over_those(study):
    edit_lines(run_folder(study, "sra", 2), "eval", keep=4)
    edit_manifest(run_folder(study, "sra", 2), status="running")
    loaded = load_study(study)
    assert loaded.point == 8
    assert row(results.final_table(loaded), "sra")[MAIN] == 15.0
    notes = findings.notes(loaded)
    assert "sra seed 2 not finished yet at step 800 of 800." in notes
    assert shown_row(loaded, "sra")[MAIN] == "15.00 (10.00, 20.00, unfinished; 2 of 3 seeds)"


@pytest.mark.parametrize(
    ("values", "text"),
    [([123.456], "123.5"), ([0.012345, 0.02], "0.02000"), ([0.95], "0.9500"), ([54321.0], "54321.0"), ([], "–")],
)
def test_columns_show_four_figures(values, text):
    result = results.MetricResult(dict(enumerate(values)), {}, None, False)
    row = results.CellResult("a", "a", {}, {"kd": result}, 0, 0, 0, 0.0)
    show = results.digits([row], "kd")
    assert show(max(values, default=math.nan)) == text


def test_markdown_keeps_hostile_labels_in_their_cells(written, tmp_path):
    study = write_study(tmp_path, {"sit": "sit", "<script>|`x`": "repa"}, seeds=(0,))
    lines = table_files(result.section(load_study(study)))["final"][1].splitlines()
    body = [line for line in lines if line.startswith("|")]
    assert len({line.replace("\\|", "").count("|") for line in body}) == 1
    assert "<script>" not in "\n".join(lines)


def test_the_bias_stands_beside_the_number_and_in_words(study):
    loaded = load_study(study)
    assert "†" in shown_row(loaded, "repa")[MAIN]
    assert "†" not in shown_row(loaded, "repa")["class_accuracy"] + shown_row(loaded, "sit")[MAIN]
    notes = findings.notes(loaded)
    assert any("the bias favours repa (†)" in note and "efficientnet family" in note for note in notes)
    for seed in (0, 1, 2):
        edit_manifest(run_folder(study, "repa", seed), extractor_family="inception")
    assert "†" not in shown_row(load_study(study), "repa")[MAIN]


def test_the_headline_names_the_best_mean_and_what_is_separated(study):
    loaded = load_study(study)
    setup, best, separated = findings.headline(loaded)
    assert setup.startswith(
        "3 training methods for SiT-nano/2 on digits, 3 seeds each, compared after 800 of 800 steps, 64 images a step."
    )
    assert best == (
        f"The lowest mean {MAIN} is that of sra, 20.00, against 30.00 for sit: "
        "a paired difference of −10.00 [−10.00, −10.00], better at 3 of 3 seeds."
    )
    assert separated == "By the 95% intervals of the differences to sit: sra better; repa not separated."


def test_the_headline_when_the_baseline_is_best(study):
    for seed in (0, 1, 2):
        edit_lines(run_folder(study, "sit", seed), "eval", metrics={MAIN: 1.0 + seed})
    loaded = load_study(study)
    assert findings.headline(loaded)[1] == f"The lowest mean {MAIN} is that of sit, 2.00."


def test_notes_count_bad_images(study):
    edit_lines(run_folder(study, "repa", 2), "eval", bad_images=3)
    loaded = load_study(study)
    notes = findings.notes(loaded)
    assert "repa seed 2: 3 samples had non-finite latents." in notes


def test_a_run_that_failed_after_training_says_where_and_why(study):
    detail = {"error": "no space left\non device", "trace": "Traceback:\n  line 1\n", "log": "log.txt", "ended": "x"}
    edit_manifest(run_folder(study, "sra", 0), status="failed", status_detail=detail)
    loaded = load_study(study)
    notes = findings.notes(loaded)
    assert "sra seed 0 failed at step 800 of 800: no space left on device." in notes
    assert [ending.file for ending in endings(loaded)] == ["sra/seed0/log.txt"]
    assert not any("Traceback" in note for note in notes)


def test_long_errors_are_cut(study):
    fail(run_folder(study, "sra", 0), "x" * 5000)
    (ending,) = endings(load_study(study))
    assert ending.why == "x" * 300 + "…"


def test_samples_that_are_not_finite_end_a_run_as_diverged(study):
    diverge(run_folder(study, "sra", 0), 400, "samples", kept=3)
    (ending,) = endings(load_study(study))
    assert (ending.step, ending.where, ending.why) == (400, "step 400 of 800", "samples not finite")
    assert ending.file == "sra/seed0/checkpoints/diverged_00000400"


def test_a_cell_whose_runs_all_failed_at_once_stays_in_every_table(study):
    for seed in (0, 1, 2):
        fail(run_folder(study, "repa", seed), "no memory")
    loaded = load_study(study)
    assert loaded.cells == ("sit", "repa", "sra")
    assert shown_row(loaded, "repa")["runs"] == "3 failed"
    assert shown_row(loaded, "repa")[MAIN] == "– (failed, failed, failed)"
    assert row(results.final_table(loaded), "repa")["num_failed"] == 3
    notes = findings.notes(loaded)
    assert notes[0] == "repa seeds 0, 1 and 2 failed at step 0 of 800: no memory."
    assert [ending.file for ending in endings(loaded)] == [f"repa/seed{k}/log.txt" for k in range(3)]
    assert not any(note.startswith("Runs differ in") for note in notes), (
        "a run without an environment has none to differ"
    )
    headline = findings.headline(loaded)
    assert headline[-1] == "By the 95% intervals of the differences to sit: sra better."
    assert len(methods.methods_table(loaded)[0][1]) == 3


def test_a_baseline_that_failed_is_said(study):
    for seed in (0, 1, 2):
        fail(run_folder(study, "sit", seed), "no memory")
    loaded = load_study(study)
    assert (loaded.baseline, loaded.reference.cell) == ("sit", "repa")
    headline = findings.headline(loaded)
    assert headline[0].startswith("3 training methods for SiT-nano/2 on digits")
    assert headline[1].startswith(f"The lowest mean {MAIN} is that of sra, 20.00.")
    assert headline[2] == "sit, the baseline, has no value there, so there is nothing to compare the others to."
    assert shown_row(loaded, "sra")[f"{MAIN} minus sit"] == "–; no pair of seeds"


@pytest.mark.parametrize(
    ("unit", "amount", "setup", "ending"),
    [
        ("images", 51_200, "after 51,200 of 51,200 images,", "step 312, 19,968 of 51,200 images"),
        (
            "train_gflops",
            5000.0,
            "after 5,000 of 5,000 training GFLOPs,",
            "step 312, 2,708 of 5,000 training GFLOPs",
        ),
        ("seconds", 60.0, "after 60 of 60 training seconds,", "step 312, 22.5 of 60 training seconds"),
    ],
)
def test_sentences_speak_in_the_unit_of_the_budget(tmp_path, unit, amount, setup, ending):
    path = write_study(tmp_path, {"sit": "sit", "repa": "repa"}, seeds=(0, 1), unit=unit, amount=amount)
    diverge(run_folder(path, "repa", 1), 312, "base", kept=2)
    loaded = load_study(path)
    assert setup in findings.headline(loaded)[0]
    assert [found.where for found in endings(loaded)] == [ending]
    assert table_files(result.section(loaded))["final"][1].startswith(f"# digits {loaded.after}\n")


def test_cells_that_reach_a_point_at_different_steps_are_compared_there(tmp_path):
    path = write_study(tmp_path, {"sit": "sit", "repa": "repa"}, unit="train_gflops", amount=1000.0)
    table = results.final_table(load_study(path)).set_index("cell")
    assert table["step"].to_dict() == {"sit": 127, "repa": 116}
    assert set(table["budget_unit"]) == {"train_gflops"} and set(table["budget_spent"]) == {1000.0}
    assert table.loc["repa", f"{MAIN}_pairs"] == 2
    for cell, seed in (("sit", 0), ("repa", 1)):
        recorded = run_folder(path, cell, seed).lines("eval")[-1]["metrics"][MAIN]
        assert table.loc[cell, f"{MAIN}_seed{seed}"] == recorded


def test_a_shared_device_is_marked_and_left_out_of_a_budget_in_seconds(tmp_path):
    path = write_study(tmp_path, {"sit": "sit", "repa": "repa"}, unit="seconds", amount=12)
    edit_manifest(run_folder(path, "repa", 1), shared_device=True)
    loaded = load_study(path)
    table = results.final_table(loaded).set_index("cell")
    assert math.isnan(table.loc["repa", f"{MAIN}_seed1"]) and table.loc["repa", f"{MAIN}_pairs"] == 1
    assert table["num_shared_device"].to_dict() == {"sit": 0, "repa": 1}
    shown = shown_row(loaded, "repa")
    assert shown["runs"] == "2 finished (1 ‡)"
    assert shown[MAIN].endswith("left out ‡; 1 of 2 seeds)")
    assert "‡ Shared its device with another run: its seconds do not count, and it is left out here." in (
        results.footnotes(loaded, loaded.main_metrics)
    )
    assert (
        "repa seed 1 shared its device with another run: its seconds (‡) are no measure of cost, "
        "nor are the results at that time, which are left out."
    ) in findings.notes(loaded)


def test_a_study_whose_runs_all_shared_a_device_says_so_in_two_words(tmp_path):
    path = write_study(tmp_path, {"sit": "sit", "repa": "repa"})
    for cell in ("sit", "repa"):
        for seed in (0, 1):
            edit_manifest(run_folder(path, cell, seed), shared_device=True)
    loaded = load_study(path)
    said = "All 4 runs shared their device with another run: their seconds (‡) are no measure of cost."
    assert said in findings.notes(loaded)


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        ("a|b", "a\\|b"),
        ("<script>alert(1)</script>", "&#60;script&#62;alert(1)&#60;/script&#62;"),
        ("&amp;", "&#38;amp;"),
        ("$x$", "\\$x\\$"),
        ("two\nlines\u202e", "two lines"),
        ("_it_ fd_x_898", "\\_it\\_ fd_x_898"),
        ("*b* `c` [d](e) ~f~ \\g", "\\*b\\* \\`c\\` \\[d](e) \\~f\\~ \\\\g"),
    ],
)
def test_text_in_markdown_is_no_markup(study, text, escaped):
    for seed in (0, 1, 2):
        edit_manifest(run_folder(study, "sra", seed), cell=text)
    body = table_files(result.section(load_study(study)))["final"][1].splitlines()
    assert {line.split(" | ")[0] for line in body if line.startswith("| ")} == {
        "| cell",
        "| ---",
        "| sit",
        "| repa",
        f"| {escaped}",
    }


def test_tables_for_a_terminal(study):
    loaded = load_study(study)
    assert results.means_rows(loaded)[0] == {"mean over seeds": MAIN, "sit": "30.00", "repa": "28.00 †", "sra": "20.00"}
    assert [row["mean over seeds"] for row in results.means_rows(loaded)] == list(loaded.main_metrics)
    assert results.terminal_rows(loaded)[2] == {
        "cell": "sra",
        "mean": "20.00",
        "every seed": "10.00, 20.00, 30.00",
        "minus sit [95%]": "−10.00 [−10.00, −10.00]",
        "reading": "better",
        "runs": "3 finished",
    }


def test_environments_that_differ_are_a_note(study):
    edit_manifest(run_folder(study, "sra", 0), environment={"git_dirty": True})
    loaded = load_study(study)
    notes = findings.notes(loaded)
    assert any(note.startswith("Runs differ in git_dirty (") and "True: sra seed 0" in note for note in notes)


def test_what_differs_between_the_methods(study):
    facts = dict(methods.methods_table(load_study(study)))
    assert facts["Loss terms and weights"] == [[], ["0.5 × repa"], ["0.2 × sra"]]
    assert facts["Needs"] == [
        [],
        ["tokens of the frozen encoder efficientnet_lite2"],
        ["forward passes of the EMA teacher"],
    ]
    assert facts["Heads"][1] == ["repa: 506,240 parameters (512×128)"]
    assert "Note" not in facts
