"""The estimate of a study: counts, bytes and hours by hand, for the papers' S/2 and for the embedded data."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from harness.config import DataConfig
from harness.errors import UserError
from harness.machine import ram
from harness.machine.ram import MemoryPart
from studies.configs.cells import comparison
from studies.configs.settings import build_parser, parse
from studies.costs import estimate as module
from studies.costs.estimate import Estimate, Planned, data_outline, estimate

S_GMACS = 6.05
"""Of a forward pass: methods.md section 9."""
S_WEIGHTS = 32_858_896
"""Trained numbers of SiT-S/2 with 4 output channels and 1000 classes: 32.86M."""


def planned(*words: str, runs: int = 1) -> list[Planned]:
    parser = build_parser("compare", "")
    return [Planned(config=cell, runs=runs) for cell in comparison(parser, parse(parser, words)).cells]


def told(what: str, done: int, total: int) -> None:
    """A report that nobody reads."""


def estimated(cells: Sequence[Planned], tflops: float = 100.0) -> Estimate:
    return estimate(cells, tflops, told)


@pytest.fixture(scope="module")
def guided() -> Estimate:
    """The guided preset with a small backbone and the shipped autoencoder: 128 pixels give the latents 32 x 32 x 4."""
    small = ("--model.name", "SiT-S/2", "--autoencoder.path", "digits", "--data.image_size", "128")
    return estimated(planned("--config", "imagenet256-xl2-cfg", *small, "--methods", "sit,repa,vae_repa", runs=3))


@pytest.fixture(scope="module")
def digits() -> Estimate:
    return estimated(planned("--config", "digits", "--methods", "sit,sra"))


# -- operations -----------------------------------------------------------------------------------------------------


def test_training_of_s(guided: Estimate) -> None:
    """2 x 3 x 6.05 GMACs an image; 4M steps of 256. VAE-REPA's head has 0.53 GMACs, REPA's 1.68."""
    sit, repa, vae_repa = guided.cells
    assert [cell.cell for cell in guided.cells] == ["sit", "repa", "vae_repa"]
    assert sit.train_gflops_per_image == pytest.approx(6 * S_GMACS, abs=0.03)
    assert repa.train_gflops_per_image == pytest.approx(6 * (S_GMACS + 1.68), abs=0.06)
    assert vae_repa.train_gflops_per_image == pytest.approx(6 * (S_GMACS + 0.53), abs=0.06)
    assert sit.steps == 4_000_000 and sit.runs == 3
    assert sit.train_gflops == pytest.approx(4e6 * 256 * sit.train_gflops_per_image)


def test_sampling_of_s(guided: Estimate) -> None:
    """The curve: 8 x 5,000 images of 50 passes. The final: 50,000 of 422, as 172 of 250 steps start at or below 0.7."""
    for cell in guided.cells:
        assert cell.evaluations == 8
        assert cell.evaluation_gflops == pytest.approx(8 * 5_000 * 50 * 2 * S_GMACS, rel=0.01)
        assert cell.final_gflops == pytest.approx(50_000 * 422 * 2 * S_GMACS, rel=2e-3)


def forward_macs(tokens: int, width: int, depth: int, numbers: int) -> int:
    """Patch and time embedding, blocks (12 D^2 a token, attention 2 T^2 D, modulation 6 D^2), the final layer."""
    block = 12 * tokens * width**2 + 2 * tokens**2 * width + 6 * width**2
    ends = 2 * tokens * numbers * width + 256 * width + 3 * width**2
    return depth * block + ends


def digits_decoder_macs() -> int:
    """The shipped decoder on 8 x 8 x 4: channels 32, 32, 16, two residual layers a resolution."""

    def conv(size: int, inputs: int, outputs: int, kernel: int = 3) -> int:
        return size * size * inputs * outputs * kernel**2

    def residual(size: int, inputs: int, outputs: int) -> int:
        skip = conv(size, inputs, outputs, 1) if inputs != outputs else 0
        return conv(size, inputs, outputs) + conv(size, outputs, outputs) + skip

    middle = 2 * residual(8, 32, 32) + 4 * 64 * 32**2 + 2 * 64**2 * 32
    first = 2 * residual(8, 32, 32) + conv(16, 32, 32)
    second = residual(16, 32, 16) + residual(16, 16, 16) + conv(32, 16, 16)
    third = 2 * residual(32, 16, 16)
    return conv(8, 4, 4, 1) + conv(8, 4, 32) + middle + first + second + third + conv(32, 16, 3)


def test_an_evaluation_to_the_last_operation(digits: Estimate) -> None:
    """898 samples of 6 Euler steps and a decoding, and 256 held-out images at 4 times."""
    forward = forward_macs(tokens=16, width=128, depth=6, numbers=16)
    one = 2 * (898 * (6 * forward + digits_decoder_macs()) + 256 * 4 * forward) / 1e9
    sit = digits.cells[0]
    assert sit.evaluation_gflops == pytest.approx(3 * one, rel=1e-12)
    assert sit.train_gflops == pytest.approx(420 * 32 * 6 * forward / 1e9, rel=1e-12)
    assert sit.final_gflops == 0


EVEN = ("--evaluation.spacing", "even", "--evaluation.points")


def test_a_point_that_is_left_out_costs_nothing() -> None:
    (cell,) = estimated(planned("--config", "digits", "--methods", "sit", *EVEN, "20")).cells
    assert cell.evaluations == 19


@pytest.mark.parametrize(("unit", "amount"), [("images", 320), ("train_gflops", 1.15), ("seconds", 11.4)])
def test_budgets_in_other_units(unit: str, amount: float) -> None:
    """A step of 32 images costs 0.1229 GFLOPs an image, 3.93 in all; 1 GFLOP/s makes 11.4 s of it 3 steps."""
    words = ("--budget.unit", unit, "--budget.amount", str(amount))
    (cell,) = estimated(planned("--config", "digits", "--methods", "sit", *words), tflops=1e-3).cells
    step = 32 * 6 * forward_macs(16, 128, 6, 16) / 1e9
    assert step == pytest.approx(3.84, abs=0.2)
    assert cell.steps == {"images": 10, "train_gflops": 1, "seconds": 3}[unit]
    assert cell.train_gflops == pytest.approx(cell.steps * step)


# -- disk and memory ------------------------------------------------------------------------------------------------


def test_what_runs_of_s_keep(guided: Estimate) -> None:
    """Fixed positions, 256 x 384 numbers, stand in every state and have no moments."""
    sit, _, vae_repa = guided.cells
    whole, trained = S_WEIGHTS + 256 * 384, S_WEIGHTS
    assert sit.disk == {
        "checkpoints": 4 * (2 * whole + 2 * trained),
        "EMA backbones": 8 * 4 * whole,
        "samples": 9 * 30 * 3 * 128**2,
    }
    # Five layers, 384-768-768-768-768-16.
    head = 385 * 768 + 3 * 769 * 768 + 769 * 16
    assert vae_repa.disk["checkpoints"] - sit.disk["checkpoints"] == 4 * 3 * head


def test_memory_of_s(guided: Estimate) -> None:
    """20 bytes a weight, and 2 of a copy in bf16; of 64 images' 256 tokens 12 blocks keep 384 x (4 x 4 + 16 x 2) bytes
    and little more. In RAM: Inception's features (pooled and spatial) and pixels of all samples, as parts and together,
    the samples of two rounds, and the times of 250 steps."""
    block = 384 * (4 * 4 + 16 * 2)
    found = guided.cells[0].memory
    assert found["device"] == pytest.approx(22 * S_WEIGHTS + 64 * 256 * 12 * block, rel=0.03)
    assert found["ram"] == 2 * 50_000 * (2048 + 7 * 17**2 + 64) * 4 + 2 * 64 * 3 * 128**2 + 250 * 32


def test_checkpointed_activations_take_less_memory_and_a_forward_pass_more() -> None:
    words = ("--config", "digits", "--methods", "sit,sra", "--optimizer.micro_batch", "16")
    plain, less = (
        estimated(planned(*words, "--runtime.checkpoint_activations", word)).cells for word in ("false", "true")
    )
    forward = forward_macs(tokens=16, width=128, depth=6, numbers=16)
    for before, after in zip(plain, less, strict=True):
        assert after.train_gflops == before.train_gflops and before.recomputed_gflops == 0
        assert after.recomputed_gflops == pytest.approx(420 * 32 * 2 * forward / 1e9, rel=1e-12)
        assert after.memory["device"] < before.memory["device"] and after.memory["ram"] == before.memory["ram"]


def test_caches_of_imagenet(guided: Estimate) -> None:
    num = 1_281_167
    assert guided.caches == {
        "images": num * 3 * 128**2,
        "moments": num * 8 * 32 * 32 * 4,
        "tokens-dinov2_vitb14": num * 256 * 768 * 2,
        "reference features": 10_000 * (2048 + 7 * 17 * 17 + 64) * 4,
    }
    assert (guided.num_images, guided.num_classes) == (num, 1000)
    # DINOv2-B at 224: 23.16 GMACs; the small autoencoder is not nothing.
    assert guided.cache_gflops == pytest.approx(num * 2 * 23.16, rel=0.1) and guided.cache_gflops > num * 2 * 23.16


def test_caches_of_the_digits(digits: Estimate) -> None:
    assert digits.caches == {"moments": 1797 * 8 * 8 * 8 * 4, "reference features": 899 * (1280 + 64) * 4}
    assert digits.assumptions == ()


def test_moments_that_are_there_are_not_made(tmp_path: Path) -> None:
    given = ("--data.name", "preprocessed", "--data.path", str(tmp_path / "images"), "--methods", "sit")
    small = ("--model.name", "SiT-pico/2", "--autoencoder.path", "digits", "--data.image_size", "128")
    words = ("--config", "imagenet256-b2", *small, *given)
    bare = estimated(planned(*words))
    mirrored = estimated(planned(*words, "--data.latents", str(tmp_path / "vae-sd"), "--data.flip", "true"))
    assert list(bare.caches) == ["moments", "reference features"]
    assert list(mirrored.caches) == ["moments-mirrored", "reference features"]
    assert mirrored.cache_gflops == bare.cache_gflops > 0, "one picture of two has its moments"


# -- assumptions and the rate ---------------------------------------------------------------------------------------


def test_what_is_not_here_is_assumed_and_said(guided: Estimate) -> None:
    data, reference = guided.assumptions
    assert data == ("data.path imagenet/train is not here: 1,281,167 images of 1,000 classes, as in ImageNet-1k")
    assert reference == "evaluation.reference is not opened: 10,000 images, as in ADM's batches"


def test_data_that_are_here_are_listed(tmp_path: Path) -> None:
    for name in ("a/1.png", "a/2.png", "b/1.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    outline, assumed = data_outline(DataConfig(name="imagefolder", path=str(tmp_path)))
    assert (outline.num_images, outline.num_classes, assumed) == (3, 2, ())


def test_hours_are_operations_at_the_rate(digits: Estimate) -> None:
    """100 TFLOP/s are 360 million GFLOPs an hour."""
    assert digits.rate.tflops == 100 and digits.rate.source == "given"
    assert digits.rate.hours(3.6e8) == pytest.approx(1.0)


def test_the_rate_is_that_of_the_fastest_forward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Passes of 2 images that take 3, 0.5 and 2 seconds; after them 4 seconds are over."""
    clock = iter([0.0, 3.0, 3.0, 3.5, 3.5, 5.5])
    monkeypatch.setattr(module.time, "perf_counter", lambda: next(clock))
    found = estimated(planned("--config", "digits", "--methods", "sit"), tflops=0).rate
    forward = forward_macs(16, 128, 6, 16) / 1e9
    assert found.tflops == pytest.approx(2 * forward * 2 / 0.5 / 1000)
    what = "the fastest of 3 forward passes of SiT-nano/2, 2 images each, in fp32 on cpu"
    assert found.source == f"measured here: {what}"


def test_a_backbone_that_cannot_be_measured_here(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(parts: Sequence[MemoryPart], device: object) -> None:
        raise UserError(parts[0].way_out)

    monkeypatch.setattr(ram, "check", refuse)
    with pytest.raises(UserError, match="give --tflops, the sustained rate of the machine that you mean"):
        estimated(planned("--config", "digits", "--methods", "sit"), tflops=0)


def test_wrong_settings_are_refused_before_anything_is_counted() -> None:
    def config(*words: str) -> list[Planned]:
        return planned("--config", "digits", "--methods", "sit,repa", *words)

    with pytest.raises(UserError, match=r"repa\.block is 7: the backbone has blocks 1 to 6"):
        estimated(config("--repa.block", "7"))
    with pytest.raises(UserError, match=r"data\.image_size is 36: its latent of 9 x 9 cannot be cut"):
        estimated(config("--data.image_size", "36"))
