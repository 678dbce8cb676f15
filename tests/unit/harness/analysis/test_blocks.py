"""Analyses of a real small backbone on digits, against features read and compared here by other means."""

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from harness.analysis.blocks import Analysis, AnalysisConfig, Subjects, analyse, gather, noised, store
from harness.analysis.similarity import Kernel, cka, cknna, principal_components
from harness.backbones.sit import SiT, patchify
from harness.errors import UserError
from harness.frozen.encoders import FrozenEncoder
from harness.records.files import digest, file_digest, read_json
from harness.rng import global_state_kept

if TYPE_CHECKING:
    from tests.bench_setting import Bench

ENCODER = "efficientnet_lite2"
CPU = torch.device("cpu")
CONFIG = AnalysisConfig(
    encoder=ENCODER, blocks=(1, 4), times=(0.2, 0.8), images=36, probe_images=50, pictures=2, neighbours=3, chunk=16
)


def no_report(what: str, done: int, total: int) -> None:
    assert 0 < done <= total, what


@pytest.fixture(scope="module", autouse=True)
def loaded_once() -> Iterator[None]:
    """The encoder is read from its file once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FrozenEncoder, "load", functools.lru_cache(FrozenEncoder.load))
        yield


@pytest.fixture(scope="module")
def subjects(bench: "Bench") -> Subjects:
    return gather(bench.lab.prepared, CONFIG, 2, CPU, no_report)


@pytest.fixture(scope="module")
def backbone(bench: "Bench") -> SiT:
    """All weights random, so that time, label and every block matter."""
    shape = bench.lab.shape
    fields = {"input_size": shape.input_size, "in_channels": shape.in_channels, "num_classes": shape.num_classes}
    generator = torch.Generator().manual_seed(5)
    with global_state_kept():
        model = SiT.from_name("SiT-pico/2", **fields)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1, generator=generator)
    return model


@pytest.fixture(scope="module")
def analysis(backbone: SiT, subjects: Subjects) -> Analysis:
    return run(backbone, subjects)


def run(backbone: SiT, subjects: Subjects, precision: str = "fp32", **fields: Any) -> Analysis:
    subjects = dataclasses.replace(subjects, config=dataclasses.replace(subjects.config, **fields))
    return analyse(backbone, subjects, precision, False, CPU, no_report)


def line(analysis: Analysis, source: str, t: float | None = None, block: int | None = None) -> dict[str, Any]:
    (found,) = (
        value
        for value in analysis.values
        if (value["source"], value.get("t"), value.get("block")) == (source, t, block)
    )
    return dict(found)


# -- what is computed -----------------------------------------------------------------------------------------------


def hidden(backbone: SiT, subjects: Subjects, rows: np.ndarray, x0_NCHW: Tensor, t: float, block: int) -> Tensor:
    """A block's output for all images at once, with the null label."""
    xt_NCHW = noised(x0_NCHW, rows, t, subjects.config.seed)
    null_N = torch.full((len(rows),), backbone.num_classes)
    with torch.no_grad():
        return backbone.hidden(xt_NCHW, torch.full((len(rows),), t), null_N, block)


def probe(subjects: Subjects, train_ND: Tensor, held_out_ND: Tensor) -> float:
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    model.fit(train_ND.double(), subjects.train.labels_N)
    return model.score(held_out_ND.double(), subjects.held_out.labels_N)


@pytest.mark.parametrize(("t", "block"), [(0.2, 1), (0.8, 4)])
def test_blocks_are_compared_by_the_means_of_their_tokens(
    analysis: Analysis, backbone: SiT, subjects: Subjects, t: float, block: int
) -> None:
    means = {
        seen: hidden(backbone, subjects, data.rows, data.x0_NCHW, t, block).mean(dim=1)
        for seen, data in (("held_out", subjects.held_out), ("train", subjects.train))
    }
    kernel = Kernel.of(means["held_out"], 3)
    targets = {
        "encoder": Kernel.of(subjects.held_out.encoded_NZ, 3),
        "latent": Kernel.of(patchify(subjects.held_out.x0_NCHW, 2).mean(dim=1), 3),
    }
    found = line(analysis, "block", t, block)
    for name, target in targets.items():
        assert found[f"cka_{name}"] == pytest.approx(cka(kernel, target), abs=1e-5)
        assert found[f"cknna_{name}"] == pytest.approx(cknna(kernel, target), abs=1e-5)
    assert found["probe_accuracy"] == pytest.approx(probe(subjects, means["train"], means["held_out"]), abs=0.03)


