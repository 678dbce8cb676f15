"""The evaluator on small real arrays: striped pictures of three classes, a stand-in autoencoder, a small SiT."""

import json
import random
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch

from harness.backbones.sit import SiT
from harness.config import EvaluationConfig, RuntimeConfig, SamplerConfig
from harness.data.image_set import ImageSet
from harness.data.prepare import PreparedData
from harness.errors import UserError
from harness.evaluation import evaluate as evaluate_module
from harness.evaluation import fidelity
from harness.evaluation.evaluate import Evaluator, velocity_draws, velocity_errors
from harness.evaluation.fidelity import extract
from harness.evaluation.generate import Summary, generate_rounds
from harness.frozen.autoencoder import to_uint8
from harness.machine import processes
from harness.machine.processes import in_thread, open_accelerator
from harness.records.files import digest, file_digest
from harness.records.metrics import metric
from harness.rng import global_state_kept, stream

CPU = torch.device("cpu")
NUM = 48


class BoxAutoencoder:
    """Stands for the autoencoder: latents are the colours of 2 x 2 boxes."""

    digest = "boxes"

    def latent_means(self, moments):
        return moments.chunk(2, dim=1)[0]

    def decode(self, latents_NCHW):
        return to_uint8(latents_NCHW.float().repeat_interleave(2, dim=2).repeat_interleave(2, dim=3))


class Rows:
    """Stands for a cache."""

    def __init__(self, values: torch.Tensor):
        self.values, self.shape = values, tuple(values.shape)

    def rows(self, indices):
        return self.values[torch.from_numpy(indices)].numpy()


def make_data(split: int = 0, num_classes: int = 3) -> PreparedData:
    """Class c has a bright bar at rows 5 c ... 5 c + 4, on noise; even rows train, odd rows are held out."""
    generator = stream(0, "data")
    labels = np.arange(NUM) // 2 % num_classes
    images = torch.randint(0, 60, (NUM, 16, 16, 3), dtype=torch.uint8, generator=generator)
    for image, label in zip(images, labels.tolist(), strict=True):
        image[5 * label : 5 * label + 5] += 150
    boxes = torch.nn.functional.avg_pool2d(images.permute(0, 3, 1, 2).float() / 127.5 - 1, 2)
    order = np.arange(NUM)
    return PreparedData(
        images=ImageSet(images.numpy(), labels, tuple("abc"[:num_classes]), f"bars-{num_classes}"),
        train_rows=order[split::2],
        holdout_rows=order[1 - split :: 2],
        moments=Rows(torch.cat([boxes, torch.zeros_like(boxes)], dim=1)),
        tokens={},
        autoencoder=BoxAutoencoder(),
        digests={},
    )


SAMPLER = SamplerConfig(kind="ode-euler", num_steps=2)
SETTINGS = {
    "sampler": SAMPLER,
    "chunk": 10,
    "extractor_size": 32,
    "kid_subset": 12,
    "velocity_images": 7,
    "grid_images": 5,
    "precision": "fp32",
}
RUNTIME = RuntimeConfig(device="cpu", precision="fp32", tf32=False, threads=1)


def make_evaluator(cache, prepared=None, runtime=RUNTIME, **fields) -> Evaluator:
    config = EvaluationConfig(**{**SETTINGS, **fields})
    return Evaluator(config, runtime, prepared or make_data(), open_accelerator(RUNTIME), cache)


@pytest.fixture(scope="module")
def evaluator(tmp_path_factory) -> Evaluator:
    return make_evaluator(tmp_path_factory.mktemp("cache"))


def make_backbone(scale: float = 0.2) -> SiT:
    with global_state_kept():
        model = SiT(8, 2, 3, hidden_size=16, depth=1, num_heads=2, num_classes=3)
    generator = stream(0, "init")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return model


# -- the whole evaluation -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def evaluation(evaluator):
    return evaluator.evaluate(make_backbone())


