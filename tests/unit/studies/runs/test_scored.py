"""Files of images under a protocol: what is on record, and what the reader is told."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from harness.config import DataConfig, EvaluationConfig, OutputConfig, RuntimeConfig
from harness.errors import UserError
from harness.records.files import digest, file_digest
from studies.runs.scored import Protocol, Scores, score_file

IMAGES = np.random.default_rng(0).integers(0, 256, (12, 16, 16, 3), dtype=np.uint8)
DIGITS = DataConfig(name="digits", image_size=32, holdout=0.97)


def scored(path: Path, cache: Path, data: DataConfig | None = DIGITS, **fields: Any) -> Scores:
    evaluation = EvaluationConfig(**{"kid_subset": 6, "extractor_size": 32, **fields})
    runtime = RuntimeConfig(device="cpu", threads=1)
    protocol = Protocol(evaluation=evaluation, runtime=runtime, output=OutputConfig(cache=str(cache)), data=data)
    return score_file(path, protocol, lambda what, done, total: None)


@pytest.fixture
def samples(tmp_path: Path) -> Path:
    np.savez(tmp_path / "x.npz", IMAGES, np.arange(12) % 10)
    return tmp_path / "x.npz"


def test_a_record_names_the_file_by_its_content_and_the_protocol(samples: Path, shared_cache: Path) -> None:
    found = scored(samples, shared_cache)
    assert found.record["sha256"] == file_digest(samples)
    assert (found.record["samples"], found.record["images"]) == ("x.npz", 12)
    assert found.record["protocol"] == digest(found.settings)
    assert found.settings["num_samples"] == 12
    kinds = {"fd_efficientnet_lite0_12", "kd_efficientnet_lite0_12", "fd_pixels_12", "class_accuracy_12"}
    assert kinds <= found.record["metrics"].keys()
    assert "the images are of 16 x 16 pixels, and those of the data of 32 x 32" in found.warnings
    other = scored(samples, shared_cache, kid_subset=7)
    assert other.record["protocol"] != found.record["protocol"]


def test_too_few_images_are_refused(tmp_path: Path, shared_cache: Path) -> None:
    np.savez(tmp_path / "few.npz", IMAGES[:5])
    with pytest.raises(UserError, match=r"kid_subset is 6: there are 5 images in .*few\.npz and 54 in the ref.*2 to 5"):
        scored(tmp_path / "few.npz", shared_cache)


def test_without_data_the_samples_give_the_size_of_a_reference_folder(samples: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "reference.npz", IMAGES[:8])
    found = scored(samples, tmp_path / "cache", data=None, reference=str(tmp_path / "reference.npz"))
    assert found.record["metrics"]["recall_efficientnet_lite0_12"] == 1, "the reference is a part of the samples"
    assert not any("pixels" in warning for warning in found.warnings)
    assert "evaluation.classifier has no effect: there are no training images" in found.warnings
