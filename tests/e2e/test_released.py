"""`evaluate` and `sample` on released checkpoints: a run's EMA in the authors' formats gives what the run gave.

The formats' formulas are tested in golden/test_official_formulas.py, what is refused in unit/harness/test_official.py.
"""

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from harness.records.files import file_digest
from harness.records.run_folder import RunFolder
from harness.training import checkpoint
from tests.e2e.conftest import SMALL, FinishedStudy

Ditbench = Callable[..., tuple[int, str, str]]
State = dict[str, Tensor]


@pytest.fixture(scope="module")
def ema(finished: FinishedStudy) -> State:
    return checkpoint.load_ema(RunFolder(finished.run("sit")).checkpoints)[0]


@pytest.fixture(scope="module")
def repa_file(ema: State, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training checkpoint of REPA whose average is the run's."""
    heads = {"projectors.0.0.weight": torch.ones(8, 64)}
    arguments = argparse.Namespace(model="SiT-XL/2", num_classes=1000)
    raw = {name: torch.zeros_like(value) for name, value in ema.items()}
    content = {"model": raw | heads, "ema": ema | heads, "opt": {"state": {}}, "args": arguments, "steps": 6}
    path = tmp_path_factory.mktemp("released") / "0000006.pt"
    torch.save(content, path)
    return path


@pytest.fixture(scope="module")
def sit_file(ema: State, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SiT's bare file of the same backbone: time reversed, the sign turned, as many channels more and unread."""
    state, weight = dict(ema), ema["t_embedder.mlp.0.weight"].double()
    turned = torch.zeros_like(weight)
    for i in range(128):
        f = 10000 ** (-i / 128)
        turned[:, i] = math.cos(f) * weight[:, i] + math.sin(f) * weight[:, 128 + i]
        turned[:, 128 + i] = math.sin(f) * weight[:, i] - math.cos(f) * weight[:, 128 + i]
    state["t_embedder.mlp.0.weight"] = turned.float()
    channels = ema["x_embedder.proj.weight"].shape[1]
    for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
        pixels = ema[name].split(channels)
        state[name] = torch.cat([torch.cat([-pixel, 9 * torch.ones_like(pixel)]) for pixel in pixels])
    path = tmp_path_factory.mktemp("released") / "SiT-pico-2.pt"
    torch.save(state, path)
    return path


def words(finished: FinishedStudy, file: Path, source: str) -> list[str]:
    """The file under the config of the study, which stands on the command line here and in a YAML file elsewhere."""
    output = ["--output.runs", str(finished.place.runs), "--output.cache", str(finished.place.cache)]
    threads = ["--runtime.threads", str(torch.get_num_threads())]
    return ["--checkpoint", str(file), "--source", source, *SMALL, *output, *threads]


def test_evaluate_gives_the_metrics_of_the_run_and_keeps_them(
    finished: FinishedStudy, repa_file: Path, ditbench: Ditbench
) -> None:
    [*_, last] = RunFolder(finished.run("sit")).lines("eval")
    status, out, err = ditbench("evaluate", *words(finished, repa_file, "repa"), "--format", "json")
    assert status == 0, err
    record = json.loads(out)
    assert record["protocol"] == last["protocol"] and record["metrics"] == last["metrics"]
    sha256 = file_digest(repa_file)
    assert record["checkpoint"] == {
        "file": "0000006.pt",
        "sha256": sha256,
        "source": "sihyun-yu/REPA",
        "which": "ema",
        "model": "SiT-pico/2",
    }
    folder = finished.place.runs / "released" / f"0000006-{sha256[:12]}"
    [kept] = folder.rglob("*.json")
    assert kept.parent == folder / "evaluations" / last["protocol"][:12]
    stored = json.loads(kept.read_text())
    assert {key: stored[key] for key in record} == record and stored["settings"]["num_samples"] == 48


def test_evaluation_seeds_are_those_of_the_command_line(
    finished: FinishedStudy, repa_file: Path, ditbench: Ditbench
) -> None:
    """The config's own `seeds` are those of training."""
    given = words(finished, repa_file, "repa")
    assert given[4:6] == ["--config", "digits"]
    status, out, err = ditbench("evaluate", *given, "--seeds", "1,0", "--format", "json", "--which", "model")
    assert status == 0, err
    other, same = json.loads(out)
    assert other["protocol"] != same["protocol"] and same["checkpoint"]["which"] == "model"
    [*_, last] = RunFolder(finished.run("sit")).lines("eval")
    assert same["protocol"] == last["protocol"] and same["metrics"] != last["metrics"]


def test_a_checkpoint_of_ours_is_the_run(finished: FinishedStudy, ditbench: Ditbench, tmp_path: Path) -> None:
    run, out = finished.run("sit"), tmp_path / "out.npz"
    file = run / "checkpoints" / "ema_00000003.safetensors"
    status, printed, err = ditbench("sample", "--checkpoint", str(file), "--num", "2", "--npz", str(out))
    assert (status, printed.splitlines()[-1]) == (0, f"2 images of step 3 in {out}"), err


def test_samples_of_a_converted_backbone_are_those_of_the_run(
    finished: FinishedStudy, sit_file: Path, ditbench: Ditbench, tmp_path: Path
) -> None:
    ours, theirs = tmp_path / "ours.npz", tmp_path / "theirs.npz"
    assert ditbench("sample", str(finished.run("sit")), "--num", "10", "--npz", str(ours))[0] == 0
    status, printed, err = ditbench("sample", *words(finished, sit_file, "sit"), "--num", "10", "--npz", str(theirs))
    assert (status, printed.splitlines()[-1]) == (0, f"10 images of SiT-pico-2.pt (ema) in {theirs}"), err
    a, b = (np.load(path)["arr_0"].astype(int) for path in (ours, theirs))
    # Conversion and its inverse round once each: a pixel may cross to the next of 256 levels.
    assert a.std() > 10 and np.abs(a - b).max() <= 1


def test_what_does_not_fit_is_refused_in_one_line(
    finished: FinishedStudy, ema: State, repa_file: Path, ditbench: Ditbench, tmp_path: Path
) -> None:
    fewer = tmp_path / "fewer.pt"
    table = "y_embedder.embedding_table.weight"
    torch.save(ema | {table: ema[table][:8].clone()}, fewer)
    missing = str(tmp_path / "missing.pt")
    wrong = [
        ([*words(finished, repa_file, "repa"), "--model.name", "SiT-nano/2"], "the checkpoint holds SiT-pico/2"),
        (words(finished, repa_file, "sit"), "is not of willisma/SiT"),
        (words(finished, fewer, "sra"), "has 7 classes and latents of 8 x 8 x 4, but the data 10 classes"),
        (["--checkpoint", missing, "--source", "repa", "--config", "digits"], "is not there"),
        (["--checkpoint", missing], "give --source (repa, sra, sit) and --config as well"),
        (["--source", "repa", "--config", "digits"], "name the file too, with --checkpoint"),
        (["--checkpoint", str(repa_file), "--source", "repa", "--widht", "3"], "key 'widht' is not known"),
    ]
    for command in ("evaluate", "sample"):
        for given, message in wrong:
            status, out, err = ditbench(command, *given)
            assert (status, out) == (2, "") and message in err and len(err.splitlines()) == 1, (given, err)
