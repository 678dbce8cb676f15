"""`--dry_run` of compare, train and ablate: sums, units, formats, and that nothing is started or written."""

import json
from pathlib import Path
from typing import Any

import pytest

from studies import cli
from studies.costs.dry_run import table
from studies.costs.estimate import CellEstimate, Estimate, Rate

DIGITS = ("--config", "digits", "--dry_run", "--tflops", "0.5")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert cli.main(list(words)) == 0
    return capsys.readouterr().out


def asked_json(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    return json.loads(run(capsys, *words, "--format", "json"))


def test_compare_sums_cells_and_seeds(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    found = asked_json(capsys, "compare", *DIGITS, "--methods", "sit,vae_repa", "--seeds", "0,1,2")
    assert list(folder.iterdir()) == []
    assert [(cell["cell"], cell["runs"]) for cell in found["cells"]] == [("sit", 3), ("vae_repa", 3)]
    total = found["total"]
    assert total["runs"] == 6
    assert total["train_gflops"] == pytest.approx(3 * sum(cell["train_gflops"] for cell in found["cells"]))
    assert total["disk"] == 3 * sum(sum(cell["disk"].values()) for cell in found["cells"])
    # 0.5 TFLOP/s: 1.8 million GFLOPs an hour.
    assert total["hours"]["train"] == pytest.approx(total["train_gflops"] / 1.8e6)
    assert total["hours"]["evaluation"] == pytest.approx(total["evaluation_gflops"] / 1.8e6)
    assert found["caches"]["hours"] == pytest.approx(found["caches"]["gflops"] / 1.8e6)
    assert found["rate"] == {"tflops": 0.5, "source": "given"}


def test_train_is_one_run(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    printed = run(capsys, "train", *DIGITS, "--method", "vae_repa")
    assert list(folder.iterdir()) == []
    assert printed.startswith("digits: 1 cell, 1 run; nothing is started or written\n")
    assert "data: 1,797 images of 10 classes\nrate: 0.5 TFLOP/s, given\n\ncell " in printed
    assert printed.count("vae_repa ") == 1 and "\nall " not in printed


def test_ablate_counts_settings_and_trials(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    """A grid: the control and every setting at every seed. A search: its trials, each as the default setting."""
    seeds = ("--seeds", "0,1")
    grid = asked_json(capsys, "ablate", *DIGITS, "--method", "vae_repa", "--grid.head_layers", "2,5", *seeds)
    assert {cell["cell"]: cell["runs"] for cell in grid["cells"]} == {
        "sit": 2,
        "vae_repa": 2,
        "vae_repa,head_layers=2": 2,
    }
    costs = {cell["cell"]: cell["train_gflops_per_image"] for cell in grid["cells"]}
    assert costs["sit"] < costs["vae_repa,head_layers=2"] < costs["vae_repa"]
    search = asked_json(capsys, "ablate", *DIGITS, "--method", "vae_repa", "--search", "tpe", "--trials", "7", *seeds)
    assert {cell["cell"]: cell["runs"] for cell in search["cells"]} == {"sit": 2, "vae_repa": 14}
    assert list(folder.iterdir()) == []


def cell(name: str, runs: int, final_gflops: float = 0.0, recomputed_gflops: float = 0.0) -> CellEstimate:
    return CellEstimate(
        cell=name, method=name, runs=runs, train_gflops_per_image=711.699, steps=400_000, train_gflops=7.2e10,
        recomputed_gflops=recomputed_gflops, evaluations=8, evaluation_gflops=3.6e8, final_gflops=final_gflops,
        disk={"checkpoints": 2 * 10**9, "EMA backbones": 10**9}, memory={"device": 4 * 10**10, "ram": 10**9},
    )  # fmt: skip


def test_the_table_by_hand() -> None:
    """At 100 TFLOP/s 3.6e8 GFLOPs are an hour; the rows are of all runs of a cell."""
    found = Estimate(
        study="x", num_images=1, num_classes=1, rate=Rate(tflops=100.0, source="given"),
        cells=(cell("a", 1, 7.2e8), cell("b", 2)), caches={}, cache_gflops=0.0, assumptions=(),
    )  # fmt: skip
    first, second, total = table(found)
    shown = ("runs", "training, PFLOPs", "training, h", "points, h", "final, h", "together, h", "disk")
    assert [first[name] for name in shown] == ["1", "72,000", "200", "1", "2", "203", "3.0 GB"]
    assert [second[name] for name in shown] == ["2", "144,000", "400", "2", "-", "402", "6.0 GB"]
    assert [total[name] for name in shown] == ["3", "216,000", "600", "3", "2", "605", "9.0 GB"]
    assert (first["GFLOPs an image"], first["steps"]) == ("711.70", "400,000")
    assert (first["device memory"], first["RAM"]) == ("40.0 GB", "1.0 GB")
    assert list(first) == list(second) == list(total)


def test_a_second_forward_pass_takes_time_and_is_not_counted() -> None:
    found = Estimate(
        study="x", num_images=1, num_classes=1, rate=Rate(tflops=100.0, source="given"),
        cells=(cell("a", 2, recomputed_gflops=2.4e10),), caches={}, cache_gflops=0.0, assumptions=(),
    )  # fmt: skip
    (row,) = table(found)
    assert (row["training, PFLOPs"], row["training, h"], row["together, h"]) == ("144,000", "533", "535")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("--tflops", "3"), "--tflops has no effect without --dry_run: give that as well"),
        (
            ("--tflops", "3", "--format", "json"),
            "--tflops --format has no effect without --dry_run: give that as well",
        ),
        (("--dry_run", "--tflops", "-1"), "tflops is -1.0: give TFLOP/s above 0, or 0 to measure them"),
        (("--config", "fast.yaml", "--dry_run"), "tflops is inf: give TFLOP/s above 0, or 0 to measure them"),
    ],
)
@pytest.mark.parametrize("command", ["compare", "train", "ablate"])
def test_what_is_refused(
    command: str, words: tuple[str, ...], line: str, capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    (folder / "fast.yaml").write_text("tflops: .inf\n")
    grid = ("--method", "vae_repa", "--grid.block", "1,2") if command == "ablate" else ()
    assert cli.main([command, "--config", "digits", *grid, *words]) == 2
    assert capsys.readouterr().err == f"ditbench: {line}\n"
    assert [path.name for path in folder.iterdir()] == ["fast.yaml"]
