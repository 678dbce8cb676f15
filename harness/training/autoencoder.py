"""Trains an autoencoder on the training half of a data set."""

import importlib.metadata
import math
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import nn

from harness import rng
from harness.data.image_set import ImageSet, evenly_spaced_rows
from harness.errors import UserError
from harness.frozen.autoencoder import (
    PASS_IMAGES,
    WEIGHTS,
    Autoencoder,
    AutoencoderRecipe,
    Network,
    build_network,
    to_pixels,
)
from harness.machine.progress import OnProgress
from harness.records.files import digest, file_digest, replaced, write_json

MEASURED_IMAGES = 2048
"""At most this many images of each half are measured, evenly spaced, whatever the size of the data set."""
PIECE = 2 * PASS_IMAGES
"""Images read together when the autoencoder is measured; whole passes, as the size of a pass changes the last bits."""


def train_autoencoder(
    images: ImageSet,
    rows: np.ndarray,
    out_folder: Path,
    recipe: AutoencoderRecipe,
    device: str | torch.device,
    on_progress: OnProgress | None = None,
) -> None:
    """Train a small autoencoder on `rows` of the images and save it in diffusers' format, with recipe.json.

    The same recipe and images give the same bytes on the same machine. All other rows are held out: some of them give
    the reconstruction error in recipe.json, and nothing else sees them.
    """
    network = _new_network(recipe).to(device)
    losses = _fit(network, images, rows, recipe, on_progress)
    network.eval().requires_grad_(False)
    scaling = unit_scaling(network, images, rows, recipe.seed, on_progress)
    network.register_to_config(scaling_factor=scaling)
    held_out = np.setdiff1d(np.arange(len(images)), rows)
    try:
        with replaced(out_folder) as folder:
            network.save_pretrained(folder)
            facts = {
                "recipe": asdict(recipe),
                "data": images.digest,
                "rows": digest(rows.tolist()),
                "device": str(next(network.parameters()).device),
                "threads": torch.get_num_threads(),
                "versions": {name: importlib.metadata.version(name) for name in ("torch", "diffusers", "numpy")},
                "weights_sha256": file_digest(folder / WEIGHTS),
                "final": losses,
                "train_error": reconstruction_error(network, images, rows, on_progress),
                "held_out_error": reconstruction_error(network, images, held_out, on_progress)
                if len(held_out)
                else None,
            }
            write_json(folder / "recipe.json", facts)
    except OSError as error:
        raise UserError(f"cannot write to {out_folder} ({error.strerror}): name a folder you may write to") from None


def _new_network(recipe: AutoencoderRecipe) -> Network:
    """An untrained network from the recipe's own stream; the global random state is left as it was."""
    seed = int(torch.randint(2**62, (), generator=rng.stream(recipe.seed, "autoencoder")))
    with rng.global_state_kept():
        torch.manual_seed(seed)
        return build_network(recipe)


def _learning_rate(recipe: AutoencoderRecipe, step: int) -> float:
    warmup = max(1, recipe.steps // 20)
    rise = min(1.0, (step + 1) / warmup)
    return recipe.lr * rise * 0.5 * (1 + math.cos(math.pi * step / recipe.steps))


def _fit(
    network: Network, images: ImageSet, rows: np.ndarray, recipe: AutoencoderRecipe, on_progress: OnProgress | None
) -> dict[str, float]:
    """Train; returns the mean absolute error and the KL of the last tenth of the steps."""
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=0.0)
    device = next(network.parameters()).device
    tail: list[tuple[float, float]] = []
    for step in range(recipe.steps):
        generator = rng.stream(recipe.seed, "autoencoder", step)
        chosen = rows[torch.randint(len(rows), (recipe.batch_size,), generator=generator).numpy()]
        pixels_NCHW = to_pixels(images.rows(chosen)).to(device)
        posterior = network.encode(pixels_NCHW).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator).to(device)
        decoded_NCHW = network.decode(posterior.mean + posterior.std * noise).sample
        error = (decoded_NCHW - pixels_NCHW).abs().mean()
        kl = posterior.kl().mean() / noise[0].numel()  # diffusers sums it over an image's latent numbers
        optimizer.zero_grad(set_to_none=True)
        (error + recipe.kl_weight * kl).backward()
        nn.utils.clip_grad_norm_(network.parameters(), recipe.clip_norm)
        for group in optimizer.param_groups:
            group["lr"] = _learning_rate(recipe, step)
        optimizer.step()
        if step >= recipe.steps * 9 // 10:
            tail.append((error.item(), kl.item()))
        if on_progress is not None and (step + 1) % 10 == 0:
            on_progress("training the autoencoder", step + 1, recipe.steps)
    absolute, kl_mean = np.mean(tail, axis=0)
    return {"absolute_error": float(absolute), "kl": float(kl_mean)}


# -- what it makes of images ----------------------------------------------------------------------------------------


def unit_scaling(
    network: Network, images: ImageSet, rows: np.ndarray, seed: int, on_progress: OnProgress | None = None
) -> float:
    """1 / standard deviation of posterior samples over all their numbers, of images spread evenly over `rows`."""
    autoencoder = Autoencoder(network, "")
    pieces = _pieces(images, rows, "scaling the latents", on_progress)
    mean, std = torch.cat([autoencoder.moments(piece_NHWC) for piece_NHWC in pieces]).chunk(2, dim=1)
    # The index lies behind the steps' and its length tells it apart from them.
    noise = torch.randn(mean.shape, generator=rng.stream(seed, "autoencoder", 0, 0))
    return 1 / float((mean + std * noise).double().std())


def reconstruction_error(
    network: Network, images: ImageSet, rows: np.ndarray, on_progress: OnProgress | None = None
) -> float:
    """Root mean squared error, in grey levels 0..255, of decoded posterior means of images spread evenly over `rows`.

    The squares are whole numbers, so their sum does not depend on how the images are divided.
    """
    autoencoder = Autoencoder(network, "")
    squares, count = 0, 0
    for piece_NHWC in _pieces(images, rows, "measuring the reconstruction error", on_progress):
        decoded_NHWC = autoencoder.decode(autoencoder.latent_means(autoencoder.moments(piece_NHWC)))
        squares += int(np.square(decoded_NHWC.astype(np.int64) - piece_NHWC).sum())
        count += piece_NHWC.size
    return math.sqrt(squares / count)


def _pieces(images: ImageSet, rows: np.ndarray, what: str, on_progress: OnProgress | None) -> Iterator[np.ndarray]:
    """At most `MEASURED_IMAGES` of the rows, evenly spaced, a few at a time: uint8 [PIECE or fewer, H, W, 3]."""
    chosen = evenly_spaced_rows(rows, MEASURED_IMAGES)
    for start in range(0, len(chosen), PIECE):
        piece = chosen[start : start + PIECE]
        yield images.rows(piece)
        if on_progress is not None:
            on_progress(what, start + len(piece), len(chosen))
