"""From a backbone to images, so that image i depends on the evaluation seed and on i alone.

Image i has label i % number of classes; its start noise and its SDE noise come, in this order, from the stream
(seed, eval, i). Images are made in fixed chunks, in fixed order: which process makes which chunk changes no bit.

Shapes: N images of a chunk, C channels, H W latent height and width.
"""

import contextlib
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor

from harness.backbones.sit import SiT
from harness.config import EvaluationConfig
from harness.frozen.autoencoder import Autoencoder
from harness.machine.processes import gathered
from harness.rng import stream
from harness.sampler import sample


def labels_for(start: int, stop: int, num_classes: int) -> Tensor:
    """Labels of images start ... stop-1, balanced by index, int64."""
    return torch.arange(start, stop) % num_classes


def chunk_bounds(num_images: int, chunk: int) -> list[tuple[int, int]]:
    """First image and end of every chunk; the last one may be short."""
    return [(start, min(start + chunk, num_images)) for start in range(0, num_images, chunk)]


def generate(
    backbone: SiT,
    autoencoder: Autoencoder,
    config: EvaluationConfig,
    num_images: int,
    device: torch.device,
    chunks: Iterable[int] | None = None,
) -> Iterator[tuple[int, np.ndarray]]:
    """Generate images.

    Args:
        backbone: on `device`; put into eval mode while a chunk is made.
        autoencoder: decodes, in fp32.
        config: sampler, seed, chunk and precision; `auto` is resolved.
        num_images: images in all chunks together.
        device: of the backbone.
        chunks: numbers of the chunks to make, in this order; all of them by default.

    Yields:
        (number of the first image, uint8 [N, H, W, 3]) for each chunk.
    """
    for start, latents_NCHW in generate_latents(backbone, config, num_images, device, chunks):
        yield start, autoencoder.decode(latents_NCHW)


@dataclass(frozen=True)
class Round:
    """The images that all processes made at once, one chunk each."""

    start: int
    """Number of the first image."""
    images_NHWC: np.ndarray
    """uint8."""
    bad_images: int
    """Number of images whose latent was not finite."""
    sampling_s: float
    """Time that this process took to sample its chunk, in seconds."""
    decoding_s: float
    """The same for the autoencoder, to uint8."""


@dataclass
class Summary:
    """Sums over rounds, and the first images of them all."""

    num_first: int
    """Number of images that are kept."""
    first: list[np.ndarray] = field(default_factory=list)
    """uint8 [H, W, 3] each."""
    bad_images: int = 0
    sampling_s: float = 0.0
    decoding_s: float = 0.0

    def of(self, rounds: Iterable[Round]) -> Iterator[np.ndarray]:
        """Take round after round; yields the images of each."""
        for part in rounds:
            self.first += [image_HWC.copy() for image_HWC in part.images_NHWC[: self.num_first - len(self.first)]]
            self.bad_images += part.bad_images
            self.sampling_s += part.sampling_s
            self.decoding_s += part.decoding_s
            yield part.images_NHWC


def generate_rounds(
    backbone: SiT,
    autoencoder: Autoencoder,
    config: EvaluationConfig,
    num_images: int,
    accelerator: Accelerator,
    done: int = 0,
) -> Iterator[Round]:
    """Images `done` to `num_images` - 1 in their order, in every process; `done` is the start of a chunk.

    Round by round each process makes the chunk of its rank, so that the bits do not depend on their number.
    """
    assert done % config.chunk == 0, (done, config.chunk)
    bounds, size = chunk_bounds(num_images, config.chunk), accelerator.num_processes
    for first in range(done // config.chunk, len(bounds), size):
        # A process without a chunk in the last round makes the last one again: all must take part in the gathering.
        mine = min(first + accelerator.process_index, len(bounds) - 1)
        started = time.perf_counter()
        [(_, latents_NCHW)] = generate_latents(backbone, config, num_images, accelerator.device, [mine])
        bad = (~latents_NCHW.isfinite().flatten(1).all(dim=1)).sum().reshape(1)
        bad.tolist()  # waits for the device, so that the times belong to what they are called
        sampled = time.perf_counter()
        images_NHWC = torch.from_numpy(autoencoder.decode(latents_NCHW))
        decoded = time.perf_counter()
        lengths = [stop - start for start, stop in bounds[first : first + size]]
        if size > 1:
            images_NHWC = F.pad(images_NHWC, (0, 0) * 3 + (0, config.chunk - len(images_NHWC))).to(accelerator.device)
        together = gathered(accelerator, images_NHWC).cpu().split(config.chunk)
        parts = [part[:length].numpy() for part, length in zip(together, lengths, strict=False)]
        num_bad = int(gathered(accelerator, bad)[: len(lengths)].sum())
        yield Round(bounds[first][0], np.concatenate(parts), num_bad, sampled - started, decoded - sampled)


def generate_latents(
    backbone: SiT,
    config: EvaluationConfig,
    num_images: int,
    device: torch.device,
    chunks: Iterable[int] | None = None,
) -> Iterator[tuple[int, Tensor]]:
    """The latents that `generate` decodes: (number of the first image, float64 [N, C, H, W])."""
    bounds = chunk_bounds(num_images, config.chunk)
    for number in range(len(bounds)) if chunks is None else chunks:
        start, stop = bounds[number]
        yield start, _sample_chunk(backbone, config, start, stop, device)


def _sample_chunk(backbone: SiT, config: EvaluationConfig, start: int, stop: int, device: torch.device) -> Tensor:
    shape = (backbone.in_channels, backbone.input_size, backbone.input_size)
    generators = [stream(config.seed, "eval", i) for i in range(start, stop)]
    # mps has no float64, so there the sampler's state stays on the CPU.
    home = torch.device("cpu") if device.type == "mps" else device

    def draw(_: int = 0) -> Tensor:
        """The next draw of every image's stream; the sampler asks for its steps in order."""
        return torch.stack([torch.randn(shape, generator=g, dtype=torch.float64) for g in generators]).to(home)

    labels_N = labels_for(start, stop, backbone.num_classes).to(device)
    with inference(backbone, config.precision, device):
        return sample(backbone, draw(), labels_N, config.sampler, step_noise=draw)


@contextlib.contextmanager
def inference(backbone: SiT, precision: str, device: torch.device) -> Iterator[None]:
    """Eval mode, no gradients, and bf16 autocast where the resolved precision says so; all undone afterwards."""
    assert precision in ("fp32", "bf16"), f"precision {precision!r} is not resolved"
    was_training = backbone.training
    backbone.eval()
    try:
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            yield
    finally:
        backbone.train(was_training)
