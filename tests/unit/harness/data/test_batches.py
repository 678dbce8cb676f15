"""The data stream of a run, recomputed slowly from its definition, and its split over processes.

Shapes: N images, C channels, H W latent height and width, T tokens, Z encoder width.
"""

import hashlib
import threading
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from harness.data import cache
from harness.data.batches import AHEAD, Batch, BatchSource, Shard
from harness.data.image_set import ImageSet
from harness.data.prepare import Encoded, PreparedData
from harness.errors import UserError
from harness.frozen.autoencoder import Autoencoder
from harness.method import Needs
from harness.rng import stream
from harness.training.trainer import extend_chain

SEED, BATCH_SIZE, LABEL_DROP = 3, 6, 0.4
NUM_IMAGES, NUM_CLASSES = 23, 3
TRAIN_ROWS = np.array([0, 2, 3, 5, 7, 8, 11, 13, 14, 17, 19, 20, 22])
SHAPE_CHW = (4, 2, 2)
SCALING, SHIFT = 0.7, 0.25


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    """Small random data; the autoencoder has a shift, which the shipped one has not."""
    generator = np.random.default_rng(5)
    autoencoder = Autoencoder.load("digits", "cpu")
    autoencoder.scaling, autoencoder.shift = SCALING, SHIFT

    def stored(name: str, values: np.ndarray) -> cache.Sharded:
        folder = tmp_path_factory.mktemp(name) / name
        return cache.build(folder, {}, len(values), values.shape[1:], values.dtype, lambda a, b: values[a:b])

    moments = generator.normal(size=(NUM_IMAGES, 8, 2, 2)).astype(np.float32)
    moments[:, 4:] = np.abs(moments[:, 4:])
    return PreparedData(
        images=ImageSet(
            images=generator.integers(0, 256, (NUM_IMAGES, 8, 8, 3), dtype=np.uint8),
            labels=generator.integers(0, NUM_CLASSES, NUM_IMAGES),
            class_names=("a", "b", "c"),
            digest="",
        ),
        train_rows=TRAIN_ROWS,
        holdout_rows=np.setdiff1d(np.arange(NUM_IMAGES), TRAIN_ROWS),
        moments=stored("moments", moments),
        tokens={"eyes": stored("tokens", generator.normal(size=(NUM_IMAGES, 4, 5)).astype(np.float16))},
        autoencoder=autoencoder,
        digests={},
    )


@pytest.fixture
def source(prepared: PreparedData) -> Callable[..., BatchSource]:
    def build(needs: Needs | None = None, shard: Shard | None = None, label_drop: float = LABEL_DROP) -> BatchSource:
        return BatchSource(prepared, SEED, BATCH_SIZE, label_drop, needs or Needs(), shard or Shard())

    return build


def slow_rows(step: int) -> list[int]:
    """One endless sequence of random orders of the training images, read position by position."""
    rows = []
    for position in range(step * BATCH_SIZE, (step + 1) * BATCH_SIZE):
        epoch, place = position // len(TRAIN_ROWS), position % len(TRAIN_ROWS)
        order = torch.randperm(len(TRAIN_ROWS), generator=stream(SEED, "data", epoch))
        rows.append(int(TRAIN_ROWS[order[place]]))
    return rows


def slow_labels(prepared: PreparedData, step: int) -> list[int]:
    """The image's class, or the class count where its own uniform number is below the drop probability."""
    uniform = torch.rand(BATCH_SIZE, generator=stream(SEED, "label_drop", step)).tolist()
    classes = [int(prepared.images.labels[row]) for row in slow_rows(step)]
    return [NUM_CLASSES if u < LABEL_DROP else c for u, c in zip(uniform, classes, strict=True)]


def draws(step: int) -> tuple[Tensor, Tensor, Tensor]:
    """Times, noise and posterior noise of the global batch."""
    shape = (BATCH_SIZE, *SHAPE_CHW)
    return (
        torch.rand(BATCH_SIZE, generator=stream(SEED, "time", step)),
        torch.randn(shape, generator=stream(SEED, "noise", step)),
        torch.randn(shape, generator=stream(SEED, "latent", step)),
    )


