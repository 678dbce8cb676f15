"""Reference curves: the band by hand and by simulation, what is refused, and the references that are shipped."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean

import numpy as np
import pytest
import yaml

from harness.records.run_folder import RunFolder, UserError, point_share
from reports.references import curves as reference_curves
from reports.references.curves import ReferenceCurves, band, check, made, matching, read, text
from reports.study.load import RecordedRun, load_run
from studies import cli
from studies.configs.settings import PRESETS
from tests.unit.reports.records_factory import MAIN, STEPS, write_study

SEEDS = (0, 1, 2, 3)


def runs_of(study: Path, cell: str, seeds: Sequence[int] = SEEDS) -> list[RecordedRun]:
    return [load_run(RunFolder(study / cell / f"seed{seed}")) for seed in seeds]


@pytest.fixture
def study(tmp_path: Path) -> Path:
    return write_study(tmp_path / "runs", {"sit": "sit", "repa": "repa"}, seeds=(*SEEDS, 4))


@pytest.fixture
def file(study: Path, tmp_path: Path) -> Path:
    path = tmp_path / "own.json"
    path.write_text(text(made(runs_of(study, "sit"))))
    return path


def changed(run: Path, change: Callable[[dict], None]) -> None:
    """Change the manifest of a run."""
    manifest = json.loads((run / "manifest.json").read_text())
    change(manifest)
    (run / "manifest.json").write_text(json.dumps(manifest))


# -- the band ---------------------------------------------------------------------------------------------------------


def test_a_band_by_hand() -> None:
    """Of 1, 2, 3: mean 2, s = 1; Student's t with 2 degrees of freedom has 9.92484 at 0.995; times sqrt(4/3)."""
    assert band([1.0, 2.0, 3.0], 1) == pytest.approx((2 - 11.46022, 2 + 11.46022), abs=1e-4)


def test_few_good_runs_fall_outside_of_any_of_their_bands() -> None:
    """2,000 times 5 seeds and one more run, at 8 independent places: about 1% are outside somewhere."""
    generator = np.random.default_rng(0)
    draws = generator.normal(3.0, 2.0, size=(2000, 8, 6))
    outside = 0
    for places in draws.tolist():
        bands = [band(values[:5], 8) for values in places]
        outside += any(not low <= values[5] <= high for (low, high), values in zip(bands, places, strict=True))
    assert outside / 2000 == pytest.approx(0.01, abs=0.007)


# -- a run against a reference ----------------------------------------------------------------------------------------


def test_a_new_seed_lies_inside_and_a_bad_run_does_not(study: Path, file: Path) -> None:
    (good,) = runs_of(study, "sit", [4])
    found = check(good, matching(good, [read(file)]))
    assert found.is_good and found.drawn == {}
    assert {place.metric for place in found.places} > {MAIN}
    assert [place.step for place in found.places if place.metric == MAIN] == list(STEPS)
    values = [run.value(MAIN, 3) for run in runs_of(study, "sit")]
    (place,) = [place for place in found.places if (place.metric, place.step) == (MAIN, STEPS[2])]
    assert place.mean == pytest.approx(fmean(values), rel=1e-5) and place.value == good.value(MAIN, 3)

    path = study / "sit" / "seed4" / "eval.jsonl"
    *lines, last = map(json.loads, path.read_text().splitlines())
    last["metrics"][MAIN] *= 3
    path.write_text("".join(json.dumps(line) + "\n" for line in (*lines, last)))
    (bad,) = runs_of(study, "sit", [4])
    outside = [place for place in check(bad, read(file)).places if not place.is_inside]
    assert [(place.metric, place.step) for place in outside] == [(MAIN, STEPS[-1])]


def test_draws_at_a_known_seed_must_be_equal(study: Path, file: Path) -> None:
    (run,) = runs_of(study, "sit", [2])
    assert check(run, read(file)).drawn == {"initial weights": True, "batches, times and noise to step 800": True}
    path = study / "sit" / "seed2" / "train.jsonl"
    path.write_text(path.read_text().replace(run.train[-1]["trace"], "0" * 64))
    (run,) = runs_of(study, "sit", [2])
    found = check(run, read(file))
    assert found.drawn == {"initial weights": True, "batches, times and noise to step 800": False}
    assert not found.is_good


