"""`sample --npz` and `evaluate --samples`, on the finished study."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from harness.records.run_folder import RunFolder
from studies import cli
from studies.runs import saved
from tests.e2e.conftest import FinishedStudy, contents, run_process

Ditbench = Callable[..., tuple[int, str, str]]
SMALL_CHUNKS = ("--num", "48", "--evaluation.chunk", "20")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("samples")


def test_an_interrupted_command_goes_on_to_the_same_file(
    finished: FinishedStudy, ditbench: Ditbench, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, whole, out = str(finished.run("sit")), folder / "whole.npz", folder / "out.npz"
    status, printed, err = ditbench("sample", run, *SMALL_CHUNKS, "--npz", str(whole))
    assert (status, err) == (0, "")
    assert printed.splitlines()[-1] == f"48 images of step 6 in {whole}"
    loaded = np.load(whole)
    assert loaded["arr_0"].shape == (48, 32, 32, 3)
    assert loaded["arr_1"].tolist() == [i % 10 for i in range(48)]

    generate, starts = saved.generate_rounds, []

    def interrupted(*arguments: Any) -> Any:
        for part in generate(*arguments):
            starts.append(part.start)
            if part.start == 20:
                raise KeyboardInterrupt
            yield part

    with monkeypatch.context() as patched:
        patched.setattr(saved, "generate_rounds", interrupted)
        assert ditbench("sample", run, *SMALL_CHUNKS, "--npz", str(out))[0] == 130
    assert starts == [0, 20]
    assert not out.exists()
    status, printed, err = ditbench("sample", run, *SMALL_CHUNKS, "--npz", str(out))
    assert (status, err) == (0, "")
    assert "20 of 48 images are there already" in printed.splitlines()
    assert out.read_bytes() == whole.read_bytes()
    assert sorted(path.name for path in folder.iterdir()) == ["out.npz", "whole.npz"]


@pytest.fixture(scope="module")
def run(finished: FinishedStudy, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the run, as evaluations are kept in its folder."""
    return Path(shutil.copytree(finished.run("sit"), tmp_path_factory.mktemp("copy") / "seed0"))


@pytest.fixture(scope="module")
def own(finished: FinishedStudy, folder: Path) -> tuple[Path, Path]:
    """The images that the run was evaluated with, as a .npz and as a folder."""
    packed, loose = folder / "own.npz", folder / "own"
    assert cli.main(["sample", str(finished.run("sit")), "--num", "48", "--npz", str(packed)]) == 0
    loose.mkdir()
    for index, image in enumerate(np.load(packed)["arr_0"]):
        Image.fromarray(image).save(loose / f"{index:06d}.png")
    return packed, loose


def test_the_commands_silence_the_libraries_before_they_load_them(tmp_path: Path) -> None:
    """torch warns when it is loaded."""
    code = "import studies.commands.evaluate, studies.commands.sample, sys; print('torch' in sys.modules)"
    result = run_process([sys.executable, "-c", code], tmp_path)
    assert (result.stdout, result.stderr) == ("False\n", "")


def scores(ditbench: Ditbench, *words: str) -> dict[str, Any]:
    status, out, err = ditbench("evaluate", *words, "--format", "json")
    assert status == 0, err
    return json.loads(out)


def test_a_run_s_own_samples_score_as_the_run_did(
    finished: FinishedStudy, run: Path, ditbench: Ditbench, own: tuple[Path, Path]
) -> None:
    """Under the protocol of the run, and under a config that says the same; all but what needs the backbone."""
    recorded = RunFolder(run).lines("eval")[-1]["metrics"]
    wanted = {name: value for name, value in recorded.items() if not name.startswith("velocity")}
    assert len(wanted) == 6
    before = contents(run)
    found = scores(ditbench, str(run), "--samples", str(own[0]))
    assert found["metrics"] == wanted
    assert (found["samples"], found["images"]) == ("own.npz", 48)
    (stored,) = (run / "evaluations" / found["protocol"][:12]).iterdir()
    assert stored.name == f"samples_{found['sha256'][:12]}.json"
    kept = json.loads(stored.read_text())
    assert kept["metrics"] == wanted
    assert kept["settings"]["samples"] == "from a file"
    assert "sampler" not in kept["settings"], "nobody knows how they were made"
    after = contents(run)
    assert {name: after[name] for name in before} == before, "the run's own records stay as they are"

    words = finished.place.words("evaluate", "--samples", str(own[0]))
    assert scores(ditbench, *words[1:]) == found