def slow_digest(prepared: PreparedData, step: int) -> bytes:
    t_N, noise_NCHW, latent_noise_NCHW = draws(step)
    parts = [
        np.array(slow_rows(step), dtype=np.int64).tobytes(),
        t_N.numpy().tobytes(),
        noise_NCHW.numpy().tobytes(),
        np.array(slow_labels(prepared, step), dtype=np.int64).tobytes(),
        latent_noise_NCHW.numpy().tobytes(),
    ]
    return hashlib.sha256(b"".join(parts)).digest()


def assert_same(a: Batch, b: Batch) -> None:
    for name in ("x0_NCHW", "x0_mean_NCHW", "noise_NCHW", "t_N", "labels_N"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name
    assert (a.step, a.first_row, a.digest) == (b.step, b.first_row, b.digest)


# Steps 2 and 4 reach over the end of a pass (13 images, 6 a step).
@pytest.mark.parametrize("step", [0, 1, 2, 4, 100])
def test_a_batch_against_a_slow_recomputation(
    source: Callable[..., BatchSource], prepared: PreparedData, step: int
) -> None:
    batch = source().batch(step)
    t_N, noise_NCHW, latent_noise_NCHW = draws(step)
    assert torch.equal(batch.t_N, t_N)
    assert torch.equal(batch.noise_NCHW, noise_NCHW)
    assert batch.labels_N.tolist() == slow_labels(prepared, step)
    for image, row in enumerate(slow_rows(step)):
        moments = prepared.moments.rows(np.array([row]))[0].astype(np.float64)
        for c, h, w in np.ndindex(*SHAPE_CHW):
            mean, std = moments[c, h, w], moments[c + 4, h, w]
            n = float(latent_noise_NCHW[image, c, h, w])
            assert float(batch.x0_NCHW[image, c, h, w]) == pytest.approx(((mean + std * n) - SHIFT) * SCALING, abs=1e-6)
            assert float(batch.x0_mean_NCHW[image, c, h, w]) == pytest.approx((mean - SHIFT) * SCALING, abs=1e-6)
    assert batch.digest == slow_digest(prepared, step)


def test_every_image_is_seen_once_before_any_is_seen_twice() -> None:
    """The slow definition itself: 13 steps of 6 are 6 whole passes over 13 images."""
    seen = [row for step in range(13) for row in slow_rows(step)]
    for start in range(0, len(seen), len(TRAIN_ROWS)):
        assert sorted(seen[start : start + len(TRAIN_ROWS)]) == TRAIN_ROWS.tolist()


def test_the_trace_is_a_chain_of_step_digests(source: Callable[..., BatchSource], prepared: PreparedData) -> None:
    chain, trace = b"", ""
    for batch in source().batches(0, 3):
        chain = hashlib.sha256(chain + slow_digest(prepared, batch.step)).digest()
        trace = extend_chain(trace, batch.digest)
        assert trace == chain.hex()


@pytest.mark.parametrize("num_processes", [2, 3, 6])
def test_shards_together_are_the_batch_of_one_process(source: Callable[..., BatchSource], num_processes: int) -> None:
    needs = Needs(images=True, encoders=("eyes",))
    whole = source(needs).batch(2)
    parts = [source(needs, Shard(rank=rank, num_processes=num_processes)).batch(2) for rank in range(num_processes)]
    for name in ("x0_NCHW", "x0_mean_NCHW", "noise_NCHW", "t_N", "labels_N", "images_NCHW"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name)), name
    assert torch.equal(torch.cat([part.tokens["eyes"] for part in parts]), whole.tokens["eyes"])
    assert {part.digest for part in parts} == {whole.digest}
    share = BATCH_SIZE // num_processes
    assert [part.first_row for part in parts] == [share * rank for rank in range(num_processes)]
    assert [len(part) for part in parts] == [share] * num_processes


def test_prefetched_batches_equal_direct_calls(source: Callable[..., BatchSource]) -> None:
    prefetched = list(source().batches(3, 8))
    assert [batch.step for batch in prefetched] == [3, 4, 5, 6, 7]
    for batch in prefetched:
        assert_same(batch, source().batch(batch.step))


def test_a_prefetch_that_is_left_early_ends_its_thread(source: Callable[..., BatchSource]) -> None:
    made: list[int] = []
    batches = source()
    make = batches.batch

    def counted(step: int) -> Batch:
        made.append(step)
        return make(step)

    batches.batch = counted  # type: ignore[method-assign]
    stream_of_batches = batches.batches(0, 100)
    next(stream_of_batches)
    stream_of_batches.close()  # type: ignore[attr-defined]
    assert set(made) <= set(range(1 + AHEAD))


