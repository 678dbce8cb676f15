"""Verdicts on claims, from hand-made records whose differences have intervals worked out by hand.

t(0.975; 2) = 4.302653: three differences with mean m and standard deviation s have the interval m +- 2.484138 s.
"""

import dataclasses
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from harness.records.files import read_json, write_json
from harness.records.run_folder import RunFolder
from reports.claims.evidence import CountedRows, Evidence, Judged, decided, judge, measured
from reports.claims.statements import load_ledger
from reports.statistics.intervals import t_interval
from reports.study.load import load_study
from tests.unit.reports.records_factory import (
    FINAL,
    MAIN,
    POINTS,
    SECTIONS,
    STEPS,
    diverge,
    edit_lines,
    edit_manifest,
    evaluate_finally,
    fail,
    run_folder,
    write_final_study,
    write_lines,
    write_run,
)

LEDGER = load_ledger()
PAPERS = {
    "vae_repa": {"block": 1, "weight": 1.0, "loss": "smooth_l1", "head_layers": 5, "t_min": 0.0, "t_max": 1.0},
    "repa": {"block": 2, "weight": 0.5},
    "sra": {"block": 2, "teacher_block": 4, "weight": 0.2, "loss": "smooth_l1", "noise_gap": 0.2},
}
"""The papers' settings for SiT-nano, which has 6 blocks: 2/12, 8/28 and 20/28 of them."""
CELLS: dict[str, tuple[str, dict[str, Any]]] = {
    "sit": ("sit", {}),
    "repa": ("repa", {}),
    "sra": ("sra", {}),
    "vae_repa": ("vae_repa", {}),
    "cosine": ("vae_repa", {"loss": "cosine"}),
    "block 3": ("vae_repa", {"block": 3}),
}
BETTER, AS_GOOD = "vae-repa-better-than-vanilla", "vae-repa-smooth-l1-as-good-as-cosine"
FASTER, MUCH_FASTER = "repa-faster-than-vanilla", "repa-17.5-times-faster"
SECONDS, COMPUTE = "vae-repa-faster-step-than-sra", "vae-repa-4-percent-compute"
SIT = (20.0, 22.0, 24.0)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = tmp_path_factory.mktemp("runs")
    for cell, (method, changes) in CELLS.items():
        for seed in range(3):
            section = {**PAPERS[method], **changes} if method in PAPERS else None
            write_run(runs, "digits", cell, method, seed, "sit", section=section)
    return runs / "digits"


@pytest.fixture
def study(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "digits", ignore=shutil.ignore_patterns("*.png")))


def judged(name: str, *paths: Path) -> Judged:
    """A claim, by the studies as they stand."""
    return next(one for one in judge(LEDGER, [load_study(path) for path in paths]) if one.claim.id == name)


def evidence(name: str, *paths: Path) -> Evidence:
    """The only evidence on a claim."""
    (found,) = judged(name, *paths).evidence
    return found


def set_last(study: Path, cell: str, values: Sequence[float], name: str = MAIN) -> None:
    """A metric at the last evaluation, for seeds 0, 1, ..."""
    for seed, value in enumerate(values):
        folder = run_folder(study, cell, seed)
        edit_lines(folder, "eval", metrics={**folder.lines("eval")[-1]["metrics"], name: value})


TUNING = {
    "study": "t",
    "id": "1",
    "kind": "grid",
    "objective": MAIN,
    "setting": {},
    "seeds": [1],
    "trials": 3,
}


def differ(study: Path, cell: str, against: str, differences: Sequence[float]) -> None:
    """Let two cells differ by this much at seeds 0, 1 and 2."""
    set_last(study, against, SIT)
    set_last(study, cell, [value + difference for value, difference in zip(SIT, differences, strict=True)])


def set_curve(folder: RunFolder, values: Sequence[float]) -> None:
    """The main metric at every evaluation."""
    lines = folder.lines("eval")
    changed = [{**line, "metrics": {**line["metrics"], MAIN: v}} for line, v in zip(lines, values, strict=True)]
    write_lines(folder, "eval", changed)


