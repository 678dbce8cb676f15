"""What networks on a CPU gain from memory that is kept when it is freed, with
`harness.machine.environment.keep_freed_memory`.

Every measurement is a process of its own, as what glibc keeps depends on all that it was asked for before; with and
without take turns. Faults are pages that the system had to hand out anew. With two processes each has one thread, and
the images of both count.
"""

import resource
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import numpy as np
import torch

from harness.config import EvaluationConfig, SamplerConfig
from harness.evaluation import extractors
from harness.evaluation.fidelity import Pictures, extract
from harness.evaluation.generate import generate_latents
from harness.frozen.autoencoder import Autoencoder
from harness.frozen.encoders import FrozenEncoder
from harness.machine import environment
from studies.children import CONTEXT, start_server
from tests.benchmarks.evaluation import make_backbone

TITLE = "networks with freed memory kept, against glibc's default"
ROUNDS = 3
WARM_UP, CALLS = 2, 5
IMAGES = 64
PARTS = ("sampling", "features", "tokens", "encoding", "decoding")
"""Of SiT-nano/2 by 6 calls; of EfficientNet-Lite0 at 64 pixels; of EfficientNet-Lite2 for 4 x 4 tokens; the embedded
autoencoder."""
SPLITS = ((1, 1), (1, 2), (2, 1))
"""Processes, and threads of each."""
CPU = torch.device("cpu")


def part(name: str) -> Callable[[], object]:
    """One call of a network on `IMAGES` images."""
    autoencoder = Autoencoder.load("digits", CPU)
    images_NHWC = np.random.default_rng(0).integers(0, 256, (IMAGES, 32, 32, 3), dtype=np.uint8)
    if name == "sampling":
        backbone = make_backbone("SiT-nano/2", autoencoder.latent_shape(32), CPU)
        sampler = SamplerConfig(kind="ode-euler", num_steps=6)
        config = EvaluationConfig(sampler=sampler, chunk=IMAGES, precision="fp32")
        return lambda: list(generate_latents(backbone, config, IMAGES, CPU))
    if name == "features":
        extractor, pictures = extractors.find("efficientnet_lite0", 64), Pictures(lambda i: images_NHWC[i], IMAGES)
        return lambda: extract(extractor, extractor.layers, pictures, CPU)
    if name == "tokens":
        encoder, images_NCHW = FrozenEncoder.load("efficientnet_lite2", 4, CPU), torch.tensor(images_NHWC)
        return lambda: encoder.tokens(images_NCHW.permute(0, 3, 1, 2))
    latents = autoencoder.latent_means(autoencoder.moments(images_NHWC))
    return (lambda: autoencoder.moments(images_NHWC)) if name == "encoding" else lambda: autoencoder.decode(latents)


def run_part(name: str, threads: int, keeps: bool) -> tuple[float, float]:
    """Images/s, the median of `CALLS` calls, and faults an image."""
    torch.set_num_threads(threads)
    if keeps:
        environment.keep_freed_memory()
    call, seconds, faults = part(name), [], 0
    for number in range(WARM_UP + CALLS):
        before, started = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, time.perf_counter()
        call()
        if number >= WARM_UP:
            seconds.append(time.perf_counter() - started)
            faults += resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    return IMAGES / statistics.median(seconds), faults / CALLS / IMAGES


def together(name: str, processes: int, threads: int, keeps: bool) -> tuple[float, float]:
    """Images/s of all processes, and faults an image."""
    start_server()
    with ProcessPoolExecutor(processes, mp_context=CONTEXT) as pool:
        asked = [pool.submit(run_part, name, threads, keeps) for _ in range(processes)]
        found = [one.result() for one in asked]
    return sum(rate for rate, _ in found), statistics.mean(faults for _, faults in found)


def rows() -> Iterator[dict[str, Any]]:
    for name in PARTS:
        for processes, threads in SPLITS:
            turns = [[together(name, processes, threads, keeps) for keeps in (False, True)] for _ in range(ROUNDS)]
            (plain, plain_faults), (kept, kept_faults) = (
                [statistics.median(values) for values in zip(*case, strict=True)] for case in zip(*turns, strict=True)
            )
            ratios = [kept[0] / plain[0] for plain, kept in turns]
            yield {
                "network": name,
                "processes": processes,
                "threads of each": threads,
                "default, images/s": plain,
                "kept, images/s": kept,
                "kept over default": f"{statistics.median(ratios):.3g} [{min(ratios):.3g}, {max(ratios):.3g}]",
                "default, faults an image": plain_faults,
                "kept, faults an image": kept_faults,
            }


def measure() -> list[dict[str, Any]]:
    return list(rows())
