"""Probability of improvement of a study, worked out by hand."""

import pytest

from reports.result import improvement
from reports.study.load import load_study
from tests.unit.reports.records_factory import MAIN, diverge, edit_manifest, run_folder, set_values, write_study

ACCURACY = "class_accuracy"


@pytest.fixture
def path(tmp_path):
    study = write_study(tmp_path, {"sit": "sit", "repa": "repa"}, seeds=(0, 1, 2))
    set_values(study, "sit", 10.0, 20.0, 30.0)
    set_values(study, "repa", 9.0, 20.0, 31.0)
    set_values(study, "sit", 0.5, 0.5, 0.5, name=ACCURACY)
    set_values(study, "repa", 0.6, 0.4, 0.7, name=ACCURACY)
    return study


def found(path, name=MAIN):
    return improvement.cell_improvement(load_study(path), "repa", name)


def test_by_hand_and_in_the_metrics_direction(path):
    # Better, equal, worse; over all: 9 beats 3, 20 beats 30 and ties 20, 31 none: 4.5 of 9.
    assert (found(path).paired, found(path).over_all) == (0.5, 0.5)
    # Higher is better: 0.6 and 0.7 beat all three.
    assert found(path, ACCURACY).paired == pytest.approx(2 / 3)
    assert found(path, ACCURACY).over_all == pytest.approx(6 / 9)


def test_a_diverged_run_loses_and_one_that_goes_on_does_not_count(path):
    diverge(run_folder(path, "repa", 0), 312, "base", kept=3)
    assert (found(path).paired, found(path).num_pairs, found(path).num_all) == (pytest.approx(0.5 / 3), 3, 9)
    assert found(path, ACCURACY).paired == pytest.approx(1 / 3)
    edit_manifest(run_folder(path, "repa", 0), status="running")
    assert (found(path).paired, found(path).num_pairs, found(path).num_all) == (0.25, 2, 6)


def test_the_table_has_a_row_a_metric_with_every_n(path):
    study = load_study(path)
    table = improvement.section(study).parts[0].table
    rows = {row["probability, by metric"]: row for row in table.rows}
    assert list(rows) == list(study.main_metrics)
    assert rows[MAIN]["repa"] == "0.50 of 3 seeds (0.50 of 9) †"
    assert rows[ACCURACY]["repa"] == "0.67 of 3 seeds (0.67 of 9)"
    assert any("1 in 8 is better at all of 3 seeds" in note for note in table.notes)
    (numbers,) = [row for row in table.numbers if row["metric"] == ACCURACY]
    assert (numbers["direction"], numbers["repa_pairs"], numbers["repa_all_pairs"]) == ("higher", 3, 9)


def test_without_a_baseline_there_is_none(tmp_path):
    assert improvement.section(load_study(write_study(tmp_path / "a", {"sit": "sit"}))) is None
    assert improvement.section(load_study(write_study(tmp_path / "b", {"sra": "sra"}, baseline=""))) is None