# -- better -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("differences", "low", "high", "verdict", "words"),
    [
        ((-3, -5, -4), -6.484138, -1.515862, "reproduced", "holds on digits, SiT-nano/2"),
        ((3, 5, 4), 1.515862, 6.484138, "contradicted", "does not hold on digits, SiT-nano/2"),
        ((-1, -3, -2), -4.484138, 0.484138, "undecided", "undecided"),
        ((0, 0, 0), 0, 0, "undecided", "undecided"),
    ],
)
def test_better(study: Path, differences: Sequence[float], low: float, high: float, verdict: str, words: str) -> None:
    differ(study, "vae_repa", "sit", differences)
    found = evidence(BETTER, study)
    assert (found.verdict, found.words) == (verdict, words)
    assert found.interval.num == 3
    assert (found.interval.low, found.interval.high) == pytest.approx((low, high), abs=1e-6)
    assert found.by_seed == dict(enumerate(differences))
    assert found.values == pytest.approx((22 + sum(differences) / 3, 22))
    assert found.num_claimed == sum(difference < 0 for difference in differences)
    assert found.missing == (() if verdict != "undecided" else ("the interval holds 0",))
    assert (found.cell, found.against, found.metric, found.study) == ("vae_repa", "sit", MAIN, "digits")


def test_the_scale_is_said(study: Path) -> None:
    place = evidence(BETTER, study).place
    assert place.text == "SiT-nano/2 on digits after 800 steps, not ImageNet"
    assert place.differences == (
        "not ImageNet",
        "not SiT-B/2 or SiT-L/2 or SiT-XL/2",
        "64 images a step, not 256",
        f"{MAIN}, not fid50k",
        "sampler.num_steps 50, not 250",
    )


def test_a_metric_whose_better_side_is_up() -> None:
    """On the other side of 0 the same interval contradicts."""
    interval = t_interval([3.0, 5.0, 4.0])
    assert decided(interval, 0, "above") == "reproduced"
    assert decided(interval, 0, "below") == "contradicted"
    assert decided(interval, 2, "above") == decided(interval, 2, "below") == "undecided"
    assert decided(interval, 7, "above") == "contradicted"


def test_which_metric_stands_for_the_papers() -> None:
    claim = next(claim for claim in LEDGER.claims if claim.metric == "fid50k")
    assert measured(claim, ["kd_x_10", "fd_x_10", "fid50k", "fid5k"]) == "fid50k"
    assert measured(claim, ["kd_x_10", "fd_pixels_10", "fd_x_10", "velocity_loss"]) == "fd_x_10"
    assert measured(claim, ["kd_x_10", "fd_pixels_10", "sfd_x_10", "velocity_loss"]) == ""
    assert measured(dataclasses.replace(claim, metric="is50k"), ["fd_x_10", "is5k"]) == "is5k"


def test_a_study_without_such_a_metric_decides_nothing(study: Path) -> None:
    for folder in study.glob("*/seed*"):
        run = RunFolder(folder)
        lines = [{**line, "metrics": {"velocity_loss": 0.5}} for line in run.lines("eval")]
        write_lines(run, "eval", lines)
    found = judged(BETTER, study)
    assert (found.evidence, found.missing) == ((), ("no metric of the kind of fid50k",))


def test_the_favour_of_the_metric_is_said(study: Path) -> None:
    assert evidence("repa-better-than-vanilla", study).favoured == ("repa",)
    assert evidence(BETTER, study).favoured == ()


# -- at least as good -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("differences", "verdict"),
    [
        ((-0.1, 0.1, 0.0), "reproduced"),  # up to 0.248, and 2% of vanilla's 22 are 0.44
        ((-3, -5, -4), "reproduced"),
        ((0.9, 1.1, 1.0), "contradicted"),  # from 0.752
        ((0.3, 0.5, 0.4), "undecided"),  # 0.152 to 0.648
        ((0.36, 0.44, 0.40), "undecided"),  # worse than the other for certain, by less than the margin perhaps
    ],
)
def test_at_least_as_good(study: Path, differences: Sequence[float], verdict: str) -> None:
    differ(study, "vae_repa", "cosine", differences)
    set_last(study, "sit", SIT)
    found = evidence(AS_GOOD, study)
    assert found.border == pytest.approx(0.44)
    assert found.verdict == verdict
    assert found.missing == (() if verdict != "undecided" else ("the interval holds the margin, 2% of vanilla",))


