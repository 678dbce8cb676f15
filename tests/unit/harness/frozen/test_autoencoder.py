"""The autoencoder: moments, scaling and rounding by hand; diffusers' folders; training that can be made again."""

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from safetensors.torch import load_file, save_file

from harness.config import DataConfig
from harness.data.image_set import ImageSet, split
from harness.data.images import load_images
from harness.errors import UserError
from harness.frozen import autoencoder as module
from harness.frozen.autoencoder import (
    ASSETS,
    SD_RECIPE,
    WEIGHTS,
    Autoencoder,
    AutoencoderRecipe,
    build_network,
    latents,
    to_pixels,
    to_uint8,
)
from harness.records.files import file_digest
from harness.rng import stream
from harness.training import autoencoder as training
from harness.training.autoencoder import train_autoencoder
from tests.benchmarks.evaluation import SD, make_autoencoder, within_one_level


def noise_images(num: int, side: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (num, side, side, 3), dtype=np.uint8)


def new_network(**config: Any) -> Any:
    """A random network; by default two resolutions and 8 channels."""
    options: dict[str, Any] = {"block_out_channels": (8, 8), "norm_num_groups": 4, "layers_per_block": 1, **config}
    levels = len(options["block_out_channels"])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * levels, up_block_types=("UpDecoderBlock2D",) * levels, **options
        )


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    new_network(scaling_factor=0.5, shift_factor=0.25).save_pretrained(tmp_path / "ae")
    return tmp_path / "ae"


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# -- pixels and latents ---------------------------------------------------------------------------------------------


def test_pixels_both_ways() -> None:
    values = torch.tensor([-1.0, 1.0, 0.0, 2.0, -7.0, math.nan, math.inf, 1 / 255, 0.9])
    # (0.9 + 1) / 2 * 255 = 242.25; 0 is 127.5, which rounds to the even 128; 1/255 is 128.
    expected = [0, 255, 128, 255, 0, 0, 255, 128, 242]
    assert to_uint8(values.reshape(1, 1, 1, -1).expand(1, 3, 1, 9))[0, 0, :, 1].tolist() == expected
    levels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=3)
    assert to_pixels(levels)[0, 2].flatten()[[0, 51, 255]].tolist() == pytest.approx([-1, -0.6, 1])
    assert (to_uint8(to_pixels(levels)) == levels).all()


def test_pictures_keep_rows_columns_and_colours_apart() -> None:
    images = noise_images(2, 4)[:, :3]  # 3 rows, 4 columns
    assert to_pixels(images)[1, 2, 0, 3].item() == pytest.approx(images[1, 0, 3, 2] / 127.5 - 1)
    assert (to_uint8(to_pixels(images)) == images).all()


