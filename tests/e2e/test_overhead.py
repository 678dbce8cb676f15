"""`ditbench overhead` as a user runs it: in an empty folder, without weights, caches or data."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from harness.records.files import read_json
from tests.e2e.conftest import Faults, FinishedStudy, Place, run_process

Ditbench = Callable[..., tuple[int, str, str]]
SMALL = ("--input_size", "8", "--num_classes", "10")


def rows_of(printed: str) -> dict[tuple[str, str], dict[str, Any]]:
    return {(row["model"], row["label"]): row for row in json.loads(printed)["counted"]}


def test_the_table_of_all_methods_without_weights(
    place: Place, ditbench: Ditbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DITBENCH_WEIGHTS", raising=False)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(place.folder)
    status, out, err = ditbench("overhead", "--models", "SiT-pico/2,SiT-nano/2", *SMALL)
    assert status == 0, err
    lines = out.splitlines()
    assert lines[0] == "Counted cost, latents 8 × 8 × 4 of 64 pixels"
    assert lines[1].split()[:2] == ["model", "method"]
    aligned = [f"{name}, {targets} targets" for name in ("irepa", "repa") for targets in ("cached", "online")]
    others = ["deep_supervision", "layersync", "sra", "sra, full teacher", "vae_repa"]
    own = ["sit", *sorted([*aligned, *others])]
    for number, line in enumerate(lines[2:22]):
        model, text = line.split(maxsplit=1)
        assert (model, text.startswith(own[number % 10])) == (("SiT-pico/2", "SiT-nano/2")[number // 10], True)
    assert lines[-1] == "saved in overhead: JSON, CSV, Markdown, LaTeX and PNG"
    assert {path.name for path in place.folder.iterdir()} == {"overhead"}, "nothing is cached or trained"
    saved = {path.suffix for path in (place.folder / "overhead").iterdir()}
    assert saved == {".json", ".csv", ".md", ".tex", ".png"}
    assert err.splitlines()[-1] == "counted SiT-nano/2 vae_repa: 16 of 16"


def test_json_and_settings(ditbench: Ditbench, tmp_path: Path) -> None:
    words = ("--models", "SiT-pico/2", "--methods", "repa+vae_repa,sra", *SMALL, "--out", str(tmp_path / "a" / "b"))
    status, plain, _ = ditbench("overhead", *words, "--format", "json")
    assert status == 0
    status, changed, _ = ditbench(
        "overhead", *words, "--format", "json", "--sra.teacher_block", "4", "--vae_repa.block", "3"
    )
    assert status == 0
    before, after = rows_of(plain), rows_of(changed)
    labels = ["sit", "repa+vae_repa, cached targets", "repa+vae_repa, online targets", "sra", "sra, full teacher"]
    assert [label for _, label in before] == labels == [label for _, label in after]
    sra, both = ("SiT-pico/2", "sra"), ("SiT-pico/2", "repa+vae_repa, cached targets")
    # One block more of the teacher: D = 64, 16 tokens.
    block = 12 * 16 * 64 * 64 + 2 * 16 * 16 * 64 + 6 * 64 * 64
    assert (after[sra]["teacher_forward_gmacs"] - before[sra]["teacher_forward_gmacs"]) * 1e9 == pytest.approx(block)
    assert (before[both]["settings"]["vae_repa"]["block"], after[both]["settings"]["vae_repa"]["block"]) == (1, 3)
    files = json.loads(changed)["files"]
    assert all(Path(file).is_file() for file in files)
    assert read_json(tmp_path / "a" / "b" / "overhead.json")["counted"] == json.loads(changed)["counted"]


def test_a_third_partys_method_has_its_row(ditbench: Ditbench, faults: Faults, tmp_path: Path) -> None:
    words = ("--models", "SiT-pico/2", "--methods", "faulty", *SMALL, "--out", str(tmp_path / "out"))
    status, printed, _ = ditbench("overhead", *words, "--format", "json")
    assert status == 0
    row = rows_of(printed)["SiT-pico/2", "faulty"]
    assert (row["change_percent"], row["term_weights"]) == (0, {"faulty": 1.0})


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--out", "file"), "--out: cannot write to file (File exists): name a folder you may write to"),
        (("--out", "file/in"), "--out: cannot write to file/in (Not a directory): name a folder you may write to"),
        (("--out", "x\0y"), "--out: cannot write to"),
        (("--models", "SiT-Q/2"), "model.name is 'SiT-Q/2'"),
        (("--models", "SiT-pico/3"), "input_size is 32: SiT-pico/3 cuts latents into 3 x 3 patches"),
        (("--methods", "rapa"), "method 'rapa' is not known (did you mean repa?)"),
        (("--input_size", "many"), "input_size is many: give a whole number"),
        (("--vae_repa.blok", "3"), "key 'vae_repa.blok' is not known: did you mean 'vae_repa.block'?"),
        (("--models", "SiT-pico/2", "--sra.block", "9"), "sra.block is 9: the backbone has blocks 1 to 4"),
        (("--models", "SiT-pico/2", "--repa.encoders", "clip"), "encoder 'clip' is not known"),
        (
            ("--models", "SiT-pico/4", *SMALL, "--methods", "vae_repa", "--measure", "--rounds", "3"),
            "rounds is 3: give 6 or",
        ),
    ],
)
def test_wrong_input_is_one_line(
    ditbench: Ditbench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    status, out, err = ditbench("overhead", *words)
    lines = [line for line in err.splitlines() if not line.startswith("counted ")]
    assert (status, out, len(lines)) == (2, "", 1)
    assert lines[0].startswith(f"ditbench: {said}")


def test_a_run_spends_what_the_table_says(ditbench: Ditbench, finished: FinishedStudy, tmp_path: Path) -> None:
    """The digits' latents are 8 x 8 x 4, their images 32 px, their classes 10."""
    words = ("--models", "SiT-pico/2", "--methods", "vae_repa", *SMALL, "--out", str(tmp_path / "out"))
    table = rows_of(ditbench("overhead", *words, "--format", "json")[1])
    for cell in ("sit", "vae_repa"):
        cost, row = read_json(finished.run(cell) / "cost.json"), table["SiT-pico/2", cell]
        same = ("backbone_forward_gmacs", "head_forward_gmacs", "teacher_forward_gmacs", "train_gflops_per_image")
        assert {name: cost[name] for name in same} == {name: row[name] for name in same}
        assert (cost["backbone_parameters"], cost["head_parameters"]) == (
            row["backbone_parameters"],
            row["head_parameters"],
        )
        lines = (finished.run(cell) / "train.jsonl").read_text().splitlines()
        spent = [json.loads(line)["train_gflops"] for line in lines]
        assert spent == pytest.approx([16 * step * row["train_gflops_per_image"] for step in range(1, 7)])
        # Caches stand apart: 1,797 images through the digits' own autoencoder, no encoder.
        assert (cost["cache_images"], cost["encoders"]) == (1797, {})
        assert cost["cache_gflops"] == pytest.approx(1797 * 2 * cost["vae_encode_gmacs"])
        assert cost["train_gflops_per_image_online"] == cost["train_gflops_per_image"]