def test_without_vanilla_there_is_no_margin(study: Path) -> None:
    differ(study, "vae_repa", "cosine", (-3, -5, -4))
    fail(run_folder(study, "sit", 1), "out of memory")
    found = evidence(AS_GOOD, study)
    assert found.verdict == "undecided"
    assert found.missing == ("vanilla at the same seeds: the margin is 2% of its value",)


# -- what forbids a verdict -------------------------------------------------------------------------------------------

CLEAR = (-3, -5, -4)


def test_two_seeds_are_too_few(study: Path) -> None:
    differ(study, "vae_repa", "sit", CLEAR)
    shutil.rmtree(study / "vae_repa" / "seed2")
    found = evidence(BETTER, study)
    assert found.verdict == "undecided"
    assert found.missing == ("1 more pair of seeds: 2 of at least 3", "vae_repa has no seed 2")


def test_two_seeds_are_too_few_however_clear(study: Path) -> None:
    set_last(study, "sit", SIT)
    set_last(study, "vae_repa", [value - 4 for value in SIT])
    shutil.rmtree(study / "sit" / "seed0")
    found = evidence(BETTER, study)
    assert (found.interval.low, found.interval.high) == (-4, -4)
    assert found.verdict == "undecided"


def test_a_diverged_run_forbids_a_verdict(study: Path, written: Path) -> None:
    write_run(study.parent, "digits", "vae_repa", "vae_repa", 3, "sit", section=PAPERS["vae_repa"])
    write_run(study.parent, "digits", "sit", "sit", 3, "sit")
    differ(study, "vae_repa", "sit", CLEAR)
    diverge(run_folder(study, "vae_repa", 3), 500, "loss", kept=4)
    found = evidence(BETTER, study)
    assert (found.interval.num, found.verdict) == (3, "undecided")
    assert found.missing == ("vae_repa seed 3 diverged: the others are survivors",)


def test_a_failed_run_is_left_out_and_named(study: Path) -> None:
    write_run(study.parent, "digits", "vae_repa", "vae_repa", 3, "sit", section=PAPERS["vae_repa"])
    write_run(study.parent, "digits", "sit", "sit", 3, "sit")
    differ(study, "vae_repa", "sit", CLEAR)
    fail(run_folder(study, "sit", 3), "out of memory")
    found = evidence(BETTER, study)
    assert (found.interval.num, found.verdict) == (3, "reproduced")
    assert found.left_out == ("sit seed 3 (failed) has no evaluation after 800 steps",)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"digests": {"training": "0" * 64}}, "not comparable: training digest differs"),
        ({"digests": {"evaluation": "0" * 64}}, "not comparable: evaluation digest differs"),
        ({"digests": {"initial_weights": "0" * 64}}, "not comparable: initial weights digest differs"),
        ({"tuning": TUNING}, "vae_repa seed 1 was tuned on that seed"),
    ],
)
def test_runs_that_may_not_be_compared_are_no_pair(study: Path, change: Mapping[str, Any], why: str) -> None:
    differ(study, "vae_repa", "sit", CLEAR)
    edit_manifest(run_folder(study, "vae_repa", 1), **change)
    found = evidence(BETTER, study)
    assert (found.interval.num, found.verdict) == (2, "undecided")
    assert why in "; ".join(found.missing)


def test_an_evaluation_under_another_protocol_is_no_pair(study: Path) -> None:
    differ(study, "vae_repa", "sit", CLEAR)
    edit_lines(run_folder(study, "vae_repa", 1), "eval", protocol="0" * 64)
    assert "was evaluated at step 800 under another protocol" in "; ".join(evidence(BETTER, study).missing)


def test_a_value_that_is_not_finite_is_no_pair(study: Path) -> None:
    differ(study, "vae_repa", "sit", (-3, math.inf, -4))
    found = evidence(BETTER, study)
    assert (found.interval.num, found.verdict) == (2, "undecided")
    assert f"vae_repa seed 1 has no finite {MAIN}" in found.missing