def test_moments_are_diffusers_mean_and_std_not_logvar(saved: Path) -> None:
    autoencoder, images = Autoencoder.load(str(saved), "cpu"), noise_images(3, 8)
    moments = autoencoder.moments(images)
    network = autoencoder.network
    with torch.no_grad():
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255 * 2 - 1
        posterior = DiagonalGaussianDistribution(network.quant_conv(network.encoder(pixels)))
    assert moments.shape == (3, 8, 4, 4) and moments.dtype == torch.float32
    torch.testing.assert_close(moments[:, :4], posterior.mean, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(moments[:, 4:], posterior.std, atol=1e-5, rtol=1e-5)
    assert (moments[:, 4:] > 0).all() and (posterior.logvar < 0).any()
    tensor = torch.from_numpy(images).permute(0, 3, 1, 2)
    assert torch.equal(autoencoder.moments(tensor), moments)


def test_latents_by_hand(saved: Path) -> None:
    autoencoder = Autoencoder.load(str(saved), "cpu")
    assert (autoencoder.scaling, autoencoder.shift) == (0.5, 0.25)
    moments = torch.cat([torch.full((1, 4, 1, 1), 3.0), torch.full((1, 4, 1, 1), 2.0)], dim=1)
    noise = torch.tensor([0.0, 0.5, -1.0, 1.0]).reshape(1, 4, 1, 1)
    # (3 + 2 n - 0.25) * 0.5
    assert latents(moments, noise, 0.5, 0.25).flatten().tolist() == [1.375, 1.875, 0.375, 2.375]
    assert autoencoder.latent_means(moments).flatten().tolist() == [1.375] * 4


def test_decode_takes_the_scaling_off_again(saved: Path) -> None:
    autoencoder = Autoencoder.load(str(saved), "cpu")
    z = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        pixels = autoencoder.network.decode(z).sample
    expected = np.clip(np.round((pixels.permute(0, 2, 3, 1).numpy().astype(np.float64) + 1) * 127.5), 0, 255)
    decoded = autoencoder.decode((z - 0.25) * 0.5)
    assert decoded.shape == (2, 8, 8, 3) and decoded.dtype == np.uint8
    assert np.abs(decoded - expected).max() <= 1 and (decoded == expected).mean() > 0.99  # a tie may round either way


def test_passes_do_not_change_the_numbers(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    autoencoder, images = Autoencoder.load(str(saved), "cpu"), noise_images(5, 8)
    moments = autoencoder.moments(images)
    decoded = autoencoder.decode(autoencoder.latent_means(moments))
    monkeypatch.setattr(module, "PASS_PIXELS", 2 * 8 * 8)
    assert [len(part) for part in module._passes(torch.zeros(5, 1), 64)] == [2, 2, 1]
    assert [len(part) for part in module._passes(torch.zeros(2, 1), 10_000)] == [1, 1]
    torch.testing.assert_close(autoencoder.moments(images), moments, atol=1e-5, rtol=1e-5)
    assert np.abs(autoencoder.decode(autoencoder.latent_means(moments)).astype(int) - decoded).max() <= 1


def test_what_decodes_keeps_the_rule_that_bf16_breaks() -> None:
    """Another precision may be off by 1 level, and by more in 0.1% of the values at most.

    In Stable Diffusion's shapes and bf16 it is far more, with random weights whose pixels fill the range.
    """
    assert within_one_level(np.array([0, 9, 9, 255], np.uint8), np.array([255, 8, 11, 254], np.uint8)) == 0.5
    autoencoder = make_autoencoder(SD, torch.device("cpu"))
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    wanted = autoencoder.decode(latents)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        used = autoencoder.decode(latents)
        in_bf16 = to_uint8(autoencoder.network.decode(latents / autoencoder.scaling).sample)
    assert wanted.std() > 40 and within_one_level(used, wanted) == 1.0
    assert within_one_level(in_bf16, wanted) < 0.99


def test_autocast_around_it_changes_nothing(saved: Path) -> None:
    autoencoder, images = Autoencoder.load(str(saved), "cpu"), noise_images(2, 8)
    moments = autoencoder.moments(images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(autoencoder.moments(images), moments)


# -- loading --------------------------------------------------------------------------------------------------------


def test_a_folder_like_stable_diffusions(tmp_path: Path) -> None:
    """Four resolutions, two layers each, 32 groups, factor 0.18215, in a pipeline folder with `vae/`."""
    network = new_network(block_out_channels=(32, 32, 64, 64), norm_num_groups=32, layers_per_block=2, sample_size=512)
    network.save_pretrained(tmp_path / "sd" / "vae")
    autoencoder = Autoencoder.load(str(tmp_path / "sd"), "cpu")
    assert (autoencoder.scaling, autoencoder.shift, autoencoder.downsampling) == (0.18215, 0.0, 8)
    assert autoencoder.latent_shape(256) == (4, 32, 32)
    for name, tensor in network.state_dict().items():
        assert torch.equal(autoencoder.network.state_dict()[name], tensor), name
    assert not any(parameter.requires_grad for parameter in autoencoder.network.parameters())
    assert not autoencoder.network.training
    assert autoencoder.digest == Autoencoder.load(str(tmp_path / "sd" / "vae"), "cpu").digest
    with pytest.raises(UserError, match=r"data\.image_size is 100: .* give a multiple of 8"):
        autoencoder.latent_shape(100)


def test_attention_names_of_older_files(saved: Path) -> None:
    """Stable Diffusion's own files say query, key, value, proj_attn."""
    before = Autoencoder.load(str(saved), "cpu").network.state_dict()
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    old = {}
    for name, tensor in load_file(saved / WEIGHTS).items():
        for new_part, old_part in names.items():
            name = name.replace(f"attentions.0.{new_part}.", f"attentions.0.{old_part}.")
        old[name] = tensor
    assert "encoder.mid_block.attentions.0.query.weight" in old
    save_file(old, saved / WEIGHTS, metadata={"format": "pt"})
    after = Autoencoder.load(str(saved), "cpu").network.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


# -- one file, and the hub ------------------------------------------------------------------------------------------

TINY_SD = AutoencoderRecipe(block_channels=(8, 8, 16, 16), layers_per_block=2, norm_groups=4)
"""Stable Diffusion's autoencoder with fewer channels: every kind of layer is there."""


def test_stable_diffusions_shapes_are_the_published_ones() -> None:
    """83,653,863 weights, as in the released sd-vae-ft-ema and sd-vae-ft-mse."""
    with torch.device("meta"):
        network = build_network(SD_RECIPE)
    assert sum(parameter.numel() for parameter in network.parameters()) == 83_653_863
    assert network.config.scaling_factor == 0.18215 and network.config.latent_channels == 4


def stability_names(state: dict[str, Any]) -> dict[str, Any]:
    """Tensors under the names of CompVis/latent-diffusion ldm/modules/diffusionmodules/model.py, renamed by hand."""
    levels, renamed = len(TINY_SD.block_channels), {}
    for name, tensor in state.items():
        name = re.sub(r"down_blocks\.(\d)\.resnets\.(\d)", r"down.\1.block.\2", name)
        name = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", name)
        name = re.sub(r"up_blocks\.(\d)\.", lambda found: f"up.{levels - 1 - int(found[1])}.", name)
        name = re.sub(r"resnets\.(\d)", r"block.\1", name.replace("mid_block.resnets.0", "mid.block_1"))
        name = name.replace("mid_block.block.1", "mid.block_2").replace("upsamplers.0", "upsample")
        name = name.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
        if "mid_block.attentions.0." in name:
            name = name.replace("mid_block.attentions.0.", "mid.attn_1.").replace("group_norm", "norm")
            name = name.replace("to_out.0", "proj_out").replace(".to_", ".")
            if tensor.ndim == 2:
                tensor = tensor[:, :, None, None]  # there a convolution of one pixel
        renamed[name] = tensor
    return renamed


@pytest.fixture
def tiny_sd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in diffusers' format with the shapes that count as Stable Diffusion's here."""
    monkeypatch.setattr(module, "SD_RECIPE", TINY_SD)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = build_network(TINY_SD)
        for parameter in network.parameters():  # norms begin at 1 and 0: any of them would do for another
            torch.nn.init.normal_(parameter, std=0.3)
    network.save_pretrained(tmp_path / "folder")
    return tmp_path / "folder"


@pytest.mark.parametrize("form", ["safetensors", "bin", "folder.bin", "older", "stability", "ckpt", "whole model"])
def test_all_formats_of_the_same_weights_give_the_same_latents_bit_for_bit(
    tiny_sd: Path, tmp_path: Path, form: str
) -> None:
    state = load_file(tiny_sd / WEIGHTS)
    path = tmp_path / "alone" / f"vae.{'safetensors' if form in ('safetensors', 'stability') else 'ckpt'}"
    path.parent.mkdir()
    match form:
        case "safetensors":
            save_file(state, path)
        case "bin":
            torch.save(state, path)
        case "folder.bin":
            (path.parent / "config.json").write_bytes((tiny_sd / "config.json").read_bytes())
            torch.save(state, path.parent / "diffusion_pytorch_model.bin")
            path = path.parent
        case "older":
            names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
            pattern = r"(attentions\.0\.)(to_q|to_k|to_v|to_out\.0)"
            torch.save({re.sub(pattern, lambda f: f[1] + names[f[2]], k): v for k, v in state.items()}, path)
        case "stability":
            save_file({k: v.contiguous() for k, v in stability_names(state).items()}, path)
        case "ckpt":
            torch.save({"state_dict": stability_names(state), "global_step": 1}, path)
        case "whole model":
            inside = {f"first_stage_model.{k}": v for k, v in stability_names(state).items()}
            torch.save({"state_dict": {**inside, "model.diffusion_model.out.bias": torch.ones(3)}}, path)
    images = noise_images(2, 32)
    first, second = (Autoencoder.load(str(place), "cpu") for place in (tiny_sd, path))
    moments = first.moments(images)
    assert torch.equal(second.moments(images), moments)
    assert (second.scaling, second.shift, second.downsampling) == (0.18215, 0.0, 8)
    latents = first.latent_means(moments)
    assert np.array_equal(second.decode(latents), first.decode(latents))


def test_one_file_with_a_config_beside_it_has_the_configs_shapes_and_scaling(tiny_sd: Path) -> None:
    edit_config(tiny_sd, scaling_factor=0.5)
    assert Autoencoder.load(str(tiny_sd / WEIGHTS), "cpu").scaling == 0.5


def test_one_file_of_other_shapes_is_refused(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "vae.safetensors").write_bytes((saved / WEIGHTS).read_bytes())
    with pytest.raises(UserError, match=r"vae\.safetensors do not fit the shapes of Stable Diffusion's autoencoder"):
        Autoencoder.load(str(tmp_path / "vae.safetensors"), "cpu")


def test_a_repository_of_the_hub(tiny_sd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, tuple[str, ...]]] = []

    def fetch(repository: str, files: tuple[str, ...]) -> Path | None:
        asked.append((repository, files))
        return next((tiny_sd / file for file in files if (tiny_sd / file).exists()), None)

    monkeypatch.setattr(module.hub, "fetch", fetch)
    assert Autoencoder.load("someone/sd-vae", "cpu").digest == Autoencoder.load(str(tiny_sd), "cpu").digest
    assert asked == [
        ("someone/sd-vae", ("config.json",)),
        ("someone/sd-vae", (WEIGHTS, "diffusion_pytorch_model.bin")),
    ]
    monkeypatch.setattr(module.hub, "fetch", lambda repository, files: None)
    with pytest.raises(UserError, match=r"'someone/sd-vae': .* a repository of the hub \(not with --offline\)"):
        Autoencoder.load("someone/sd-vae", "cpu")


def test_shapes_without_weights(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder's config gives them; for what only the hub may have they are Stable Diffusion's, and it is not asked."""

    def refuse(*_: object) -> None:
        raise AssertionError("neither weights nor hub are needed")

    (saved / WEIGHTS).write_bytes(b"not read")
    monkeypatch.setattr(module.weights, "load_tensors", refuse)
    monkeypatch.setattr(module.hub, "fetch", refuse)
    with torch.device("meta"):
        ours, theirs = module.untrained_network(str(saved)), module.untrained_network("someone/thing")
    assert tuple(ours.config.block_out_channels) == (8, 8)
    assert tuple(theirs.config.block_out_channels) == (128, 256, 512, 512)
    assert sum(p.numel() for p in theirs.parameters()) == pytest.approx(83.65e6, abs=1e4)
    assert module.is_here(str(saved)) and module.is_here("digits") and not module.is_here("someone/thing")
    with pytest.raises(UserError, match=r"autoencoder\.path is .*: give a folder with config\.json"):
        module.untrained_network(str(tmp_path / "nothing"))


def test_a_hub_that_is_away_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def away(repository: str, files: tuple[str, ...]) -> Path:
        raise module.hub.Unavailable("config.json cannot be had from the hub (no network)")

    monkeypatch.setattr(module.hub, "fetch", away)
    with pytest.raises(UserError, match=r"autoencoder\.path: .* \(no network\): look at .*, or name a folder"):
        Autoencoder.load("someone/sd-vae", "cpu")


def test_loading_leaves_the_global_random_state(saved: Path) -> None:
    before = torch.get_rng_state()
    Autoencoder.load(str(saved), "cpu")
    assert torch.equal(torch.get_rng_state(), before)


def test_digest_follows_weights_and_config(saved: Path) -> None:
    seen = [Autoencoder.load(str(saved), "cpu").digest]
    edit_config(saved, _name_or_path="elsewhere")
    assert Autoencoder.load(str(saved), "cpu").digest == seen[0]
    edit_config(saved, scaling_factor=0.75)
    seen.append(Autoencoder.load(str(saved), "cpu").digest)
    tensors = load_file(saved / WEIGHTS)
    tensors["decoder.conv_out.bias"] += 1
    save_file(tensors, saved / WEIGHTS, metadata={"format": "pt"})
    seen.append(Autoencoder.load(str(saved), "cpu").digest)
    assert len(set(seen)) == 3


def test_an_unknown_name_lists_the_shipped_ones(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"autoencoder\.path is 'nothing': .* shipped name \(.*digits.*\)"):
        Autoencoder.load("nothing", "cpu")
    with pytest.raises(UserError, match=r"config\.json"):
        Autoencoder.load(str(tmp_path), "cpu")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"_class_name": "VQModel"}, "holds a VQModel: only AutoencoderKL"),
        ({"latents_mean": [0.0] * 4}, "normalises latents by latents_mean"),
        ({"latents_std": [1.0] * 4}, "normalises latents by latents_std"),
        ({"in_channels": 1}, "1 image channels"),
        ({"layers_per_block": 2}, "do not fit its config.json"),
        ({"block_out_channels": [8, 16]}, "ae"),
    ],
)
def test_a_config_that_does_not_fit(saved: Path, changes: dict[str, Any], message: str) -> None:
    edit_config(saved, **changes)
    with pytest.raises(UserError, match=message) as raised:
        Autoencoder.load(str(saved), "cpu")
    assert "\n" not in str(raised.value)


