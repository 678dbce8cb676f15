"""`ditbench analyze` on a finished study: records beside the runs, the figures drawn from them, and what is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from harness.records.files import read_json
from reports.analysis.section import FIGURES
from reports.analysis.section import section as report_section
from reports.figures import files
from reports.figures.style import Look, cell_styles
from reports.study.load import load_study
from tests.e2e.conftest import FinishedStudy, contents
from tests.e2e.test_released import ema, repa_file, words  # noqa: F401  # the first two are fixtures

Ditbench = Callable[..., tuple[int, str, str]]
FEW = ("--images", "24", "--probe_images", "30", "--pictures", "2", "--neighbours", "4", "--times", "0.2,0.7")


@pytest.fixture(scope="module")
def study(finished: FinishedStudy, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy, which gets records."""
    return Path(shutil.copytree(finished.path, tmp_path_factory.mktemp("analyze") / "small"))


@pytest.fixture
def passed_on(finished: FinishedStudy) -> list[str]:
    return [f"--output.cache={finished.place.cache}", f"--runtime.threads={torch.get_num_threads()}"]


def test_runs_and_checkpoints_are_analysed_and_the_report_draws_them(
    study: Path, passed_on: list[str], tmp_path: Path, ditbench: Ditbench
) -> None:
    before = contents(study)
    run, file = study / "sit/seed0", study / "vae_repa/seed0/checkpoints/ema_00000006.safetensors"
    status, out, err = ditbench("analyze", str(run), str(file), *FEW, *passed_on, "--format", "json")
    assert status == 0, err
    records = json.loads(out)
    assert list(records) == [str(run), str(file)]
    added = contents(study).keys() - before.keys()
    names = [f"{cell}/seed0/analysis/step_00000006" for cell in ("sit", "vae_repa")]
    assert added == {f"{name}.{kind}" for name in names for kind in ("json", "npz")}
    assert {name: content for name, content in contents(study).items() if name in before} == before
    first, second = records.values()
    assert first["protocol"] == second["protocol"] and first["values"] != second["values"]
    assert read_json(run / "analysis/step_00000006.json") == first
    assert first["settings"]["encoder"]["name"] == "efficientnet_lite2" and first["step"] == 6
    assert [line.get("block") for line in first["values"]] == [None, *(2 * [None, 1, 2, 3, 4])]
    encoder, inputs = first["values"][:2], second["values"][:2]
    assert encoder == inputs, "what no backbone takes part in is equal"
    with np.load(run / "analysis/step_00000006.npz", allow_pickle=False) as held:
        assert held["blocks"].shape == (2, 4, 2, 4, 4, 3) and np.isfinite(held["blocks"]).all()

    loaded = load_study(study)
    section = report_section(loaded)
    assert section is not None and "24 held-out images" in section.sentences[0]
    look = Look(cell_styles(loaded.cells, loaded.baseline))
    for plan in section.plans:
        for path in files.save(plan.drawn, plan.frame, tmp_path / plan.stem, look):
            assert path.stat().st_size > 1000, path
    assert [plan.stem for plan in section.plans] == [*FIGURES, "pictures_1", "pictures_2"]
    tables = {block.table.stem: block.table for block in section.parts}
    assert list(tables) == list(FIGURES)
    assert [(row["cell"], row["t"]) for row in tables["probe"].rows] == [
        (cell, t) for cell in ("sit", "vae_repa") for t in ("0.2", "0.7")
    ]


def test_a_released_checkpoint_is_analysed_as_the_run_it_was_made_from(
    finished: FinishedStudy,
    repa_file: Path,  # noqa: F811
    passed_on: list[str],
    tmp_path: Path,
    ditbench: Ditbench,
) -> None:
    copy = Path(shutil.copytree(finished.run("sit"), tmp_path / "small/sit/seed0"))
    status, out, err = ditbench("analyze", str(copy), *FEW, "--blocks", "2", *passed_on, "--format", "json")
    assert status == 0, err
    (ours,) = json.loads(out).values()
    given = words(finished, repa_file, "repa")
    given[given.index("--output.runs") + 1] = str(tmp_path)
    status, out, err = ditbench("analyze", *given, *FEW, "--blocks", "2")
    assert status == 0, err
    (path,) = tmp_path.glob("released/*/analysis/ema.json")
    record = read_json(path)
    assert record["checkpoint"]["file"] == repa_file.name and record["settings"] == ours["settings"]
    assert record["values"] == ours["values"]
    assert "24 held-out images, encoder efficientnet_lite2" in out
    assert sum(line.startswith("block 2") for line in out.splitlines()) == 2


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["sit/seed7"], "sit/seed7 is neither a run of ours nor a file in its checkpoints/"),
        (["sit/seed0", "--blocks", "1,x"], "--blocks 1,x is not a list such as 1,2,4"),
        (["sit/seed0", "--blocks", "1,9"], "--blocks 1,9: the backbone has blocks 1 to 4"),
        (["sit/seed0", "--times", "2"], "--times 2: give times from 0 (data) to 1 (noise)"),
        (["sit/seed0", "--encoder", "nobody"], "encoder 'nobody' is not known"),
        (["sit/seed0", "--images", "many"], "analyze: argument --images: invalid int value: 'many'"),
        (["sit/seed0", "--runtime.device", "tpu"], "device"),
        ([], "analyze: the following arguments are required: checkpoints"),
    ],
)
def test_what_cannot_be_analysed_is_one_line(
    finished: FinishedStudy, passed_on: list[str], ditbench: Ditbench, given: list[str], message: str
) -> None:
    given = [str(finished.path / word) if word.startswith("sit/") else word for word in given]
    status, out, err = ditbench("analyze", *passed_on[:1], *given)
    assert status == 2 and not out
    *_, last = err.splitlines()
    assert last.startswith("ditbench: ") and message in last
    assert not list(finished.path.glob("*/*/analysis"))


def test_a_run_without_weights_is_named_before_any_is_analysed(
    finished: FinishedStudy, passed_on: list[str], tmp_path: Path, ditbench: Ditbench
) -> None:
    empty = tmp_path / "small/sit/seed3"
    empty.mkdir(parents=True)
    shutil.copy(finished.run("sit") / "manifest.json", empty)
    status, out, err = ditbench("analyze", str(finished.run("sit")), str(empty), *passed_on)
    assert status == 2 and not out
    assert err == f"ditbench: {empty} has no EMA backbone: leave it out, or train it up to its first evaluation\n"
    assert not list(finished.path.glob("*/*/analysis"))


def test_a_study_with_several_encoders_asks_for_one(study: Path, ditbench: Ditbench) -> None:
    path = study / "vae_repa/seed0/manifest.json"
    text = path.read_text()
    manifest = json.loads(text)
    manifest["method_facts"]["needs"]["encoders"] = ["efficientnet_lite0", "dinov2_vitb14"]
    path.write_text(json.dumps(manifest))
    try:
        status, _, err = ditbench("analyze", str(study / "sit/seed0"))
    finally:
        path.write_text(text)
    assert status == 2
    assert "several encoders (dinov2_vitb14, efficientnet_lite0): name one with --encoder" in err
