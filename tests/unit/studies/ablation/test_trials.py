"""Trials of an ablation: queued, begun, taken over, told, pruned, queued again, and always what the runs say."""

import json
import math
import multiprocessing
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
from sqlalchemy.exc import OperationalError

from harness.errors import UserError
from harness.training.trainer import Event
from studies.ablation.book import full_name
from studies.ablation.commands import finish, prepare
from studies.ablation.plan import RECORD, AblationPlan
from studies.ablation.storage import TrialLedger, connect
from studies.ablation.trials import AblationAgenda
from studies.agenda import Job
from studies.dispatch.leases import claim
from studies.runs.folders import folder_of, is_done, lease_of
from tests.unit.harness.records.plain_records import eval_line, train_line
from tests.unit.studies.ablation.ablation_factory import METRIC, end, evaluate, grid, search, start, with_study


def record_of(agenda: AblationAgenda) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((agenda.ablation.folder / RECORD).read_text())
    return found


def entry(agenda: AblationAgenda, cell: str) -> dict[str, Any]:
    return next(trial for trial in record_of(agenda)["trial_list"] if trial["cell"] == cell)


def optuna_trials(ablation: AblationPlan) -> list[optuna.trial.FrozenTrial]:
    """What another process reads in the storage."""
    storage = connect(ablation.storage, ablation.control.output.runs, ablation.control.study)
    name = f"{ablation.control.study}/{ablation.subjects[0].method}"
    return optuna.load_study(study_name=name, storage=storage).get_trials()


def numbers(agenda: AblationAgenda, cell: str) -> list[int]:
    """A cell's runs, seed by seed."""
    return [job.number for job in agenda.jobs() if job and job.config.label == cell]


def job_of(agenda: AblationAgenda, number: int) -> Job:
    """A job that is decided."""
    job = agenda.job(number)
    assert job is not None, number
    return job


def go(agenda: AblationAgenda, number: int, *values: float, status: str = "finished") -> None:
    """A run from its begin to its end."""
    job = job_of(agenda, number)
    agenda.begins(job)
    end(job.config, *values, status=status)
    agenda.ended(job)


# -- grids ----------------------------------------------------------------------------------------------------------


def test_a_grid_is_queued_with_its_record(tmp_path: Path) -> None:
    agenda = prepare(grid(tmp_path, {"block": "1,3", "weight": "1.0,0.5"}, seeds=(4, 7)))
    runs = [job.config for job in agenda.jobs() if job]
    cells = ["sit", "vae_repa", "vae_repa,weight=0.5", "vae_repa,block=3", "vae_repa,block=3,weight=0.5"]
    assert [(run.label, run.seed) for run in runs] == [(c, s) for s in (4, 7) for c in cells]
    assert [cell.label for cell in agenda.cells] == cells
    trials = optuna_trials(agenda.ablation)
    assert [trial.state.name for trial in trials] == ["WAITING"] * 4
    assert [trial.params for trial in trials] == [{"block": b, "weight": w} for b in (1, 3) for w in (1.0, 0.5)]
    assert trials[0].distributions == {
        "block": optuna.distributions.IntDistribution(1, 3),
        "weight": optuna.distributions.FloatDistribution(0.5, 1.0),
    }
    record = record_of(agenda)
    assert [trial["cell"] for trial in record["trial_list"]] == cells[1:]
    assert {trial["state"] for trial in record["trial_list"]} == {"waiting"}
    assert (record["objective"], record["direction"], record["seeds"]) == ("", "lower", [4, 7])
    assert len(record["id"]) == 16


def test_a_trial_is_told_once_when_all_its_seeds_are_over(tmp_path: Path) -> None:
    agenda = prepare(grid(tmp_path, {"block": "1,2"}))
    first, second = numbers(agenda, "vae_repa,block=2")
    go(agenda, first, 9.0, 8.0, 3.0)
    found = entry(agenda, "vae_repa,block=2")
    assert (found["state"], found["value"], found["spent"]) == ("running", None, {"budget": 0.5})
    assert optuna_trials(agenda.ablation)[1].state.name == "RUNNING"
    go(agenda, second, 9.0, 8.0, 6.0)
    found = entry(agenda, "vae_repa,block=2")
    assert (found["state"], found["value"], found["spent"]) == ("complete", 4.5, {"budget": 1.0})
    assert record_of(agenda)["objective"] == METRIC
    trial = optuna_trials(agenda.ablation)[1]
    assert (trial.state.name, trial.value, trial.user_attrs["outcome"]) == ("COMPLETE", 4.5, "complete")
    journal = (agenda.ablation.folder / "optuna.journal").read_bytes()
    agenda.ended(job_of(agenda, second))
    prepare(agenda.ablation)
    assert (agenda.ablation.folder / "optuna.journal").read_bytes() == journal, "nothing was told again"


