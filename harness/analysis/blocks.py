"""What a trained backbone's blocks represent: alignment with a frozen encoder and with the latents, linear probes, and
pictures of principal components. No method code runs here, and nothing is drawn from global random state.

Blocks see noised latents of real images with the null label (sihyun-yu/REPA#24), so that no label can be read off but
from the image. A record is `analysis/<name>.json`, beside `<name>.npz` with the pictures:

    settings    all that decides the numbers; `protocol` is its digest, and records of two protocols are not compared
    values      a line for every time and source: `block` with its number; `input`, what the blocks see at that time;
                and `encoder`, at no time. Each has of probe_accuracy, cka_encoder, cknna_encoder, cka_latent and
                cknna_latent those that it can have
    pictures    sha256 of the .npz, and for each picture the shares of the variance that its components hold

The .npz holds `images` uint8 [K, H, W, 3] and float32 scores of three components: `encoder` [K, g, g, 3], `latent`
[K, h, w, 3], and `blocks` [times, blocks, K, g, g, 3]. The components of a picture are those of all K images together.

Shapes: N images, K images with pictures, C channels, h w latent height and width, T = g * g tokens, D width of a block,
Z encoder width, P numbers of a patch.
"""

import hashlib
import io
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from harness import flow
from harness.analysis.similarity import LEAST_IMAGES, Kernel, cka, cknna, principal_components
from harness.backbones.sit import SiT, patchify
from harness.config import require
from harness.data.image_set import evenly_spaced_rows
from harness.data.prepare import PreparedData
from harness.evaluation.generate import chunk_bounds, inference
from harness.frozen import encoders
from harness.frozen.encoders import FrozenEncoder
from harness.machine.progress import OnProgress
from harness.records.files import digest, storing, write_atomic, write_json
from harness.records.schema import FORMAT, AnalysisFacts, AnalysisRecord, AnalysisSettings, AnalysisValues, Origin
from harness.rng import stream

MOST_IMAGES = 10_000
"""Held-out images at most: tables of likeness hold their square, 0.8 GB at this number, and there are a few of them."""
PROBE_STEPS = 1000
"""Iterations of a probe's fit at most."""


@dataclass(frozen=True, kw_only=True)
class AnalysisConfig:
    """The quantities that are computed, and the number of images that they are computed on."""

    encoder: str
    """Frozen encoder that blocks are compared with."""
    blocks: tuple[int, ...] = ()
    """Blocks, counted from 1; () = all of them."""
    times: tuple[float, ...] = (0.1, 0.5, 0.9)
    """Times at which the latents are noised: 0 is data, 1 is noise."""
    images: int = 512
    """Held-out images of alignment and probe scores, evenly spaced; as many as there are where there are fewer."""
    probe_images: int = 1024
    """Training images that probes are fitted on, evenly spaced; 0 = no probe."""
    pictures: int = 3
    """Held-out images with pictures."""
    neighbours: int = 10
    """k of CKNNA."""
    seed: int = 0
    """Seed of the noise."""
    chunk: int = 32
    """Images that go through the networks together; changes memory, and numbers by rounding alone."""

    def __post_init__(self) -> None:
        encoders.spec(self.encoder)
        require(all(block >= 1 for block in self.blocks), f"--blocks {_listed(self.blocks)}: blocks count from 1")
        require(len(set(self.blocks)) == len(self.blocks), f"--blocks {_listed(self.blocks)} names a block twice")
        within = bool(self.times) and all(0 <= t <= 1 for t in self.times)
        require(within, f"--times {_listed(self.times)}: give times from 0 (data) to 1 (noise)")
        require(len(set(self.times)) == len(self.times), f"--times {_listed(self.times)} names a time twice")
        for name in ("pictures", "chunk"):
            require(getattr(self, name) >= 1, f"--{name} is {getattr(self, name)}: give 1 or more images")
        require(self.neighbours >= 2, f"--neighbours is {self.neighbours}: give 2 or more")
        require(self.probe_images >= 0, f"--probe_images is {self.probe_images}: give 0 or more")
        require(0 <= self.seed < 2**63, f"--noise_seed is {self.seed}: give 0 or more, in at most 63 bits")
        least = self.least_images
        ok = least <= self.images <= MOST_IMAGES
        require(ok, f"--images is {self.images}: give {least} to {MOST_IMAGES} with --neighbours {self.neighbours}")

    @property
    def least_images(self) -> int:
        """Held-out images without which there is no alignment."""
        return max(LEAST_IMAGES, self.neighbours + 1)