@pytest.mark.full
def test_measured_rows_stand_in_the_same_files(place: Place) -> None:
    words = (
        "--models",
        "SiT-pico/4",
        "--methods",
        "vae_repa",
        *SMALL,
        "--runtime.threads",
        str(torch.get_num_threads()),
        "--batch_size",
        "2",
        "--rounds",
        "7",
    )
    result = place.process("overhead", *words, "--measure", "--format", "json")
    assert result.returncode == 0, result.stderr
    printed = json.loads(result.stdout)
    sit, vae_repa = printed["measured"]
    assert (sit["label"], vae_repa["label"]) == ("sit", "vae_repa")
    assert sit["ratio"] == {"median": 1.0, "low": 1.0, "high": 1.0}
    for row in (sit, vae_repa):
        assert 0 < row["step_ms"]["least"] <= row["step_ms"]["median"] <= row["step_ms"]["most"]
        assert row["forward_ms"]["median"] < row["step_ms"]["median"]
        assert (row["batch"], row["rounds"]) == (2, 7)
    assert (place.folder / "overhead" / "measured.csv").is_file()
    assert "# Measured cost" in (place.folder / "overhead" / "overhead.md").read_text()


PEAK = "import resource, sys; from studies.cli import main; print(main(sys.argv[1:]), "
PEAK += "resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)"
"""Runs a command, then prints its exit status and the most memory that it had, in bytes."""


@pytest.mark.full
def test_the_largest_model_with_all_methods_takes_less_than_4_gb(place: Place) -> None:
    result = run_process([sys.executable, "-c", PEAK, "overhead", "--models", "SiT-XL/2"], place.folder)
    status, num_bytes = result.stdout.splitlines()[-1].split()
    assert status == "0", result.stderr
    assert int(num_bytes) < 4e9
