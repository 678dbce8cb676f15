"""Inception from a file in torch-fidelity's format, with random weights: features, names, and what is refused."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

from harness.config import EvaluationConfig
from harness.data.image_set import ImageSet
from harness.errors import UserError
from harness.evaluation import extractors
from harness.evaluation.extractors import LOGITS, POOLED, SPATIAL
from harness.evaluation.fidelity import Pictures, extract
from harness.evaluation.scoring import Scorer, ScoringSetup, TrainingImages
from harness.frozen import weights
from harness.records.files import file_digest
from harness.records.metrics import metric
from tests.unit.harness.evaluation.inception_factory import SMALL_SIDE, save_inception

CPU = torch.device("cpu")
NUM = 24
IMAGES = np.random.default_rng(0).integers(0, 256, (NUM, 16, 16, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_inception(tmp_path_factory.mktemp("weights"))


@pytest.fixture
def here(file: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file is in $DITBENCH_WEIGHTS, and the network takes small pictures."""
    monkeypatch.setenv("DITBENCH_WEIGHTS", str(file.parent))
    monkeypatch.setattr(FeatureExtractorInceptionV3, "INPUT_IMAGE_SIZE", SMALL_SIDE)
    return file


def pictures() -> Pictures:
    return Pictures(lambda i: IMAGES[i], NUM)


def test_features_are_those_of_torch_fidelity_to_the_bit(here: Path) -> None:
    found = extractors.find("inception", 64)
    ours = extract(found, found.layers, pictures(), CPU)
    theirs = FeatureExtractorInceptionV3("x", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(here))
    with torch.no_grad():
        pooled, logits = theirs(torch.from_numpy(IMAGES).permute(0, 3, 1, 2))
    assert torch.equal(ours[POOLED], pooled) and torch.equal(ours[LOGITS], logits)
    assert pooled.std(dim=0).max() > 1e-3, "images differ"


def test_spatial_features_are_the_first_channels_of_a_map_of_17_rows(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the network's own size, layer by layer: row, column and channel count in this order."""
    monkeypatch.setenv("DITBENCH_WEIGHTS", str(file.parent))
    found = extractors.find("inception", 64)
    one = Pictures(lambda i: IMAGES[0], 1)
    ours = extract(found, (SPATIAL,), one, CPU)[SPATIAL]
    assert ours.shape == (1, found.spatial_width) == (1, 2023)
    assert extractors.compared_width("inception") == found.width + found.spatial_width == 2048 + 2023
    network = FeatureExtractorInceptionV3("x", ["2048"], feature_extractor_weights_path=str(file))
    x = interpolate_bilinear_2d_like_tensorflow1x(one[0][None].float(), size=(299, 299), align_corners=False)
    x = (x - 128) / 128
    for name, module in network.named_children():
        if name == "Mixed_6d":
            break
        x = module(x)
    expected = network.Mixed_6d.branch1x1(x)[0].numpy()
    assert expected.shape == (192, 17, 17) and expected[:7].std() > 0
    for row, column, channel in ((0, 0, 0), (0, 0, 6), (0, 3, 2), (16, 16, 6), (5, 9, 4)):
        assert ours[0, (row * 17 + column) * 7 + channel] == pytest.approx(expected[channel, row, column], rel=1e-5)


def test_only_the_released_weights_are_called_standard(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The release carries the first digits of its hash in its name: so would these weights under another name."""
    found = extractors.find("inception", 64)
    assert (found.is_standard, found.label) == (False, "inception_unverified")
    sha = file_digest(here)
    renamed = here.with_name(f"weights-inception-2015-12-05-{sha[:8]}.pth")
    here.rename(renamed)
    try:
        monkeypatch.setattr(weights, "INCEPTION_FILE", renamed.name)
        found = extractors.find("inception", 64)
    finally:
        renamed.rename(here)
    assert (found.is_standard, found.label) == (True, "inception")
    assert found.facts["weights"] == sha and found.facts["size"] == SMALL_SIDE


def scorer(cache: Path) -> Scorer:
    held = ImageSet(IMAGES[::-1].copy(), np.arange(NUM) % 3, tuple("abc"), "noise")
    training = TrainingImages(images=held, rows=np.arange(0, NUM, 2))
    config = EvaluationConfig(extractor="inception", kid_subset=6)
    return Scorer(config, training, 16, ScoringSetup(device=CPU, tf32=False, cache=cache))


def test_other_weights_give_no_fid(here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = scorer(tmp_path)
    some = Pictures(lambda i: IMAGES[i], 12)
    found = real.score(some, None)
    kinds = ("fd", "sfd", "kd", "precision", "recall", "is")
    assert set(found) == {f"{kind}_inception_unverified_12" for kind in kinds} | {"fd_pixels_12"}
    assert all(np.isfinite(value) and metric(name) for name, value in found.items())
    assert found["is_inception_unverified_12"] >= 1
    assert real.protocol["inception_score"] == {"splits": 10, "seed": 2020}
    names = {kind: real.metric_name(kind, 50_000) for kind in kinds}
    assert names["fd"] == "fd_inception_unverified_50k"
    monkeypatch.setattr(real, "extractor", replace(real.extractor, is_standard=True))
    assert [real.metric_name(kind, 50_000) for kind in kinds] == [
        *("fid50k", "sfid50k", "kid50k", "precision50k", "recall50k", "is50k")
    ]


def test_missing_weights_say_which_file_to_put_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DITBENCH_WEIGHTS", str(tmp_path))
    with pytest.raises(UserError, match=rf"put weights-inception-2015-12-05-6726825d\.pth of .* into {tmp_path}"):
        extractors.find("inception", 64)


class Dangerous:
    """Unpickled by a careless loader, as torch-fidelity's is, this would make a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


def test_code_in_the_file_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DITBENCH_WEIGHTS", str(tmp_path))
    path = tmp_path / weights.INCEPTION_FILE
    torch.save({"fc.weight": Dangerous(tmp_path / "touched")}, path)
    with pytest.raises(UserError, match="is not a file of plain weights"):
        extractors.find("inception", 64)
    assert not (tmp_path / "touched").exists()
    with pytest.raises(Exception, match="conv"):
        FeatureExtractorInceptionV3("x", ["2048"], feature_extractor_weights_path=str(path))
    assert (tmp_path / "touched").exists(), "the file does nothing, so this test could not fail"


def test_weights_of_another_network_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DITBENCH_WEIGHTS", str(tmp_path))
    torch.save({"fc.weight": torch.zeros(1008, 2048)}, tmp_path / weights.INCEPTION_FILE)
    with pytest.raises(UserError, match=r"does not hold torch-fidelity's Inception \(.*replace it") as raised:
        extractors.find("inception", 64)
    assert "\n" not in str(raised.value)
