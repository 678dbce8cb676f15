"""References: folders of images, ADM batches with statistics, images or both, and what is refused."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from harness.config import EvaluationConfig
from harness.errors import UserError
from harness.evaluation.extractors import Extractor
from harness.evaluation.reference import ReferenceImages, open_reference
from harness.evaluation.scoring import Scorer, ScoringSetup

WIDTH = 5
EXTRACTOR = Extractor(name="test", label="test", family="", width=WIDTH, spatial="map", spatial_width=3)
PLAIN = Extractor(name="test", label="test", family="", width=WIDTH)


def opened(path: Path, tmp_path: Path, extractor: Extractor = EXTRACTOR) -> ReferenceImages:
    return open_reference(path, extractor, 8, tmp_path / "cache", None)


def statistics(width: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    points = np.random.default_rng(seed).normal(size=(20, width))
    return points.mean(axis=0), np.cov(points.T)


def save(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


IMAGES = np.random.default_rng(1).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)
MU, SIGMA = statistics(WIDTH)
MU_S, SIGMA_S = statistics(3)


# -- ADM batches ----------------------------------------------------------------------------------------------------


def test_statistics_alone(tmp_path: Path) -> None:
    source = opened(save(tmp_path / "x.npz", mu=MU, sigma=SIGMA), tmp_path)
    assert source.num == 0 and source.pictures is None and source.statistics.keys() == {"fd"}
    assert np.array_equal(source.statistics["fd"]["mu"], MU)
    assert np.array_equal(source.statistics["fd"]["sigma"], SIGMA)


def test_statistics_of_both_kinds_and_images(tmp_path: Path) -> None:
    path = save(tmp_path / "x.npz", arr_0=IMAGES, mu=MU, sigma=SIGMA, mu_s=MU_S, sigma_s=SIGMA_S)
    source = opened(path, tmp_path)
    assert source.num == 6 and source.statistics.keys() == {"fd", "sfd"}
    assert np.array_equal(source.statistics["sfd"]["mu"], MU_S)
    assert source.pictures is not None
    assert np.array_equal(source.pictures[4].permute(1, 2, 0).numpy(), IMAGES[4])


@pytest.mark.parametrize("write", [np.savez, np.savez_compressed])
def test_images_alone(tmp_path: Path, write: Any) -> None:
    write(tmp_path / "x.npz", IMAGES)
    source = opened(tmp_path / "x.npz", tmp_path)
    assert source.num == 6 and not source.statistics
    assert np.array_equal(source.get(5), IMAGES[5])


def test_digest_changes_with_the_file(tmp_path: Path) -> None:
    one = opened(save(tmp_path / "x.npz", mu=MU, sigma=SIGMA), tmp_path)
    moved = opened(save(tmp_path / "y.npz", mu=MU, sigma=SIGMA), tmp_path)
    other = opened(save(tmp_path / "z.npz", mu=MU + 1e-9, sigma=SIGMA), tmp_path)
    assert one.digest == moved.digest != other.digest


REFUSED = {
    "another width": (
        {"mu": MU[:4], "sigma": SIGMA[:4, :4]},
        r"mu and sigma of .* are \(4,\) and \(4, 4\).* 5 features",
    ),
    "no square": ({"mu": MU, "sigma": SIGMA[:4]}, r"mu and sigma of .* are \(5,\) and \(4, 5\)"),
    "another spatial width": ({"mu": MU, "sigma": SIGMA, "mu_s": MU, "sigma_s": SIGMA}, "mu_s and sigma_s of"),
    "half": ({"mu": MU}, "has neither mu and sigma nor arr_0"),
    "not finite": ({"mu": MU * np.nan, "sigma": SIGMA}, "mu or sigma of .* is not finite"),
    "objects": ({"mu": np.array([None] * 5), "sigma": SIGMA}, "is not a .npz of plain arrays"),
    "float images": ({"arr_0": IMAGES / 255}, r"arr_0 of .* is float64 \[6, 8, 8, 3\]: it must be uint8"),
    "grey images": ({"arr_0": IMAGES[..., 0]}, r"arr_0 of .* is uint8 \[6, 8, 8\]: it must be"),
}


@pytest.mark.parametrize(("arrays", "message"), REFUSED.values(), ids=REFUSED)
def test_what_does_not_fit_is_refused(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=rf"^evaluation\.reference: .*{message}") as raised:
        opened(save(tmp_path / "x.npz", **arrays), tmp_path)
    assert "\n" not in str(raised.value)


def test_spatial_statistics_are_passed_over_by_an_extractor_without_such_a_layer(tmp_path: Path) -> None:
    path = save(tmp_path / "x.npz", mu=MU, sigma=SIGMA, mu_s=MU, sigma_s=SIGMA)
    assert opened(path, tmp_path, PLAIN).statistics.keys() == {"fd", "sfd"}


@pytest.mark.parametrize("content", [None, b"", b"no zip", b"PK\x03\x04 half a zip"])
def test_what_is_no_npz_is_named(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "x.npz"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"evaluation\.reference: .*x\.npz is not"):
        opened(path, tmp_path)


def test_a_file_cut_short_is_named(tmp_path: Path) -> None:
    """The directory of a .npz stands at its end; here it is put behind half of the images."""
    path = save(tmp_path / "x.npz", arr_0=IMAGES)
    content = path.read_bytes()
    path.write_bytes(content[:600] + content[content.rindex(b"PK\x01\x02") :])
    with pytest.raises(UserError, match=r"is not a .npz of plain arrays"):
        opened(path, tmp_path)


# -- folders --------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for index, image in enumerate(IMAGES):
        path = tmp_path / "real" / "ab"[index % 2] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    (tmp_path / "real" / "notes.txt").write_text("")
    return tmp_path / "real"


def test_a_folder_is_read_at_any_depth_in_the_order_of_its_paths(folder: Path, tmp_path: Path) -> None:
    source = opened(folder, tmp_path)
    assert source.num == 6
    for index, wanted in enumerate((0, 2, 4, 1, 3, 5)):
        assert np.array_equal(source.get(index), IMAGES[wanted])


def test_images_of_a_folder_are_cut_as_training_images_are(folder: Path, tmp_path: Path) -> None:
    wide = np.zeros((8, 12, 3), np.uint8)
    wide[:, 2:10] = IMAGES[0]
    Image.fromarray(wide).save(folder / "a" / "0.png")
    assert np.array_equal(opened(folder, tmp_path).get(0), IMAGES[0])


def test_digest_of_a_folder_follows_its_content(folder: Path, tmp_path: Path) -> None:
    first = opened(folder, tmp_path).digest
    assert opened(folder, tmp_path).digest == first
    path = folder / "a" / "2.png"
    content, times = path.read_bytes(), path.stat()
    Image.fromarray(255 - IMAGES[2]).save(path)
    changed = opened(folder, tmp_path).digest
    path.write_bytes(content)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns + 1))
    assert changed != first and opened(folder, tmp_path).digest == first
    path.rename(folder / "a" / "2b.png")
    assert opened(folder, tmp_path).digest != first
    assert open_reference(folder, EXTRACTOR, 4, tmp_path / "cache", None).digest != first


def test_contents_are_read_again_only_when_a_file_changed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = opened(folder, tmp_path).digest
    monkeypatch.setattr("harness.evaluation.reference.file_digest", None)
    assert opened(folder, tmp_path).digest == first


def test_a_broken_image_is_named_with_the_key_it_came_by(folder: Path, tmp_path: Path) -> None:
    (folder / "a" / "2.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"^evaluation\.reference: cannot read image .*2\.png"):
        opened(folder, tmp_path).get(1)


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"evaluation\.reference: .*empty holds no images"):
        opened(tmp_path / "empty", tmp_path)


# -- and what the scorer makes of them ------------------------------------------------------------------------------


def scorer(reference: Path, tmp_path: Path, **fields: Any) -> Scorer:
    config = EvaluationConfig(reference=str(reference), extractor_size=32, **fields)
    return Scorer(config, None, 8, ScoringSetup(device=torch.device("cpu"), tf32=False, cache=tmp_path / "cache"))


def test_statistics_alone_need_few_images_and_say_what_is_left_out(tmp_path: Path) -> None:
    mu, sigma = np.zeros(1280), np.eye(1280)
    real = scorer(save(tmp_path / "x.npz", mu=mu, sigma=sigma), tmp_path)
    real.require_enough(2, "2 samples")
    with pytest.raises(UserError, match="needs 2 or more images, and there are 1 samples"):
        real.require_enough(1, "1 samples")
    left_out = real.warnings(50_000)[-1]
    assert "statistics and no images: kernel distance, precision, recall and the distance on pixels" in left_out
    assert real.protocol["classifier"] == "none"


def test_the_digest_of_the_reference_stands_in_the_protocol(folder: Path, tmp_path: Path) -> None:
    real = scorer(folder, tmp_path, kid_subset=5)
    assert real.protocol["reference"] == opened(folder, tmp_path).digest
    with pytest.raises(UserError, match="kid_subset is 5: there are 4 samples; give 2 to 4"):
        real.require_enough(4, "4 samples")