def test_the_encoder_and_the_input_stand_beside_the_blocks(analysis: Analysis, subjects: Subjects) -> None:
    held_out, train = subjects.held_out, subjects.train
    encoder, found = Kernel.of(held_out.encoded_NZ, 3), line(analysis, "encoder")
    assert "cka_encoder" not in found and "cknna_encoder" not in found
    assert found["probe_accuracy"] == probe(subjects, train.encoded_NZ, held_out.encoded_NZ)
    xt, train_xt = (noised(seen.x0_NCHW, seen.rows, 0.8, 0) for seen in (held_out, train))
    found = line(analysis, "input", 0.8)
    assert found["cka_encoder"] == pytest.approx(cka(Kernel.of(patchify(xt, 2).mean(dim=1), 3), encoder))
    assert found["probe_accuracy"] == probe(subjects, train_xt.flatten(1), xt.flatten(1))
    sources = [(value["source"], value.get("t"), value.get("block")) for value in analysis.values]
    at = [[("input", t, None), ("block", t, 1), ("block", t, 4)] for t in (0.2, 0.8)]
    assert sources == [("encoder", None, None), *at[0], *at[1]]


def test_images_are_held_out_and_spread_and_probes_are_fitted_on_training_images(
    subjects: Subjects, bench: "Bench"
) -> None:
    prepared = bench.lab.prepared
    assert set(subjects.held_out.rows) <= set(prepared.holdout_rows) and len(subjects.held_out.rows) == 36
    assert set(subjects.train.rows) <= set(prepared.train_rows) and len(subjects.train.rows) == 50
    assert subjects.pictured_rows.tolist() == [subjects.held_out.rows[0], subjects.held_out.rows[18]]
    np.testing.assert_array_equal(subjects.held_out.labels_N, prepared.images.labels[subjects.held_out.rows])
    moments = torch.from_numpy(prepared.moments.rows(subjects.held_out.rows))
    assert torch.equal(subjects.held_out.x0_NCHW, prepared.autoencoder.latent_means(moments))
    images = torch.from_numpy(prepared.images.rows(subjects.held_out.rows[:5])).permute(0, 3, 1, 2)
    tokens = FrozenEncoder.load(ENCODER, 4, CPU).tokens(images)
    torch.testing.assert_close(subjects.held_out.encoded_NZ[:5], tokens.mean(dim=1))


def test_noise_belongs_to_row_and_seed_and_is_the_same_at_all_times() -> None:
    x0 = torch.arange(2 * 3 * 4, dtype=torch.float32).reshape(2, 3, 2, 2)
    whole = noised(x0, np.array([7, 3]), 0.25, 0)
    assert torch.equal(noised(x0[1:], np.array([3]), 0.25, 0), whole[1:])
    assert torch.equal(noised(x0, np.array([7, 3]), 0.0, 0), x0)
    noise = noised(x0, np.array([7, 3]), 1.0, 0)
    torch.testing.assert_close(whole, 0.75 * x0 + 0.25 * noise)
    assert not torch.equal(noise[0], noise[1])
    assert not torch.equal(noised(x0, np.array([7, 3]), 1.0, 1), noise)


def test_pictures_are_components_of_all_images_together(
    analysis: Analysis, backbone: SiT, subjects: Subjects, bench: "Bench"
) -> None:
    pictures = analysis.pictures
    assert pictures["blocks"].shape == (2, 2, 2, 4, 4, 3) and pictures["blocks"].dtype == np.float32
    assert pictures["encoder"].shape == (2, 4, 4, 3) and pictures["latent"].shape == (2, 8, 8, 3)
    np.testing.assert_array_equal(pictures["images"], bench.lab.prepared.images.rows(subjects.pictured_rows))
    tokens = hidden(backbone, subjects, subjects.pictured_rows, subjects.pictured_x0_KCHW, 0.8, 4)
    scores, shares = principal_components(tokens.flatten(0, 1))
    np.testing.assert_allclose(pictures["blocks"][1, 1], scores.reshape(2, 4, 4, 3), atol=1e-4)
    assert analysis.shares["blocks"][1][1] == pytest.approx(shares.tolist(), abs=1e-5)
    # The latent's places go row by row, with its channels as features.
    scores, _ = principal_components(subjects.pictured_x0_KCHW.permute(0, 2, 3, 1).reshape(-1, 4))
    np.testing.assert_allclose(pictures["latent"], scores.reshape(2, 8, 8, 3), atol=1e-5)


