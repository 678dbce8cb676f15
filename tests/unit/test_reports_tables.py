"""The final table, its renderings, and the sentences that are made from it."""

import math
import shutil
from pathlib import Path

import pandas as pd
import pytest
from records_factory import MAIN, edit_lines, edit_manifest, run_folder, write_study

from reports import findings, tables
from reports.load import load_study
from reports.verify import environment

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
    return next(texts for texts in tables.display_rows(study) if texts["cell"] == cell)


def test_the_table_by_hand(study):
    table = tables.final_table(load_study(study))
    repa = row(table, "repa")
    assert (repa[MAIN], repa["step"], repa["num_seeds"], repa["num_finished"]) == (28.0, 800, 3, 3)
    assert [repa[f"{MAIN}_seed{k}"] for k in (0, 1, 2)] == [19, 27, 38]
    assert repa[f"{MAIN}_difference"] == -2
    assert repa[f"{MAIN}_low"] == pytest.approx(-2 - 2.484138, abs=1e-6)
    assert repa[f"{MAIN}_high"] == pytest.approx(-2 + 2.484138, abs=1e-6)
    assert (repa[f"{MAIN}_pairs"], repa[f"{MAIN}_seeds_better"]) == (3, 3)
    assert repa[f"{MAIN}_reading"] == "not separated"
    assert repa["head_parameters"] == 506_240
    assert repa["train_gflops"] == pytest.approx(2 * 3 * (0.0206 + 0.002) * 64 * 800)


def test_direction_decides_what_is_better(study):
    sra = row(tables.final_table(load_study(study)), "sra")
    assert sra[f"{MAIN}_reading"] == "better"
    assert sra["class_accuracy_reading"] == "worse"
    assert sra["class_accuracy_seeds_better"] == 0


def test_the_baseline_has_no_difference_to_itself(study):
    sit = row(tables.final_table(load_study(study)), "sit")
    assert math.isnan(sit[f"{MAIN}_difference"])
    assert sit[f"{MAIN}_reading"] == ""


def test_a_diverged_run_stays_and_its_mean_says_so(study):
    folder = run_folder(study, "repa", 1)
    edit_lines(folder, "eval", metrics={MAIN: "nan"})
    edit_manifest(folder, status="diverged", status_detail={"step": 640, "parts": ["loss"]})
    loaded = load_study(study)
    repa = row(tables.final_table(loaded), "repa")
    assert (repa[MAIN], repa["num_seeds"], repa["num_diverged"]) == (28.5, 3, 1)
    assert (repa[f"{MAIN}_pairs"], repa[f"{MAIN}_difference"]) == (2, -1.5)
    shown = shown_row(loaded, "repa")
    assert shown["runs"] == "2 finished, 1 diverged"
    assert shown[MAIN] == "28.50 † (19.00, –, 38.00; 2 of 3 seeds)"
    notes = findings.notes(loaded, tables.results(loaded), environment(loaded))
    assert "repa seed 1 has diverged, at step 800 of 800 (parts: loss, step: 640)." in notes
    assert any(note.startswith("Means of repa are over 2 of 3 seeds") for note in notes)


def test_a_cell_without_any_value_stays(study):
    for seed in (0, 1, 2):
        edit_lines(run_folder(study, "sra", seed), "eval", keep=2, metrics={MAIN: "nan"})
        edit_manifest(run_folder(study, "sra", seed), status="diverged")
    loaded = load_study(study)
    sra = row(tables.final_table(loaded), "sra")
    assert math.isnan(sra[MAIN]) and math.isnan(sra["train_gflops"])
    assert sra[f"{MAIN}_reading"] == "no pair"
    shown = shown_row(loaded, "sra")
    assert shown[MAIN] == "– (–, –, –)"
    assert shown[f"{MAIN} minus sit"] == "–; no pair of seeds"


def test_one_seed_has_no_interval(study):
    for cell in CELLS:
        for seed in (1, 2):
            shutil.rmtree(study / cell / f"seed{seed}")
    loaded = load_study(study)
    repa = shown_row(loaded, "repa")
    assert repa[f"{MAIN} minus sit"] == "−1.00; one pair, no interval; better at 1 of 1 seed"
    assert "With one seed there is no interval" in findings.headline(loaded, tables.results(loaded))[-1]


def test_the_text_of_a_difference(study):
    sra = shown_row(load_study(study), "sra")
    assert sra[f"{MAIN} minus sit"] == "−10.00 [−10.00, −10.00]; better; better at 3 of 3 seeds"


def test_a_cell_without_a_run_at_a_seed_says_so(study):
    shutil.rmtree(study / "sra" / "seed1")
    loaded = load_study(study)
    assert shown_row(loaded, "sra")[MAIN] == "20.00 (10.00, –, 30.00; 2 of 3 seeds)"
    assert row(tables.final_table(loaded), "sra")["num_seeds"] == 2
    assert any(
        "Means of sra are over 2 of 3 seeds" in note for note in findings.notes(loaded, tables.results(loaded), [])
    )