def test_few_batches_are_ahead_of_the_one_in_use(source: Callable[..., BatchSource]) -> None:
    """A batch with tokens may take 100 MB."""
    batches, made = source(), []
    make = batches.batch
    batches.batch = lambda step: made.append(step) or make(step)  # type: ignore[assignment,func-returns-value]
    for batch in batches.batches(0, 12):
        assert batch.step + 1 <= len(made) <= batch.step + 1 + AHEAD
    assert sorted(made) == list(range(12))


def test_batches_for_a_gpu_are_pinned_by_threads_that_are_on_it(
    prepared: PreparedData, monkeypatch: pytest.MonkeyPatch
) -> None:
    pinned: set[int] = set()
    on: list[tuple[str, torch.device]] = []

    def pin(tensor: Tensor) -> Tensor:
        copy = tensor.clone()
        pinned.add(copy.data_ptr())
        return copy

    monkeypatch.setattr(Tensor, "pin_memory", pin)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: on.append((threading.current_thread().name, device)))
    gpu, needs = torch.device("cuda", 3), Needs(images=True, encoders=("eyes",))
    for device in (torch.device("cpu"), gpu):
        source = BatchSource(prepared, SEED, BATCH_SIZE, LABEL_DROP, needs, Shard(), device)
        (batch,) = source.batches(2, 3)
        assert_same(batch, BatchSource(prepared, SEED, BATCH_SIZE, LABEL_DROP, needs, Shard()).batch(2))
        tensors = [value for value in (*vars(batch).values(), *batch.tokens.values()) if isinstance(value, Tensor)]
        assert len(tensors) == 7
        assert {tensor.data_ptr() in pinned for tensor in tensors} == {device is gpu}
    assert on and all(name.startswith("batches") and device == gpu for name, device in on)


