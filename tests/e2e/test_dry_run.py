"""What a dry run says of a study is what the study then records and keeps."""

import json
from collections.abc import Callable

import pytest

from harness.records.run_folder import RunFolder
from tests.e2e.conftest import STUDY, FinishedStudy

Ditbench = Callable[..., tuple[int, str, str]]


def test_the_estimate_is_what_the_study_came_to(finished: FinishedStudy, ditbench: Ditbench) -> None:
    words = finished.place.words("compare", *STUDY)
    status, out, _ = ditbench(*words, "--dry_run", "--tflops", "1", "--format", "json")
    found = json.loads(out)
    assert status == 0 and [cell["cell"] for cell in found["cells"]] == ["sit", "vae_repa"]
    for cell in found["cells"]:
        folder = RunFolder(finished.run(cell["cell"]))
        last, cost = folder.lines("train")[-1], json.loads((folder.path / "cost.json").read_text())
        assert cell["train_gflops_per_image"] == pytest.approx(cost["train_gflops_per_image"], rel=1e-12)
        assert (cell["steps"], cell["train_gflops"]) == (last["step"], pytest.approx(last["train_gflops"], rel=1e-12))
        assert cell["evaluations"] == len(folder.lines("eval")) == 2
        kept = {
            "checkpoints": sum(file.stat().st_size for file in folder.checkpoints.glob("step_*/*.safetensors")),
            "EMA backbones": sum(file.stat().st_size for file in folder.checkpoints.glob("ema_*.safetensors")),
        }
        # The names of tensors and AdamW's counters take a share of files as small as these.
        assert {name: cell["disk"][name] for name in kept} == pytest.approx(kept, rel=0.05)