def test_a_step_that_only_some_runs_reached_is_compared_over_those(study):
    edit_lines(run_folder(study, "sra", 2), "eval", keep=4)
    edit_manifest(run_folder(study, "sra", 2), status="running")
    loaded = load_study(study)
    assert loaded.step == 800
    assert row(tables.final_table(loaded), "sra")[MAIN] == 15.0
    notes = findings.notes(loaded, tables.results(loaded), environment(loaded))
    assert "sra seed 2 is still running, at step 800 of 800." in notes


@pytest.mark.parametrize(
    ("values", "text"),
    [([123.456], "123.5"), ([0.012345, 0.02], "0.02000"), ([0.95], "0.9500"), ([54321.0], "54321.0"), ([], "–")],
)
def test_columns_show_four_figures(values, text):
    result = tables.MetricResult(dict(enumerate(values)), None, False)
    row = tables.CellResult("a", "a", {}, {"kd": result}, 0, 0.0)
    show = tables.digits([row], "kd")
    assert show(max(values, default=math.nan)) == text


def test_markdown_keeps_hostile_labels_in_their_cells(written, tmp_path):
    study = write_study(tmp_path, {"sit": "sit", "<script>|`x`": "repa"}, seeds=(0,))
    lines = tables.markdown(load_study(study)).splitlines()
    body = [line for line in lines if line.startswith("|")]
    assert len({line.replace("\\|", "").count("|") for line in body}) == 1
    assert "<script>" not in "\n".join(lines)


def test_the_bias_stands_beside_the_number_and_in_words(study):
    loaded = load_study(study)
    assert "†" in shown_row(loaded, "repa")[MAIN]
    assert "†" not in shown_row(loaded, "repa")["class_accuracy"] + shown_row(loaded, "sit")[MAIN]
    notes = findings.notes(loaded, tables.results(loaded), environment(loaded))
    assert any("the bias favours repa (†)" in note and "efficientnet family" in note for note in notes)
    for seed in (0, 1, 2):
        edit_manifest(run_folder(study, "repa", seed), extractor_family="inception")
    assert "†" not in shown_row(load_study(study), "repa")[MAIN]


def test_the_headline_names_the_best_mean_and_what_is_separated(study):
    loaded = load_study(study)
    setup, best, separated = findings.headline(loaded, tables.results(loaded))
    assert setup.startswith(
        "3 training methods for SiT-nano/2 on digits, 3 seeds each, compared after 800 of 800 steps"
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
    assert findings.headline(loaded, tables.results(loaded))[1] == f"The lowest mean {MAIN} is that of sit, 2.00."


def test_notes_count_bad_images_and_leave_traces_out(study):
    edit_lines(run_folder(study, "repa", 2), "eval", bad_images=3)
    failure = {"error": "no space left", "trace": "Traceback:\n  line 1\n"}
    edit_manifest(run_folder(study, "sra", 0), status="failed", status_detail=failure)
    loaded = load_study(study)
    notes = findings.notes(loaded, tables.results(loaded), environment(loaded))
    assert "repa seed 2: 3 samples had non-finite latents." in notes
    assert "sra seed 0 has failed, at step 800 of 800 (error: no space left)." in notes


def test_tables_for_a_terminal(study):
    loaded = load_study(study)
    assert tables.means_rows(loaded)[0] == {"mean over seeds": MAIN, "sit": "30.00", "repa": "28.00 †", "sra": "20.00"}
    assert [row["mean over seeds"] for row in tables.means_rows(loaded)] == list(loaded.main_metrics)
    assert tables.terminal_rows(loaded)[2] == {
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
    notes = findings.notes(loaded, tables.results(loaded), environment(loaded))
    assert any(note.startswith("Runs differ in git_dirty (") and "True: sra seed 0" in note for note in notes)


def test_what_differs_between_the_methods(study):
    for seed in (0, 1, 2):
        config = run_folder(study, "sra", seed).manifest()["config"]
        config["optimizer"]["micro_batch"] = 16
        edit_manifest(run_folder(study, "sra", seed), config=config)
    facts = dict(tables.methods_table(load_study(study)))
    assert facts["Loss terms and weights"] == [[], ["0.5 × repa"], ["0.2 × sra"]]
    assert facts["Needs"] == [
        [],
        ["tokens of the frozen encoder efficientnet_lite2"],
        ["forward passes of the EMA teacher"],
    ]
    assert facts["Heads"][1] == ["repa: 506,240 parameters (512×128)"]
    assert "repa.block = 2" in facts["Own settings"][1]
    micro = [f"optimizer.micro_batch = {n}" for n in (0, 0, 16)]
    assert facts["Other settings that differ"] == [[text] for text in micro]
    assert "Note" not in facts


def test_the_cost_table_by_hand(study):
    cost = {row["cell"]: row for row in tables.cost_rows(load_study(study))}
    # repa: (0.0206 + 0.002) / 0.0206 = 1.0971; sra: the teacher's 0.011 once beside three times 0.0226.
    assert cost["repa"]["against the baseline"] == "+9.7%"
    assert cost["sra"]["against the baseline"] == "+27.5%"
    assert cost["sit"]["train GFLOPs an image"] == "0.1236"
