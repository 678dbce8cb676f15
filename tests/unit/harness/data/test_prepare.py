"""Preparation: rows agree across caches, sizes are checked, a second start makes nothing."""

import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from harness.config import AutoencoderConfig, DataConfig, ModelConfig, OutputConfig, RunConfig
from harness.data import cache as caches
from harness.data import prepare as module
from harness.data.prepare import prepare
from harness.errors import UserError
from harness.frozen.autoencoder import Autoencoder
from harness.frozen.encoders import FrozenEncoder
from harness.method import Needs

ENCODER = "efficientnet_lite0"


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    """11 random pictures of 2 classes at 16 pixels: latents of 4 x 4, a grid of 2 x 2 tokens."""
    random = np.random.default_rng(0)
    for i in range(11):
        folder = tmp_path / "images" / ("ant" if i < 5 else "cat")
        folder.mkdir(parents=True, exist_ok=True)
        pixels = random.integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:02d}.png")
    return RunConfig(
        model=ModelConfig(name="SiT-pico/2"),
        data=DataConfig(path=str(tmp_path / "images"), image_size=16, holdout=0.3),
        output=OutputConfig(cache=str(tmp_path / "cache")),
    )


def test_row_i_is_the_same_image_everywhere(config: RunConfig) -> None:
    prepared = prepare(config, Needs(encoders=(ENCODER,)), "cpu")
    assert prepared.moments.shape == (11, 8, 4, 4) and prepared.moments.dtype == np.float32
    assert prepared.tokens[ENCODER].shape == (11, 4, 1280) and prepared.tokens[ENCODER].dtype == np.float16
    assert len(prepared.train_rows) == 8 and len(prepared.holdout_rows) == 3
    assert prepared.images.num_classes == 2 and prepared.images.labels.tolist() == [0] * 5 + [1] * 6
    autoencoder, encoder = Autoencoder.load("digits", "cpu"), FrozenEncoder.load(ENCODER, 2, "cpu")
    for row in (10, 3):
        file = Path(config.data.path) / ("ant" if row < 5 else "cat") / f"{row:02d}.png"
        image = np.asarray(Image.open(file))[None]
        index = np.array([row])
        assert (prepared.images.rows(index) == image).all()
        moments = torch.from_numpy(prepared.moments.rows(index))
        torch.testing.assert_close(moments, autoencoder.moments(image), atol=1e-4, rtol=1e-4)
        tokens = torch.from_numpy(prepared.tokens[ENCODER].rows(index)).float()
        expected = encoder.tokens(torch.from_numpy(image.copy()).permute(0, 3, 1, 2))
        torch.testing.assert_close(tokens, expected, atol=1e-2, rtol=1e-2)  # stored with 11 bits


