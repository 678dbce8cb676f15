"""Generated images: what they depend on, and what they do not."""

import copy

import numpy as np
import pytest
import torch

from harness.backbones.sit import SiT
from harness.config import EvaluationConfig, RuntimeConfig, SamplerConfig
from harness.evaluation.generate import (
    Summary,
    chunk_bounds,
    generate,
    generate_latents,
    generate_rounds,
    inference,
    labels_for,
)
from harness.machine.processes import open_accelerator
from harness.rng import global_state_kept, stream

CPU = torch.device("cpu")
EULER = SamplerConfig(kind="ode-euler", num_steps=3)
SDE = SamplerConfig(kind="sde-euler-maruyama", num_steps=3)


class Decoder:
    """Stands for the autoencoder: three latent channels are the colours."""

    def decode(self, latents_NCHW):
        return ((latents_NCHW.float() + 2) * 50).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()


def config(**fields) -> EvaluationConfig:
    return EvaluationConfig(**{"sampler": EULER, "chunk": 4, "precision": "fp32", **fields})


@pytest.fixture(scope="module")
def backbone() -> SiT:
    """A backbone with an output: all its weights are drawn, none is zero."""
    with global_state_kept():
        model = SiT(4, 2, 3, hidden_size=16, depth=1, num_heads=2, num_classes=3)
    generator = stream(0, "init")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def collect(backbone, settings, num, chunks=None) -> dict[int, torch.Tensor]:
    found = {}
    for start, latents in generate_latents(backbone, settings, num, CPU, chunks):
        found |= {start + offset: latent for offset, latent in enumerate(latents)}
    return found


def test_chunks_are_fixed_and_the_last_is_short():
    assert chunk_bounds(10, 4) == [(0, 4), (4, 8), (8, 10)]
    assert chunk_bounds(8, 4) == [(0, 4), (4, 8)]


def test_labels_are_balanced_by_index():
    assert labels_for(4, 9, 3).tolist() == [1, 2, 0, 1, 2]


@pytest.mark.parametrize("sampler", [EULER, SDE], ids=["ode", "sde"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_samples_do_not_depend_on_who_makes_which_chunk(backbone, sampler, precision):
    settings = config(sampler=sampler, precision=precision)
    alone = collect(backbone, settings, 10)
    backwards = collect(backbone, settings, 10, chunks=[2, 1, 0])
    two_processes = collect(backbone, settings, 10, chunks=[0, 2]) | collect(backbone, settings, 10, chunks=[1])
    assert sorted(alone) == list(range(10))
    for other in (backwards, two_processes):
        assert all(torch.equal(alone[i], other[i]) for i in range(10))


def test_an_image_does_not_depend_on_the_number_of_images(backbone):
    few, many = collect(backbone, config(sampler=SDE), 8), collect(backbone, config(sampler=SDE), 12)
    assert all(torch.equal(few[i], many[i]) for i in few)


def test_an_image_depends_on_chunk_size_in_the_last_bits_only(backbone):
    whole, parts = collect(backbone, config(sampler=SDE), 6), collect(backbone, config(sampler=SDE, chunk=1), 6)
    assert all(torch.allclose(whole[i], parts[i], atol=1e-5) for i in whole)


def test_seeds_give_other_images(backbone):
    assert not torch.equal(collect(backbone, config(), 1)[0], collect(backbone, config(seed=1), 1)[0])


def untrained() -> SiT:
    """Its output is exactly zero."""
    with global_state_kept():
        return SiT(4, 2, 3, hidden_size=16, depth=1, num_heads=2, num_classes=3)


def test_start_noise_is_the_first_draw_of_the_image():
    """Velocity 0 and an ODE: the latents are the noise."""
    latents = collect(untrained(), config(), 6)
    for i in range(6):
        assert torch.equal(latents[i], torch.randn((3, 4, 4), generator=stream(0, "eval", i), dtype=torch.float64))


def test_sde_noise_goes_on_with_the_image_s_stream():
    """Velocity 0: every step is x += x dt + sqrt(2 t |dt|) n, at times 1, 0.52, 0.04, 0."""
    latents = collect(untrained(), config(sampler=SDE), 6)
    for i in range(6):
        generator = stream(0, "eval", i)
        x, first, second = (torch.randn((3, 4, 4), generator=generator, dtype=torch.float64) for _ in range(3))
        x = x * (1 - 0.48) + (2 * 1 * 0.48) ** 0.5 * first
        x = x * (1 - 0.48) + (2 * 0.52 * 0.48) ** 0.5 * second
        assert torch.allclose(latents[i], x * (1 - 0.04), atol=1e-12)


def test_images_are_the_decoded_latents(backbone):
    latents = collect(backbone, config(), 6)
    parts = dict(generate(backbone, Decoder(), config(), 6, CPU))
    assert sorted(parts) == [0, 4]
    assert np.array_equal(parts[4], Decoder().decode(torch.stack([latents[4], latents[5]])))
    assert parts[0].dtype == np.uint8 and parts[0].shape == (4, 4, 4, 3)


def test_rounds_go_on_from_any_chunk(backbone):
    """Chunks of 4 of 10 images: the last one is short."""
    accelerator = open_accelerator(RuntimeConfig(device="cpu"))
    whole = list(generate_rounds(backbone, Decoder(), config(), 10, accelerator))
    rest = list(generate_rounds(backbone, Decoder(), config(), 10, accelerator, done=4))
    assert [part.start for part in whole] == [0, 4, 8] and [part.start for part in rest] == [4, 8]
    for one, other in zip(whole[1:], rest, strict=True):
        assert np.array_equal(one.images_NHWC, other.images_NHWC)
    assert len(rest[-1].images_NHWC) == 2 and sum(part.bad_images for part in whole) == 0
    assert all(part.sampling_s > 0 and part.decoding_s > 0 for part in whole)


def test_of_rounds_the_first_images_and_sums_are_kept(backbone):
    """Chunks of 4 of 10 images, of which those of class 1 are not finite: 1, 4, 7."""
    accelerator = open_accelerator(RuntimeConfig(device="cpu"))
    broken = copy.deepcopy(backbone)
    with torch.no_grad():
        broken.y_embedder.embedding_table.weight[1] = float("nan")
    whole = list(generate_rounds(broken, Decoder(), config(), 10, accelerator))
    images_NHWC = np.concatenate([part.images_NHWC for part in whole])
    for num, kept in ((0, 0), (3, 3), (5, 5), (99, 10)):
        made = Summary(num)
        assert np.array_equal(np.concatenate(list(made.of(whole))), images_NHWC)
        assert len(made.first) == kept and np.array_equal(made.first, images_NHWC[:kept] if kept else [])
        assert all(image_HWC.base is None for image_HWC in made.first), "a view would keep the whole round"
        assert made.bad_images == 3
        assert made.sampling_s == pytest.approx(sum(part.sampling_s for part in whole))
        assert made.decoding_s == pytest.approx(sum(part.decoding_s for part in whole))


def test_backbone_is_left_as_it_was(backbone):
    for training in (True, False):
        backbone.train(training)
        latents = collect(backbone, config(), 2)
        assert backbone.training is training and not latents[0].requires_grad


def test_backbone_runs_in_eval_mode_and_the_asked_precision(backbone):
    x, t, y = torch.zeros(1, 3, 4, 4), torch.zeros(1), torch.zeros(1, dtype=torch.int64)
    backbone.train()
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        with inference(backbone, precision, CPU):
            assert not backbone.training and backbone(x, t, y)[0].dtype == dtype