def test_unequal_steps_decide_nothing(tmp_path: Path) -> None:
    for cell in ("sit", "vae_repa"):
        for seed in range(3):
            section = PAPERS.get(cell)
            write_run(tmp_path, "gflops", cell, cell, seed, "sit", unit="train_gflops", amount=4000.0, section=section)
    study = tmp_path / "gflops"
    differ(study, "vae_repa", "sit", CLEAR)
    found = evidence(BETTER, study)
    assert found.verdict == "undecided"
    # 4000 / (64 x 0.1236) = 505.7 and 4000 / (64 x 0.1356) = 460.9 steps.
    assert found.missing == (
        "the two made 461 and 506 steps: the claim is of equal ones, so set budget.unit steps or images",
    )


# -- pairs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "missing"),
    [
        ("vae-repa-all-times-better-than-half", ("no cell of vae_repa with t_max 0.5 (nearest: vae_repa)",)),
        ("vae-repa-5-layers-better-than-2", ("no cell of vae_repa with head_layers 2 (nearest: vae_repa)",)),
        ("vae-repa-shallow-better-than-block-8", ("no cell of vae_repa with block 4 (nearest: block 3)",)),
        ("vae-repa-adds-to-repa", ("no cell of repa+vae_repa",)),
        ("sra-time-gap-better-than-none", ("no cell of sra with noise_gap 0 (nearest: sra)",)),
    ],
)
def test_what_is_missing_of_a_pair_is_named(study: Path, name: str, missing: tuple[str, ...]) -> None:
    found = judged(name, study)
    assert (found.evidence, found.missing) == ((), missing)


def test_a_pair_is_found_by_its_settings(study: Path) -> None:
    found = evidence("vae-repa-shallow-better-than-block-6", study)
    assert (found.cell, found.against) == ("vae_repa", "block 3")


def test_all_that_a_claim_does_not_vary_must_be_equal(study: Path) -> None:
    for seed in range(3):
        folder = run_folder(study, "cosine", seed)
        sections = {"vae_repa": {**folder.manifest()["config"]["sections"]["vae_repa"], "head_width": 64}}
        edit_manifest(folder, config={"sections": sections})
    found = judged(AS_GOOD, study)
    assert (found.evidence, found.missing) == ((), ("the two differ in vae_repa.head_width too",))


def test_a_setting_that_is_not_on_record_is_none(tmp_path: Path) -> None:
    assert "t_max" not in SECTIONS["vae_repa"]
    for cell in ("sit", "vae_repa"):
        write_run(tmp_path, "old", cell, cell, 0, "sit")
    assert judged(BETTER, tmp_path / "old").missing == (
        "no cell of vae_repa with t_min 0.0 and t_max 1.0 (nearest: vae_repa)",
    )


def test_the_parts_of_a_sum_have_no_order(tmp_path: Path) -> None:
    for cell, method in {"both": "repa+vae_repa", "repa": "repa"}.items():
        for seed in range(3):
            write_run(tmp_path, "sums", cell, method, seed, "repa")
            folder = run_folder(tmp_path / "sums", cell, seed)
            sections = {part: {**SECTIONS[part], **PAPERS[part]} for part in method.split("+")}
            edit_manifest(folder, config={"sections": sections})
            if cell == "both":
                edit_manifest(folder, method="vae_repa+repa")
    study = tmp_path / "sums"
    differ(study, "both", "repa", CLEAR)
    found = evidence("vae-repa-adds-to-repa", study)
    assert (found.cell, found.against, found.verdict) == ("both", "repa", "reproduced")


# -- several studies --------------------------------------------------------------------------------------------------


def test_two_studies_that_decide_differently_are_both_shown(study: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(study, tmp_path / "other"))
    differ(study, "vae_repa", "sit", CLEAR)
    differ(other, "vae_repa", "sit", (3, 5, 4))
    found = judged(BETTER, study, other)
    assert [(one.study, one.verdict) for one in found.evidence] == [("digits", "reproduced"), ("other", "contradicted")]
    assert found.is_contested
    assert not judged(BETTER, study, study).is_contested


def test_the_study_that_lacks_least_says_what_is_missing(study: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(study, tmp_path / "other"))
    shutil.rmtree(study / "repa")
    assert judged("vae-repa-adds-to-repa", study, other).missing == ("other: no cell of repa+vae_repa",)