def test_a_folder_of_samples_is_scored_without_labels(run: Path, ditbench: Ditbench, own: tuple[Path, Path]) -> None:
    recorded = RunFolder(run).lines("eval")[-1]["metrics"]
    status, out, err = ditbench("evaluate", str(run), "--samples", str(own[1]))
    assert status == 0
    assert f"{own[1]} has no labels, so no class accuracy is given" in err
    shown = {row.split()[0]: row.split()[1] for row in out.splitlines()[1:]}
    names = [name for name in recorded if not name.startswith(("velocity", "class"))]
    assert shown == {name: f"{recorded[name]:.4g}" for name in names}


def test_samples_against_a_reference_alone_need_no_run_and_no_data(
    finished: FinishedStudy, ditbench: Ditbench, own: tuple[Path, Path], tmp_path: Path
) -> None:
    """A folder against itself, then statistics alone; and what is said where there is nothing to compare with."""
    cache = ("--output.cache", str(finished.place.cache))
    against = ("--evaluation.reference", str(own[1]), "--evaluation.kid_subset", "20")
    found = scores(ditbench, "--samples", str(own[0]), *against, *cache)["metrics"]
    assert found["fd_efficientnet_lite0_48"] == pytest.approx(0, abs=1e-2)
    assert found["precision_efficientnet_lite0_48"] == found["recall_efficientnet_lite0_48"] == 1
    assert not any(name.startswith("class") for name in found)

    np.savez(tmp_path / "reference.npz", mu=np.zeros(1280), sigma=np.eye(1280))
    words = ("--samples", str(own[0]), "--evaluation.reference", str(tmp_path / "reference.npz"), *cache)
    status, out, err = ditbench("evaluate", *words)
    assert status == 0
    assert [line.split()[0] for line in out.splitlines()] == ["metric", "fd_efficientnet_lite0_48"]
    assert "holds statistics and no images" in err

    status, _, err = ditbench("evaluate", "--samples", str(own[0]), *cache)
    assert status == 2
    assert "have nothing to be compared with: name a run, or give --config or --evaluation.reference" in err


def test_evaluation_seeds_stand_side_by_side(run: Path, ditbench: Ditbench) -> None:
    status, out, err = ditbench("evaluate", str(run), "--seeds", "0,7", "--evaluation.kid_subset", "21")
    assert status == 0, err
    header, *rows = [line.split() for line in out.splitlines()]
    assert header == ["metric", "seed", "0", "seed", "7", "mean", "sd"]
    (row,) = (row for row in rows if row[0] == "fd_efficientnet_lite0_48")
    first, second, middle, spread = map(float, row[1:])
    assert first == pytest.approx(RunFolder(run).lines("eval")[-1]["metrics"][row[0]], rel=1e-3)
    assert second != first
    assert middle == pytest.approx((first + second) / 2, rel=1e-3)
    assert spread == pytest.approx(abs(first - second) / 2**0.5, rel=0.1)
    status, _, err = ditbench("evaluate", str(run), "--seeds", "1,1")
    assert status == 2
    assert "--seeds 1,1 names a seed twice" in err


@pytest.mark.full
def test_two_processes_evaluate_and_sample_as_one_does(run: Path, own: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "two.npz"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    launcher += ["-m", "studies.cli"]
    result = run_process([*launcher, "evaluate", str(run), "--format", "json"], tmp_path)
    assert result.returncode == 0, result.stderr
    recorded = RunFolder(run).lines("eval")[-1]
    found = json.loads(result.stdout[result.stdout.index("{") :])
    assert (found["protocol"], found["metrics"]) == (recorded["protocol"], recorded["metrics"])
    result = run_process([*launcher, "sample", str(run), "--num_images", "48", "--npz", str(out)], tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("48 images of step 6") == 1, "one process prints"
    assert out.read_bytes() == own[0].read_bytes()


def test_a_step_of_samples_is_refused(run: Path, ditbench: Ditbench, own: tuple[Path, Path]) -> None:
    status, _, err = ditbench("evaluate", str(run), "--samples", str(own[0]), "--step", "3")
    assert (status, err) == (2, "ditbench: --step is 3 and has no meaning with --samples: leave it out\n")