def test_one_piece_of_images_passes_through_the_network_at_a_time(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither pictures nor moments of earlier calls are held, but for those that were made last."""
    held: list[tuple[weakref.ref[Any], weakref.ref[Any]]] = []
    most = [0, 0]

    def moments(self: Autoencoder, images_NHWC: np.ndarray) -> torch.Tensor:
        for which in (0, 1):
            most[which] = max(most[which], sum(pair[which]() is not None for pair in held))
        made_NCHW = torch.zeros(len(images_NHWC), 8, 4, 4)
        held.append((weakref.ref(images_NHWC), weakref.ref(made_NCHW)))
        return made_NCHW

    monkeypatch.setattr(caches, "ROWS_PER_CALL", 1)
    monkeypatch.setattr(Autoencoder, "moments", moments)
    assert prepare(config, Needs(), "cpu").moments.shape == (11, 8, 4, 4)
    assert len(held) == 11 and most[0] == 0 and most[1] <= 1


def test_digests_name_what_must_agree(config: RunConfig) -> None:
    prepared = prepare(config, Needs(encoders=(ENCODER,)), "cpu")
    assert prepared.digests == {
        "data": prepared.images.digest,
        "autoencoder": Autoencoder.load("digits", "cpu").digest,
        f"encoder/{ENCODER}": FrozenEncoder.load(ENCODER, 2, "cpu").digest,
    }
    assert prepare(config, Needs(), "cpu").tokens == {}


def test_a_second_start_makes_nothing_and_builds_no_encoder(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    first = prepare(config, Needs(encoders=(ENCODER,)), "cpu")

    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("made again")

    monkeypatch.setattr(module.FrozenEncoder, "load", never)
    monkeypatch.setattr(module.Autoencoder, "moments", never)
    second = prepare(config, Needs(encoders=(ENCODER,)), "cpu", never)
    rows = np.arange(11)
    assert (second.moments.rows(rows) == first.moments.rows(rows)).all()
    assert (second.tokens[ENCODER].rows(rows) == first.tokens[ENCODER].rows(rows)).all()


def test_caches_made_twice_have_the_same_bytes(config: RunConfig, tmp_path: Path) -> None:
    other = replace(config, output=OutputConfig(cache=str(tmp_path / "other")))
    for each in (config, other):
        prepare(each, Needs(encoders=(ENCODER,)), "cpu")
    shards = sorted(path.relative_to(tmp_path / "cache") for path in (tmp_path / "cache").rglob("shard-*.npy"))
    assert [path.parent.name.rpartition("-")[0] for path in shards] == ["images", "moments", f"tokens-{ENCODER}"]
    for shard in shards:
        assert (tmp_path / "cache" / shard).read_bytes() == (tmp_path / "other" / shard).read_bytes()


def test_other_weights_make_other_caches(config: RunConfig, tmp_path: Path) -> None:
    first = prepare(config, Needs(), "cpu")
    network = first.autoencoder.network
    network.save_pretrained(tmp_path / "ae")
    with torch.no_grad():
        network.encoder.conv_out.bias += 1
    network.save_pretrained(tmp_path / "moved")
    moved = prepare(replace(config, autoencoder=AutoencoderConfig(path=str(tmp_path / "moved"))), Needs(), "cpu")
    assert moved.moments.folder != first.moments.folder
    same = prepare(replace(config, autoencoder=AutoencoderConfig(path=str(tmp_path / "ae"))), Needs(), "cpu")
    assert not np.allclose(moved.moments.rows(np.arange(11)), same.moments.rows(np.arange(11)))


def test_progress_reaches_its_end(config: RunConfig) -> None:
    told: dict[str, tuple[int, int]] = {}
    prepare(config, Needs(encoders=(ENCODER,)), "cpu", lambda what, done, total: told.update({what: (done, total)}))
    assert len(told) == 4 and set(told.values()) == {(11, 11)}


@pytest.mark.parametrize(
    ("model", "image_size", "message"),
    [
        ("SiT-pico/2", 18, r"data\.image_size is 18: .* give a multiple of 4"),
        ("SiT-pico/2", 12, r"latent of 3 x 3 cannot be cut into the 2 x 2 patches .* give a multiple of 8"),
        ("SiT-pico/8", 16, r"latent of 4 x 4 cannot be cut into the 8 x 8 patches .* give a multiple of 32"),
    ],
)
def test_sizes_that_do_not_fit_leave_nothing_behind(
    config: RunConfig, tmp_path: Path, model: str, image_size: int, message: str
) -> None:
    bad = replace(config, model=ModelConfig(name=model), data=replace(config.data, image_size=image_size))
    with pytest.raises(UserError, match=message):
        prepare(bad, Needs(), "cpu")
    assert not (tmp_path / "cache").exists()


def test_missing_weights_are_found_before_any_work(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DITBENCH_WEIGHTS", raising=False)
    with pytest.raises(UserError, match="weights of dinov2_vitb14 are not on this machine"):
        prepare(config, Needs(encoders=("dinov2_vitb14",)), "cpu")
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("kind", ["images", "moments", "tokens"])
def test_any_damaged_file_of_the_caches_is_made_again_to_the_same_bytes(config: RunConfig, kind: str) -> None:
    """Damaged after the caches were opened, and touched by another thread, as batches are drawn in one."""
    needs = Needs(encoders=(ENCODER,))
    prepare(config, needs, "cpu")
    cache = Path(config.output.cache)
    whole = {path: path.read_bytes() for path in cache.rglob("*") if path.is_file()}
    (shard,) = cache.glob(f"{kind}-*/shard-00000.npy")
    told: list[str] = []
    opened = prepare(config, needs, "cpu", lambda what, done, total: told.append(what))
    shard.write_bytes(whole[shard][:-1])
    everything = np.arange(11)
    with ThreadPoolExecutor(1) as thread:
        for rows in (opened.images.rows, opened.moments.rows, opened.tokens[ENCODER].rows):
            thread.submit(rows, everything).result()
    assert told[0] == f"{shard} is missing or damaged and is made again"
    for path in (*cache.glob("files-*.json"), *cache.glob(f"{kind}-*/index.json")):
        path.write_bytes(path.read_bytes().replace(b"0", b"1", 1))
        told.clear()
        prepare(config, needs, "cpu", lambda what, done, total: told.append(what))
        assert told[0] == f"{path} is damaged and is made again"
    assert {path: path.read_bytes() for path in cache.rglob("*") if path.is_file()} == whole


# -- flips ----------------------------------------------------------------------------------------------------------


def test_mirror_images_are_encoded_and_cached_beside_the_others(config: RunConfig, tmp_path: Path) -> None:
    """Their moments and tokens are those of a folder of pictures that were mirrored beforehand."""
    flipping = replace(config, data=replace(config.data, flip=True))
    needs, everything = Needs(encoders=(ENCODER,)), np.arange(11)
    plain, prepared = prepare(config, needs, "cpu"), prepare(flipping, needs, "cpu")
    assert plain.mirrored is None and plain.num_encoded == 11
    assert prepared.mirrored is not None and prepared.num_encoded == 22
    assert prepared.moments.folder == plain.moments.folder, "what is not mirrored is not made again"
    for file in (tmp_path / "images").rglob("*.png"):
        mirror = tmp_path / "mirrored" / file.relative_to(tmp_path / "images")
        mirror.parent.mkdir(parents=True, exist_ok=True)
        ImageOps.mirror(Image.open(file)).save(mirror)
    other = replace(config, data=replace(config.data, path=str(tmp_path / "mirrored")))
    expected = prepare(other, needs, "cpu")
    for ours, theirs in (
        (prepared.mirrored.moments, expected.moments),
        (prepared.mirrored.tokens[ENCODER], expected.tokens[ENCODER]),
    ):
        assert (ours.rows(everything) == theirs.rows(everything)).all()
    # A latent cannot be flipped: that of the mirror image is another one.
    apart = prepared.mirrored.moments.rows(everything) - prepared.moments.rows(everything)[..., ::-1]
    assert np.abs(apart).mean() > 0.01