def test_metrics_carry_extractor_and_count(evaluation):
    scored = {f"{kind}_efficientnet_lite0_24" for kind in ("fd", "kd", "precision", "recall")}
    scored |= {"fd_pixels_24", "class_accuracy_24", "velocity_loss"}
    assert set(evaluation.metrics) == scored | {f"velocity_loss_t{i}" for i in (1, 2, 3, 4)}
    assert all(metric(name).direction in ("lower", "higher") for name in evaluation.metrics)
    assert all(isinstance(value, float) and np.isfinite(value) for value in evaluation.metrics.values())


def test_metrics_are_known_before_they_are_measured(evaluation, evaluator):
    assert tuple(evaluation.metrics) == evaluator.metric_names


def test_another_way_of_sampling_shares_what_it_is_scored_by(evaluator, tmp_path):
    config = replace(evaluator.config, num_samples=20, seed=3, sampler=SamplerConfig(kind="ode-heun", num_steps=2))
    shared = evaluator.under(config)
    alone = make_evaluator(tmp_path, num_samples=20, seed=3, sampler=config.sampler)
    assert shared.scorer is evaluator.scorer
    assert shared.digest == alone.digest != evaluator.digest
    assert shared.evaluate(make_backbone()).metrics == alone.evaluate(make_backbone()).metrics


def test_grid_holds_the_first_images(evaluation, evaluator):
    parts = (evaluator.prepared.autoencoder, evaluator.config, 24, open_accelerator(RUNTIME))
    made = Summary(0)
    images = np.concatenate(list(made.of(generate_rounds(make_backbone(), *parts))))
    assert images.shape == (24, 16, 16, 3) and made.bad_images == evaluation.bad_images == 0
    assert np.array_equal(evaluation.grid, images[:5])


def test_grid_is_clipped_to_the_number_of_images(tmp_path):
    evaluator = make_evaluator(tmp_path, grid_images=99, num_samples=14)
    assert len(evaluator.evaluate(make_backbone()).grid) == 14


def test_evaluation_can_be_repeated_to_the_bit(evaluation, evaluator):
    again = evaluator.evaluate(make_backbone())
    assert again.metrics == evaluation.metrics and np.array_equal(again.grid, evaluation.grid)


def test_global_random_state_is_kept(tmp_path):
    """Every part from scratch: reference features, classifier, samples, lines."""
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    evaluator = make_evaluator(tmp_path)
    evaluator.evaluate(make_backbone())
    evaluator.lines()
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1] and random.getstate() == before[2]


def test_bad_images_are_counted(evaluator):
    """The label's embedding of class 1 is NaN: 8 of 24 images."""
    backbone = make_backbone()
    with torch.no_grad():
        backbone.y_embedder.embedding_table.weight[1] = float("nan")
    evaluation = evaluator.evaluate(backbone)
    assert evaluation.bad_images == 8
    assert np.all(evaluation.grid[1::3] == 0) and not np.all(evaluation.grid[0::3] == 0)


def test_scoring_in_a_thread_gives_the_same_bits(evaluation, evaluator, monkeypatch):
    """As on a GPU: features of chunks of 10 while the next are made, distances while the velocity is scored."""
    threads: list[str] = []

    def noted(*arguments):
        threads.append(threading.current_thread().name)
        return extract(*arguments)

    monkeypatch.setattr(fidelity, "extract", noted)
    monkeypatch.setattr(evaluate_module, "beside", lambda device: in_thread())
    found = evaluator.evaluate(make_backbone())
    assert found.metrics == evaluation.metrics and np.array_equal(found.grid, evaluation.grid)
    assert threads and threading.current_thread().name not in threads


def test_errors_of_scoring_are_not_lost(evaluator, monkeypatch):
    def failing(*arguments):
        raise UserError("the disk is full")

    monkeypatch.setattr(fidelity, "extract", failing)
    for beside in (lambda device: in_thread(), processes.beside):
        monkeypatch.setattr(evaluate_module, "beside", beside)
        with pytest.raises(UserError, match="the disk is full"):
            evaluator.evaluate(make_backbone())