def test_a_run_that_diverged_leaves_no_value(tmp_path: Path) -> None:
    agenda = prepare(grid(tmp_path, {"block": "1,2"}))
    first, second = numbers(agenda, "vae_repa")
    go(agenda, first, 9.0, status="diverged")
    assert entry(agenda, "vae_repa")["state"] == "running", "a grid still runs its other seed"
    go(agenda, second, 9.0, 8.0, 7.0)
    found, trial = entry(agenda, "vae_repa"), optuna_trials(agenda.ablation)[0]
    assert (found["state"], found["value"]) == ("diverged", None)
    assert found["spent"]["budget"] == pytest.approx((1 / 3 + 1) / 2)
    assert (trial.state.name, trial.value, trial.user_attrs["outcome"]) == ("PRUNED", None, "diverged")


def test_an_objective_that_is_not_finite_is_a_divergence(tmp_path: Path) -> None:
    agenda = prepare(grid(tmp_path, {"block": "1,2"}, seeds=(0,)))
    go(agenda, *numbers(agenda, "vae_repa"), 9.0, 8.0, math.nan)
    assert entry(agenda, "vae_repa")["state"] == "diverged"
    assert optuna_trials(agenda.ablation)[0].state.name == "PRUNED"


def test_what_a_killed_process_did_not_tell_is_told(tmp_path: Path) -> None:
    """It died between the end of the last run and the trial's."""
    agenda = prepare(grid(tmp_path, {"block": "1,2"}))
    for number, value in zip(numbers(agenda, "vae_repa"), (3.0, 5.0), strict=True):
        agenda.begins(job_of(agenda, number))
        config = job_of(agenda, number).config
        end(config, 9.0, 8.0, value)
    assert optuna_trials(agenda.ablation)[0].state.name == "RUNNING"
    prepare(agenda.ablation)
    assert optuna_trials(agenda.ablation)[0].value == entry(agenda, "vae_repa")["value"] == 4.0


def test_a_grid_grows(tmp_path: Path) -> None:
    """Levels get trials of their own; of a trial that gains a seed the record says what its runs say."""
    agenda = prepare(grid(tmp_path, {"block": "3,4"}, seeds=(0,)))
    go(agenda, *numbers(agenda, "vae_repa,block=3"), 9.0, 8.0, 3.0)
    wider = prepare(grid(tmp_path, {"block": "2,3", "loss": "smooth_l1,l1"}, seeds=(0, 1)))
    record = record_of(wider)
    assert [trial["cell"] for trial in record["trial_list"]][:3] == [
        "vae_repa", "vae_repa,block=3", "vae_repa,block=4",
    ]  # fmt: skip
    assert {trial["number"] for trial in record["trial_list"]} == set(range(len(record["trial_list"])))
    assert record["trial_list"][1]["setting"] == {"block": 3, "loss": "smooth_l1"}
    assert (record["trial_list"][1]["state"], record["trial_list"][1]["value"]) == ("waiting", None)
    assert "vae_repa,block=2,loss=l1" in {cell.label for cell in wider.cells}
    assert "vae_repa,block=4" not in {cell.label for cell in wider.cells}, "not asked for by this command"
    go(wider, numbers(wider, "vae_repa,block=3")[1], 9.0, 8.0, 7.0)
    found, trial = entry(wider, "vae_repa,block=3"), optuna_trials(wider.ablation)[1]
    assert (found["state"], found["value"]) == ("complete", 5.0)
    assert (trial.value, trial.user_attrs["seeds"]) == (3.0, [0]), "what was told cannot change"


