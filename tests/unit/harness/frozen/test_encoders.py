"""Frozen encoders: real weights that recognise real photos, DINOv2 files, grids, preprocessing."""

import functools
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from harness.data.pictures import centre_crop
from harness.errors import UserError
from harness.frozen import encoders
from harness.frozen.encoders import ENCODERS, FrozenEncoder, encoder_digest, encoder_width, family


def noise_images(num: int, side: int) -> Tensor:
    return torch.randint(0, 256, (num, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DITBENCH_WEIGHTS", str(tmp_path))
    return tmp_path


@functools.cache
def random_dinov2(name: str) -> Any:
    """A small DINOv2 with random weights at its native 518 pixels; shared by tests, which only read it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = timm.create_model(name, pretrained=False, num_classes=0).eval()
        for parameter in network.parameters():  # timm zeroes some; every part must matter here
            torch.nn.init.normal_(parameter, std=0.05)
    return network


# -- no weights -----------------------------------------------------------------------------------------------------


def test_an_untrained_encoder_is_the_architecture_without_a_file(folder: Path) -> None:
    before = torch.get_rng_state()
    encoder = FrozenEncoder.untrained("dinov2_vits14", 8, "cpu")
    width, block = 384, 12 * 384**2 + 15 * 384  # qkv, projection, MLP, two norms, two layer scales
    parts = (3 * 14**2 + 1) * width, (8 * 8 + 1) * width + width, 12 * block, 2 * width
    assert sum(p.numel() for p in encoder.parameters()) == sum(parts)
    assert encoder.tokens(noise_images(2, 128)).shape == (2, 64, 384)
    assert FrozenEncoder.untrained("efficientnet_lite0", 2, "cpu").tokens(noise_images(2, 64)).shape == (2, 4, 1280)
    assert not any(p.requires_grad for p in encoder.parameters()) and not encoder.training
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(UserError, match="weights of dinov2_vits14 are not on this machine"):
        FrozenEncoder.load("dinov2_vits14", 8, "cpu")


# -- the table ------------------------------------------------------------------------------------------------------


def test_names_widths_and_families() -> None:
    widths = {name: encoder_width(name) for name in ENCODERS}
    assert widths == {
        "efficientnet_lite0": 1280,
        "efficientnet_lite2": 1280,
        **{
            f"dinov2_vit{size}14{end}": width
            for end in ("", "_reg")
            for size, width in zip("sblg", (384, 768, 1024, 1536), strict=True)
        },
    }
    assert family("efficientnet_lite2") == family("efficientnet_lite0") == "efficientnet"
    assert family("dinov2_vitg14_reg") == "dinov2"
    with pytest.raises(UserError, match=r"encoder 'clip' is not known: .*efficientnet_lite2.*dinov2_vitb14"):
        encoder_width("clip")


@pytest.mark.parametrize("name", ENCODERS)
def test_timm_knows_every_network_at_this_width_and_stride(name: str) -> None:
    spec = ENCODERS[name]
    config = timm.get_pretrained_cfg(spec.timm_name)
    assert config is not None and (config.mean, config.std) == spec.normalisation
    if name.endswith(("s14", "s14_reg", "lite0")):  # building the large ones takes memory
        with torch.device("meta"):
            network = timm.create_model(spec.timm_name)
        assert network.num_features == spec.width


# -- EfficientNet ---------------------------------------------------------------------------------------------------


def photo(name: str) -> Tensor:
    from sklearn.datasets import load_sample_image

    square = centre_crop(Image.fromarray(load_sample_image(name)), 256)
    return torch.from_numpy(np.array(square)).permute(2, 0, 1)[None]


@pytest.mark.parametrize(
    ("name", "picture", "imagenet_class"),
    [
        ("efficientnet_lite0", "flower.jpg", 985),  # daisy
        ("efficientnet_lite0", "china.jpg", 698),  # palace
        ("efficientnet_lite2", "china.jpg", 698),
    ],
)
def test_packaged_weights_recognise_photos(name: str, picture: str, imagenet_class: int) -> None:
    """With two tensors exchanged, or another normalisation, the class is one of a thousand others."""
    encoder = FrozenEncoder.load(name, 8, "cpu")
    tokens_NTZ = encoder.tokens(photo(picture))
    assert tokens_NTZ.shape == (1, 64, 1280) and tokens_NTZ.dtype == torch.float32
    assert int(encoder.network.classifier(tokens_NTZ.mean(1)).argmax()) == imagenet_class


def test_packaged_tensors_stand_under_their_names() -> None:
    network = FrozenEncoder.load("efficientnet_lite2", 4, "cpu").network
    packaged = torch.load(encoders.weights.find("efficientnet_lite2").path, weights_only=True)
    state = network.state_dict()
    assert len(packaged) == len(state) == 386
    # A mean in a variance's place would show: every one of the 64 layers has a negative mean somewhere.
    assert all((tensor >= 0).all() for name, tensor in state.items() if name.endswith("running_var"))
    assert sum(bool((tensor < 0).any()) for name, tensor in state.items() if name.endswith("running_mean")) == 64
    # Pairs read off the two naming schemes by hand.
    for old, new in {
        "_conv_stem.weight": "conv_stem.weight",
        "_bn0.running_mean": "bn1.running_mean",
        "_blocks.0._depthwise_conv.weight": "blocks.0.0.conv_dw.weight",
        "_blocks.1._expand_conv.weight": "blocks.1.0.conv_pw.weight",
        "_conv_head.weight": "conv_head.weight",
        "_bn1.running_var": "bn2.running_var",
        "_fc.bias": "classifier.bias",
    }.items():
        assert torch.equal(packaged[old], state[new]), new


def test_tensors_in_another_order_are_refused(folder: Path) -> None:
    packaged = torch.load(encoders.weights.find("efficientnet_lite0").path, weights_only=True)
    names = list(packaged)
    first, second = names.index("_bn0.running_mean"), names.index("_bn0.running_var")
    names[first], names[second] = names[second], names[first]  # same shapes: only the names can tell
    torch.save({name: packaged[name] for name in names}, folder / "efficientnet_lite0.pth")
    with pytest.raises(UserError, match=r"efficientnet_lite0\.pth does not hold the weights"):
        FrozenEncoder.load("efficientnet_lite0", 4, "cpu")
    torch.save(dict(list(packaged.items())[:-1]), folder / "efficientnet_lite0.pth")
    with pytest.raises(UserError, match=r"efficientnet_lite0\.pth does not hold the weights"):
        FrozenEncoder.load("efficientnet_lite0", 4, "cpu")


@pytest.mark.parametrize("grid", [1, 4, 5])
def test_the_token_grid_is_the_backbones_row_by_row(grid: int) -> None:
    encoder = FrozenEncoder.load("efficientnet_lite0", grid, "cpu")
    images = noise_images(2, 32)
    tokens_NTZ = encoder.tokens(images)
    assert tokens_NTZ.shape == (2, grid * grid, 1280)
    normalised = (images.double() / 255 - 0.5) / 0.5
    resized = torch.nn.functional.interpolate(normalised, (32 * grid, 32 * grid), mode="bicubic").float()
    with torch.no_grad():
        map_NCHW = encoder.network.forward_features(resized)
    for row in range(grid):
        for column in range(grid):
            torch.testing.assert_close(
                tokens_NTZ[:, row * grid + column], map_NCHW[:, :, row, column], atol=1e-3, rtol=1e-3
            )


def test_frozen_without_gradient_and_blind_to_the_batch() -> None:
    encoder = FrozenEncoder.load("efficientnet_lite0", 2, "cpu")
    assert not encoder.training and not any(parameter.requires_grad for parameter in encoder.parameters())
    images = noise_images(19, 16)  # three passes of at most 8 on a CPU
    before = torch.get_rng_state()
    tokens_NTZ = encoder.tokens(images)
    assert not tokens_NTZ.requires_grad and torch.equal(torch.get_rng_state(), before)
    torch.testing.assert_close(tokens_NTZ[17:], encoder.tokens(images[17:]), atol=1e-4, rtol=1e-4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(encoder.tokens(images), tokens_NTZ)


def test_a_grid_without_tokens_is_refused() -> None:
    with pytest.raises(UserError, match="grid of 0 x 0 tokens cannot be matched"):
        FrozenEncoder.load("efficientnet_lite0", 0, "cpu")


def test_loading_leaves_the_global_random_state() -> None:
    before = torch.get_rng_state()
    FrozenEncoder.load("efficientnet_lite0", 2, "cpu")
    assert torch.equal(torch.get_rng_state(), before)


# -- DINOv2 ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "timm_name", "num_prefix"),
    [
        ("dinov2_vits14", "vit_small_patch14_dinov2", 1),
        ("dinov2_vits14_reg", "vit_small_patch14_reg4_dinov2", 5),
    ],
)
def test_dinov2_gives_16_by_16_patch_tokens(folder: Path, name: str, timm_name: str, num_prefix: int) -> None:
    network = random_dinov2(timm_name)
    save_file(network.state_dict(), folder / f"{name}.safetensors")
    images = noise_images(1, 256)
    tokens_NTZ = FrozenEncoder.load(name, 16, "cpu").tokens(images)
    assert tokens_NTZ.shape == (1, 256, 384) and tokens_NTZ.dtype == torch.float32
    # The same by hand: REPA's preprocessing, the position table of 37 x 37 resampled to 16 x 16, prefix tokens off.
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    pixels = (images / 255 - mean[:, None, None]) / std[:, None, None]
    pixels = torch.nn.functional.interpolate(pixels, 224, mode="bicubic")
    table = network.pos_embed.data[:, network.pos_embed.shape[1] - 37 * 37 :]
    prefix = network.pos_embed.data[:, : network.pos_embed.shape[1] - 37 * 37]
    square = table.reshape(1, 37, 37, 384).permute(0, 3, 1, 2)
    small = torch.nn.functional.interpolate(square, (16, 16), mode="bicubic", antialias=True)
    reference: Any = timm.create_model(timm_name, pretrained=False, num_classes=0, img_size=224).eval()
    state: dict[str, Tensor] = dict(network.state_dict())
    state["pos_embed"] = torch.cat([prefix, small.flatten(2).transpose(1, 2)], dim=1)
    reference.load_state_dict(state)
    with torch.no_grad():
        expected = reference.forward_features(pixels)
    assert expected.shape[1] == 256 + num_prefix
    torch.testing.assert_close(tokens_NTZ, expected[:, num_prefix:], atol=1e-4, rtol=1e-4)


def authors_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state of timm's under the names of facebookresearch/dinov2 (models/vision_transformer.py), by hand.

    Their position table has a row for the class token, also with registers; timm adds it to the token there.
    """
    theirs = {"mask_token": torch.zeros(1, state["cls_token"].shape[-1])}
    for name, tensor in state.items():
        name = name.replace("mlp.fc1", "mlp.w12").replace("mlp.fc2", "mlp.w3") if "reg_token" in state else name
        theirs[name.replace("reg_token", "register_tokens")] = tensor
    if "reg_token" in state:
        row = torch.full_like(state["cls_token"], 0.25)
        theirs["pos_embed"] = torch.cat([row, state["pos_embed"]], dim=1)
        theirs["cls_token"] = state["cls_token"] - row
    return theirs


def plain_mlp(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same for the sizes whose MLP is no SwiGLU: S, B and L."""
    return {name.replace("mlp.w12", "mlp.fc1").replace("mlp.w3", "mlp.fc2"): tensor for name, tensor in state.items()}


@pytest.mark.parametrize(
    ("name", "timm_name"),
    [("dinov2_vits14", "vit_small_patch14_dinov2"), ("dinov2_vits14_reg", "vit_small_patch14_reg4_dinov2")],
)
def test_all_formats_of_the_same_weights_give_the_same_tokens_bit_for_bit(
    folder: Path, name: str, timm_name: str
) -> None:
    """timm's file and folder under our name and its own, and the authors' file under theirs and ours."""
    theirs = plain_mlp(authors_names(random_dinov2(timm_name).state_dict()))
    state = dict(random_dinov2(timm_name).state_dict())
    if name.endswith("_reg"):  # (a - b) + b is not always a
        state["cls_token"] = theirs["cls_token"] + theirs["pos_embed"][:, :1]
    images, seen = noise_images(1, 64), []
    forms: dict[str, Any] = {
        f"{name}.safetensors": state,
        f"{name}.pth": theirs,
        f"dinov2_vits14_{'reg4_' if name.endswith('_reg') else ''}pretrain.pth": theirs,
        f"{timm_name}.lvd142m/model.safetensors": state,
        f"{timm_name}.lvd142m/pytorch_model.bin": {"state_dict": state},
    }
    for file, tensors in forms.items():
        path = folder / file
        path.parent.mkdir(exist_ok=True)
        (save_file if path.suffix == ".safetensors" else torch.save)(tensors, path)
        assert encoders.weights.find(name).path == path
        seen.append(FrozenEncoder.load(name, 4, "cpu").tokens(images))
        path.unlink()
    assert all(torch.equal(tokens, seen[0]) for tokens in seen)


def test_the_giants_gated_mlp_has_other_names_in_the_authors_file(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`mlp.w12` and `mlp.w3`; with one of its 40 blocks, as the whole has 1.1 billion weights."""
    real = timm.create_model
    monkeypatch.setattr(encoders.timm, "create_model", lambda name, **options: real(name, depth=1, **options))
    state = FrozenEncoder.untrained("dinov2_vitg14_reg", 2, "cpu").network.state_dict()
    theirs = authors_names(state)
    assert theirs["blocks.0.mlp.w12.weight"].shape == (8192, 1536)
    assert theirs["blocks.0.mlp.w3.weight"].shape == (1536, 4096)
    torch.save(theirs, folder / "dinov2_vitg14_reg4_pretrain.pth")
    loaded = FrozenEncoder.load("dinov2_vitg14_reg", 2, "cpu").network.state_dict()
    for name in ("blocks.0.mlp.fc1.weight", "blocks.0.mlp.fc2.bias", "reg_token", "pos_embed"):
        assert torch.equal(loaded[name], state[name]), name


# -- any other network of timm --------------------------------------------------------------------------------------


@pytest.fixture
def small_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    """timm's networks with fewer layers and channels; what is read off them, and how, is the same."""
    real = timm.create_model
    less: dict[str, dict[str, Any]] = {
        "vit": {"depth": 1, "embed_dim": 48, "num_heads": 2},
        "resnet": {"layers": (1, 1, 1, 1), "channels": (8, 8, 16, 24)},
        "swin": {"depths": (1, 1, 1, 1), "embed_dim": 8, "num_heads": (1, 1, 2, 2)},
    }
    monkeypatch.setattr(
        encoders.timm,
        "create_model",
        lambda name, **options: real(name, **less[re.match("[a-z]+", name)[0]], **options),  # type: ignore[index]
    )
    encoders._timm_spec.cache_clear()
    monkeypatch.setattr(encoders, "_timm_spec", encoders._timm_spec.__wrapped__)


@pytest.mark.parametrize(
    ("name", "width", "side", "num_prefix", "mean", "std"),
    [
        ("vit_base_patch16_224.mae", 48, 4 * 16, 1, 0.485, 0.229),
        ("vit_base_patch16_clip_224.openai", 48, 4 * 16, 1, 0.48145466, 0.26862954),
        ("vit_base_patch16_siglip_224.webli", 48, 4 * 16, 0, 0.5, 0.5),
        ("resnet18.a1_in1k", 24, 4 * 32, 0, 0.485, 0.229),
        ("swin_tiny_patch4_window7_224.ms_in1k", 64, 4 * 32, 0, 0.485, 0.229),
    ],
)
def test_another_network_of_timm_by_its_name(
    folder: Path,
    small_networks: None,
    name: str,
    width: int,
    side: int,
    num_prefix: int,
    mean: float,
    std: float,
) -> None:
    spec = encoders.spec(f"timm/{name}")
    assert (spec.width, spec.stride * 4, spec.normalisation[0][0], spec.normalisation[1][0]) == (width, side, mean, std)
    native: Any = encoders.timm.create_model(name, pretrained=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        for parameter in native.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
    (folder / name).mkdir()
    save_file(native.state_dict(), folder / name / "model.safetensors")
    encoder = FrozenEncoder.load(f"timm/{name}", 4, "cpu")
    images = noise_images(2, 80)
    tokens_NTZ = encoder.tokens(images)
    assert tokens_NTZ.shape == (2, 16, width) and not encoder.training
    # By hand: normalise, then resize, then the features without the prefix, row by row.
    mean_C, std_C = (torch.tensor(values)[:, None, None] for values in spec.normalisation)
    pixels = torch.nn.functional.interpolate((images / 255 - mean_C) / std_C, side, mode="bicubic")
    sized = {} if name.startswith("resnet") else {"img_size": side}
    cut: Any = encoders.timm.create_model(name, pretrained=False, **sized).eval()
    state = dict(native.state_dict())
    if "pos_embed" in state:
        table, num = state["pos_embed"], state["pos_embed"].shape[1] - 14 * 14
        square = table[:, num:].reshape(1, 14, 14, width).permute(0, 3, 1, 2)
        small = torch.nn.functional.interpolate(square, (4, 4), mode="bicubic", antialias=True)
        state["pos_embed"] = torch.cat([table[:, :num], small.flatten(2).transpose(1, 2)], dim=1)
    if name.startswith("swin"):
        # Its windows shrink with the picture, and timm resamples their position biases: not restated here.
        state = dict(encoder.network.state_dict())
    cut.load_state_dict(state)
    with torch.no_grad():
        features = cut.forward_features(pixels)
    if name.startswith("resnet"):
        expected = torch.stack([features[:, :, row, column] for row in range(4) for column in range(4)], dim=1)
    elif name.startswith("swin"):
        expected = torch.stack([features[:, row, column] for row in range(4) for column in range(4)], dim=1)
    else:
        expected = features[:, num_prefix:]
    torch.testing.assert_close(tokens_NTZ, expected, atol=1e-4, rtol=1e-4)


def test_a_hole_in_the_weights_of_a_network_with_a_classifier_is_refused(folder: Path, small_networks: None) -> None:
    state = encoders.timm.create_model("resnet18.a1_in1k", pretrained=False).state_dict()
    state.pop("layer4.0.bn2.weight")
    save_file(state, folder / "resnet18.a1_in1k.safetensors")
    with pytest.raises(UserError, match=r"resnet18\.a1_in1k\.safetensors does not hold the weights of timm/resnet18"):
        FrozenEncoder.load("timm/resnet18.a1_in1k", 2, "cpu")


def test_networks_that_timm_does_not_know_or_that_have_no_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"encoder 'timm/resnet1' is not known to timm: it has .*resnet"):
        encoder_width("timm/resnet1")
    with pytest.raises(UserError, match=r"'clip' is not known: .*, or timm/<network>"):
        encoder_width("clip")
    monkeypatch.setattr(encoders.timm, "create_model", lambda name, **options: torch.nn.Identity())
    with pytest.raises(UserError, match=r"'timm/vgg11' says nothing of its grid of features"):
        encoder_width("timm/vgg11")


@pytest.mark.parametrize(
    ("name", "known"),
    [("vit_base_patch14_dinov2", "dinov2"), ("resnet18", "resnet"), ("tf_efficientnet_b0", "efficientnet")],
)
def test_families_of_other_networks(name: str, known: str) -> None:
    assert family(f"timm/{name}") == known


def test_weights_that_are_nowhere_come_from_timms_repository(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = random_dinov2("vit_small_patch14_dinov2").state_dict()
    (tmp_path / "snapshot").mkdir()
    save_file(state, tmp_path / "snapshot" / "model.safetensors")
    asked: list[tuple[str, tuple[str, ...]]] = []

    def fetch(repository: str, files: tuple[str, ...]) -> Path:
        asked.append((repository, files))
        return tmp_path / "snapshot" / files[0]

    monkeypatch.setattr(encoders.weights.hub, "fetch", fetch)
    assert FrozenEncoder.load("dinov2_vits14", 2, "cpu").tokens(noise_images(1, 32)).shape == (1, 4, 384)
    assert set(asked) == {("timm/vit_small_patch14_dinov2.lvd142m", ("model.safetensors", "pytorch_model.bin"))}


def test_dinov2_weights_of_another_width_are_refused(folder: Path) -> None:
    state = random_dinov2("vit_small_patch14_dinov2").state_dict()
    narrow = {name: tensor[..., :100].clone() for name, tensor in state.items()}
    save_file(narrow, folder / "dinov2_vits14.safetensors")
    with pytest.raises(UserError, match=r"dinov2_vits14\.safetensors does not hold the weights") as raised:
        FrozenEncoder.load("dinov2_vits14", 4, "cpu")
    assert "\n" not in str(raised.value)


def test_dinov2_weights_with_a_hole_are_refused(folder: Path) -> None:
    state = random_dinov2("vit_small_patch14_dinov2").state_dict()
    state.pop("norm.weight")
    save_file(state, folder / "dinov2_vits14.safetensors")
    with pytest.raises(UserError, match="does not hold the weights"):
        FrozenEncoder.load("dinov2_vits14", 4, "cpu")


# -- digests --------------------------------------------------------------------------------------------------------


def test_digest_follows_weights_grid_and_name(folder: Path) -> None:
    save_file({"a": torch.zeros(1)}, folder / "dinov2_vits14.safetensors")
    seen = [encoder_digest("dinov2_vits14", 16), encoder_digest("dinov2_vits14", 8)]
    (folder / "dinov2_vits14_reg.safetensors").write_bytes((folder / "dinov2_vits14.safetensors").read_bytes())
    seen.append(encoder_digest("dinov2_vits14_reg", 16))
    save_file({"a": torch.ones(1)}, folder / "dinov2_vits14.safetensors")
    assert load_file(folder / "dinov2_vits14.safetensors")["a"].item() == 1
    seen.append(encoder_digest("dinov2_vits14", 16))
    assert len(set(seen)) == 4
    assert FrozenEncoder.load("efficientnet_lite0", 3, "cpu").digest == encoder_digest("efficientnet_lite0", 3)