# -- what does not matter, and what does ----------------------------------------------------------------------------


def test_chunks_change_nothing_but_rounding(
    analysis: Analysis, backbone: SiT, bench: "Bench", subjects: Subjects
) -> None:
    config = dataclasses.replace(CONFIG, chunk=5)
    other = run(backbone, gather(bench.lab.prepared, config, 2, CPU, no_report), chunk=5)
    assert other.settings == analysis.settings
    for ours, theirs in zip(other.values, analysis.values, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4), theirs
    for name, scores in analysis.pictures.items():
        np.testing.assert_allclose(other.pictures[name], scores, atol=1e-3)


def test_the_global_random_state_and_the_backbone_stay_as_they_were(backbone: SiT, subjects: Subjects) -> None:
    before, weights = (
        torch.random.get_rng_state(),
        {name: value.clone() for name, value in backbone.state_dict().items()},
    )
    numpy_before = np.random.get_state()[1].copy()  # type: ignore[index, union-attr]
    backbone.train()
    run(backbone, subjects, times=(0.5,), blocks=(2,))
    assert backbone.training
    backbone.eval()
    assert torch.equal(torch.random.get_rng_state(), before)
    np.testing.assert_array_equal(np.random.get_state()[1], numpy_before)  # type: ignore[index]
    assert all(torch.equal(value, weights[name]) for name, value in backbone.state_dict().items())


def test_seed_and_precision_are_settings_and_change_numbers(
    analysis: Analysis, backbone: SiT, subjects: Subjects
) -> None:
    assert analysis.settings["precision"] == "fp32"
    other = run(backbone, subjects, seed=1, times=(0.8,))
    assert other.settings["seed"] == 1
    assert line(other, "block", 0.8, 4) != line(analysis, "block", 0.8, 4)
    rough = run(backbone, subjects, "bf16", times=(0.8,), blocks=(4,))
    assert rough.settings["precision"] == "bf16"
    ours, theirs = line(rough, "block", 0.8, 4), line(analysis, "block", 0.8, 4)
    assert ours["cka_latent"] != theirs["cka_latent"]
    assert ours["cka_latent"] == pytest.approx(theirs["cka_latent"], abs=0.02)


def test_without_blocks_named_all_are_analysed(backbone: SiT, subjects: Subjects) -> None:
    found = run(backbone, subjects, blocks=(), times=(0.0,))
    assert found.settings["blocks"] == [1, 2, 3, 4]
    assert [value.get("block") for value in found.values] == [None, None, 1, 2, 3, 4]


# -- what cannot be compared ----------------------------------------------------------------------------------------


def test_images_of_one_class_have_no_probe(backbone: SiT, subjects: Subjects) -> None:
    train = dataclasses.replace(subjects.train, labels_N=np.zeros(50, dtype=np.int64))
    found = run(backbone, dataclasses.replace(subjects, train=train), times=(0.5,), blocks=(1,))
    assert not any("probe_accuracy" in value for value in found.values)


