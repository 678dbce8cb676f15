"""What MLflow is given of a record: flat keys, values, and where its points lie in time."""

import math
from pathlib import Path
from typing import Any

import pytest

from harness.records.run_folder import RunFolder
from harness.tracking.mirror import metrics_of, recorded_points, run_name, started_ms, stored
from tests.unit.harness.records.plain_records import train_line


def train_record(step: int) -> dict[str, Any]:
    return {
        "step": step,
        "images": 16 * step,
        "loss": 1.0 / step,
        "terms": {"repa": {"value": -0.5, "weight": 0.5}, "vae_repa": {"value": 0.25, "weight": 1.0}},
        "grad_norm": math.nan,
        "trace": "ab" * 32,
        "diagnostics": {},
    }


def test_numbers_of_a_record_get_flat_legal_keys() -> None:
    record = {
        **train_record(4),
        "metrics": {"fd_efficientnet_lite0_898": 12.5},
        "terms": {"a+b": {"value": 1, "weight": 0.5}, "c@d=e": {"value": 2.0, "weight": 0.0}},
        "converged": True,
        "samples": "samples/step_00000004.png",
    }
    assert metrics_of(record) == {
        "images": 64.0,
        "loss": 0.25,
        "terms/a_b/value": 1.0,
        "terms/a_b/weight": 0.5,
        "terms/c_d_e/value": 2.0,
        "terms/c_d_e/weight": 0.0,
        "grad_norm": pytest.approx(math.nan, nan_ok=True),
        "metrics/fd_efficientnet_lite0_898": 12.5,
    }


def test_a_record_that_was_read_back_has_the_same_numbers(tmp_path: Path) -> None:
    record = {
        **train_line(2, loss=0.5, grad_norm=math.nan),
        "worst": math.inf,
        "best": {"x": -math.inf},
        "note": "infinite",
    }
    folder = RunFolder(tmp_path)
    folder.append("train", record)
    (read,) = folder.lines("train")
    assert {key: str(value) for key, value in metrics_of(read).items()} == {
        key: str(value) for key, value in metrics_of(record).items()
    }
    assert metrics_of(read)["best/x"] == -math.inf
    assert metrics_of({"step": 3, "metrics": {"fid50k": 9.5}}, "final") == {"final/metrics/fid50k": 9.5}
    assert "note" not in metrics_of(read)


def test_points_lie_where_the_records_clocks_put_them() -> None:
    early = {"step": 1, "loss": 3.0, "train_seconds": 1.5}
    late = {"step": 2, "loss": 2.0, "train_seconds": 2.5, "evaluation_seconds": 3.25, "io_seconds": 0.0004}
    points = recorded_points([("train", early), ("train", late)])
    assert points["loss", 1] == (3.0, 1500)
    assert points["loss", 2] == (2.0, 5750)
    assert recorded_points([("train", early), ("eval", {**early, "loss": 9.0})]) == recorded_points([("train", early)])


def test_a_run_has_the_name_and_the_start_of_its_folder(tmp_path: Path) -> None:
    assert run_name(RunFolder(tmp_path / "digits" / "sit,block=8" / "seed3")) == "sit,block=8/seed3"
    assert started_ms({"started": "2026-01-02T03:04:05+00:00"}) == 1767323045000
    assert started_ms({}) is None


@pytest.mark.parametrize(("value", "kept"), [(math.nan, "nan"), (math.inf, 1.7976931348623157e308), (-0.5, -0.5)])
def test_databases_keep_no_infinity(value: float, kept: float | str) -> None:
    assert stored(value) == kept