# -- the paper's own scale --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SiT-B/2 after 400,000 steps at 256 pixels, with a final evaluation of 50,000 images."""
    path = write_final_study(tmp_path_factory.mktemp("runs"))
    for cell, section in {"repa": PAPERS["repa"] | {"block": 4}, "vae_repa": PAPERS["vae_repa"] | {"block": 2}}.items():
        for seed in range(3):
            edit_manifest(run_folder(path, cell, seed), config={"sections": {cell: section}})
    for folder in path.glob("*/seed*"):
        write_json(folder / "cost.json", {**read_json(folder / "cost.json"), "cache_images": 1_281_167})
        manifest = RunFolder(folder).manifest()
        needs = {**manifest["method_facts"]["needs"], "encoders": []}
        edit_manifest(RunFolder(folder), method_facts={"needs": needs})
    return path


def test_at_the_papers_scale_the_words_are_the_papers(imagenet: Path) -> None:
    found = {one.metric: one for one in judged("repa-better-than-vanilla", imagenet).evidence}
    final = found["fid50k"]
    # 24.5 - 33.1, 24.1 - 33.4, 24.9 - 32.8: mean -8.6, s = 0.7.
    assert FINAL["repa"]["fid50k"] == (24.5, 24.1, 24.9)
    assert (final.interval.low, final.interval.high) == pytest.approx((-8.6 - 2.484138 * 0.7, -8.6 + 2.484138 * 0.7))
    assert (final.verdict, final.words) == ("reproduced", "reproduced")
    assert final.place.text == "SiT-B/2 on ImageNet after 400,000 steps"
    # The other protocol's numbers are evidence of their own, and not at the paper's scale.
    assert found.keys() == {"fid50k", MAIN}
    assert not found[MAIN].place.is_papers


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"config": {"model": {"name": "SiT-S/2"}}}, "not SiT-B/2 or SiT-L/2"),
        ({"config": {"optimizer": {"batch_size": 64}}}, "64 images a step, not 256"),
        ({"config": {"data": {"name": "parquet", "path": "data/flowers", "image_size": 64}}}, "not ImageNet"),
    ],
)
def test_whatever_differs_from_the_paper_makes_it_another_scale(
    imagenet: Path, tmp_path: Path, change: Mapping[str, Any], difference: str
) -> None:
    path = Path(shutil.copytree(imagenet, tmp_path / "imagenet"))
    for folder in path.glob("*/seed*"):
        edit_manifest(RunFolder(folder), **change)
    found = next(one for one in judged("repa-better-than-vanilla", path).evidence if one.metric == "fid50k")
    assert difference in found.place.differences
    assert found.words.startswith("holds on ")
    assert (found.place.data == "flowers") == (difference == "not ImageNet")


def test_another_sampler_or_budget_is_another_scale(imagenet: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(imagenet, tmp_path / "imagenet"))
    for cell, metrics in FINAL.items():
        for seed in range(3):
            folder = run_folder(path, cell, seed)
            values = {name: numbers[seed] for name, numbers in metrics.items()}
            evaluate_finally(folder, values, sampler={"kind": "ode-heun", "num_steps": 250, "cfg_scale": 1.0})
            edit_lines(folder, "final", step=200_000)
    found = next(one for one in judged("repa-better-than-vanilla", path).evidence if one.metric == "fid50k")
    assert set(found.place.differences) == {
        "200,000 steps, not 400,000",
        "sampler.kind ode-heun, not sde-euler-maruyama",
    }


# -- speed-up ---------------------------------------------------------------------------------------------------------


def reach(study: Path, *points: int) -> None:
    """Vanilla ends at 20; REPA is at 19 from these evaluations on, at seeds 0, 1, ...; 0 for never."""
    for seed, point in enumerate(points):
        set_curve(run_folder(study, "sit", seed), [30.0] * (POINTS - 1) + [20.0])
        first = point or POINTS + 1
        set_curve(run_folder(study, "repa", seed), [30.0 if p < first else 19.0 for p in range(1, POINTS + 1)])


def test_a_speed_up_by_hand(study: Path) -> None:
    reach(study, 2, 2, 4)
    found = evidence(FASTER, study)
    # 800 / 200, 800 / 200 and 800 / 400 steps: factors 4, 4, 2 with logarithms of mean 1.15525 and s = 0.40018.
    assert found.by_seed == {0: 4.0, 1: 4.0, 2: 2.0}
    low, high = (math.exp(1.155245 + sign * 2.484138 * 0.400189) for sign in (-1, 1))
    assert (found.interval.mean, found.interval.low, found.interval.high) == pytest.approx(
        (32 ** (1 / 3), low, high), rel=1e-5
    )
    assert found.values == (pytest.approx(800 / 3), 800)
    assert (found.verdict, found.words) == ("reproduced", "holds on digits, SiT-nano/2")