def test_speed_of_each_part_is_told(evaluation):
    assert set(evaluation.images_per_s) == {"sampling", "decoding", "features"}
    assert all(speed > 0 for speed in evaluation.images_per_s.values())


def test_another_evaluator_computes_nothing_of_the_reference(evaluator, evaluation, monkeypatch):
    """Another protocol, as of `ditbench evaluate` or of another run: features and moments are read."""
    reads = {"theirs": 0}
    rows = evaluator.prepared.images.rows

    def counted(images, indices):
        reads["theirs"] += 1
        return rows(indices)

    monkeypatch.setattr(ImageSet, "rows", counted)
    monkeypatch.setattr(fidelity, "_root", None)
    other = make_evaluator(evaluator.cache, num_samples=20, seed=3, classifier=False)
    opened = reads["theirs"]
    assert other.digest != evaluator.digest
    other.evaluate(make_backbone())
    assert reads["theirs"] == opened
    with pytest.raises(TypeError):  # else this test could not fail
        make_evaluator(evaluator.cache / "empty", num_samples=20, classifier=False).evaluate(make_backbone())
    assert reads["theirs"] > opened + 1


# -- scores ---------------------------------------------------------------------------------------------------------


def test_training_images_score_perfectly_against_themselves(evaluator):
    prepared = evaluator.prepared
    rows = prepared.train_rows
    found = evaluator.score(prepared.images.rows(rows), prepared.images.labels[rows])
    scale = found["fd_efficientnet_lite0_24"], found["fd_pixels_24"]
    assert scale == (pytest.approx(0, abs=1e-2), pytest.approx(0, abs=1e-5))
    assert found["precision_efficientnet_lite0_24"] == found["recall_efficientnet_lite0_24"] == 1
    assert found["class_accuracy_24"] == 1


def test_class_accuracy_counts_the_asked_class(evaluator):
    """Right labels on three quarters of the held-out images, wrong ones on the rest."""
    prepared = evaluator.prepared
    rows = prepared.holdout_rows
    asked = prepared.images.labels[rows].copy()
    asked[:6] = (asked[:6] + 1) % 3
    assert evaluator.score(prepared.images.rows(rows), asked)["class_accuracy_24"] == 0.75


def test_pixel_distance_by_an_independent_formula(evaluator):
    """FD = |difference of means|^2 + trace(A + B - 2 (A B)^(1/2)) of 8 x 8 luminance, by scipy."""
    from scipy.linalg import sqrtm

    prepared = evaluator.prepared

    def statistics(rows):
        grey = prepared.images.rows(rows).astype(np.float64) / 255 @ [0.299, 0.587, 0.114]
        features = grey.reshape(-1, 8, 2, 8, 2).mean(axis=(2, 4)).reshape(len(rows), 64)
        return features.mean(axis=0), np.cov(features.T)

    (mean_a, cov_a), (mean_b, cov_b) = statistics(prepared.holdout_rows), statistics(prepared.train_rows)
    # Half the images' directions are missing (24 images, 64 numbers), where sqrtm of a singular product is unstable.
    ridge = 1e-9 * np.eye(64)
    root = sqrtm((cov_a + ridge) @ (cov_b + ridge)).real
    expected = np.sum((mean_a - mean_b) ** 2) + np.trace(cov_a + cov_b - 2 * root)
    found = evaluator.score(prepared.images.rows(prepared.holdout_rows), np.zeros(24, np.int64))
    assert found["fd_pixels_24"] == pytest.approx(expected, abs=1e-5) and expected > 0.03


# -- floor and reconstruction ---------------------------------------------------------------------------------------


