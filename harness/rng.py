"""Named random streams. Every draw is a function of (seed, role, index), so no draw can shift another.

Draws are made on the CPU for the whole global batch: CPU and GPU see the same numbers, and neither the number of
processes nor the splitting of a batch changes them. Nothing here touches the global random state.
"""

import contextlib
import functools
import hashlib
from collections.abc import Iterator

import numpy as np
import torch

ROLES = ("init", "data", "latent", "time", "noise", "label_drop", "flip", "eval", "split", "autoencoder")
"""Roles of the harness; methods draw from `method/<name>/<draw>`."""


def stream(seed: int, role: str, *index: int) -> torch.Generator:
    """A fresh CPU generator for `role` at `index` (a step, an epoch or an image number).

    Args:
        seed: the run's or the evaluation's seed, 0 or more.
        role: one of `ROLES`, or `method/<name>/<draw>`.
        index: non-negative integers that tell draws of one role apart.
    """
    assert role in ROLES or role.startswith("method/"), role
    words = np.frombuffer(hashlib.sha256(role.encode()).digest()[:16], dtype=np.uint32).tolist()
    # The index's length goes in as well: SeedSequence pads with zeros, so (s,) and (s, 0) would collide.
    mixed = np.random.SeedSequence([seed, *words, len(index), *index])
    # torch's CPU generator keeps 32 bits of its seed: of n streams, n^2 / 2^33 pairs are expected to coincide.
    generator = torch.Generator("cpu")
    generator.manual_seed(int(mixed.generate_state(1, np.uint64)[0] >> np.uint64(1)))
    return generator


@contextlib.contextmanager
def global_state_kept() -> Iterator[None]:
    """Restore torch's global CPU random state afterwards: building a `torch.nn` module draws from it."""
    with torch.random.fork_rng(devices=[]):
        yield


@functools.lru_cache(maxsize=4)
def permutation(seed: int, role: str, epoch: int, length: int) -> torch.Tensor:
    """A random order of `length` items, int64, for one pass over them. Kept, because every step of a pass reads it."""
    return torch.randperm(length, generator=stream(seed, role, epoch))


def batch_rows(seed: int, step: int, batch_size: int, num_images: int) -> torch.Tensor:
    """Indices of the images of a step (counted from 0), int64 [batch_size].

    The run reads one endless sequence of random orders of all images; step s reads positions
    s * batch_size ... (s + 1) * batch_size - 1 of it, so every image is seen once before any is seen twice.
    """
    start = step * batch_size
    rows, position = [], start
    while position < start + batch_size:
        epoch, offset = divmod(position, num_images)
        take = min(num_images - offset, start + batch_size - position)
        rows.append(permutation(seed, "data", epoch, num_images)[offset : offset + take])
        position += take
    return torch.cat(rows)