SAME = ("all seeds are there at the same evaluation, so their spread says nothing: evaluate more often",)
APART = ("the evaluations are too far apart: evaluate more often",)


@pytest.mark.parametrize(
    ("points", "name", "verdict", "missing"),
    [
        ((4, 4, 5), MUCH_FASTER, "contradicted", ()),  # at most 800 / 300, 800 / 300 and 800 / 400 times
        ((1, 1, 2), MUCH_FASTER, "undecided", APART),  # 2.35 to 17.2 times, and nobody knows how much more
        ((2, 2, 4), MUCH_FASTER, "undecided", APART),  # 1.18 to 8.58 times; up to 26.8 by the evaluations before
        ((1, 1, 2), FASTER, "reproduced", ()),  # at least 700 / 100, 700 / 100 and 700 / 200 times
        ((6, 6, 7), FASTER, "undecided", APART),  # 1.02 to 1.58; from 0.89 if vanilla was there just after 700 steps
        ((7, 7, 8), FASTER, "undecided", ("the interval holds 1",)),  # 0.90 to 1.32
        ((4, 4, 4), FASTER, "undecided", SAME),
        ((2, 0, 4), FASTER, "undecided", ("1 of 3 seeds never reached vanilla's value within the budget",)),
        ((0, 0, 0), MUCH_FASTER, "undecided", ("3 of 3 seeds never reached vanilla's value within the budget",)),
    ],
)
def test_speed_ups(study: Path, points: Sequence[int], name: str, verdict: str, missing: tuple[str, ...]) -> None:
    reach(study, *points)
    found = evidence(name, study)
    assert (found.verdict, found.missing) == (verdict, missing)
    assert found.has_data == any(points)


def test_vanilla_that_was_there_before_its_end_took_no_longer(study: Path) -> None:
    """Its curve need not fall: its own first evaluation at the target counts, not the whole budget."""
    reach(study, 4, 4, 5)
    for seed in range(3):
        set_curve(run_folder(study, "sit", seed), [30.0, 30.0, 30.0, 18.0, 25.0, 25.0, 25.0, 20.0])
    found = evidence(FASTER, study)
    assert found.by_seed == {0: 1.0, 1: 1.0, 2: 0.8}
    assert (found.verdict, found.missing) == ("undecided", ("the interval holds 1",))


def test_a_speed_up_of_less_than_one_contradicts(study: Path) -> None:
    reach(study, 7, 7, 8)
    for seed in range(3):
        set_curve(run_folder(study, "sit", seed), [30.0, 20.0, 20.0, 20.0, 20.0, 20.0, 20.0, 20.0])
    found = evidence(FASTER, study)
    assert (found.verdict, found.values) == ("contradicted", (pytest.approx(2200 / 3), 200))


def test_the_target_is_the_median_of_vanillas_last_values(study: Path) -> None:
    reach(study, 2, 2, 4)
    set_last(study, "sit", (18.0, 19.0, 30.0))  # 19 is just reached; the mean, 22.3, would be as well, 18 never
    assert evidence(FASTER, study).by_seed == {0: 4.0, 1: 4.0, 2: 2.0}
    set_last(study, "sit", (18.0, 18.5, 30.0))
    assert evidence(FASTER, study).missing == ("3 of 3 seeds never reached vanilla's value within the budget",)


# -- seconds ----------------------------------------------------------------------------------------------------------


def time_steps(study: Path, cell: str, milliseconds: Sequence[float]) -> None:
    for seed, value in enumerate(milliseconds):
        edit_lines(run_folder(study, cell, seed), "eval", train_seconds=STEPS[-1] * value / 1000)