def test_a_run_that_failed_queues_its_trial_for_the_next_command(tmp_path: Path) -> None:
    agenda = prepare(grid(tmp_path, {"block": "1,2"}))
    first, second = numbers(agenda, "vae_repa")
    config = job_of(agenda, first).config
    agenda.begins(job_of(agenda, first))
    start(config, "failed")
    lease = claim(lease_of(replace(config, seed=1)))
    finish(agenda)
    assert entry(agenda, "vae_repa")["state"] == "running", "another command is at its other seed"
    assert lease is not None
    lease.release()
    finish(agenda)
    assert entry(agenda, "vae_repa")["state"] == "waiting"
    assert optuna_trials(agenda.ablation)[0].state.name == "WAITING"
    again = prepare(agenda.ablation)
    assert not is_done(folder_of(config))
    go(again, first, 9.0, 8.0, 2.0)
    go(again, second, 9.0, 8.0, 4.0)
    assert entry(again, "vae_repa")["value"] == optuna_trials(again.ablation)[0].value == 3.0


def test_a_takeover_is_said_and_noted(tmp_path: Path) -> None:
    agenda = prepare(grid(tmp_path, {"block": "1,2"}))
    first, _ = numbers(agenda, "vae_repa")
    config = job_of(agenda, first).config
    assert agenda.begins(job_of(agenda, first)) == ""
    own = optuna_trials(agenda.ablation)[0].user_attrs["holders"]["0"]
    start(config, "running")
    assert agenda.begins(job_of(agenda, first)) == f"taken over from {own}, which is gone"
    (takeover,) = optuna_trials(agenda.ablation)[0].user_attrs["takeovers"]
    assert (takeover["seed"], takeover["from"], takeover["by"]) == (0, own, own)
    control = job_of(agenda, 1).config
    start(control, "running")
    assert agenda.begins(job_of(agenda, 1)) == "taken over from a process, which is gone"
    assert entry(agenda, "vae_repa")["workers"] == [own]


# -- what is refused ------------------------------------------------------------------------------------------------


def test_another_plan_is_refused_and_nothing_changes(tmp_path: Path) -> None:
    agenda = prepare(grid(tmp_path, {"block": "1,2"}))
    before = (agenda.ablation.folder / RECORD).read_bytes()
    other = search(tmp_path, trials=3)
    with pytest.raises(UserError, match=r"holds another ablation: kind 'grid', now 'search'.*: give another --study$"):
        prepare(other)
    assert (agenda.ablation.folder / RECORD).read_bytes() == before