def test_weights_that_are_not_finite_give_nan(backbone: SiT, subjects: Subjects, tmp_path: Path) -> None:
    with global_state_kept():
        broken = SiT.from_name("SiT-pico/2", input_size=8, in_channels=4, num_classes=10)
    broken.load_state_dict(backbone.state_dict())
    with torch.no_grad():
        broken.blocks[1].mlp.fc1.weight[0, 0] = math.nan  # type: ignore[index, union-attr, operator]
    found = run(broken, subjects, times=(0.5,), blocks=(1, 2))
    whole, none = line(found, "block", 0.5, 1), line(found, "block", 0.5, 2)
    names = whole.keys() - {"source", "t", "block"}
    assert all(math.isfinite(whole[name]) for name in names)
    assert len(names) == 5 and all(math.isnan(none[name]) for name in names)
    assert np.isfinite(found.pictures["blocks"][0, 0]).all() and np.isnan(found.pictures["blocks"][0, 1]).all()
    assert store(found, tmp_path, "step", {"step": 1})["values"]
    assert read_json(tmp_path / "step.json")["values"][3]["cka_latent"] == "nan"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"encoder": "resnet9000"}, "encoder 'resnet9000' is not known"),
        ({"blocks": (0, 1)}, "--blocks 0,1: blocks count from 1"),
        ({"blocks": (2, 2)}, "--blocks 2,2 names a block twice"),
        ({"times": ()}, r"--times \(none\): give times from 0"),
        ({"times": (0.5, 1.5)}, "--times 0.5,1.5: give times from 0"),
        ({"times": (math.nan,)}, "--times nan: give times from 0"),
        ({"times": (0.5, 0.5)}, "--times 0.5,0.5 names a time twice"),
        ({"pictures": 0}, "--pictures is 0: give 1 or more"),
        ({"chunk": 0}, "--chunk is 0: give 1 or more"),
        ({"neighbours": 1}, "--neighbours is 1: give 2 or more"),
        ({"probe_images": -1}, "--probe_images is -1: give 0 or more"),
        ({"seed": -1}, "--noise_seed is -1: give 0 or more"),
        ({"images": 3, "neighbours": 2}, "--images is 3: give 4 to 10000 with --neighbours 2"),
        ({"images": 10_001}, "--images is 10001: give 4 to 10000"),
        ({"images": 30, "neighbours": 30}, "--images is 30: give 31 to 10000 with --neighbours 30"),
    ],
)
def test_settings_that_mean_nothing_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        dataclasses.replace(CONFIG, **fields)


def test_blocks_and_neighbours_that_are_not_there_are_refused(
    backbone: SiT, subjects: Subjects, bench: "Bench"
) -> None:
    with pytest.raises(UserError, match=r"--blocks 1,5: the backbone has blocks 1 to 4"):
        run(backbone, subjects, blocks=(1, 5))
    few = dataclasses.replace(bench.lab.prepared, holdout_rows=bench.lab.prepared.holdout_rows[:3])
    with pytest.raises(UserError, match="--neighbours is 3: it needs 4 held-out images and"):
        gather(few, CONFIG, 2, CPU, no_report)


# -- the record -----------------------------------------------------------------------------------------------------


def test_the_record_holds_what_is_drawn(analysis: Analysis, tmp_path: Path) -> None:
    record = store(analysis, tmp_path / "analysis", "step_00000006", {"step": 6})
    folder = tmp_path / "analysis"
    assert sorted(path.name for path in folder.iterdir()) == ["step_00000006.json", "step_00000006.npz"]
    assert read_json(folder / "step_00000006.json") == json.loads(json.dumps(record))
    assert record["step"] == 6 and record["protocol"] == digest(analysis.settings)
    assert record["pictures"]["sha256"] == file_digest(folder / "step_00000006.npz")
    with np.load(folder / "step_00000006.npz", allow_pickle=False) as held:
        assert set(held.files) == {"images", "encoder", "latent", "blocks"}
        for name in held.files:
            np.testing.assert_array_equal(held[name], analysis.pictures[name])
    again = store(analysis, folder, "step_00000006", {"step": 6})
    assert again == record, "equal analyses give equal bytes"


def test_every_setting_is_a_part_of_the_protocol(backbone: SiT, subjects: Subjects, bench: "Bench") -> None:
    """Each option but the chunk, of its own, gives another digest."""

    def protocol(change: Callable[[AnalysisConfig], AnalysisConfig]) -> str:
        found = gather(bench.lab.prepared, change(small), 2, CPU, no_report)
        return digest(run(backbone, found).settings)

    small = dataclasses.replace(CONFIG, images=8, probe_images=8, pictures=1, times=(0.5,), blocks=(1,))
    base = protocol(lambda config: config)
    changes: list[dict[str, Any]] = [
        *({"blocks": (2,)}, {"times": (0.4,)}, {"images": 9}, {"probe_images": 9}),
        *({"pictures": 2}, {"neighbours": 4}, {"seed": 1}),
    ]
    others = {digest(change): protocol(lambda c, change=change: dataclasses.replace(c, **change)) for change in changes}
    assert len({base, *others.values()}) == len(changes) + 1
    assert protocol(lambda config: dataclasses.replace(config, chunk=3)) == base