def test_the_command_says_where_a_run_stands(
    study: Path, file: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    again = tmp_path / "again.json"
    words = [str(study / "sit" / f"seed{seed}") for seed in SEEDS]
    assert cli.main(["check-reference", *words, "--make", str(again)]) == 0
    assert again.read_text() == file.read_text()
    capsys.readouterr()
    assert cli.main(["check-reference", words[0], "--reference", str(file)]) == 0
    assert "all inside: this run is what it should be" in capsys.readouterr().out
    changed(study / "sit" / "seed0", lambda manifest: manifest["digests"].update(initial_weights="f" * 64))
    assert cli.main(["check-reference", words[0], "--reference", str(file), "--format", "json"]) == 1
    (found,) = json.loads(capsys.readouterr().out)
    assert (found["good"], found["equal"]["initial weights"]) == (False, False)
    assert all(place["inside"] for place in found["places"])


def test_a_run_with_other_points_is_held_to_the_steps_that_both_have(study: Path, file: Path) -> None:
    path = study / "sit" / "seed4" / "eval.jsonl"
    second = json.loads(path.read_text().splitlines()[1])
    path.write_text(json.dumps({**second, "point": 1}) + "\n")
    (run,) = runs_of(study, "sit", [4])
    assert {place.step for place in check(run, read(file)).places} == {STEPS[1]}
    path.write_text(json.dumps({**second, "step": 7}) + "\n")
    (run,) = runs_of(study, "sit", [4])
    with pytest.raises(UserError, match="was evaluated after no step at which own was"):
        check(run, read(file))


# -- refused ----------------------------------------------------------------------------------------------------------


def test_a_run_of_other_settings_is_refused(study: Path, file: Path) -> None:
    (other,) = runs_of(study, "repa", [0])
    with pytest.raises(UserError, match=r"no reference of method repa with these settings .*there are some of sit"):
        matching(other, [read(file)])

    def longer(manifest: dict) -> None:
        manifest["config"]["optimizer"]["lr"] = 0.5
        manifest["digests"]["training"] = "e" * 64

    changed(study / "sit" / "seed0", longer)
    (other,) = runs_of(study, "sit", [0])
    with pytest.raises(UserError, match=r"made under its settings \(optimizer\.lr is 0\.5, and .* in own\)"):
        matching(other, [read(file)])


def test_what_makes_no_reference(study: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="needs 3 or more runs, each at a seed of its own; 2 are given"):
        made(runs_of(study, "sit", [0, 1]))
    with pytest.raises(UserError, match="needs 3 or more runs"):
        made(runs_of(study, "sit", [0, 1, 1]))
    with pytest.raises(UserError, match="differ in method: a reference is of one setting"):
        made([*runs_of(study, "sit", [0, 1]), *runs_of(study, "repa", [2])])
    changed(study / "sit" / "seed1", lambda manifest: manifest.update(status="running"))
    with pytest.raises(UserError, match="is running: a reference is made of finished runs"):
        made(runs_of(study, "sit"))
    (tmp_path / "empty.json").write_text("{}")
    with pytest.raises(UserError, match="is no reference"):
        read(tmp_path / "empty.json")


# -- what is shipped --------------------------------------------------------------------------------------------------


@pytest.fixture(params=sorted(path.stem for path in reference_curves.FOLDER.glob("*.json")))
def shipped(request: pytest.FixtureRequest) -> ReferenceCurves:
    return read(reference_curves.FOLDER / f"{request.param}.json")


def test_there_is_a_reference_for_each_precision_and_for_each_method() -> None:
    found = {(one.method, one.settings["runtime"]["precision"]) for one in reference_curves.shipped()}
    assert found >= {(name, precision) for name in ("sit", "repa", "sra", "vae_repa") for precision in ("fp32", "bf16")}


def test_every_seed_lies_in_the_band_of_the_others(shipped: ReferenceCurves) -> None:
    places = [(name, step) for name, curve in shipped.curves.items() for step in curve]
    for name, step in places:
        values = shipped.curves[name][step]
        assert values.keys() == shipped.seeds.keys() and len(values) >= 5
        for seed, value in values.items():
            low, high = band([v for s, v in values.items() if s != seed], len(places))
            assert low <= value <= high, (name, step, seed)


def test_a_shipped_reference_is_of_the_preset_as_it_is(shipped: ReferenceCurves) -> None:
    preset = yaml.safe_load((PRESETS / "digits.yaml").read_text())
    for section in ("model", "data", "autoencoder", "optimizer", "ema", "budget"):
        for key, value in preset[section].items():
            assert shipped.settings[section][key] == value, f"{section}.{key}: make the references anew"
    assert shipped.settings["protocol"]["sampler"]["num_steps"] == preset["evaluation"]["sampler"]["num_steps"]
    points, spacing = preset["evaluation"]["points"], preset["evaluation"]["spacing"]
    evaluated = {
        int(preset["budget"]["amount"] * point_share(point, points, spacing)) for point in range(1, points + 1)
    }
    assert all(evaluated <= curve.keys() for curve in shipped.curves.values()), (
        "a run of the preset is held to them all"
    )
