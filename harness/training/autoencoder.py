"""Trains an autoencoder on the training half of a data set."""

import importlib.metadata
import math
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import nn

from harness import rng
from harness.data.image_set import ImageSet
from harness.errors import UserError
from harness.frozen.autoencoder import WEIGHTS, Autoencoder, AutoencoderRecipe, Network, build_network, to_pixels
from harness.machine.progress import OnProgress
from harness.records.files import digest, file_digest, replaced, write_json


def train_autoencoder(
    images: ImageSet,
    rows: np.ndarray,
    out_folder: Path,
    recipe: AutoencoderRecipe,
    device: str | torch.device,
    on_progress: OnProgress | None = None,
) -> None:
    """Train a small autoencoder on `rows` of the images and save it in diffusers' format, with recipe.json.

    The same recipe and images give the same bytes on the same machine. All other rows are held out: they give the
    reconstruction error in recipe.json and are seen by nothing else.
    """
    network = _new_network(recipe).to(device)
    losses = _fit(network, images, rows, recipe, on_progress)
    network.eval().requires_grad_(False)
    scaling = _unit_scaling(network, images, rows, recipe.seed)
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
                "train_error": _reconstruction_error(network, images, rows),
                "held_out_error": _reconstruction_error(network, images, held_out) if len(held_out) else None,
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


def _unit_scaling(network: Network, images: ImageSet, rows: np.ndarray, seed: int) -> float:
    """1 / standard deviation of posterior samples of the training images, over all their numbers."""
    moments = Autoencoder(network, "").moments(images.rows(rows))
    mean, std = moments.chunk(2, dim=1)
    # The index lies behind the steps' and its length tells it apart from them.
    noise = torch.randn(mean.shape, generator=rng.stream(seed, "autoencoder", 0, 0))
    return 1 / float((mean + std * noise).double().std())


def _reconstruction_error(network: Network, images: ImageSet, rows: np.ndarray) -> float:
    """Root mean squared error, in grey levels 0..255, of decoded posterior means."""
    autoencoder = Autoencoder(network, "")
    original = images.rows(rows)
    decoded = autoencoder.decode(autoencoder.latent_means(autoencoder.moments(original)))
    return float(np.sqrt(np.square(decoded.astype(np.float64) - original).mean()))
