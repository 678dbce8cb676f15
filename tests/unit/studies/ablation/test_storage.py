"""Where trials are kept: the journal's lock, mended lines, errors in one line, and what a search draws."""

import multiprocessing
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import optuna
import pytest
from optuna.storages import BaseStorage
from optuna.trial import TrialState
from sqlalchemy.exc import OperationalError

from harness.errors import StorageError, UserError
from harness.records.ablation import Axis
from studies.ablation import storage
from studies.ablation.storage import (
    OWNER,
    KernelLock,
    as_choice,
    connect,
    journal_path,
    make_pruner,
    open_ledger,
    owner_of,
    reaching,
    sampler_seed,
)
from studies.configs.recorded_command import recorded_command, without_passwords
from tests.unit.studies.ablation.ablation_factory import grid, search


@pytest.fixture
def journal(tmp_path: Path) -> BaseStorage:
    (tmp_path / "s").mkdir()
    return connect("", str(tmp_path), "s")


# -- the journal ----------------------------------------------------------------------------------------------------


def test_a_line_that_was_cut_short_is_dropped(tmp_path: Path, journal: BaseStorage) -> None:
    """A full disk leaves one; Optuna alone could read no line after it."""
    open_ledger(journal, "s/m", "id", "lower", make_pruner("none", 3), False)
    with journal_path(str(tmp_path), "s").open("a") as file:
        file.write('{"op_code":4,"work')
    fresh = connect("", str(tmp_path), "s")
    open_ledger(fresh, "s/n", "id", "lower", make_pruner("none", 3), False)
    names = {study.study_name for study in optuna.get_all_study_summaries(connect("", str(tmp_path), "s"))}
    assert names == {"s/m", "s/n"}


def test_a_killed_process_leaves_no_lock(tmp_path: Path) -> None:
    journal, lock = tmp_path / "journal", tmp_path / "lock"
    journal.touch()

    def hold() -> None:
        KernelLock(journal, lock).acquire()
        os.kill(os.getpid(), signal.SIGKILL)

    killed = multiprocessing.get_context("fork").Process(target=hold)
    killed.start()
    killed.join(60)
    assert killed.exitcode == -signal.SIGKILL
    own = KernelLock(journal, lock)
    assert own.acquire()
    own.release()


def test_what_the_disk_refuses_names_the_journal() -> None:
    with pytest.raises(StorageError, match=r"optuna\.journal"), reaching("", Path("optuna.journal")):
        raise OSError(28, "No space left on device")


# -- databases ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cause", ["refused me:pa%3Ass@word to me", "password is pa%3Ass@word"])
def test_no_message_of_a_database_shows_its_password(cause: str) -> None:
    url = "postgresql://me:pa%3Ass@word@host/trials?password=other"
    error = OperationalError("SELECT 1", {}, Exception(cause))
    with pytest.raises(UserError) as told, reaching(url, Path()):
        raise error
    assert str(told.value).startswith("storage postgresql://me:***@host/trials?password=*** cannot be used (")
    assert "word" not in str(told.value).replace("password", "")


def test_a_missing_driver_is_named() -> None:
    line = r"needs a driver .* pip install 'ditbench\[postgres\]'$"
    with pytest.raises(UserError, match=line), reaching("postgresql://host/trials", Path()):
        raise ImportError("psycopg")


def test_a_url_that_is_none_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "RETRY_SECONDS", 0)
    line = r"^storage nowhere cannot be used \(.*: start its server, correct the URL"
    with pytest.raises(UserError, match=line), reaching("nowhere", Path()):
        connect("nowhere", "runs", "s")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("postgresql://me:secret@host:5432/db", "postgresql://me:***@host:5432/db"),
        ("postgresql+psycopg://me:s:e/c@r@host/db", "postgresql+psycopg://me:***@host/db"),
        ("--storage=postgresql://:secret@/db", "--storage=postgresql://:***@/db"),
        ("postgresql://host/db?user=me&password=secret&x=1", "postgresql://host/db?user=me&password=***&x=1"),
        ("postgresql://me@host/db", "postgresql://me@host/db"),
        ("runs/a@b", "runs/a@b"),
    ],
)
def test_passwords_are_hidden(text: str, shown: str) -> None:
    assert without_passwords(text) == shown


def test_the_recorded_command_has_no_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/bin/ditbench", "ablate", "--storage", "postgresql://me:secret@host/db"])
    assert recorded_command() == ["ditbench", "ablate", "--storage", "postgresql://me:***@host/db"]


# -- trials ---------------------------------------------------------------------------------------------------------


def test_a_study_says_whose_it_is(journal: BaseStorage) -> None:
    assert owner_of(journal, "s/m") is None
    open_ledger(journal, "s/m", "mine", "lower", make_pruner("none", 3), False)
    open_ledger(journal, "s/m", "mine", "lower", make_pruner("none", 3), False)
    assert owner_of(journal, "s/m") == "mine"
    study = optuna.create_study(study_name="s/other", storage=journal)
    assert owner_of(journal, "s/other") == "", "a process that was killed before it could say"
    study.add_trial(optuna.trial.create_trial(state=TrialState.WAITING))
    assert owner_of(journal, "s/other") not in ("", None)
    assert OWNER not in study.user_attrs