def _listed(values: Sequence[float]) -> str:
    return ",".join(f"{value:g}" for value in values) or "(none)"


# -- what is seen ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pictured:
    """Pictures of one set of tokens."""

    scores: np.ndarray
    """float32 [K, side, side, 3]."""
    shares: list[float]
    """Share of the variance that each component holds."""

    @classmethod
    def of(cls, tokens_KTD: Tensor) -> "Pictured":
        """Principal components of all tokens of K images together; tokens go row by row."""
        num, tokens, _ = tokens_KTD.shape
        scores, shares = principal_components(tokens_KTD.flatten(0, 1))
        side = math.isqrt(tokens)
        return cls(scores.reshape(num, side, side, -1).float().numpy(), shares.tolist())


@dataclass(frozen=True)
class Seen:
    """Some images as the networks see them."""

    rows: np.ndarray
    """int64 [N], of the data set."""
    labels_N: np.ndarray
    x0_NCHW: Tensor
    """Scaled posterior means, float32, on the CPU."""
    encoded_NZ: Tensor
    """Encoder tokens, their mean over an image, float32, on the CPU."""


@dataclass(frozen=True)
class Subjects:
    """Images, latents and encoder features that every backbone of one setting is analysed with."""

    config: AnalysisConfig
    facts: AnalysisFacts
    """Digests and names of data, autoencoder, encoder and images, as the settings of an analysis have them."""
    held_out: Seen
    train: Seen
    pictured_rows: np.ndarray
    """int64 [K]."""
    pictured_x0_KCHW: Tensor
    pictures: Mapping[str, np.ndarray]
    """`images`, `encoder` and `latent` of the .npz."""
    shares: Mapping[str, list[float]]
    """Share of the variance that each component of `encoder` and `latent` holds."""
    patch_size: int

    @cached_property
    def encoder(self) -> Kernel:
        return Kernel.of(self.held_out.encoded_NZ, self.config.neighbours)

    @cached_property
    def latent(self) -> Kernel:
        """The likeness of the images by their clean latents, each the mean over its patches."""
        return Kernel.of(patchify(self.held_out.x0_NCHW, self.patch_size).mean(dim=1), self.config.neighbours)

    @property
    def has_probe(self) -> bool:
        """Whether the images have two classes or more, which a probe can tell apart."""
        return len(np.unique(self.train.labels_N)) > 1