def test_a_study_of_another_folder_is_refused(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/trials.db"
    agenda = prepare(grid(tmp_path / "a", {"block": "1,2"}, storage=url))
    assert [trial.state.name for trial in optuna_trials(agenda.ablation)] == ["WAITING"] * 2
    prepare(agenda.ablation)
    with pytest.raises(UserError, match=r"^the storage holds a study 'abl/vae_repa' of another folder of runs: "):
        prepare(grid(tmp_path / "b", {"block": "1,2"}, storage=url))
    assert not (tmp_path / "b" / "abl" / RECORD).exists()
    prepare(with_study(grid(tmp_path / "b", {"block": "1,2"}, storage=url), "other"))


def test_a_storage_that_does_not_answer_is_one_line_without_its_password(tmp_path: Path) -> None:
    url = "postgresql://me:s3cr3t@127.0.0.1:1/trials"
    with pytest.raises(UserError) as refused:
        prepare(grid(tmp_path, {"block": "1,2"}, storage=url))
    line = str(refused.value)
    assert line.startswith("storage postgresql://me:***@127.0.0.1:1/trials cannot be used (")
    assert line.endswith("): start its server, correct the URL, or leave --storage out")
    assert "s3cr3t" not in line
    assert "\n" not in line
    assert not list(tmp_path.iterdir()), "nothing was made"


def test_what_no_evaluation_measures_is_no_objective(tmp_path: Path) -> None:
    agenda = prepare(grid(tmp_path, {"block": "1,2"}, seeds=(0,), objective="recall"))
    assert record_of(agenda)["direction"] == "higher"
    with pytest.raises(UserError, match=rf"^objective is 'recall', which is not measured here: give one of {METRIC}, "):
        agenda.check_metrics([METRIC, "velocity_loss"])
    agenda.check_metrics([METRIC, "recall_898"])


@pytest.mark.parametrize(
    ("asked", "name"),
    [
        ("", "fd_a_898"),
        ("fd", "fd_a_898"),
        ("velocity_loss", "velocity_loss"),
        ("velocity_loss_t1", "velocity_loss_t1"),
        ("fd_pixels", "fd_pixels_898"),
    ],
)
def test_the_objective_by_its_full_name(asked: str, name: str) -> None:
    measured = ["velocity_loss_t1", "velocity_loss", "fd_pixels_898", "class_accuracy_898", "fd_a_898"]
    assert full_name(asked, measured) == name


def test_a_storage_that_goes_away_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line where it is missed; what it was not told, the next command tells it."""

    def away(*arguments: Any) -> None:
        raise OperationalError("UPDATE", {}, Exception("server closed the connection"))

    agenda = prepare(grid(tmp_path, {"block": "1,2"}, seeds=(0,), storage=f"sqlite:///{tmp_path}/trials.db"))
    first, second = numbers(agenda, "vae_repa") + numbers(agenda, "vae_repa,block=2")
    line = r"^storage sqlite:///.* cannot be used \(server closed the connection\): start its server, "
    with monkeypatch.context() as patched:
        patched.setattr(TrialLedger, "begin", away)
        patched.setattr(TrialLedger, "tell", away)
        with pytest.raises(UserError, match=line):
            agenda.begins(job_of(agenda, second))
        config = job_of(agenda, first).config
        end(config, 9.0, 8.0, 3.0)
        with pytest.raises(UserError, match=line):
            agenda.ended(job_of(agenda, first))
    assert entry(agenda, "vae_repa")["state"] == "waiting"
    prepare(agenda.ablation)
    assert entry(agenda, "vae_repa")["value"] == optuna_trials(agenda.ablation)[0].value == 3.0


# -- durable --------------------------------------------------------------------------------------------------------


def test_a_lost_journal_is_made_again(tmp_path: Path) -> None:
    agenda = prepare(grid(tmp_path, {"block": "3,4"}, seeds=(0,)))
    go(agenda, *numbers(agenda, "vae_repa,block=4"), 9.0, 8.0, 3.0)
    before = record_of(agenda)["trial_list"]
    (agenda.ablation.folder / "optuna.journal").unlink()
    again = prepare(agenda.ablation)
    assert record_of(again)["trial_list"] == before
    trials = optuna_trials(again.ablation)
    assert [trial.user_attrs["cell"] for trial in trials] == ["vae_repa", "vae_repa,block=3", "vae_repa,block=4"]
    assert [trial.value for trial in trials] == [None, None, 3.0]


def test_four_processes_at_once_make_one_study(tmp_path: Path) -> None:
    """They are forked, and so start within a moment."""
    ablation = grid(tmp_path, {"block": "1,2,3", "head_layers": "2,5"})
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(4)

    def begin() -> None:
        barrier.wait()
        prepare(ablation)

    processes = [context.Process(target=begin) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 4
    trials = optuna_trials(ablation)
    assert len({trial.user_attrs["cell"] for trial in trials}) == len(trials) == 6
    record = json.loads((ablation.folder / RECORD).read_text())
    assert [trial["number"] for trial in record["trial_list"]] == list(range(6))
    assert len(record["commands"]) == 1


# -- search ---------------------------------------------------------------------------------------------------------


def value_of(agenda: AblationAgenda, number: int) -> float:
    """A made-up result that depends on the setting and the seed alone."""
    config = job_of(agenda, number).config
    section = config.sections.get("vae_repa")
    return 10.0 if section is None else abs(section.block - 3) + section.weight + 0.01 * config.seed


def run_all(agenda: AblationAgenda, reopen: Callable[[AblationAgenda], AblationAgenda] = lambda a: a) -> int:
    """One worker's way through a search; returns how many runs were made."""
    made = 0
    for number in range(1, agenda.total + 1):
        agenda = reopen(agenda)
        job = agenda.job(number)
        if job and agenda.settled(job):
            continue
        assert agenda.due(number)
        config = job_of(agenda, number).config
        if is_done(folder_of(config)):
            agenda.ended(job_of(agenda, number))
            continue
        value = value_of(agenda, number)
        go(agenda, number, value + 2, value + 1, value)
        made += 1
    return made


def test_a_search_begins_with_the_default_and_repeats_itself(tmp_path: Path) -> None:
    """Also when every trial is drawn by a process of its own, as after kills."""
    found = []
    for name, reopen in (("a", lambda a: a), ("b", lambda a: pickle.loads(pickle.dumps(a)))):
        agenda = prepare(search(tmp_path / name, trials=14, seeds=(0,)))
        assert agenda.job(2) is not None
        assert agenda.job(3) is None, "not decided yet"
        run_all(agenda, reopen)
        found.append([trial["setting"] for trial in record_of(agenda)["trial_list"]])
    assert found[0] == found[1]
    assert found[0][0] == agenda.ablation.subjects[0].default()
    assert len(found[0]) == 14
    assert len({json.dumps(setting) for setting in found[0]}) > 8
    trials = optuna_trials(agenda.ablation)
    assert [trial.state.name for trial in trials] == ["COMPLETE"] * 14
    assert [trial.params for trial in trials] == found[0]
    # TPE's draws begin after ten trials; by then it has learnt that block 3 is best.
    assert [setting["block"] for setting in found[0][10:]].count(3) >= 3


def test_a_setting_that_a_search_tries_twice_runs_once(tmp_path: Path) -> None:
    ablation = search(tmp_path, trials=6, seeds=(0, 1))
    (subject,) = ablation.subjects
    narrow = replace(subject, axes=tuple(replace(axis, levels=axis.levels[:1]) for axis in subject.axes[:2]))
    narrow = replace(narrow, axes=(replace(subject.axes[0], levels=(1, 2)), *narrow.axes[1:]))
    agenda = prepare(replace(ablation, subjects=(narrow,)))
    distinct = 2 * (1 if subject.axes[1].default == subject.axes[1].levels[0] else 2)
    made = run_all(agenda)
    assert made <= 2 * (1 + distinct) < agenda.total
    trials = record_of(agenda)["trial_list"]
    assert [trial["state"] for trial in trials] == ["complete"] * 6
    by_cell = {trial["cell"]: trial["value"] for trial in trials}
    assert all(trial["value"] == by_cell[trial["cell"]] for trial in trials)


def test_a_pruned_trial_spares_its_other_seeds(tmp_path: Path) -> None:
    agenda = prepare(search(tmp_path, trials=7, seeds=(0, 1), pruner="median"))
    for number in range(1, 13):  # the control, and five trials
        assert agenda.due(number)
        if number >= 3 and number % 2:
            assert agenda.due(number + 1) is None, "its first seed has not come through"
        go(agenda, number, 9.0, 8.0, 7.0)
    assert agenda.due(13)
    config = job_of(agenda, 13).config
    agenda.begins(job_of(agenda, 13))
    start(config)
    evaluate(config, 9.0)
    line = {"point": 1, "metrics": {METRIC: 9.0}}
    assert not agenda.watch(job_of(agenda, 13), Event("eval", 2, line)), "as good as the median of the others"
    assert not agenda.watch(job_of(agenda, 1), Event("eval", 2, {"point": 1, "metrics": {METRIC: 99.0}})), "the control"
    worse = {"point": 2, "metrics": {METRIC: 8.5}}
    evaluated = folder_of(config)
    evaluated.append("train", train_line(4))
    evaluated.append("eval", eval_line(4, **worse))
    assert agenda.watch(job_of(agenda, 13), Event("eval", 4, worse))
    evaluated.update_manifest(status="pruned")
    assert agenda.settled(job_of(agenda, 14)) == "left out, pruned at seed 0"
    agenda.ended(job_of(agenda, 13))
    found, trial = record_of(agenda)["trial_list"][5], optuna_trials(agenda.ablation)[5]
    assert (found["state"], found["value"], found["intermediate"]) == ("pruned", None, {"1": 9.0, "2": 8.5})
    assert found["spent"]["budget"] == pytest.approx((4 / 6 + 0) / 2)
    assert (trial.state.name, trial.user_attrs["outcome"]) == ("PRUNED", "pruned")
    assert trial.intermediate_values == {1: 9.0, 2: 8.5}
    assert agenda.due(15)
    go(agenda, 15, 9.0, status="diverged")
    assert agenda.settled(job_of(agenda, 16)) == "left out, diverged at seed 0"
    assert record_of(agenda)["trial_list"][6]["state"] == "diverged"


def test_threads_are_given_to_every_cell(tmp_path: Path) -> None:
    agenda = prepare(grid(tmp_path, {"block": "1,2"})).with_threads(3)
    assert {cell.runtime.threads for cell in agenda.cells} == {3}
