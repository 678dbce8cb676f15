"""`ditbench ablate` and `compare --tuned` as a user types them; wrong words are one line, and nothing is changed."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from harness.records.files import read_json
from harness.records.run_folder import RunFolder
from studies.commands import report
from tests.e2e.conftest import Place, Said, contents, draw_nothing, say

SHORT = ("--budget.amount", "6", "--evaluation.points", "2", "--output.log_every", "3", "--output.mlflow", "false")
GRID = ("--method", "vae_repa", "--seeds", "0")


@dataclass(frozen=True)
class Steps:
    """A grid, the grid with another axis, and its best setting on another seed."""

    place: Place
    first: Said
    runs_of_first: dict[str, bytes]
    grown: Said
    tuned: Said

    @property
    def study(self) -> Path:
        return self.place.runs / "digits-vae_repa-ablation"


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory, shared_cache: Path) -> Steps:
    place = Place(tmp_path_factory.mktemp("ablation"), shared_cache)
    study = place.runs / "digits-vae_repa-ablation"
    words = place.words("ablate", *SHORT, *GRID)
    with pytest.MonkeyPatch.context() as patched:
        draw_nothing(patched)
        first = say(*words, "--grid.block", "1,2")
        runs = records(study)
        with pytest.MonkeyPatch.context() as unreported:  # one report of each kind of study is enough
            unreported.setattr(report, "write_and_print", lambda study: None)
            grown = say(*words, "--grid.block", "2", "--grid.head_layers", "2")
        tuned = say("compare", "--tuned", str(study), "--seeds", "1", "--output.cache", str(place.cache))
    return Steps(place, first, runs, grown, tuned)


def records(study: Path) -> dict[str, bytes]:
    """What the runs of a study left on record."""
    return {name: data for name, data in contents(study).items() if name.endswith(("manifest.json", ".jsonl"))}


# -- what runs ------------------------------------------------------------------------------------------------------


def test_a_grid_runs_the_control_and_every_setting(steps: Steps) -> None:
    assert (steps.first.status, steps.first.err) == (0, "")
    assert "vae_repa: 2 settings and sit, at 1 seed: 3 runs, 3 of them to be run\n" in steps.first.out
    for cell in ("sit", "vae_repa", "vae_repa,block=2"):
        run = RunFolder(steps.study / cell / "seed0")
        assert run.status() == "finished" and run.manifest()["baseline"] == "sit"
    block = RunFolder(steps.study / "vae_repa,block=2" / "seed0").manifest()["config"]["sections"]["vae_repa"]["block"]
    assert block == 2
    assert (steps.study / "report" / "index.html").is_file()
    assert f"report: {steps.study / 'report' / 'index.html'}" in steps.first.out


def test_a_table_an_axis_is_printed(steps: Steps) -> None:
    """Both levels of the first grid, with the value that is on record."""
    lines = [line.split() for line in steps.first.out.splitlines()]
    levels = {line[0] for line in lines if line and line[0].rstrip("*") in ("1", "2")}
    assert len(levels) == 2, steps.first.out


def test_another_axis_joins_the_study_and_runs_what_is_missing(steps: Steps) -> None:
    """The default and the control are there from before; a setting tried before has a value on the axis that joined."""
    assert steps.grown.status == 0, steps.grown.err
    assert "vae_repa: 2 settings and sit, at 1 seed: 3 runs, 1 of them to be run\n" in steps.grown.out
    after = records(steps.study)
    assert len(steps.runs_of_first) == 9 and steps.runs_of_first.items() <= after.items()
    record = read_json(steps.study / "ablation.json")
    axes = {axis["name"]: axis["levels"] for axis in record["methods"]["vae_repa"]["axes"]}
    assert axes == {"block": [1, 2], "head_layers": [2]}
    settings = {trial["cell"]: trial["setting"] for trial in record["trial_list"]}
    assert settings == {
        "vae_repa": {"block": 1, "head_layers": 5},
        "vae_repa,block=2": {"block": 2, "head_layers": 5},
        "vae_repa,block=2,head_layers=2": {"block": 2, "head_layers": 2},
    }
    assert all(trial["state"] == "complete" for trial in record["trial_list"])


def test_a_trials_value_is_the_main_metric_at_the_end_of_its_run(steps: Steps) -> None:
    record = read_json(steps.study / "ablation.json")
    assert record["objective"].startswith("fd_")
    for trial in record["trial_list"]:
        last = RunFolder(steps.study / trial["cell"] / "seed0").lines("eval")[-1]
        assert trial["value"] == pytest.approx(last["metrics"][record["objective"]], rel=1e-12)


def test_the_best_setting_is_compared_on_another_seed(steps: Steps) -> None:
    assert steps.tuned.status == 0, steps.tuned.err
    record = read_json(steps.study / "ablation.json")
    best = min(record["trial_list"], key=lambda trial: trial["value"])
    folder = steps.place.runs / "digits-vae_repa-ablation-tuned"
    assert {path.name for path in folder.iterdir() if (path / "seed1").is_dir()} == {"sit", best["cell"]}
    run = RunFolder(folder / best["cell"] / "seed1").manifest()
    assert run["config"]["budget"]["amount"] == 6
    assert run["tuning"]["id"] == record["id"] and run["tuning"]["seeds"] == [0]
    assert run["tuning"]["setting"] == best["setting"] and run["tuning"]["value"] == best["value"]
    assert "tuning" not in RunFolder(folder / "sit" / "seed1").manifest()


def test_a_seed_that_was_used_for_tuning_is_refused(steps: Steps) -> None:
    said = say("compare", "--tuned", str(steps.study), "--seeds", "0,1")
    assert said.status == 2
    assert said.err == (f"ditbench: seeds 0 were used for tuning in {steps.study}: give others, such as --seeds 1\n")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("--grid.block", "3", "--budget.amount", "7"), "budget.amount 6, now 7"),
        (("--grid.block", "3", "--vae_repa.weight", "0.5"), "vae_repa.weight 1.0, now 0.5"),
        (("--grid.block", "3", "--one_at_a_time"), "kind 'grid', now 'one_at_a_time'"),
        (("--grid.block", "3", "--objective", "velocity_loss"), "objective 'main', now 'velocity_loss'"),
        (
            ("--method", "sra", "--grid.block", "3", "--study", "digits-vae_repa-ablation"),
            "method 'vae_repa', now 'sra'",
        ),
    ],
)
def test_another_ablation_under_the_same_name_is_refused(steps: Steps, words: tuple[str, ...], line: str) -> None:
    before = contents(steps.study)
    said = say(*steps.place.words("ablate", *SHORT, *GRID, *words))
    assert (said.status, said.out) == (2, "")
    assert said.err == f"ditbench: {steps.study} holds another ablation: {line}: give another --study\n"
    assert contents(steps.study) == before


def test_a_comparison_and_an_ablation_do_not_share_a_folder(steps: Steps) -> None:
    words = steps.place.words("compare", *SHORT, "--methods", "sit", "--study", steps.study.name)
    said = say(*words)
    assert said.status == 2 and "holds an ablation: give another --study" in said.err
    tuned = "digits-vae_repa-ablation-tuned"
    said = say(*steps.place.words("ablate", *SHORT, *GRID, "--grid.block", "1", "--study", tuned))
    assert said.status == 2
    assert said.err == f"ditbench: {steps.place.runs / tuned} holds runs of no ablation: give another --study\n"
    assert not (steps.place.runs / tuned / "ablation.json").exists()


# -- what is refused ------------------------------------------------------------------------------------------------


HOW = "give a grid, such as --grid.block 1,2,3, or a search, such as --search tpe --trials 40"
SEARCH = ("--search", "tpe")
BLOCK = ("--grid.block", "1,2")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ((), f"ablate has nothing to vary: {HOW}"),
        ((*BLOCK, *SEARCH, "--trials", "3"), f"grid and --search tpe exclude each other: {HOW}"),
        ((*BLOCK, "--trials", "3"), "--trials belongs to a search: leave it out, or give --search tpe"),
        ((*BLOCK, "--prune=median"), "--prune belongs to a search: leave it out, or give --search tpe"),
        ((*BLOCK, "--methods", "sra"), "--methods belongs to a search: leave it out, or give --search tpe"),
        ((*BLOCK, "--seed", "3"), "--seed has no effect here: leave it out"),
        (SEARCH, "trials is 0: give how many settings of each method to try, 1 to 10000"),
        (
            (*SEARCH, "--trials", "2", "--one_at_a_time"),
            "--one_at_a_time belongs to a grid: leave it out, or give --grid.AXIS",
        ),
        (("--grid.block",), "grid.block has no value: give its levels"),
        ((*BLOCK, "--objective", "fdx"), "objective is 'fdx': give a metric in full, or its family, such as fd"),
        (
            (*BLOCK, "--workers", "2", "--budget.unit", "seconds"),
            "workers is 2 with budget.unit seconds: runs side by side slow each other; give 1",
        ),
        ((*BLOCK, "--runtime.device", "abacus"), "runtime.device is 'abacus': give auto, cpu, cuda or mps"),
        (("--grid.block", "7"), "grid.block: vae_repa.block is 7: the backbone has blocks 1 to 4"),
        ((*BLOCK, "--seeds", "1,1"), "seeds [1, 1] name a seed twice"),
        (
            (*BLOCK, "--workers", "-1"),
            "workers is -1: give how many runs go side by side, or 0 for the machine's own",
        ),
    ],
)
def test_wrong_words_are_one_line_and_leave_nothing(
    place: Place, ditbench: Callable[..., tuple[int, str, str]], words: tuple[str, ...], line: str
) -> None:
    status, out, err = ditbench(*place.words("ablate", "--method", "vae_repa", *words))
    assert (status, out, err) == (2, "", f"ditbench: {line}\n")
    assert not place.runs.exists()


def test_an_objective_that_is_not_measured_is_refused_before_a_run(
    place: Place, ditbench: Callable[..., tuple[int, str, str]]
) -> None:
    status, _, err = ditbench(*place.words("ablate", "--method", "vae_repa", *BLOCK, "--objective", "is"))
    assert status == 2
    assert err.startswith(
        "ditbench: objective is 'is', which is not measured here: give one of fd_efficientnet_lite0_48"
    )
    assert not list(place.runs.glob("*/*/seed*"))


def test_a_launcher_is_refused(
    place: Place, ditbench: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    status, out, err = ditbench(*place.words("ablate", "--method", "vae_repa", *BLOCK))
    assert (status, out) == (2, "") and not place.runs.exists()
    assert err == (
        "ditbench: ablate runs under no launcher: start it alone, with --workers N for N runs side by side\n"
    )


def test_a_plan_whose_data_are_not_there_is_no_study(
    place: Place, ditbench: Callable[..., tuple[int, str, str]]
) -> None:
    """What is wrong shows when the data are read; the plan put right is not refused as another one."""
    words = place.words("ablate", *SHORT, *GRID, "--grid.block", "2", "--study", "mine")
    status, _, err = ditbench(*words, "--data.name", "imagefolder", "--data.path", "nowhere")
    assert status == 2 and "nowhere" in err and len(err.splitlines()) == 1
    assert not (place.runs / "mine").exists()


def test_the_printed_plan_is_a_config_of_the_same_cells(
    place: Place, ditbench: Callable[..., tuple[int, str, str]]
) -> None:
    words = ("--method", "vae_repa", "--grid.block", "2,3,4", "--grid.loss", "l1", "--seeds", "0,1", "--print_config")
    status, out, _ = ditbench(*place.words("ablate", *words))
    assert status == 0
    assert out.startswith(
        "# vae_repa: 4 settings and sit, at 2 seeds: 10 runs\n# vae_repa, block: 2, 3, 4 (default 1)\n"
    )
    plan: dict[str, Any] = yaml.safe_load(out)
    blocks = [f"vae_repa,block={block},loss=l1" for block in (2, 3, 4)]
    assert list(plan["cells"]) == ["sit", "vae_repa", *blocks]
    (place.folder / "plan.yaml").write_text(out)
    status, printed, _ = ditbench("compare", "--config", str(place.folder / "plan.yaml"), "--print_config")
    assert status == 0
    cells = list(yaml.safe_load_all(printed))
    assert [cell["cell"] for cell in cells] == list(plan["cells"])
    assert cells[-1]["vae_repa"] == plan["cells"][blocks[-1]]["vae_repa"]
    assert not place.runs.exists()


def test_levels_in_yaml_may_be_lists_and_the_command_line_wins(
    place: Place, ditbench: Callable[..., tuple[int, str, str]]
) -> None:
    grid = {"block": [2, 3], "loss": ["l1"]}
    (place.folder / "grid.yaml").write_text(yaml.safe_dump({"grid": grid, "method": "vae_repa"}))
    words = place.words("ablate", "--config", str(place.folder / "grid.yaml"), "--grid.block", "2", "--print_config")
    status, out, err = ditbench(*words)
    assert status == 0, err
    assert list(yaml.safe_load(out)["cells"]) == ["sit", "vae_repa", "vae_repa,block=2,loss=l1"]