def test_missing_surplus_and_torn_weights(saved: Path) -> None:
    whole = load_file(saved / WEIGHTS)
    tensors = {name: tensor for name, tensor in whole.items() if name != "decoder.conv_out.bias"}
    save_file(tensors, saved / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"do not fit its config.json .*decoder\.conv_out\.bias"):
        Autoencoder.load(str(saved), "cpu")
    save_file({**whole, "more": torch.zeros(1)}, saved / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"do not fit its config.json .*more"):
        Autoencoder.load(str(saved), "cpu")
    (saved / WEIGHTS).write_bytes((saved / WEIGHTS).read_bytes()[:-100])
    with pytest.raises(UserError, match="is not a file of plain weights"):
        Autoencoder.load(str(saved), "cpu")
    (saved / WEIGHTS).unlink()
    with pytest.raises(UserError, match=f"has no {WEIGHTS}"):
        Autoencoder.load(str(saved), "cpu")


# -- training -------------------------------------------------------------------------------------------------------

SMALL = AutoencoderRecipe(block_channels=(8, 8), norm_groups=4, steps=3, batch_size=4)


def image_set(images: np.ndarray) -> ImageSet:
    return ImageSet(images, np.zeros(len(images), np.int64), ("one",), "digest of the images")


def train(folder: Path, images: np.ndarray, recipe: AutoencoderRecipe = SMALL) -> dict[str, Any]:
    """Train on the first 12 images; returns recipe.json."""
    train_autoencoder(image_set(images), np.arange(12), folder, recipe, "cpu")
    return json.loads((folder / "recipe.json").read_text())