def test_an_error_of_the_prefetch_thread_reaches_the_loop(
    source: Callable[..., BatchSource], prepared: PreparedData, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = source()
    iterator = batches.batches(0, 5)
    next(iterator)

    def damaged(rows: np.ndarray) -> np.ndarray:
        raise UserError("shard-00000.npy is damaged")

    monkeypatch.setattr(prepared.moments, "rows", damaged)
    with pytest.raises(UserError, match="is damaged"):
        list(iterator)


def test_tokens_and_images_come_only_when_needed(source: Callable[..., BatchSource], prepared: PreparedData) -> None:
    plain, full = source().batch(1), source(Needs(images=True, encoders=("eyes",))).batch(1)
    assert plain.tokens == {}
    assert plain.images_NCHW is None
    assert full.images_NCHW is not None
    for image, row in enumerate(slow_rows(1)):
        pixels_HWC = prepared.images.rows(np.array([row]))[0]
        assert np.array_equal(full.images_NCHW[image].permute(1, 2, 0).numpy(), pixels_HWC)
        assert np.array_equal(full.tokens["eyes"][image].numpy(), prepared.tokens["eyes"].rows(np.array([row]))[0])
    assert plain.digest == full.digest, "what a method needs may not change the trace"


@pytest.mark.parametrize("label_drop", [0.0, 0.1, 0.5])
def test_labels_are_dropped_at_the_asked_rate(source: Callable[..., BatchSource], label_drop: float) -> None:
    num_steps = 300
    labels = torch.cat([batch.labels_N for batch in source(label_drop=label_drop).batches(0, num_steps)])
    rate = float((labels == NUM_CLASSES).float().mean())
    deviation = (label_drop * (1 - label_drop) / (num_steps * BATCH_SIZE)) ** 0.5
    assert abs(rate - label_drop) <= 4 * deviation


def test_the_digest_sees_every_part(prepared: PreparedData) -> None:
    """Another seed, step, size or drop rate is another trace."""

    def digest(seed: int = SEED, size: int = BATCH_SIZE, drop: float = LABEL_DROP, step: int = 0) -> bytes:
        return BatchSource(prepared, seed, size, drop, Needs(), Shard()).batch(step).digest

    assert len({digest(), digest(seed=4), digest(size=12), digest(drop=0.9), digest(step=1)}) == 5


# -- flips ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def flipping(prepared: PreparedData, tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    """With mirror images whose moments and tokens are of their own, not flipped ones."""

    def stored(name: str, values: np.ndarray) -> cache.Sharded:
        folder = tmp_path_factory.mktemp(name) / name
        return cache.build(folder, {}, len(values), values.shape[1:], values.dtype, lambda a, b: values[a:b])

    everything = np.arange(NUM_IMAGES)
    moments, tokens = prepared.moments.rows(everything) + 100, prepared.tokens["eyes"].rows(everything) + 100
    mirrored = Encoded(moments=stored("mirrored", moments), tokens={"eyes": stored("mirrored-tokens", tokens)})
    return replace(prepared, mirrored=mirrored)


def flips(step: int) -> list[bool]:
    return (torch.rand(BATCH_SIZE, generator=stream(SEED, "flip", step)) < 0.5).tolist()


@pytest.mark.parametrize("step", [0, 2, 7])
def test_a_flipped_row_has_latent_tokens_and_picture_of_the_mirror_image(
    prepared: PreparedData, flipping: PreparedData, step: int
) -> None:
    needs = Needs(images=True, encoders=("eyes",))
    plain, flipped = (
        BatchSource(each, SEED, BATCH_SIZE, LABEL_DROP, needs, Shard()).batch(step) for each in (prepared, flipping)
    )
    assert plain.images_NCHW is not None and flipped.images_NCHW is not None
    drawn = flips(step)
    assert True in drawn and False in drawn
    for image, is_flipped in enumerate(drawn):
        far = 100 if is_flipped else 0
        # The mirror image's moments are 100 more: mean and std, so 100 * (1 + noise) more, times the scaling.
        noise = draws(step)[2][image]
        more = flipped.x0_NCHW[image] - plain.x0_NCHW[image]
        torch.testing.assert_close(more, far * (1 + noise) * SCALING, atol=1e-3, rtol=1e-4)
        more = flipped.x0_mean_NCHW[image] - plain.x0_mean_NCHW[image]
        torch.testing.assert_close(more, torch.full_like(more, far * SCALING), atol=1e-3, rtol=0)
        expected = prepared.tokens["eyes"].rows(np.array(slow_rows(step)[image : image + 1]))[0] + np.float16(far)
        assert np.array_equal(flipped.tokens["eyes"][image].numpy(), expected)
        picture = plain.images_NCHW[image].numpy()
        assert np.array_equal(flipped.images_NCHW[image].numpy(), picture[:, :, ::-1] if is_flipped else picture)


def test_flips_shift_no_other_draw_and_stand_in_the_trace(prepared: PreparedData, flipping: PreparedData) -> None:
    plain, flipped = (
        BatchSource(each, SEED, BATCH_SIZE, LABEL_DROP, Needs(), Shard()).batch(3) for each in (prepared, flipping)
    )
    for name in ("noise_NCHW", "t_N", "labels_N"):
        assert torch.equal(getattr(plain, name), getattr(flipped, name)), name
    t_N, noise_NCHW, latent_noise_NCHW = draws(3)
    parts = [np.array(slow_rows(3)), t_N.numpy(), noise_NCHW.numpy(), np.array(slow_labels(prepared, 3))]
    parts += [latent_noise_NCHW.numpy(), np.array(flips(3), dtype=np.uint8)]
    assert flipped.digest == hashlib.sha256(b"".join(part.tobytes() for part in parts)).digest()


def test_processes_share_the_flips_of_the_global_batch(flipping: PreparedData) -> None:
    needs = Needs(images=True, encoders=("eyes",))
    whole, *parts = (
        BatchSource(flipping, SEED, BATCH_SIZE, LABEL_DROP, needs, shard).batch(2)
        for shard in (Shard(), *(Shard(rank=rank, num_processes=3) for rank in range(3)))
    )
    for name in ("x0_NCHW", "x0_mean_NCHW", "images_NCHW"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name)), name
    assert torch.equal(torch.cat([part.tokens["eyes"] for part in parts]), whole.tokens["eyes"])


def test_half_of_the_images_are_flipped(flipping: PreparedData) -> None:
    source = BatchSource(flipping, SEED, BATCH_SIZE, LABEL_DROP, Needs(), Shard())
    rate = np.mean([source.batch(step).x0_mean_NCHW.mean(dim=(1, 2, 3)).numpy() > 50 * SCALING for step in range(300)])
    assert abs(rate - 0.5) <= 4 * 0.5 / (300 * BATCH_SIZE) ** 0.5