def test_lines_score_held_out_images_and_their_reconstructions(evaluator):
    lines = evaluator.lines()
    prepared = evaluator.prepared
    rows = prepared.holdout_rows
    assert lines["floor"] == evaluator.score(prepared.images.rows(rows), prepared.images.labels[rows])
    assert lines["floor"].keys() == lines["reconstruction"].keys()
    assert lines["floor"]["class_accuracy_24"] > 0.9
    # Boxes of 2 x 2 keep the 8 x 8 luminance to the rounding of uint8, and lose what the network sees.
    assert lines["reconstruction"]["fd_pixels_24"] == pytest.approx(lines["floor"]["fd_pixels_24"], abs=1e-3)
    assert lines["reconstruction"]["fd_efficientnet_lite0_24"] > lines["floor"]["fd_efficientnet_lite0_24"]


def test_lines_are_cached(evaluator, monkeypatch):
    lines = evaluator.lines()
    (path,) = evaluator.cache.glob("floor-*.json")
    assert path.name == f"floor-{evaluator.digest[:12]}.json" and json.loads(path.read_text())["value"] == lines
    other = make_evaluator(evaluator.cache)
    with monkeypatch.context() as patched:
        patched.setattr(other, "score", None)
        assert other.lines() == lines
    # A flipped digit is noticed, and the lines are computed again.
    content = path.read_text()
    path.write_text(content.replace("0.", "1.", 1))
    assert other.lines() == lines and path.read_text() == content


def test_a_shared_cache_does_not_mix_references(tmp_path):
    """Two splits of one data set in one cache folder: the second one's scores are those of a folder of its own."""
    images = make_data().images.images[:24]
    labels = np.zeros(24, np.int64)
    first = make_evaluator(tmp_path / "shared").score(images, labels)
    second = make_evaluator(tmp_path / "shared", make_data(split=1)).score(images, labels)
    alone = make_evaluator(tmp_path / "alone", make_data(split=1)).score(images, labels)
    assert second == alone and second != first


def test_floor_of_fewer_held_out_images_carries_their_own_count(tmp_path):
    prepared = make_data()
    prepared = replace(prepared, holdout_rows=prepared.holdout_rows[:16])
    evaluator = make_evaluator(tmp_path, prepared, num_samples=20, classifier=False)
    lines = evaluator.lines()
    assert "fd_efficientnet_lite0_16" in lines["floor"] and "fd_efficientnet_lite0_20" not in lines["floor"]


# -- another reference ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def batch_of_30(tmp_path_factory):
    """30 images of the data in ADM's layout."""
    path = tmp_path_factory.mktemp("reference") / "batch.npz"
    np.savez(path, make_data().images.images[:30])
    return path


def test_another_reference_is_what_all_are_compared_with(evaluator, batch_of_30, tmp_path):
    """More samples than training images may be asked for; the classifier still knows the training images."""
    other = make_evaluator(tmp_path, reference=str(batch_of_30), num_samples=40)
    assert other.protocol["reference"] == file_digest(batch_of_30) and other.digest != evaluator.digest
    images = other.prepared.images
    found = other.score(images.images[:30], images.labels[:30])
    assert found["fd_efficientnet_lite0_30"] == pytest.approx(0, abs=1e-2)
    assert found["recall_efficientnet_lite0_30"] == 1 and found["class_accuracy_30"] > 0.9
    assert evaluator.score(images.images[:30], images.labels[:30])["fd_efficientnet_lite0_30"] > 1
    metrics = other.evaluate(make_backbone()).metrics
    assert {"fd_efficientnet_lite0_40", "class_accuracy_40", "velocity_loss"} <= set(metrics)
    assert "class_accuracy_24" in other.lines()["floor"]


def test_a_reference_that_is_too_small_is_said(batch_of_30, tmp_path):
    with pytest.raises(UserError, match=r"kid_subset is 25: .*held-out .*; the reference has 30; give 2 to 24"):
        make_evaluator(tmp_path, reference=str(batch_of_30), kid_subset=25)
    with pytest.raises(UserError, match=r"evaluation\.reference: .*nothing\.npz is not there"):
        make_evaluator(tmp_path, reference=str(tmp_path / "nothing.npz"))


