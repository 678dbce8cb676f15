"""Reading a study, and the checks that its runs may be compared."""

import math
import shutil
from pathlib import Path

import pytest
from records_factory import MAIN, edit_lines, edit_manifest, run_folder, write_run, write_study

from harness.records import UserError
from reports.load import load_study, metric_curves, training_curves
from reports.verify import differing_fields, environment, flatten, short_text, verify

CELLS = {"sit": "sit", "repa": "repa", "both": "repa+vae_repa"}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return write_study(tmp_path_factory.mktemp("runs"), CELLS)


@pytest.fixture
def study(written, tmp_path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "digits"))


# -- load -----------------------------------------------------------------------------------------------------------


def test_baseline_comes_first_then_labels_in_order(study):
    loaded = load_study(study)
    assert loaded.cells == ("sit", "both", "repa")
    assert loaded.seeds == (0, 1)
    assert (loaded.name, loaded.baseline, loaded.step) == ("digits", "sit", 800)


def test_the_main_metric_is_the_frechet_distance_of_features(study):
    loaded = load_study(study)
    assert loaded.metrics[0] == loaded.main_metrics[0] == MAIN
    assert loaded.main_metrics.index("fd_pixels_898") > loaded.main_metrics.index("velocity_loss")


def test_parts_of_a_metric_are_not_main_metrics(study):
    loaded = load_study(study)
    assert "velocity_loss_t0" in loaded.metrics
    assert "velocity_loss_t0" not in loaded.main_metrics


def test_values_that_are_not_finite_come_back_as_nan(study):
    edit_lines(run_folder(study, "repa", 1), "eval", metrics={MAIN: "nan", "velocity_loss": "inf"})
    run = next(r for r in load_study(study).runs if r.label == "repa seed 1")
    assert math.isnan(run.value(MAIN, 800))
    assert math.isnan(run.value("velocity_loss", 800))
    assert math.isnan(run.value("class_accuracy", 800))
    assert math.isnan(run.value(MAIN, 799))


def test_a_study_without_its_baseline_has_none(study):
    shutil.rmtree(study / "sit")
    assert load_study(study).baseline == ""


def test_the_baseline_that_most_runs_name_counts(study):
    edit_manifest(run_folder(study, "both", 0), baseline="repa")
    assert load_study(study).baseline == "sit"


def test_cells_that_name_only_themselves_have_no_baseline(study):
    for cell in CELLS:
        for seed in (0, 1):
            edit_manifest(run_folder(study, cell, seed), baseline=cell)
    assert load_study(study).baseline == ""
    for cell in ("both", "repa"):
        shutil.rmtree(study / cell)
    assert load_study(study).baseline == "sit"


def test_studies_that_cannot_be_reported_are_refused(study, tmp_path):
    with pytest.raises(UserError, match="holds no runs"):
        load_study(tmp_path / "nowhere")
    for cell in CELLS:
        for seed in (0, 1):
            edit_lines(run_folder(study, cell, seed), "eval", keep=0)
    with pytest.raises(UserError, match="holds no evaluation yet"):
        load_study(study)


@pytest.mark.parametrize(
    ("old", "new", "message"), [('"format": 1', '"format": 2', "has format 2"), ('"cell"', '"x"', "lacks cell")]
)
def test_manifests_that_cannot_be_read_are_named(study, old, new, message):
    path = run_folder(study, "repa", 0).manifest_path
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(UserError, match=f"repa/seed0/manifest.json {message}"):
        load_study(study)


# -- curves -----------------------------------------------------------------------------------------------------------


def test_means_of_curves_by_hand(study):
    for seed, value in ((0, 30.0), (1, 50.0)):
        edit_lines(run_folder(study, "repa", seed), "eval", metrics={MAIN: value})
    frame = metric_curves(load_study(study), MAIN)
    last = frame[(frame["cell"] == "repa") & (frame["step"] == 800)]
    assert last[last["series"] == "seed"]["value"].tolist() == [30.0, 50.0]
    mean = last[last["series"] == "mean"].iloc[0]
    assert (mean["value"], mean["num_seeds"], mean["of_seeds"], mean["images"]) == (40.0, 2, 2, 64 * 800)


def test_a_mean_over_survivors_says_so(study):
    edit_lines(run_folder(study, "repa", 0), "eval", metrics={MAIN: 30.0})
    edit_lines(run_folder(study, "repa", 1), "eval", metrics={MAIN: "nan"})
    frame = metric_curves(load_study(study), MAIN)
    mean = frame[(frame["cell"] == "repa") & (frame["step"] == 800) & (frame["series"] == "mean")].iloc[0]
    assert (mean["value"], mean["num_seeds"], mean["of_seeds"]) == (30.0, 1, 2)


def test_reference_lines_are_in_the_frame(study):
    frame = metric_curves(load_study(study), MAIN)
    lines = frame[frame["series"] == "line"]
    assert dict(zip(lines["cell"], lines["value"], strict=True)) == {"floor": 3.1, "reconstruction": 6.4}
    assert (metric_curves(load_study(study), "velocity_loss")["series"] != "line").all()


def test_training_curves_hold_every_part_of_the_loss(study):
    frame = training_curves(load_study(study))
    assert set(frame["quantity"]) == {"velocity loss", "gradient norm", "term repa", "term vae_repa"}
    assert set(frame[frame["quantity"] == "term vae_repa"]["cell"]) == {"both"}
    line = run_folder(study, "sit", 0).lines("train")[0]
    own = frame[(frame["quantity"] == "velocity loss") & (frame["cell"] == "sit") & (frame["seed"] == 0)]
    assert (own["step"].iloc[0], own["value"].iloc[0]) == (line["step"], line["base"])