def test_training_again_gives_the_same_bytes(tmp_path: Path) -> None:
    images = noise_images(16, 8)
    before = torch.get_rng_state()
    facts = train(tmp_path / "a", images)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(12345)
    train(tmp_path / "b", images)
    train(tmp_path / "c", images, AutoencoderRecipe(**{**vars(SMALL), "seed": 1}))
    for name in ("config.json", WEIGHTS, "recipe.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert (tmp_path / "a" / WEIGHTS).read_bytes() != (tmp_path / "c" / WEIGHTS).read_bytes()
    assert facts["weights_sha256"] == file_digest(tmp_path / "a" / WEIGHTS)
    assert facts["recipe"]["block_channels"] == [8, 8] and facts["data"] == "digest of the images"
    assert facts["versions"]["torch"] == torch.__version__.split("+")[0]


def test_held_out_images_are_seen_by_their_own_error_alone(tmp_path: Path) -> None:
    images = noise_images(16, 8)
    facts = train(tmp_path / "a", images)
    images[12:] = 0
    other = train(tmp_path / "b", images)
    assert (tmp_path / "a" / WEIGHTS).read_bytes() == (tmp_path / "b" / WEIGHTS).read_bytes()
    assert facts["train_error"] == other["train_error"] and facts["held_out_error"] != other["held_out_error"]


def test_errors_are_root_mean_squares_in_grey_levels(tmp_path: Path) -> None:
    images = noise_images(16, 8)
    facts = train(tmp_path / "a", images)
    autoencoder = Autoencoder.load(str(tmp_path / "a"), "cpu")
    decoded = autoencoder.decode(autoencoder.latent_means(autoencoder.moments(images[12:])))
    squares = [(int(a) - int(b)) ** 2 for a, b in zip(decoded.flatten(), images[12:].flatten(), strict=True)]
    assert facts["held_out_error"] == pytest.approx(math.sqrt(sum(squares) / len(squares)))


def test_measuring_in_pieces_gives_what_all_images_at_once_give(saved: Path) -> None:
    autoencoder, images, rows = Autoencoder.load(str(saved), "cpu"), image_set(noise_images(300, 8)), np.arange(3, 290)
    told: list[tuple[str, int, int]] = []
    error = training.reconstruction_error(autoencoder.network, images, rows, lambda *words: told.append(words))
    original = images.rows(rows)
    moments = autoencoder.moments(original)
    decoded = autoencoder.decode(autoencoder.latent_means(moments))
    assert error == pytest.approx(np.sqrt(np.square(decoded.astype(np.float64) - original).mean()), rel=1e-14)
    noise = torch.randn(moments.chunk(2, dim=1)[0].shape, generator=stream(5, "autoencoder", 0, 0))
    whole = 1 / float(latents(moments, noise, 1.0, 0.0).double().std())
    assert training.unit_scaling(autoencoder.network, images, rows, seed=5) == whole
    assert [done for _, done, _ in told] == [64, 128, 192, 256, 287] and {total for *_, total in told} == {287}


def test_a_large_data_set_is_measured_on_an_even_part_of_each_half(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few images are in memory at once."""
    images = image_set(noise_images(600, 8))
    asked: list[list[int]] = []
    told: list[tuple[str, int, int]] = []

    def rows(self: ImageSet, indices: np.ndarray) -> np.ndarray:
        asked.append(indices.tolist())
        return np.asarray(self.images)[indices]

    monkeypatch.setattr(training, "MEASURED_IMAGES", 100)
    monkeypatch.setattr(ImageSet, "rows", rows)
    recipe = AutoencoderRecipe(**{**vars(SMALL), "steps": 1})
    even = np.arange(0, 600, 2)
    train_autoencoder(images, even, tmp_path / "a", recipe, "cpu", lambda *words: told.append(words))
    assert [len(each) for each in asked] == [4] + 3 * [64, 36], "a step, then the scaling and both errors"
    trained, held_out = list(range(0, 600, 6)), list(range(1, 600, 6))
    assert [asked[n] + asked[n + 1] for n in (1, 3, 5)] == [trained, trained, held_out]
    assert [words[1:] for words in told] == [(64, 100), (100, 100)] * 3 and len({words[0] for words in told}) >= 2


def test_scaled_latents_have_unit_variance(tmp_path: Path) -> None:
    images = noise_images(16, 8)
    train(tmp_path / "a", images)
    autoencoder = Autoencoder.load(str(tmp_path / "a"), "cpu")
    moments = autoencoder.moments(images[:12]).repeat(50, 1, 1, 1)  # 38,400 draws: error of a deviation about 0.4%
    noise = torch.randn(600, 4, 4, 4, generator=torch.Generator().manual_seed(7))
    # The factor itself comes from 768 draws, so its own error is about 2.6%.
    assert float(latents(moments, noise, autoencoder.scaling, autoencoder.shift).std()) == pytest.approx(1, abs=0.1)


def test_training_learns(tmp_path: Path) -> None:
    ramp = np.linspace(0, 255, 8).astype(np.uint8)
    images = np.stack([np.roll(ramp, i)[None, :, None].repeat(8, 0).repeat(3, 2) for i in range(16)])
    few = train(tmp_path / "few", images)
    many = train(tmp_path / "many", images, AutoencoderRecipe(**{**vars(SMALL), "steps": 150, "batch_size": 12}))
    assert many["train_error"] < few["train_error"] / 2
    assert many["final"]["absolute_error"] < few["final"]["absolute_error"] / 2


def test_a_strong_kl_weight_pulls_the_posterior_to_the_prior(tmp_path: Path) -> None:
    images = noise_images(16, 8)
    facts = train(tmp_path / "a", images, AutoencoderRecipe(**{**vars(SMALL), "steps": 100, "kl_weight": 100.0}))
    assert facts["final"]["kl"] < 0.05
    moments = Autoencoder.load(str(tmp_path / "a"), "cpu").moments(images)
    assert abs(float(moments[:, :4].mean())) < 0.2 and abs(float(moments[:, 4:].mean()) - 1) < 0.2


def test_an_unwritable_folder_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write to .*file"):
        train(tmp_path / "file" / "a", noise_images(16, 8), AutoencoderRecipe(**{**vars(SMALL), "steps": 1}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_channels": ()}, "block_channels is empty"),
        ({"block_channels": (8, 12)}, "multiples of norm_groups, 8"),
        ({"steps": 0}, "steps is 0"),
        ({"lr": 0.0}, "lr is 0.0"),
        ({"kl_weight": -1.0}, "kl_weight is -1.0"),
        ({"clip_norm": 0.0}, "clip_norm is 0.0"),
    ],
)
def test_a_recipe_that_cannot_work(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        AutoencoderRecipe(**change)


# -- the shipped autoencoder ----------------------------------------------------------------------------------------


def test_the_shipped_digits(tmp_path: Path) -> None:
    folder = ASSETS / "digits_autoencoder"
    facts = json.loads((folder / "recipe.json").read_text())
    images = load_images(DataConfig(name="digits", image_size=32), tmp_path)
    train_rows, held_out = split(len(images), 0.5, 0)
    assert facts["weights_sha256"] == file_digest(folder / WEIGHTS) and facts["data"] == images.digest
    assert (folder / WEIGHTS).stat().st_size <= 4_000_000
    recipe = {**facts["recipe"], "block_channels": tuple(facts["recipe"]["block_channels"])}
    assert AutoencoderRecipe(**recipe) == AutoencoderRecipe()  # the defaults make it again
    autoencoder = Autoencoder.load("digits", "cpu")
    assert autoencoder.latent_shape(32) == (4, 8, 8)
    some = images.rows(held_out[:64])
    decoded = autoencoder.decode(autoencoder.latent_means(autoencoder.moments(some)))
    # In grey levels of 0..255; one level of the source, 0..16, is 16 of them wide.
    assert np.sqrt(np.square(decoded.astype(float) - some).mean()) < 2
    moments = autoencoder.moments(images.rows(train_rows[:64]))
    noise = torch.randn(64, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    assert float(latents(moments, noise, autoencoder.scaling, autoencoder.shift).std()) == pytest.approx(1, abs=0.05)


def test_the_numbers_of_the_shipped_digits_are_measured_on_all_of_them(tmp_path: Path) -> None:
    facts = json.loads((ASSETS / "digits_autoencoder" / "recipe.json").read_text())
    images = load_images(DataConfig(name="digits", image_size=32), tmp_path)
    network = Autoencoder.load("digits", "cpu").network
    train_rows, held_out = split(len(images), 0.5, 0)
    for name, rows in (("train_error", train_rows), ("held_out_error", held_out)):
        # A level that rounds differently on another machine moves the fifth digit.
        assert training.reconstruction_error(network, images, rows) == pytest.approx(facts[name], rel=1e-4)
    scaling = training.unit_scaling(network, images, train_rows, facts["recipe"]["seed"])
    assert scaling == pytest.approx(network.config.scaling_factor, rel=1e-5)


def test_a_folder_named_like_a_shipped_one_needs_a_path(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(saved, tmp_path / "digits")
    monkeypatch.chdir(tmp_path)
    assert Autoencoder.load("digits", "cpu").latent_shape(32) == (4, 8, 8)
    assert Autoencoder.load("./digits", "cpu").latent_shape(32) == (4, 16, 16)