def test_statistics_alone_leave_out_what_needs_images(tmp_path):
    path = tmp_path / "statistics.npz"
    np.savez(path, mu=np.zeros(1280), sigma=np.eye(1280))
    evaluator = make_evaluator(tmp_path, reference=str(path), kid_subset=500, num_samples=10)
    metrics = evaluator.evaluate(make_backbone()).metrics
    scored = {name for name in metrics if not name.startswith("velocity")}
    assert scored == {"fd_efficientnet_lite0_10", "class_accuracy_10"}
    assert "statistics and no images" in evaluator.warnings[-1]


# -- the velocity loss ----------------------------------------------------------------------------------------------


def test_velocity_loss_against_a_slow_loop(evaluator):
    """One image, one time and one forward pass at a time, formulas written out."""
    backbone, prepared = make_backbone().eval(), evaluator.prepared
    rows = prepared.holdout_rows[[0, 3, 6, 10, 13, 17, 20]]
    errors = np.zeros((7, 4))
    for i, row in enumerate(rows):
        x0 = prepared.moments.values[int(row), :3]
        t_NB, noise_NBCHW = velocity_draws(0, np.array([row]), prepared.moments.shape)
        for b in range(4):
            t, noise = t_NB[0, b], noise_NBCHW[0, b]
            xt = (1 - t) * x0 + t * noise
            with torch.no_grad():
                v = backbone(xt[None], t[None], torch.tensor([prepared.images.labels[row]]))[0][0]
            errors[i, b] = np.mean((v - (noise - x0)).double().numpy() ** 2)
    found = evaluator.velocity_loss(backbone)
    assert [found[f"velocity_loss_t{b}"] for b in (1, 2, 3, 4)] == pytest.approx(errors.mean(axis=0), rel=1e-5)
    assert found["velocity_loss"] == pytest.approx(errors.mean(), rel=1e-5)


class OnePoint(torch.nn.Module):
    """The exact field of data at one point x*: v = (x - x*) / t."""

    def __init__(self, point):
        super().__init__()
        self.point = point

    def forward(self, x, t, y):
        return (x - self.point) / t.reshape(-1, 1, 1, 1), {}


def test_a_perfect_field_has_no_velocity_loss():
    point = torch.randn(3, 8, 8, generator=stream(1, "eval", 0))
    draws = velocity_draws(0, np.arange(5), (9, 6, 8, 8))
    labels = torch.zeros(5, dtype=torch.int64)
    x0 = point.expand(5, 3, 8, 8)
    errors = velocity_errors(OnePoint(point), x0, labels, *draws, precision="fp32", device=CPU)
    # x - x* loses digits that a division by t of about 0.01 brings back up.
    assert errors.shape == (5, 4) and errors.max() < 1e-8
    moved = velocity_errors(OnePoint(point + 1), x0, labels, *draws, precision="fp32", device=CPU)
    assert torch.allclose(moved, 1 / draws[0].double() ** 2, rtol=1e-3)


def test_velocity_times_lie_in_their_quarters_and_depend_on_the_row_alone():
    t_NB, noise_NBCHW = velocity_draws(0, np.array([4, 9]), (20, 6, 8, 8))
    assert torch.equal((t_NB * 4).floor(), torch.arange(4.0).expand(2, 4)) and noise_NBCHW.shape == (2, 4, 3, 8, 8)
    alone = velocity_draws(0, np.array([9]), (20, 6, 8, 8))
    assert torch.equal(alone[0][0], t_NB[1]) and torch.equal(alone[1][0], noise_NBCHW[1])
    assert not torch.equal(velocity_draws(1, np.array([9]), (20, 6, 8, 8))[0], alone[0])