def test_directions(journal: BaseStorage) -> None:
    for direction, name in (("lower", "MINIMIZE"), ("higher", "MAXIMIZE")):
        ledger = open_ledger(journal, f"s/{direction}", "id", direction, make_pruner("none", 3), False)
        assert ledger.study.direction.name == name


def test_a_grid_keeps_ranges_choices_and_no_free_text(tmp_path: Path, journal: BaseStorage) -> None:
    (subject,) = grid(tmp_path, {"block": "2,3", "weight": "0.5", "loss": "l1,l2"}).subjects
    ledger = open_ledger(journal, "s/m", "id", "lower", make_pruner("none", 3), False)
    setting = {"block": 2, "weight": 0.5, "loss": "l1"}
    trial = ledger.trial(ledger.add(subject, setting, "cell"))
    assert trial.distributions["block"] == optuna.distributions.IntDistribution(1, 3), "the default is among them"
    assert trial.distributions["weight"] == optuna.distributions.FloatDistribution(0.5, 1.0)
    kinds = trial.distributions["loss"]
    assert isinstance(kinds, optuna.distributions.CategoricalDistribution)
    assert set(kinds.choices) > {"l1", "l2", "smooth_l1"}, "all there are, so that the grid may gain some"
    assert trial.params == trial.user_attrs["setting"] == setting
    text = Axis(name="encoder", default="a", levels=("b",), kind="text")
    wider = replace(subject, axes=(*subject.axes, text))
    other = ledger.trial(ledger.add(wider, {**setting, "encoder": "b"}, "cell"))
    assert "encoder" not in other.params
    assert other.user_attrs["setting"]["encoder"] == "b"


def test_a_told_trial_stays_told(tmp_path: Path, journal: BaseStorage) -> None:
    (subject,) = grid(tmp_path, {"block": "1,2"}).subjects
    ledger = open_ledger(journal, "s/m", "id", "lower", make_pruner("none", 3), False)
    number = ledger.add(subject, {"block": 1}, "cell")
    ledger.tell(number, "complete", 2.0, [0])
    for change in (
        lambda: ledger.tell(number, "complete", 3.0, [0, 1]),
        lambda: ledger.tell(number, "pruned", None, [0]),
        lambda: ledger.begin(number),
        lambda: ledger.queue(number),
        lambda: ledger.report(number, {1: 5.0}),
        lambda: ledger.note(number, outcome="other"),
    ):
        change()
        trial = ledger.trial(number)
        assert (trial.state, trial.value, trial.user_attrs["seeds"]) == (TrialState.COMPLETE, 2.0, [0])
        assert (trial.user_attrs["outcome"], trial.intermediate_values) == ("complete", {})


def test_evaluations_are_reported_once_and_finite(tmp_path: Path, journal: BaseStorage) -> None:
    (subject,) = grid(tmp_path, {"block": "1,2"}).subjects
    ledger = open_ledger(journal, "s/m", "id", "lower", make_pruner("none", 3), False)
    number = ledger.add(subject, {"block": 1}, "cell")
    ledger.begin(number)
    ledger.report(number, {1: 5.0, 2: float("nan")})
    ledger.report(number, {1: 6.0, 2: 4.0})
    assert ledger.trial(number).intermediate_values == {1: 5.0, 2: 4.0}
    assert not ledger.prunes(number)


def test_what_is_proposed_depends_on_the_trials_before_alone(tmp_path: Path, journal: BaseStorage) -> None:
    """Not on what else was drawn, nor on whether the trials before wait or run."""
    (subject,) = search(tmp_path, trials=3).subjects
    ledger = open_ledger(journal, "s/m", "id", "lower", make_pruner("hyperband", 3), True)
    ledger.add(subject, subject.default(), "cell")
    first = ledger.propose(subject)
    assert ledger.propose(subject) == first
    ledger.begin(0)
    assert ledger.propose(subject) == first
    assert first.keys() == subject.default().keys()
    for axis in subject.axes:
        assert first[axis.name] in axis.levels
    ledger.add(subject, first, "cell")
    assert ledger.propose(subject) != first
    assert ledger.trial(0).state == TrialState.RUNNING, "proposing changes nothing"


def test_every_trial_has_a_stream_of_its_own() -> None:
    seeds = [sampler_seed(study, number) for study in ("a/m", "a/n", "b/m") for number in range(50)]
    assert len(set(seeds)) == len(seeds)


def test_levels_as_choices() -> None:
    assert [as_choice(value) for value in (1, 0.5, True, "a")] == [1, 0.5, True, "a"]
    assert as_choice(("a", "b")) == as_choice(["a", "b"]) == '["a","b"]'


@pytest.mark.parametrize(("name", "kind"), [("none", "NopPruner"), ("median", "MedianPruner")])
def test_pruners(name: str, kind: str) -> None:
    assert type(make_pruner(name, 4)).__name__ == kind
    assert isinstance(make_pruner("hyperband", 4), optuna.pruners.HyperbandPruner)
