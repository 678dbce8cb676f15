"""Extractors: values against hand-computed ones and an independent pooling, registration, errors."""

import numpy as np
import pytest
import torch
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

from harness.errors import UserError
from harness.evaluation.extractors import describe, luminance, pixel_features, register_encoder, register_pixels, resize
from harness.frozen.encoders import FrozenEncoder
from harness.rng import stream


def images(num: int, size: int) -> torch.Tensor:
    return torch.randint(0, 256, (num, 3, size, size), dtype=torch.uint8, generator=stream(0, "eval", 0))


def extractor(name: str):
    return FEATURE_EXTRACTORS_REGISTRY[name](name, ["pooled"], batch_size=2, verbose=False)


def test_luminance_of_pure_colours():
    """ITU-R BT.601: red 0.299, green 0.587, blue 0.114, white 1."""
    colours = torch.zeros(4, 3, 8, 8, dtype=torch.uint8)
    colours[0, 0], colours[1, 1], colours[2, 2], colours[3] = 255, 255, 255, 255
    expected = torch.tensor([0.299, 0.587, 0.114, 1.0])[:, None].expand(4, 64)
    assert torch.allclose(luminance(colours), expected, atol=1e-6)


def test_luminance_averages_blocks_row_by_row():
    """16 px: each of the 8 x 8 numbers is the mean of a 2 x 2 block; the second one lies right of the first."""
    grey = torch.zeros(1, 3, 16, 16, dtype=torch.uint8)
    grey[:, :, 0, 2] = 255
    grey[:, :, 2:4, 0:2] = 51
    found = luminance(grey)[0]
    assert found[1].item() == pytest.approx(0.25) and found[8].item() == pytest.approx(0.2)
    assert found.sum().item() == pytest.approx(0.45)


def test_pixel_features_take_numpy_images():
    batch = images(3, 16)
    assert np.array_equal(pixel_features(batch.permute(0, 2, 3, 1).numpy()), luminance(batch).numpy())
    assert torch.equal(extractor(register_pixels())(batch)[0], luminance(batch))


def test_encoder_features_are_the_mean_token_of_the_frozen_encoder():
    """At 64 px the encoder's grid is 2 x 2; its own path (normalise, then resize) is the independent one here."""
    batch = images(2, 32)
    tokens = FrozenEncoder.load("efficientnet_lite0", 2, "cpu").tokens(batch)
    (features,) = extractor(register_encoder("efficientnet_lite0", 64))(batch)
    assert features.shape == (2, 1280) and features.dtype == torch.float32
    # The mean of a constant survives bicubic weights, which sum to 1, so the order of the two steps is immaterial.
    assert torch.allclose(features, tokens.mean(dim=1), atol=2e-4)
    assert features.std() > 0.1


def test_autocast_outside_does_not_reach_the_features():
    batch, extract = images(2, 32), extractor(register_encoder("efficientnet_lite0", 64))
    with torch.autocast("cpu", torch.bfloat16):
        (inside,) = extract(batch)
    assert torch.equal(inside, extract(batch)[0])


def test_shrinking_is_antialiased_and_growing_is_not():
    """A one-pixel checkerboard shrinks to grey: without antialias it would keep full contrast or vanish by phase."""
    board = (torch.arange(32)[:, None] + torch.arange(32)[None]).remainder(2).float().expand(1, 3, 32, 32)
    assert (resize(board, 8)[..., 1:-1, 1:-1] - 0.5).abs().max() < 0.05
    assert resize(board, 64).max() > 0.9


def test_registration_is_made_once_and_names_tell_sizes_apart():
    name = register_encoder("efficientnet_lite0", 64)
    assert register_encoder("efficientnet_lite0", 64) == name and register_pixels() == register_pixels()
    assert describe("efficientnet_lite0", 64)["weights"][:12] in name and "64" in name


def test_extractors_share_one_network():
    name = register_encoder("efficientnet_lite0", 64)
    assert extractor(name).network is extractor(name).network


def test_global_random_state_is_kept():
    state = torch.get_rng_state()
    register_encoder("efficientnet_lite0", 32)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", ["resnet50", "dinov2_vitb14"])
def test_unknown_extractors_are_refused(name):
    with pytest.raises(UserError, match=rf"evaluation\.extractor is '{name}': give one of efficientnet_lite0"):
        register_encoder(name, 64)