def test_seconds_of_a_step_by_hand(study: Path) -> None:
    time_steps(study, "sra", (70, 72, 74))
    time_steps(study, "vae_repa", (67, 67, 70))
    found = evidence(SECONDS, study)
    assert found.by_seed == pytest.approx({0: -3.0, 1: -5.0, 2: -4.0})
    assert (found.interval.low, found.interval.high) == pytest.approx((-6.484138, -1.515862), abs=1e-6)
    assert found.values == pytest.approx((68, 72))
    assert found.verdict == "reproduced"
    assert found.place.differences[-1] == "cpu x86_64, not H100"
    time_steps(study, "vae_repa", (73, 77, 78))
    assert evidence(SECONDS, study).verdict == "contradicted"


def test_a_shared_device_counts_for_no_seconds(study: Path) -> None:
    time_steps(study, "sra", (70, 72, 74))
    time_steps(study, "vae_repa", (67, 67, 70))
    edit_manifest(run_folder(study, "sra", 1), shared_device=True)
    found = evidence(SECONDS, study)
    assert (found.interval.num, found.verdict) == (2, "undecided")
    assert "sra seed 1 shared the device, so the seconds do not count" in found.missing


def test_seconds_of_unlike_machines_decide_nothing(study: Path) -> None:
    time_steps(study, "sra", (70, 72, 74))
    time_steps(study, "vae_repa", (67, 67, 70))
    edit_manifest(run_folder(study, "sra", 1), environment={"threads": 4})
    found = evidence(SECONDS, study)
    assert (found.interval.num, found.verdict) == (3, "undecided")
    assert "the runs differ in threads" in "; ".join(found.missing)


# -- counts -----------------------------------------------------------------------------------------------------------


def test_counts_need_no_seeds(study: Path) -> None:
    for seed in (1, 2):
        shutil.rmtree(study / "vae_repa" / f"seed{seed}")
    found = evidence(COMPUTE, study)
    # 0.1356 / 0.1236 GFLOPs an image.
    assert found.interval.mean == pytest.approx(100 * (0.1356 / 0.1236 - 1))
    assert (found.verdict, found.words) == ("contradicted", "does not hold on digits, SiT-nano/2")
    none = evidence("vae-repa-no-external-parameters", study)
    assert (none.words, none.interval.mean) == ("holds on digits, SiT-nano/2", 0)
    assert none.cell == "block 3, cosine and 1 more"


def test_an_external_encoder_contradicts(study: Path) -> None:
    folder = run_folder(study, "sra", 0)
    write_json(folder.path / "cost.json", {**read_json(folder.path / "cost.json"), "external_parameters": 5})
    found = evidence("sra-no-external-parameters", study)
    assert (found.verdict, found.interval.mean) == ("contradicted", 5)


def test_without_a_count_there_is_no_verdict(study: Path) -> None:
    for path in study.glob("*/seed*/cost.json"):
        path.unlink()
    assert judged(COMPUTE, study).missing == ("no counted cost of the pair",)


def overhead_row(method: str, gflops: float, targets: str = "cached", **section: Any) -> dict[str, Any]:
    settings = {method: {**PAPERS.get(method, {}), **section}}
    return {
        "model": "SiT-XL/2",
        "method": method,
        "label": method,
        "targets": targets,
        "settings": settings,
        "train_gflops_per_image": gflops,
        "external_parameters": 0,
    }


@pytest.mark.parametrize(("gflops", "words"), [(740.29, "reproduced"), (750.0, "contradicted")])
def test_counts_of_the_overhead_command_stand_at_the_papers_scale(tmp_path: Path, gflops: float, words: str) -> None:
    rows = [overhead_row("sit", 711.70), overhead_row("vae_repa", gflops, block=8)]
    found = by_overhead(tmp_path, rows, input_size=32)
    (exact,) = found[COMPUTE].evidence
    assert exact.interval.mean == pytest.approx(100 * (gflops / 711.70 - 1))
    assert exact.words == words
    assert found[BETTER].missing == ("no metric of the kind of fid50k",)
    assert found[SECONDS].missing == ("no cell of sra",)
    (smaller,) = by_overhead(tmp_path, rows, input_size=16)[COMPUTE].evidence
    assert smaller.words.endswith("on SiT-XL/2")


def by_overhead(folder: Path, rows: Sequence[Mapping[str, Any]], input_size: int) -> dict[str, Judged]:
    return {one.claim.id: one for one in judge(LEDGER, [CountedRows(folder, rows, {"input_size": input_size})])}
