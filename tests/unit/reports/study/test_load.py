"""Reading a study, and the checks that its runs may be compared."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from harness.records.run_folder import RunFolder, UserError
from reports.costs import targets
from reports.figures.curves import metric_curves, training_curves
from reports.study.load import MOST_TRAINING_LINES, load_study
from reports.study.verify import compact, differing_fields, environment, flatten, short_text, verify
from tests.unit.reports.records_factory import (
    MAIN,
    diverge,
    edit_lines,
    edit_manifest,
    fail,
    run_folder,
    write_lines,
    write_run,
    write_study,
)

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
    assert (loaded.name, loaded.baseline, loaded.point, loaded.after) == ("digits", "sit", 8, "after 800 steps")


def test_the_main_metric_is_the_frechet_distance_of_features(study):
    loaded = load_study(study)
    assert loaded.metrics[0] == loaded.main_metrics[0] == MAIN
    assert loaded.main_metrics.index("fd_pixels_898") > loaded.main_metrics.index("velocity_loss")


def test_of_many_logged_steps_the_same_are_read_in_every_run(study, monkeypatch):
    assert load_study(study).thinning == 1 and MOST_TRAINING_LINES > 40
    edit_lines(run_folder(study, "repa", 1), "train", keep=17)  # to step 340
    monkeypatch.setattr("reports.study.load.MOST_TRAINING_LINES", 10)
    found = load_study(study)
    # 40 lines, one every 20 steps: 1 in 4 leaves 10.
    assert found.thinning == 4
    steps = {run.label: [line["step"] for line in run.train] for run in found.runs}
    assert steps["sit seed 0"] == list(range(80, 801, 80))
    assert steps["repa seed 1"] == [80, 160, 240, 320, 340]
    verify(found)
    folder = run_folder(study, "repa", 0)
    lines = [line if line["step"] < 500 else {**line, "trace": "0" * 64} for line in folder.lines("train")]
    write_lines(folder, "train", lines)
    with pytest.raises(UserError, match="batch trace at step 560 differs"):
        verify(load_study(study))


def test_parts_of_a_metric_are_not_main_metrics(study):
    loaded = load_study(study)
    assert "velocity_loss_t0" in loaded.metrics
    assert "velocity_loss_t0" not in loaded.main_metrics


def test_values_that_are_not_finite_come_back_as_nan(study):
    edit_lines(run_folder(study, "repa", 1), "eval", metrics={MAIN: "nan", "velocity_loss": "inf"})
    run = next(r for r in load_study(study).runs if r.label == "repa seed 1")
    assert math.isnan(run.value(MAIN, 8))
    assert math.isnan(run.value("velocity_loss", 8))
    assert math.isnan(run.value("class_accuracy", 8))
    assert math.isnan(run.value(MAIN, 9))
    assert math.isfinite(run.value(MAIN, 7))


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
    with pytest.raises(UserError, match="holds no evaluation yet: let"):
        load_study(study)
    edit_manifest(run_folder(study, "repa", 1), status="failed")
    with pytest.raises(UserError, match=r"holds no evaluation yet \(repa seed 1 failed\)"):
        load_study(study)


@pytest.mark.parametrize(
    ("old", "new", "message"), [('"format": 2', '"format": 3', "has format 3"), ('"cell"', '"x"', "lacks cell")]
)
def test_manifests_that_cannot_be_read_are_named(study, old, new, message):
    path = run_folder(study, "repa", 0).manifest_path
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(UserError, match=f"repa/seed0/manifest.json {message}"):
        load_study(study)


@pytest.mark.parametrize(("name", "field"), [("train", "trace"), ("eval", "point"), ("eval", "train_seconds")])
def test_records_that_lack_a_field_are_named(study, name, field):
    path = run_folder(study, "repa", 0).path / f"{name}.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    del lines[2][field]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(UserError, match=rf"repa/seed0/{name}.jsonl, line 3, lacks {field}:"):
        load_study(study)


# -- budgets --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("unit", "amount", "after", "steps"),
    [
        ("steps", 800, "after 800 steps", (800, 800)),
        ("steps", 8, "after 8 steps", (8, 8)),
        ("images", 6400, "after 6,400 images", (100, 100)),
        # An image costs 2 x 3 x 0.0206 GFLOPs, and with a head 2 x 3 x 0.0226: 64 images are 7.9104 and 8.6784.
        ("train_gflops", 1000.0, "after 1,000 training GFLOPs", (127, 116)),
        # A step takes 0.05 s, and 0.075 s with a term.
        ("seconds", 12, "after 12 training seconds", (240, 160)),
    ],
)
def test_the_last_point_is_the_whole_budget_whatever_its_unit(tmp_path, unit, amount, after, steps):
    path = write_study(tmp_path, {"sit": "sit", "repa": "repa"}, seeds=(0,), unit=unit, amount=amount)
    study = load_study(path)
    assert (study.point, study.after) == (8, after)
    assert tuple(run.evaluation(8)["step"] for run in study.runs) == steps


def test_half_a_budget_is_said_in_its_unit(tmp_path):
    path = write_study(tmp_path, {"sit": "sit"}, seeds=(0,), unit="train_gflops", amount=1000.0)
    edit_lines(run_folder(path, "sit", 0), "eval", keep=4)
    assert load_study(path).after == "after 500 training GFLOPs"


def test_points_that_double_lie_at_those_shares_of_the_budget(tmp_path):
    """Two of three evaluations are there: half of the budget is spent, not two thirds."""
    path = write_study(tmp_path, {"sit": "sit"}, seeds=(0,), unit="train_gflops", amount=1500.0)
    folder = run_folder(path, "sit", 0)
    evaluation = folder.manifest()["config"]["evaluation"] | {"points": 3, "spacing": "doubling"}
    edit_manifest(folder, config={"evaluation": evaluation})
    edit_lines(folder, "eval", keep=2)
    study = load_study(path)
    assert [study.share(point) for point in (1, 2, 3)] == [0.25, 0.5, 1.0]
    assert study.after == "after 750 training GFLOPs"
    assert "whole evaluations, after 375 training GFLOPs and at each doubling;" in targets.notes(study, [])[0]


def test_images_that_end_within_a_step_are_counted_whole(tmp_path):
    path = write_study(tmp_path, {"sit": "sit"}, seeds=(0,), unit="images", amount=100)
    assert load_study(path).after == "after 128 images"


def test_runs_that_shared_their_device_are_left_out_of_seconds(tmp_path):
    path = write_study(tmp_path, {"sit": "sit", "repa": "repa"}, unit="seconds", amount=12)
    edit_manifest(run_folder(path, "repa", 1), shared_device=True)
    study = load_study(path)
    assert [run.label for run in study.timed] == ["sit seed 0", "sit seed 1", "repa seed 0"]
    frame = metric_curves(study, MAIN)
    assert set(frame[(frame["cell"] == "repa") & (frame["series"] == "seed")]["seed"]) == {0}
    assert set(frame[(frame["cell"] == "repa") & (frame["series"] == "mean")]["num_seeds"]) == {1}
    training = training_curves(study)
    assert set(training[(training["cell"] == "repa") & (training["series"] == "seed")]["seed"]) == {0}
    for cell, seed in (("sit", 0), ("sit", 1), ("repa", 0)):
        edit_manifest(run_folder(path, cell, seed), shared_device=True)
    with pytest.raises(UserError, match="budget is in seconds and every evaluated run shared its device"):
        load_study(path)


def test_a_shared_device_does_not_matter_to_steps(study):
    edit_manifest(run_folder(study, "repa", 1), shared_device=True)
    assert len(load_study(study).timed) == 6


# -- curves -----------------------------------------------------------------------------------------------------------


def test_means_of_curves_by_hand(study):
    for seed, value in ((0, 30.0), (1, 50.0)):
        edit_lines(run_folder(study, "repa", seed), "eval", metrics={MAIN: value})
    frame = metric_curves(load_study(study), MAIN)
    last = frame[(frame["cell"] == "repa") & (frame["point"] == 8)]
    assert last[last["series"] == "seed"]["value"].tolist() == [30.0, 50.0]
    mean = last[last["series"] == "mean"].iloc[0]
    assert (mean["value"], mean["num_seeds"], mean["of_seeds"], mean["images"]) == (40.0, 2, 2, 64 * 800)
    assert mean["step"] == 800


def test_means_are_taken_at_points_that_seeds_reach_at_different_steps(tmp_path):
    path = write_study(tmp_path, {"sit": "sit"}, unit="seconds", amount=40)
    for seed, step, value in ((0, 800, 30.0), (1, 640, 50.0)):
        edit_lines(
            run_folder(path, "sit", seed),
            "eval",
            step=step,
            images=64 * step,
            train_seconds=40.0,
            metrics={MAIN: value},
        )
    frame = metric_curves(load_study(path), MAIN)
    mean = frame[(frame["series"] == "mean") & (frame["point"] == 8)].iloc[0]
    assert (mean["value"], mean["num_seeds"], mean["step"], mean["train_seconds"]) == (40.0, 2, 720, 40.0)


def test_stops_are_in_the_frame_at_the_last_value(study):
    diverge(run_folder(study, "repa", 1), 312, "base", kept=3)
    fail(run_folder(study, "both", 0), "no memory")
    loaded = load_study(study)
    value = run_folder(study, "repa", 1).lines("eval")[2]["metrics"][MAIN]
    stops = metric_curves(loaded, MAIN).query("series == 'stop'").set_index("cell")
    assert stops.loc["repa", ["seed", "step", "images", "value"]].tolist() == [1, 312, 64 * 312, value]
    assert stops.loc["repa", "train_gflops"] == pytest.approx(2 * 3 * 0.0226 * 64 * 312)
    assert stops.loc["both", ["seed", "step"]].tolist() == [0, 0] and math.isnan(stops.loc["both", "value"])
    training = training_curves(loaded).query("series == 'stop'")
    assert training["quantity"].tolist() == ["velocity loss", "gradient norm", "term repa"]
    assert training["value"].tolist()[1] == run_folder(study, "repa", 1).lines("train")[-1]["grad_norm"]


def test_a_mean_over_survivors_says_so(study):
    edit_lines(run_folder(study, "repa", 0), "eval", metrics={MAIN: 30.0})
    edit_lines(run_folder(study, "repa", 1), "eval", metrics={MAIN: "nan"})
    frame = metric_curves(load_study(study), MAIN)
    mean = frame[(frame["cell"] == "repa") & (frame["point"] == 8) & (frame["series"] == "mean")].iloc[0]
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
        ("encoder/efficientnet_lite2 digest", 4),
        ("size", 6),
        ("precision", 6),
        ("compile", 6),
        ("TF32", 6),
        ("training digest", 6),
        ("evaluation digest", 6),
    }
    assert [(c.what, c.scope, c.num_runs) for c in checks if c.scope.startswith("seed 1")] == [
        ("initial weights digest", "seed 1", 3),
        ("batch trace", "seed 1, to step 800", 3),
    ]


@pytest.mark.parametrize("name", ["data", "autoencoder", "training", "evaluation", "initial_weights"])
def test_a_digest_that_differs_is_refused_with_both_runs(study, name):
    edit_manifest(run_folder(study, "repa", 1), digests={name: "0" * 64})
    what = name.replace("_", " ")
    with pytest.raises(UserError, match=rf"^{what} digest differs between (sit seed 0|sit seed 1) and repa seed 1 \("):
        verify(load_study(study))


def test_an_encoder_of_two_cells_must_be_one_file(study):
    edit_manifest(run_folder(study, "repa", 1), digests={"encoder/efficientnet_lite2": "0" * 64})
    with pytest.raises(
        UserError, match=r"^encoder/efficientnet_lite2 digest differs between both seed 0 and repa seed 1"
    ):
        verify(load_study(study))


def test_cells_may_read_different_encoders(study):
    for seed in (0, 1):
        folder = run_folder(study, "repa", seed)
        digests = {k: v for k, v in folder.manifest()["digests"].items() if not k.startswith("encoder/")}
        facts = {**folder.manifest()["method_facts"], "needs": {"images": False, "encoders": ["dinov2"], "ema": False}}
        folder.write_manifest(
            {**bare(folder), "digests": {**digests, "encoder/dinov2": "1" * 64}, "method_facts": facts}
        )
    counted = {check.what: check.num_runs for check in verify(load_study(study))}
    assert (counted["encoder/dinov2 digest"], counted["encoder/efficientnet_lite2 digest"]) == (2, 2)


def test_an_encoder_that_is_read_must_be_on_record(study):
    for cell in ("repa", "both"):
        for seed in (0, 1):
            folder = run_folder(study, cell, seed)
            digests = {k: v for k, v in folder.manifest()["digests"].items() if not k.startswith("encoder/")}
            folder.write_manifest({**bare(folder), "digests": digests})
    with pytest.raises(UserError, match="both seed 0: the manifest has no encoder/efficientnet_lite2 digest"):
        verify(load_study(study))


@pytest.mark.parametrize(
    ("field", "other", "what", "where"),
    [
        ("precision", "fp32", "precision", "runtime.precision is bf16 against fp32"),
        ("compile", True, "compile", "runtime.compile is False against True"),
        ("tf32", True, "TF32", "runtime.tf32 is False against True"),
    ],
)
def test_a_runtime_that_decides_numbers_must_agree(study, field, other, what, where):
    folder = run_folder(study, "repa", 1)
    config = folder.manifest()["config"]
    config["runtime"][field] = other
    edit_manifest(folder, config=config)
    with pytest.raises(UserError, match=rf"^{what} differs between sit seed 0 and repa seed 1 \({where}\)"):
        verify(load_study(study))


def test_the_size_must_agree(study):
    edit_manifest(run_folder(study, "both", 0), model={"parameters": 7})
    with pytest.raises(UserError, match=r"^size differs .* both seed 0 \(model.parameters is 1930000 against 7\)"):
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


def test_numbers_of_two_protocols_meet_in_no_curve(study):
    """Not the last line: that no table shows, and a figure would."""
    folder = run_folder(study, "both", 0)
    lines = folder.lines("eval")
    lines[4]["protocol"] = "f" * 64
    (folder.path / "eval.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(UserError, match=r"both seed 0: the evaluation at step 500 was made under another protocol"):
        verify(load_study(study))


def test_evaluations_made_again_lie_apart(study):
    """`ditbench evaluate` under another protocol writes beside the records, and nothing of it is read."""
    before = load_study(study)
    folder = run_folder(study, "repa", 0).path / "evaluations" / ("f" * 12)
    folder.mkdir(parents=True)
    record = {"step": 800, "point": 8, "protocol": "f" * 64, "metrics": {MAIN: 1e9}}
    (folder / "step_00000800.json").write_text(json.dumps(record))
    after = load_study(study)
    assert after.runs == before.runs
    assert metric_curves(after, MAIN).equals(metric_curves(before, MAIN))


def test_traces_are_compared_at_every_common_step(study):
    folder = run_folder(study, "repa", 0)
    edit_lines(folder, "train", keep=5)
    scopes = {check.scope: check.num_runs for check in verify(load_study(study)) if check.what == "batch trace"}
    assert scopes == {"seed 0, to step 800": 3, "seed 1, to step 800": 3}
    edit_lines(folder, "train", keep=5, trace="f" * 64)
    with pytest.raises(UserError, match="batch trace at step 100 differs between sit seed 0 and repa seed 0"):
        verify(load_study(study))


def test_a_run_that_stopped_early_does_not_hide_the_steps_of_the_others(study):
    edit_lines(run_folder(study, "repa", 0), "train", keep=1)
    edit_manifest(run_folder(study, "repa", 0), status="diverged")
    edit_lines(run_folder(study, "both", 0), "train", trace="f" * 64)
    with pytest.raises(UserError, match="batch trace at step 800 differs between sit seed 0 and both seed 0"):
        verify(load_study(study))


def test_runs_that_log_at_different_steps_are_compared_at_their_common_ones(study):
    for cell, every in (("repa", 3), ("both", 2)):
        folder = run_folder(study, cell, 0)
        lines = [line for line in folder.lines("train") if line["step"] % (20 * every) == 0]
        (folder.path / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    shutil.rmtree(study / "sit" / "seed0")
    (check,) = [c for c in verify(load_study(study)) if c.what == "batch trace" and c.scope.startswith("seed 0")]
    assert (check.scope, check.num_runs) == ("seed 0, to step 720", 2)


def test_a_finished_run_without_a_trace_is_refused(study):
    edit_lines(run_folder(study, "repa", 0), "train", keep=0)
    with pytest.raises(UserError, match=r"repa seed 0 is finished, and its train.jsonl holds no batch trace"):
        verify(load_study(study))


def test_checks_are_compact_on_a_terminal(study):
    rows = {row["agrees"]: row for row in compact(verify(load_study(study)))}
    assert rows["size"] == {"agrees": "size", "in": "study", "runs": "6", "value": "SiT-nano/2, 1,930,000 parameters"}
    assert rows["batch trace"]["in"] == "at each of 2 seeds"
    assert rows["batch trace"]["runs"] == "6"
    assert len(rows["data digest"]["value"]) == 12


def test_initial_weights_may_differ_between_seeds_only(study):
    weights = {seed: {run.digests["initial_weights"] for run in load_study(study).at(seed)} for seed in (0, 1)}
    assert len(weights[0]) == len(weights[1]) == 1
    assert weights[0] != weights[1]


def test_a_run_that_has_just_begun_is_not_compared_yet(study):
    folder = write_run(study.parent, "digits", "sra", "sra", 0, "sit")
    folder.write_manifest({**bare(folder), "digests": {}, "status": "running"})
    edit_lines(folder, "train", keep=0)
    edit_lines(folder, "eval", keep=0)
    checks = {(c.what, c.scope): c.num_runs for c in verify(load_study(study))}
    assert checks["data digest", "study"] == 6
    assert checks["batch trace", "seed 0, to step 800"] == 3


def test_a_run_that_failed_at_once_is_not_compared(study):
    fail(run_folder(study, "repa", 0), "no memory")
    checks = {(c.what, c.scope): c.num_runs for c in verify(load_study(study))}
    assert checks["data digest", "study"] == checks["precision", "study"] == 5
    assert checks["batch trace", "seed 0, to step 800"] == 2


@pytest.mark.parametrize("status", ["finished", "diverged"])
def test_a_run_that_ended_without_a_digest_is_refused(study, status):
    folder = run_folder(study, "repa", 0)
    digests = {k: v for k, v in folder.manifest()["digests"].items() if k != "data"}
    folder.write_manifest({**bare(folder), "digests": digests, "status": status})
    with pytest.raises(UserError, match="repa seed 0: the manifest has no data digest"):
        verify(load_study(study))


def bare(folder: RunFolder) -> dict[str, Any]:
    """The manifest as it is written: the format is added then."""
    return {name: value for name, value in folder.manifest().items() if name != "format"}


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
