"""What the runs of one process share: the data set, its caches and the networks are read once for all of them."""

import gc
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from harness.data import file_digests, folders
from harness.frozen import encoders, weights
from harness.frozen.autoencoder import ASSETS, WEIGHTS, Autoencoder
from harness.frozen.encoders import FrozenEncoder
from studies.configs.cells import Comparison, comparison
from studies.configs.settings import build_parser, parse
from studies.dispatch.execute import run_here
from studies.runs import run as run_module
from studies.runs.folders import folder_of
from tests.bench_setting import WORDS

ENCODER = "efficientnet_lite2"
CLASSES = ("ant", "bee")


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Comparison:
    """Two cells with two seeds on 32 pictures, with files of weights that no other test has read."""
    random = np.random.default_rng(0)
    for number in range(32):
        path = tmp_path / "images" / CLASSES[number % 2] / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(path)
    shutil.copytree(ASSETS / "digits_autoencoder", tmp_path / "autoencoder")
    (tmp_path / "weights").mkdir()
    for name in weights.PACKAGES:
        shutil.copy(weights.find(name).path, tmp_path / "weights" / f"{name}.pth")
    monkeypatch.setenv("DITBENCH_WEIGHTS", str(tmp_path / "weights"))
    words = (
        *WORDS,
        *("--methods", "sit,repa", "--seeds", "0,1", "--repa.encoders", ENCODER, "--budget.amount", "2"),
        *("--data.name", "imagefolder", "--data.path", str(tmp_path / "images"), "--data.image_size", "16"),
        *("--autoencoder.path", str(tmp_path / "autoencoder"), "--evaluation.points", "1"),
        *("--evaluation.num_samples", "8", "--evaluation.kid_subset", "4", "--evaluation.velocity_images", "4"),
        *("--output.runs", str(tmp_path / "runs"), "--output.cache", str(tmp_path / "cache"), "--output.mlflow=false"),
        *("--runtime.device", "cpu", "--runtime.threads", str(torch.get_num_threads())),
    )
    parser = build_parser("compare", "")
    return comparison(parser, parse(parser, words))


def test_runs_of_one_process_share_what_was_read_once(
    asked: Comparison, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts: Counter[str] = Counter()

    def count(owner: Any, name: str, key: Callable[..., str]) -> None:
        real = getattr(owner, name)

        def counted(*arguments: Any, **options: Any) -> Any:
            counts[key(*arguments)] += 1
            return real(*arguments, **options)

        monkeypatch.setattr(owner, name, counted)

    count(folders, "_find_images", lambda root, name: f"walk of {name}")
    count(file_digests, "_file_state", lambda path: f"state of {path.name}")
    count(weights, "file_digest", lambda path: f"hash of {path.name}")
    count(encoders, "_load_packaged", lambda name, grid: f"building {name}")
    before = {id(each) for each in gc.get_objects() if type(each) is Autoencoder}
    most: list[int] = []

    def watched(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            found = gc.get_objects()
            most.append(sum(type(each) is Autoencoder and id(each) not in before for each in found))
            held = [each.name for each in found if type(each) is FrozenEncoder]
            assert ENCODER not in held, "an encoder whose tokens are made only takes memory"
            return real(*arguments)

        return call

    monkeypatch.setattr(run_module, "set_up", watched(run_module.set_up))
    assert run_here(asked) == []

    assert len(most) == 4 and set(most) == {1}
    walked = {f"walk of {name}": 1 for name in CLASSES} | {f"state of {number:02d}.png": 1 for number in range(32)}
    hashed = {f"hash of {name}": 1 for name in (WEIGHTS, f"{ENCODER}.pth", "efficientnet_lite0.pth")}
    measuring = counts.pop("building efficientnet_lite0", 0)
    assert measuring <= 1, "the extractor is built once a process, and another test may have done so before"
    assert counts == walked | hashed | {f"building {ENCODER}": 1}
    recorded = {config.label: folder_of(config).manifest()["digests"] for config in asked.runs()}
    assert "encoder/" + ENCODER in recorded["repa"] and "encoder/" + ENCODER not in recorded["sit"]