def gather(
    prepared: PreparedData, config: AnalysisConfig, patch_size: int, device: torch.device, on_progress: OnProgress
) -> Subjects:
    """Read the images, and run the encoder on them.

    Raises:
        UserError: for missing weights of the encoder, or fewer held-out images than `neighbours` asks for.
    """
    num_held_out, least = len(prepared.holdout_rows), config.least_images
    require(
        num_held_out >= least,
        f"--neighbours is {config.neighbours}: it needs {least} held-out images and data.holdout leaves "
        f"{num_held_out}; give fewer neighbours",
    )
    grid = prepared.moments.shape[-1] // patch_size
    network = FrozenEncoder.load(config.encoder, grid, device)
    held_out = evenly_spaced_rows(prepared.holdout_rows, config.images)
    train = evenly_spaced_rows(prepared.train_rows, config.probe_images)
    pictured = evenly_spaced_rows(held_out, config.pictures)
    images_KHWC = prepared.images.rows(pictured)
    latents_KCHW = _latents(prepared, pictured)
    encoder = Pictured.of(network.tokens(_channels_first(images_KHWC)).cpu())
    latent = Pictured.of(patchify(latents_KCHW, 1))
    facts: AnalysisFacts = {
        "data": prepared.images.digest,
        "autoencoder": prepared.autoencoder.digest,
        "encoder": {
            "name": config.encoder,
            "family": encoders.family(config.encoder),
            "digest": network.digest,
        },
        "images": {"num": len(held_out), "rows": digest(held_out.tolist())},
        "probe_images": {"num": len(train), "rows": digest(train.tolist())},
        "pictures": pictured.tolist(),
    }
    return Subjects(
        config=config,
        facts=facts,
        held_out=_see(prepared, held_out, network, config.chunk, on_progress),
        train=_see(prepared, train, network, config.chunk, on_progress),
        pictured_rows=pictured,
        pictured_x0_KCHW=latents_KCHW,
        pictures={"images": images_KHWC, "encoder": encoder.scores, "latent": latent.scores},
        shares={"encoder": encoder.shares, "latent": latent.shares},
        patch_size=patch_size,
    )


def _see(prepared: PreparedData, rows: np.ndarray, network: FrozenEncoder, chunk: int, on_progress: OnProgress) -> Seen:
    encoded = [torch.empty(0, encoders.encoder_width(network.name))]
    for start, stop in chunk_bounds(len(rows), chunk):
        tokens_NTZ = network.tokens(_channels_first(prepared.images.rows(rows[start:stop])))
        encoded.append(tokens_NTZ.mean(dim=1).cpu())
        on_progress(f"features of {network.name}", stop, len(rows))
    return Seen(rows, prepared.images.labels[rows], _latents(prepared, rows), torch.cat(encoded))


def _channels_first(images_NHWC: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(images_NHWC)).permute(0, 3, 1, 2)


def _latents(prepared: PreparedData, rows: np.ndarray) -> Tensor:
    return prepared.autoencoder.latent_means(torch.from_numpy(prepared.moments.rows(rows)))


# -- what the blocks make of it -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Analysis:
    """The result of analysing one backbone."""

    settings: AnalysisSettings
    values: Sequence[AnalysisValues]
    pictures: Mapping[str, np.ndarray]
    """The arrays of the .npz file, by name."""
    shares: Mapping[str, Any]
    """Share of the variance that each component of every picture holds; for blocks as [times][blocks][components]."""


@dataclass(frozen=True)
class Reader:
    """Reads hidden states of a backbone, a chunk of images at a time."""

    backbone: SiT
    """The backbone that is read; it lies on `device`."""
    blocks: tuple[int, ...]
    precision: str
    """fp32 or bf16."""
    device: torch.device
    config: AnalysisConfig

    def hidden(self, xt_NCHW: Tensor, t: float) -> dict[int, Tensor]:
        """Outputs [N, T, D] of the blocks for latents noised to t, float32, on the device."""
        xt_NCHW = xt_NCHW.to(self.device)
        t_N = torch.full((len(xt_NCHW),), t, device=self.device)
        null_N = torch.full((len(xt_NCHW),), self.backbone.num_classes, device=self.device)
        with inference(self.backbone, self.precision, self.device):
            _, hidden = self.backbone(xt_NCHW, t_N, null_N, taps=self.blocks)
        return {block: hidden[block].float() for block in self.blocks}

    def means(self, seen: Seen, t: float, tell: Callable[[int], None]) -> dict[int, Tensor]:
        """Means over tokens, {block: float32 [N, D]}, on the CPU; block 0 is the input, its patches being the tokens.

        `tell` hears of the images done. One chunk's hidden states at a time are in memory.
        """
        parts: dict[int, list[Tensor]] = {0: [], **{block: [] for block in self.blocks}}
        for start, stop in chunk_bounds(len(seen.rows), self.config.chunk):
            x0_NCHW, rows = seen.x0_NCHW[start:stop], seen.rows[start:stop]
            xt_NCHW = noised(x0_NCHW, rows, t, self.config.seed)
            parts[0].append(patchify(xt_NCHW, self.backbone.patch_size).mean(dim=1))
            for block, hidden_NTD in self.hidden(xt_NCHW, t).items():
                parts[block].append(hidden_NTD.mean(dim=1).cpu())
            tell(stop)
        return {block: torch.cat(found) for block, found in parts.items()}

    def inputs(self, seen: Seen, t: float) -> Tensor:
        """All numbers of the noised latents, float32 [N, C*H*W]."""
        return noised(seen.x0_NCHW, seen.rows, t, self.config.seed).flatten(1)