# -- verify -----------------------------------------------------------------------------------------------------------


def test_runs_that_agree_pass_every_check(study):
    checks = verify(load_study(study))
    assert {(c.what, c.num_runs) for c in checks if c.scope == "study"} == {
        ("data digest", 6),
        ("autoencoder digest", 6),
        ("training digest", 6),
        ("evaluation digest", 6),
    }
    assert [(c.what, c.scope, c.num_runs) for c in checks if c.scope.startswith("seed 1")] == [
        ("initial weights digest", "seed 1", 3),
        ("batch trace", "seed 1, step 800", 3),
    ]


@pytest.mark.parametrize("name", ["data", "autoencoder", "training", "evaluation", "initial_weights"])
def test_a_digest_that_differs_is_refused_with_both_runs(study, name):
    edit_manifest(run_folder(study, "repa", 1), digests={name: "0" * 64})
    with pytest.raises(UserError, match=rf"{name} differs between (sit seed 0|sit seed 1) and repa seed 1"):
        verify(load_study(study))


def test_the_field_behind_a_difference_is_named(study):
    folder = run_folder(study, "repa", 0)
    config = folder.manifest()["config"]
    config["optimizer"]["lr"] = 0.1
    config["optimizer"]["micro_batch"] = 8
    edit_manifest(folder, config=config, digests={"training": "0" * 64})
    with pytest.raises(UserError, match=r"\(optimizer.lr is 0.0015 against 0.1\)"):
        verify(load_study(study))


def test_the_field_behind_another_protocol_is_named(study):
    folder = run_folder(study, "repa", 0)
    sampler = {**folder.manifest()["protocol"]["sampler"], "num_steps": 25}
    edit_manifest(folder, protocol={"sampler": sampler}, digests={"evaluation": "0" * 64})
    with pytest.raises(UserError, match=r"sampler.num_steps is 50 against 25"):
        verify(load_study(study))


def test_an_evaluation_under_another_protocol_is_refused(study):
    edit_lines(run_folder(study, "both", 1), "eval", keep=3, protocol="f" * 64)
    with pytest.raises(UserError, match=r"both seed 1: the evaluation at step 300 .* another protocol"):
        verify(load_study(study))


def test_traces_are_compared_at_the_last_common_step(study):
    edit_lines(run_folder(study, "repa", 0), "train", keep=5)
    checks = verify(load_study(study))
    assert ("batch trace", "seed 0, step 100") in [(c.what, c.scope) for c in checks]
    edit_lines(run_folder(study, "repa", 0), "train", keep=5, trace="f" * 64)
    with pytest.raises(UserError, match="batch trace at step 100 differs between sit seed 0 and repa seed 0"):
        verify(load_study(study))


def test_initial_weights_may_differ_between_seeds_only(study):
    weights = {seed: {run.digests["initial_weights"] for run in load_study(study).at(seed)} for seed in (0, 1)}
    assert len(weights[0]) == len(weights[1]) == 1
    assert weights[0] != weights[1]


def test_a_run_that_has_just_begun_is_not_compared_yet(study):
    folder = write_run(study.parent, "digits", "sra", "sra", 0, "sit")
    manifest = {k: v for k, v in folder.manifest().items() if k not in ("format", "digests")}
    folder.write_manifest({**manifest, "status": "running"})
    edit_lines(folder, "train", keep=0)
    edit_lines(folder, "eval", keep=0)
    checks = {(c.what, c.scope): c.num_runs for c in verify(load_study(study))}
    assert checks["data digest", "study"] == 6
    assert checks["batch trace", "seed 0, step 800"] == 3


def test_a_finished_run_without_a_digest_is_refused(study):
    folder = run_folder(study, "repa", 0)
    digests = {k: v for k, v in folder.manifest()["digests"].items() if k != "data"}
    folder.write_manifest({**{k: v for k, v in folder.manifest().items() if k != "format"}, "digests": digests})
    with pytest.raises(UserError, match="repa seed 0: the manifest has no data digest"):
        verify(load_study(study))


def test_environments_are_shown_with_their_runs(study):
    edit_manifest(run_folder(study, "both", 0), environment={"threads": 8})
    settings = {setting.name: setting for setting in environment(load_study(study))}
    assert not settings["packages.torch"].differs
    assert settings["threads"].differs
    assert settings["threads"].values["8"] == ["both seed 0"]
    assert len(settings["threads"].values["2"]) == 5


def test_digests_are_shown_short_and_numbers_whole():
    assert (
        short_text("0123456789abcdef" * 4) == short_text("0123456789abcdef0123456789abcdef01234567") == "0123456789ab"
    )
    assert short_text("0123456789abcdef") == "0123456789abcdef"
    assert short_text(0.5) == "0.5"


def test_nested_fields_by_hand():
    assert flatten({"a": {"b": 1, "c": {"d": 2}}, "e": [1]}) == {"a.b": 1, "a.c.d": 2, "e": [1]}
    assert differing_fields({"a": {"b": 1}, "c": 2}, {"a": {"b": 3}, "c": 2, "d": 4}) == {"a.b": (1, 3), "d": (None, 4)}