def test_velocity_loss_does_not_depend_on_the_chunk_but_in_the_last_bits(evaluator, tmp_path):
    other = make_evaluator(tmp_path, chunk=3).velocity_loss(make_backbone())
    assert other == pytest.approx(evaluator.velocity_loss(make_backbone()), rel=1e-5)


# -- the protocol ---------------------------------------------------------------------------------------------------


def test_digest_is_that_of_the_protocol(evaluator):
    assert evaluator.digest == digest(evaluator.protocol)
    assert '"auto"' not in json.dumps(evaluator.protocol) and evaluator.protocol["num_samples"] == 24


CHANGES = {
    "seed": {"seed": 1},
    "chunk": {"chunk": 11},
    "num_samples": {"num_samples": 20},
    "precision": {"precision": "bf16"},
    "kid_subset": {"kid_subset": 13},
    "extractor": {"extractor": "efficientnet_lite2"},
    "extractor_size": {"extractor_size": 64},
    "classifier": {"classifier": False},
    "velocity_images": {"velocity_images": 8},
    "sampler.kind": {"sampler": replace(SAMPLER, kind="ode-heun")},
    "sampler.num_steps": {"sampler": replace(SAMPLER, num_steps=3)},
    "sampler.cfg_scale": {"sampler": replace(SAMPLER, cfg_scale=2.0)},
    "sampler.guidance_low": {"sampler": replace(SAMPLER, guidance_low=0.1)},
    "sampler.guidance_high": {"sampler": replace(SAMPLER, guidance_high=0.9)},
    "compile": {"runtime": replace(RUNTIME, compile=True)},
    "tf32": {"runtime": replace(RUNTIME, tf32=True)},
    "split": {"prepared": make_data(split=1)},
    "data": {"prepared": make_data(num_classes=2)},
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_digest_changes_with(change, evaluator, tmp_path):
    assert make_evaluator(tmp_path, **change).digest != evaluator.digest


def test_digest_changes_with_the_decoder(evaluator, tmp_path):
    prepared = make_data()
    prepared.autoencoder.digest = "other boxes"
    assert make_evaluator(tmp_path, prepared).digest != evaluator.digest


def test_digest_does_not_change_with_what_decides_no_number(evaluator, tmp_path):
    runtime = replace(RUNTIME, threads=2)
    assert make_evaluator(tmp_path, runtime=runtime, points=3, grid_images=2).digest == evaluator.digest


def test_auto_and_zero_are_resolved(tmp_path):
    config = make_evaluator(tmp_path, precision="auto").config
    assert config.precision in ("fp32", "bf16") and config.num_samples == 24 and config.extractor_size == 32


# -- what the user got wrong, and what the user should know ---------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"kid_subset": 25},
            r"kid_subset is 25: there are 24 samples, and data\.holdout leaves 24 held-out and 24 .*; give 2 to 24",
        ),
        ({"kid_subset": 20, "num_samples": 19}, r"kid_subset is 20: there are 19 samples.*give 2 to 19"),
        ({"kid_subset": 1}, r"kid_subset is 1: .* give 2 to 24"),
        (
            {"num_samples": 25},
            r"num_samples of .* is 25: precision and recall .* there are 24; give at most 24",
        ),
        ({"num_samples": 3}, r"precision and recall need 4 or more images in each set and there are 3 samples"),
        ({"extractor": "resnet50"}, r"evaluation\.extractor is 'resnet50'"),
    ],
)
def test_too_few_images_are_refused(fields, message, tmp_path):
    with pytest.raises(UserError, match=message):
        make_evaluator(tmp_path, **fields)


def test_few_images_are_warned_of(evaluator):
    (warning,) = evaluator.warnings
    assert "24 images in 1280 dimensions" in warning


def test_a_classifier_of_one_class_is_left_out_with_a_warning(tmp_path):
    evaluator = make_evaluator(tmp_path, make_data(num_classes=1))
    assert not evaluator.scorer.has_classifier and "evaluation.classifier has no effect" in evaluator.warnings[1]
    assert evaluator.protocol["classifier"] == "none"