def noised(x0_NCHW: Tensor, rows: np.ndarray, t: float, seed: int) -> Tensor:
    """Latents at time t; the noise of a row depends on (seed, row) alone and is the same at all times."""
    # Two indices, the last one 1: those of generated images and of the velocity loss are (i) and (row, 0).
    draws = [torch.randn(x0_NCHW.shape[1:], generator=stream(seed, "eval", row, 1)) for row in rows.tolist()]
    return flow.interpolate(x0_NCHW, torch.stack(draws), torch.full((len(x0_NCHW),), t))


def analyse(
    backbone: SiT, subjects: Subjects, precision: str, tf32: bool, device: torch.device, on_progress: OnProgress
) -> Analysis:
    """Everything about one backbone.

    Args:
        backbone: the EMA backbone, on `device`; left as it was.
        subjects: what it is analysed with.
        precision: of its forward passes, fp32 or bf16.
        tf32: whether matrix products may use TF32, for the record.
        device: of the backbone.
        on_progress: told about images read and probes fitted.

    Raises:
        UserError: for a block that the backbone does not have.
    """
    config = subjects.config
    blocks = chosen_blocks(config, backbone)
    reader = Reader(backbone, blocks, precision, device, config)
    values = [_encoder_values(subjects)]
    scores, shares = [], []
    for t in config.times:
        values += _values_at(reader, subjects, t, on_progress)
        hidden = reader.hidden(noised(subjects.pictured_x0_KCHW, subjects.pictured_rows, t, config.seed), t)
        pictured = [Pictured.of(hidden[block]) for block in blocks]
        scores.append(np.stack([each.scores for each in pictured]))
        shares.append([each.shares for each in pictured])
    return Analysis(
        settings=_settings(subjects, blocks, precision, tf32),
        values=values,
        pictures={**subjects.pictures, "blocks": np.stack(scores)},
        shares={**subjects.shares, "blocks": shares},
    )


def chosen_blocks(config: AnalysisConfig, backbone: SiT) -> tuple[int, ...]:
    """The blocks that are analysed; `UserError` for one that the backbone does not have."""
    blocks = config.blocks or tuple(range(1, backbone.depth + 1))
    has = f"the backbone has blocks 1 to {backbone.depth}"
    require(max(blocks) <= backbone.depth, f"--blocks {_listed(blocks)}: {has}")
    return blocks


def _settings(subjects: Subjects, blocks: tuple[int, ...], precision: str, tf32: bool) -> AnalysisSettings:
    """All that decides the numbers of a backbone, readable."""
    config = subjects.config
    return {
        **subjects.facts,
        "blocks": list(blocks),
        "times": list(config.times),
        "seed": config.seed,
        "noise": "row r draws from its own stream (seed, eval, r, 1), the same at all times",
        "backbone": "EMA",
        "labels": "null class",
        "latents": "posterior mean",
        "features": "mean over tokens; of the input a probe has all numbers",
        "cka": "linear, unbiased",
        "cknna": {"neighbours": config.neighbours, "estimator": "unbiased", "features": "at length 1"},
        "probe": f"logistic regression on standardised features, C 1, L-BFGS, at most {PROBE_STEPS} iterations",
        "precision": precision,
        "tf32": tf32,
    }


