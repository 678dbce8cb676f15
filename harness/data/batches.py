"""The data stream of a run: what every step trains on, drawn for the global batch and sliced for this process.

Everything here is a function of (seed, step) and the data. Threads prepare the next steps while one trains.

Shapes: N images, C channels, H W latent height and width, T tokens, Z encoder width.
"""

import hashlib
import itertools
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from harness import flow
from harness.data.cache import Rows
from harness.data.prepare import PreparedData
from harness.frozen.autoencoder import latent_means, latents
from harness.method import Needs
from harness.rng import batch_rows, stream

AHEAD = 4
"""Batches that are ready or in preparation beside the one in use: a disk that stalls for a while must stop nothing."""
THREADS = 2
"""Batches in preparation at once: one may wait for the disk while another is drawn and hashed."""
CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class Batch:
    """This process's rows of one step, on the CPU."""

    step: int
    first_row: int
    """Row of the global batch at which this process's rows begin."""
    x0_NCHW: Tensor
    x0_mean_NCHW: Tensor
    noise_NCHW: Tensor
    t_N: Tensor
    labels_N: Tensor
    """Labels after label drop."""
    tokens: dict[str, Tensor]
    images_NCHW: Tensor | None
    digest: bytes
    """SHA-256 over indices, t, noise, labels after drop, posterior noise and flips of the global batch."""

    def __len__(self) -> int:
        return len(self.t_N)


@dataclass(frozen=True, kw_only=True)
class Shard:
    """Which part of the global batch a process trains on."""

    rank: int = 0
    num_processes: int = 1

    def rows(self, batch_size: int) -> slice:
        """Contiguous rows; the global batch divides evenly."""
        share = batch_size // self.num_processes
        return slice(self.rank * share, (self.rank + 1) * share)


class BatchSource:
    """Batches of a run by step."""

    def __init__(
        self,
        prepared: PreparedData,
        seed: int,
        batch_size: int,
        label_drop: float,
        needs: Needs,
        shard: Shard,
        device: torch.device = CPU,
    ) -> None:
        """`device` is what the batches are for: a GPU copies from pinned memory while the CPU goes on."""
        self.prepared = prepared
        self.seed, self.batch_size, self.label_drop = seed, batch_size, label_drop
        self.needs, self.shard, self.device = needs, shard, device

    def batch(self, step: int) -> Batch:
        """The batch of a step, counted from 0."""
        prepared, mine = self.prepared, self.shard.rows(self.batch_size)
        places_N = batch_rows(self.seed, step, self.batch_size, len(prepared.train_rows)).numpy()
        rows_N = prepared.train_rows[places_N]
        _, numbers, height, width = prepared.moments.shape
        draw = flow.draw(self.seed, step, (self.batch_size, numbers // 2, height, width), self.label_drop)
        labels_N = torch.from_numpy(prepared.images.labels[rows_N])
        labels_N = torch.where(draw.dropped_N, prepared.images.num_classes, labels_N)
        digest = hashlib.sha256()
        for part in (torch.from_numpy(rows_N), draw.t_N, draw.noise_NCHW, labels_N, draw.latent_noise_NCHW):
            digest.update(part.numpy().data)
        flipped_N = self._flipped(step)
        if prepared.mirrored is not None:
            digest.update(flipped_N.data)
        pick = _Pick(prepared, rows_N[mine], flipped_N[mine])
        moments = pick.moments()
        batch = Batch(
            step=step,
            first_row=mine.start,
            x0_NCHW=latents(moments, draw.latent_noise_NCHW[mine], prepared.scaling, prepared.shift),
            x0_mean_NCHW=latent_means(moments, prepared.scaling, prepared.shift),
            noise_NCHW=draw.noise_NCHW[mine],
            t_N=draw.t_N[mine],
            labels_N=labels_N[mine],
            tokens={name: pick.tokens(name) for name in self.needs.encoders},
            images_NCHW=pick.images() if self.needs.images else None,
            digest=digest.digest(),
        )
        return _pinned(batch) if self.device.type == "cuda" else batch

    def _flipped(self, step: int) -> np.ndarray:
        """Which images of the global batch are mirrored, bool [batch size]; each with probability 1/2, or none."""
        if self.prepared.mirrored is None:
            return np.zeros(self.batch_size, dtype=bool)
        return (torch.rand(self.batch_size, generator=stream(self.seed, "flip", step)) < 0.5).numpy()

    def batches(self, start: int, stop: int | None = None) -> Iterator[Batch]:
        """Batches of steps start..stop-1, or without end, in order; the next ones are prepared while one is used."""
        steps = iter(itertools.count(start) if stop is None else range(start, stop))
        with ThreadPoolExecutor(THREADS, "batches", _use, (self.device,)) as pool:
            ahead = deque(pool.submit(self.batch, step) for step in itertools.islice(steps, AHEAD))
            while ahead:
                batch = ahead.popleft().result()
                ahead.extend(pool.submit(self.batch, step) for step in itertools.islice(steps, 1))
                yield batch


def _use(device: torch.device) -> None:
    """A thread begins on the first GPU, and memory that it pins there would take that GPU in every process."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


def _pinned(batch: Batch) -> Batch:
    """The batch in pinned memory."""
    pinned: dict[str, Any] = {k: value.pin_memory() for k, value in vars(batch).items() if isinstance(value, Tensor)}
    return replace(batch, tokens={name: value.pin_memory() for name, value in batch.tokens.items()}, **pinned)


@dataclass(frozen=True)
class _Pick:
    """What the images of a batch give, or what their mirror images give where they are flipped."""

    prepared: PreparedData
    rows_N: np.ndarray
    flipped_N: np.ndarray

    def moments(self) -> Tensor:
        """Moments, [N, 2C, H, W]."""
        mirrored = self.prepared.mirrored
        return self._rows(self.prepared.moments, None if mirrored is None else mirrored.moments)

    def tokens(self, name: str) -> Tensor:
        """Tokens of the encoder `name`, [N, T, Z]."""
        mirrored = self.prepared.mirrored
        return self._rows(self.prepared.tokens[name], None if mirrored is None else mirrored.tokens[name])

    def _rows(self, plain: Rows, mirrored: Rows | None) -> Tensor:
        rows = plain.rows(self.rows_N)
        if mirrored is not None:
            rows[self.flipped_N] = mirrored.rows(self.rows_N[self.flipped_N])
        return torch.from_numpy(rows)

    def images(self) -> Tensor:
        """The pictures, uint8 [N, 3, H, W] with the height and width of images."""
        images_NHWC = self.prepared.images.rows(self.rows_N)
        images_NHWC[self.flipped_N] = images_NHWC[self.flipped_N, :, ::-1]
        return torch.from_numpy(images_NHWC).permute(0, 3, 1, 2)
