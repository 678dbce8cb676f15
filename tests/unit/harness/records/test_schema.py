"""Records are checked where they are read: each wrong field is named, and what is right passes."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harness.errors import UserError
from harness.records.run_folder import RunFolder
from harness.records.schema import (
    FORMAT,
    AblationRecord,
    CostRecord,
    CountedRecord,
    EvalRecord,
    Manifest,
    MeasuredRecord,
    RunAnalysisRecord,
    TrainRecord,
    misfit,
    parse_line,
    read_record,
)
from tests.unit.harness.records.plain_records import CONFIG, eval_line, manifest, train_line

OLD = Path(__file__).parents[3] / "data" / "study-0.1.0"


@pytest.mark.parametrize(
    "kind", [AblationRecord, CostRecord, CountedRecord, EvalRecord, Manifest, MeasuredRecord, RunAnalysisRecord]
)
def test_every_record_has_a_check(kind: type) -> None:
    wrong = misfit([], kind)
    assert wrong is not None and "a list" in wrong.what


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"step": 1.0}, "step is 1.0 where a whole number belongs"),
        ({"step": True}, "step is true where a whole number belongs"),
        ({"train_seconds": math.nan}, "train_seconds is NaN where a finite number belongs"),
        ({"train_gflops": math.inf}, "train_gflops is Infinity where a finite number belongs"),
        ({"train_gflops": "inf"}, 'train_gflops is "inf" where a finite number belongs'),
        ({"base": "large"}, 'base is "large" where a finite number belongs'),
        ({"terms": []}, "terms is a list where an object belongs"),
        ({"terms": {"repa": {"value": 1.0}}}, "terms.repa lacks weight"),
        ({"terms": {"repa": {"value": None, "weight": 1}}}, "terms.repa.value is null"),
        ({"trace": 7}, "trace is 7 where text belongs"),
    ],
)
def test_a_wrong_field_of_a_line_is_named(fields: dict[str, Any], told: str) -> None:
    line = json.dumps({**train_line(3), **fields}).encode()
    with pytest.raises(UserError) as error:
        parse_line(line, TrainRecord, "train.jsonl, line 3")
    assert str(error.value).startswith(f"train.jsonl, line 3, {told}") and "run the cell again" in str(error.value)


@pytest.mark.parametrize("value", [1.5, 3, "nan", "inf", "-inf"])
def test_measured_numbers_may_be_words(value: float | str) -> None:
    line = eval_line(4, metrics={"fid": value})
    assert parse_line(json.dumps(line).encode(), EvalRecord, "here") == line


def test_fields_of_later_versions_are_left_alone() -> None:
    line = train_line(1, colour="green")
    assert parse_line(json.dumps(line).encode(), TrainRecord, "here") == line


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            lambda whole: {**whole, "format": FORMAT + 1},
            f"has format {FORMAT + 1} and this version reads 1 to {FORMAT}",
        ),
        (lambda whole: {**whole, "format": "1"}, "has format 1"),
        (lambda whole: {**whole, "status": "asleep"}, "status is"),
        (lambda whole: {**whole, "config": {**CONFIG, "budget": {"unit": "years", "amount": 1}}}, "config.budget.unit"),
        (lambda whole: {**whole, "digests": {"data": 1}}, "digests.data is 1"),
        (lambda whole: {**whole, "method_facts": {"taps": [1, "2"]}}, 'method_facts.taps.1 is "2"'),
        (lambda whole: [whole], "is a list where an object belongs"),
    ],
)
def test_a_wrong_field_of_a_manifest_is_named(
    tmp_path: Path, change: Callable[[dict[str, Any]], object], told: str
) -> None:
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps(change({"format": FORMAT, **manifest()})))
    with pytest.raises(UserError, match=r"manifest\.json ") as error:
        read_record(path, Manifest)
    assert told in str(error.value) and "\n" not in str(error.value)


def test_a_file_nested_without_end_is_no_crash(tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    path.write_text("[" * 100_000)
    with pytest.raises(UserError, match="is not valid JSON"):
        read_record(path, Manifest)


def test_records_of_format_1_are_read() -> None:
    folder = RunFolder(OLD / "vae_repa" / "seed1")
    assert folder.manifest().get("format") == 1 and folder.status() == "finished"
    assert [line["step"] for line in folder.lines("train")] == [1, 2, 3, 4, 5, 6]
    assert [line["point"] for line in folder.lines("eval")] == [1, 2]
    assert folder.cost()["head_parameters"] == 59920
