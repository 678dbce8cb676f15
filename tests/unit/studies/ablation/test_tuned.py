"""`compare --tuned`: which cells win, under which shared settings, and what is refused."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from harness.errors import UserError
from harness.records.files import write_json
from studies.ablation import axes
from studies.ablation.plan import AblationPlan, plan_record
from studies.commands import compare
from studies.configs.cells import Comparison, run_config
from studies.configs.sections import nominal_shape, resolve_sections
from studies.configs.settings import build_parser, parse

WORDS = ("--config", "digits", "--optimizer.lr", "0.01", "--evaluation.sampler.num_steps", "9", "--study", "s")
SUM = "repa+vae_repa"
Record = dict[str, Any]


def trial(method: str, cell: str, setting: Mapping[str, Any], value: float | None, state: str = "complete") -> Record:
    plain = {"number": 0, "intermediate": {}, "started": "", "ended": "", "workers": [], "spent": {"budget": 1.0}}
    return {**plain, "method": method, "cell": cell, "setting": setting, "value": value, "state": state}


@pytest.fixture(scope="module")
def plan() -> Record:
    """The record of a search over two methods, before any trial."""
    parser = build_parser("ablate", "")
    cells = {
        name: replace(run_config(parser, parse(parser, [*WORDS, "--method", name])), cell=name)
        for name in ("sit", "sra", SUM)
    }
    control = resolve_sections(cells["sit"], nominal_shape(cells["sit"]))
    subjects = (axes.search_subject(cells["sra"]), axes.search_subject(cells[SUM]))
    asked = AblationPlan(kind="search", subjects=subjects, seeds=(0, 1), trials=2, control=control)
    return {**plan_record(asked), "id": "0a1b", "direction": "lower", "objective": "fd_x"}


@pytest.fixture
def study(plan: Record, tmp_path: Path) -> Callable[..., Path]:
    """Writes a study with these trials; returns its folder."""

    def write(*trials: Record, **fields: Any) -> Path:
        folder = tmp_path / "runs" / "s"
        folder.mkdir(parents=True)
        write_json(folder / "ablation.json", {**plan, "commands": [], "trial_list": trials, **fields})
        return folder

    return write


TRIALS = (
    trial("sra", "sra", {"block": 2, "weight": 0.2}, 5.0),
    trial("sra", "sra,block=3,weight=0.5", {"block": 3, "weight": 0.5}, 4.0),
    trial(SUM, SUM, {"repa.weight": 0.5, "vae_repa.block": 1}, 7.0),
    trial(SUM, f"{SUM},vae_repa.block=4", {"repa.weight": 0.5, "vae_repa.block": 4}, None, "pruned"),
)


def tuned(folder: Path, *words: str) -> Comparison:
    parser = compare.command_parser()
    given = ["--tuned", str(folder), *words]
    parse(parser, given)
    return compare.tuned(parser, given, folder)


def refusal(folder: Path, *words: str) -> str:
    with pytest.raises(UserError) as error:
        tuned(folder, *words)
    return str(error.value).replace(str(folder), "STUDY")


def test_the_winners_are_compared_with_the_control_under_the_studys_settings(study: Callable[..., Path]) -> None:
    folder = study(*TRIALS)
    found = tuned(folder, "--seeds", "2,3")
    assert [cell.label for cell in found.cells] == ["sit", SUM, "sra,block=3,weight=0.5"]
    assert found.seeds == (2, 3) and found.baseline == "sit"
    for cell in found.cells:
        assert (cell.study, cell.output.runs) == ("s-tuned", str(folder.parent))
        assert cell.optimizer.lr == 0.01 and cell.evaluation.sampler.num_steps == 9 and cell.data.name == "digits"
    both, best = found.cells[1].sections, found.cells[2].sections["sra"]
    assert (best.block, best.weight, best.teacher_block, best.head_width) == (3, 0.5, 4, 256)
    assert both["repa"].encoders == "efficientnet_lite2" and both["vae_repa"].block == 1


def test_a_winner_is_the_same_run_as_its_trial(study: Callable[..., Path]) -> None:
    parser = build_parser("ablate", "")
    config = replace(run_config(parser, parse(parser, [*WORDS, "--method", "sra"])), cell="sra")
    cell = axes.grid_subject(config, {"block": "3", "weight": "0.5"}).cell({"block": 3, "weight": 0.5})
    found = tuned(study(*TRIALS), "--seeds", "2", "--study", "s").cells[2]
    assert replace(found, output=cell.output) == cell


def test_every_winners_manifest_says_how_it_was_tuned(study: Callable[..., Path]) -> None:
    found = tuned(study(*TRIALS), "--seeds", "2,3")
    assert found.job(1).context.facts == {}, "the control was not tuned"
    shared = {"study": "s", "id": "0a1b", "kind": "search", "objective": "fd_x", "seeds": [0, 1], "trials": 2}
    assert found.job(3).context.facts == {"tuning": {**shared, "setting": {"block": 3, "weight": 0.5}, "value": 4.0}}
    assert found.job(5).context.facts["tuning"]["value"] == 7.0


def test_higher_is_better_where_the_record_says_so(study: Callable[..., Path]) -> None:
    assert tuned(study(*TRIALS, direction="higher"), "--seeds", "2").cells[2].label == "sra"


def test_the_command_line_wins_over_the_studys_settings(study: Callable[..., Path]) -> None:
    words = ("--seeds", "2", "--study", "mine", "--optimizer.lr", "0.5", "--output.runs", "elsewhere")
    cell = tuned(study(*TRIALS), *words).cells[0]
    assert (cell.study, cell.optimizer.lr, cell.output.runs) == ("mine", 0.5, "elsewhere")
    assert cell.evaluation.sampler.num_steps == 9


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ((), "seeds 0 were used for tuning in STUDY: give others, such as --seeds 2,3"),
        (("--seeds", "1,2,0"), "seeds 0,1 were used for tuning in STUDY: give others, such as --seeds 2,3"),
        (("--seeds", "2,2"), "seeds [2, 2] name a seed twice"),
        (("--seeds", "2", "--methods", "sit"), "--methods with --tuned: the study says what is compared; leave it out"),
        (("--seeds", "2", "--cells", "{}"), "--cells with --tuned: the study says what is compared; leave it out"),
        (
            ("--seeds", "2", "--sra.weight", "1"),
            "--sra.weight with --tuned: the study says how its methods are set; leave it out",
        ),
    ],
)
def test_refusals_of_the_command_line(study: Callable[..., Path], words: tuple[str, ...], line: str) -> None:
    assert refusal(study(*TRIALS), *words) == line


def test_a_study_that_left_compile_to_the_machine_asks_for_it(study: Callable[..., Path], plan: Record) -> None:
    """Version 0.1.0 put `auto` on record."""
    base = {**plan["base"], "runtime": {**plan["base"]["runtime"], "compile": "auto"}}
    folder = study(*TRIALS, base=base)
    assert "give --runtime.compile true or false" in refusal(folder, "--seeds", "2")
    assert tuned(folder, "--seeds", "2", "--runtime.compile", "true").cells[0].runtime.compile is True


@pytest.mark.parametrize("state", ["waiting", "running"])
def test_a_winner_that_could_still_change_is_refused(study: Callable[..., Path], state: str) -> None:
    open_trial = trial(SUM, f"{SUM},repa.weight=1.0", {"repa.weight": 1.0, "vae_repa.block": 1}, None, state)
    line = refusal(study(*TRIALS[:3], open_trial), "--seeds", "2")
    assert line == (
        "--tuned STUDY: unfinished trials of repa+vae_repa: 1, so its best is not known; "
        "run the same `ditbench ablate` again first"
    )


def test_a_search_that_was_cut_short_is_refused(study: Callable[..., Path]) -> None:
    assert refusal(study(*TRIALS, trials=5), "--seeds", "2").startswith(
        "--tuned STUDY: unfinished trials of repa+vae_repa: 3"
    )


def test_a_method_without_a_completed_trial_is_refused(study: Callable[..., Path]) -> None:
    lost = [trial("sra", cell, {}, None, state) for cell, state in (("sra", "pruned"), ("sra,block=3", "diverged"))]
    line = refusal(study(*lost, *TRIALS[2:]), "--seeds", "2")
    assert line == "--tuned STUDY: no trial of sra came to its end, so there is no best one"


def test_a_folder_without_trials_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path) == "--tuned STUDY: there is no ablation.json; name a study of `ditbench ablate`"


def test_a_setting_that_this_version_does_not_know_is_refused(study: Callable[..., Path], plan: Record) -> None:
    base = {**plan["base"], "optimizer": {**plan["base"]["optimizer"], "momentum": 1}}
    line = refusal(study(*TRIALS, base=base), "--seeds", "2")
    assert line == "--tuned STUDY has optimizer.momentum on record, which this version does not know"


def test_a_comparison_is_refused_in_the_folder_of_an_ablation(study: Callable[..., Path]) -> None:
    folder = study(*TRIALS)
    with pytest.raises(UserError, match="holds an ablation: give another --study"):
        compare.refuse_ablation(folder)
    compare.refuse_ablation(folder.parent)