def _encoder_values(subjects: Subjects) -> AnalysisValues:
    """The encoder itself: its alignment with the latents, and what a probe reads off it."""
    found: AnalysisValues = {"source": "encoder", **_alignment(subjects.encoder, {"latent": subjects.latent})}
    if subjects.has_probe:
        found["probe_accuracy"] = _probe(subjects, subjects.train.encoded_NZ, subjects.held_out.encoded_NZ)
    return found


def _values_at(reader: Reader, subjects: Subjects, t: float, on_progress: OnProgress) -> list[AnalysisValues]:
    """The input and every block at one time."""
    held_out, train = subjects.held_out, subjects.train if subjects.has_probe else None
    num = len(held_out.rows) + (len(train.rows) if train else 0)
    means = reader.means(held_out, t, lambda done: on_progress(f"images at t = {t:g}", done, num))
    train_means = {}
    if train:
        train_means = reader.means(
            train, t, lambda done: on_progress(f"images at t = {t:g}", done + len(means[0]), num)
        )
    targets = {"encoder": subjects.encoder, "latent": subjects.latent}
    values: list[AnalysisValues] = []
    for place, (block, features_ND) in enumerate(means.items(), start=1):
        line: AnalysisValues = {"source": "block", "block": block} if block else {"source": "input"}
        line |= {"t": t, **_alignment(Kernel.of(features_ND, subjects.config.neighbours), targets)}
        if train:
            pair = (train_means[block], features_ND) if block else (reader.inputs(train, t), reader.inputs(held_out, t))
            line["probe_accuracy"] = _probe(subjects, *pair)
        values.append(line)
        on_progress(f"features compared at t = {t:g}", place, len(means))
    return values


def _probe(subjects: Subjects, train_ND: Tensor, held_out_ND: Tensor) -> float:
    """Share of the held-out images whose true class is named by a classifier fitted on the training images' features;
    NaN for features that are not finite."""
    from sklearn.exceptions import ConvergenceWarning  # here, because importing scikit-learn takes a second
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    x_ND, y_ND = train_ND.double().numpy(), held_out_ND.double().numpy()
    if not (np.isfinite(x_ND).all() and np.isfinite(y_ND).all()):
        return math.nan
    scaler = StandardScaler().fit(x_ND)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the number of iterations is a part of the settings
        probe = LogisticRegression(C=1.0, max_iter=PROBE_STEPS).fit(scaler.transform(x_ND), subjects.train.labels_N)
    return float(np.mean(probe.predict(scaler.transform(y_ND)) == subjects.held_out.labels_N))


def _alignment(kernel: Kernel, targets: Mapping[str, Kernel]) -> AnalysisValues:
    """CKA and CKNNA with each target, `encoder` or `latent`."""
    values = {f"cka_{name}": cka(kernel, target) for name, target in targets.items()}
    return cast(AnalysisValues, values | {f"cknna_{name}": cknna(kernel, target) for name, target in targets.items()})


# -- the record -----------------------------------------------------------------------------------------------------


def store(analysis: Analysis, folder: Path, name: str, facts: Origin) -> AnalysisRecord:
    """Write `<name>.json` and `<name>.npz` into a folder, each whole or not at all; returns the record.

    The pictures come first, and the record holds their SHA-256: a record that was not replaced does not fit them.

    Args:
        analysis: what is written.
        folder: `analysis` in the folder of the run; made here.
        name: of the files.
        facts: first fields of the record, such as the step.
    """
    with storing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    content = io.BytesIO()
    np.savez_compressed(content, allow_pickle=False, **analysis.pictures)
    write_atomic(folder / f"{name}.npz", content.getvalue())
    record: AnalysisRecord = {
        "format": FORMAT,
        **facts,
        "protocol": digest(analysis.settings),
        "settings": analysis.settings,
        "values": list(analysis.values),
        "pictures": {"sha256": hashlib.sha256(content.getvalue()).hexdigest(), "shares": analysis.shares},
    }
    write_json(folder / f"{name}.json", record)
    return record
