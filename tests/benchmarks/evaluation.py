"""How fast images are sampled, decoded and read by an extractor, and what decoding in bf16 would do to them.

The embedded setting's SiT-nano/2 and autoencoder, and SiT-B/2 with a decoder of Stable Diffusion's shapes at 256
pixels, with random weights. Its last layer is scaled so that pixels spread over the levels as a picture's do: else all
of them would be one grey, and agree whatever the precision.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from harness.backbones.sit import SiT
from harness.config import EvaluationConfig, RuntimeConfig, SamplerConfig
from harness.evaluation import extractors
from harness.evaluation.fidelity import Pictures, extract
from harness.evaluation.generate import generate_latents
from harness.frozen.autoencoder import PASS_IMAGES, Autoencoder, Network, to_uint8, untrained_network
from harness.machine import environment
from harness.rng import global_state_kept, stream
from tests.benchmarks.interleaved import Timing, timed

TITLE = "images/s of sampling, decoding and features; decoders in bf16 against fp32"
ROUNDS = 3
SD = "stabilityai/sd-vae-ft-ema"
"""Not read: an autoencoder that is not on this machine is given random weights of its shapes."""
SETTINGS = (
    # backbone, image size, autoencoder, images, calls of the network, precision, extractor's pixels
    ("SiT-nano/2", 32, "digits", 128, 6, "fp32", 64),
    ("SiT-B/2", 256, SD, 2, 2, "bf16", 224),
)


def measure() -> list[dict[str, Any]]:
    device = torch.device(environment.resolve_runtime(RuntimeConfig()).device)
    return [row for setting in SETTINGS for row in measure_setting(device, *setting)]


def measure_setting(
    device: torch.device, name: str, pixels: int, path: str, num: int, calls: int, precision: str, size: int
) -> list[dict[str, Any]]:
    """A row for each part of an evaluation."""
    autoencoder = make_autoencoder(path, device)
    backbone = make_backbone(name, autoencoder.latent_shape(pixels), device)
    settings = EvaluationConfig(
        sampler=SamplerConfig(kind="ode-euler", num_steps=calls),
        chunk=num,
        precision=precision,  # type: ignore[arg-type]
    )
    latents_NCHW = torch.randn(
        (num, backbone.in_channels, backbone.input_size, backbone.input_size), generator=stream(0, "eval", 0)
    )
    extractor = extractors.find("efficientnet_lite0", size)
    images_NHWC = autoencoder.decode(latents_NCHW)
    pictures = Pictures(lambda i: images_NHWC[i], num)
    network, scaled = autoencoder.network, (latents_NCHW / autoencoder.scaling + autoencoder.shift).to(device)
    decoded: dict[str, np.ndarray] = {}

    def sample() -> None:
        for _, made_NCHW in generate_latents(backbone, settings, num, device):
            made_NCHW.cpu()

    def decode(label: str, enabled: bool) -> None:
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=enabled):
            decoded[label] = to_uint8(torch.cat([network.decode(part).sample for part in scaled.split(PASS_IMAGES)]))

    found = timed(
        {
            f"sampling, {precision}, {calls} calls": sample,
            "decoding, fp32": lambda: decode("fp32", False),
            "decoding, bf16": lambda: decode("bf16", True),
            f"features, {size} pixels": lambda: extract(extractor, extractor.layers, pictures, device),
        },
        ROUNDS,
    )
    agree = {"decoding, bf16": within_one_level(decoded["bf16"], decoded["fp32"])}
    place = f"{name}, {pixels} pixels"
    return [row(place, part, num, timing, agree.get(part)) for part, timing in found.items()]


def row(place: str, part: str, num: int, timing: Timing, agree: float | None) -> dict[str, Any]:
    return {
        "setting": place,
        "part": part,
        "images": num,
        "images/s": num / timing.median,
        "least": num / max(timing.seconds),
        "most": num / min(timing.seconds),
        "within 1 level of fp32": "" if agree is None else f"{agree:.4%}",
    }


def within_one_level(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Share of uint8 values that differ by 1 or less; a decoder in another precision may stand in from 99.9% on."""
    return float(np.mean(np.abs(ours.astype(np.int16) - theirs) <= 1))


def make_autoencoder(path: str, device: torch.device) -> Autoencoder:
    """The shipped one as it is; others with random weights of their shapes."""
    if path != SD:
        return Autoencoder.load(path, device)
    with seeded():
        network = untrained_network(path)
    network.register_to_config(scaling_factor=0.18215)
    spread_pixels(network)
    return Autoencoder(network.to(device), "untrained")


@torch.no_grad()
def spread_pixels(network: Network) -> None:
    """Scale the last layer to pixels of mean 0 and standard deviation 0.5, as of pictures in [-1, 1]."""
    latent_NCHW = torch.randn((1, 4, 16, 16), generator=stream(0, "eval", 1)) / 0.18215
    pixels_NCHW = network.decode(latent_NCHW).sample
    last, scale = network.decoder.conv_out, 0.5 / pixels_NCHW.std()
    last.weight.mul_(scale)
    last.bias.sub_(pixels_NCHW.mean()).mul_(scale)


def make_backbone(name: str, shape: tuple[int, int, int], device: torch.device) -> SiT:
    """For latents (C, h, w), with all weights drawn: those that start at 0 would make the output 0."""
    with seeded():
        model = SiT.from_name(name, input_size=shape[1], in_channels=shape[0], num_classes=10)
        for weight in model.parameters():
            weight.data += 0.02 * torch.randn_like(weight)
    return model.to(device).eval().requires_grad_(False)


@contextlib.contextmanager
def seeded() -> Iterator[None]:
    """torch's global state is set inside of the block, and as it was behind it."""
    with global_state_kept():
        torch.manual_seed(0)
        yield
