"""Where the trials of an ablation are kept for Optuna: a journal in the study's folder, or a database.

Trials are added whole, with their parameters, so that a process that is killed leaves none half made; what a search
tries next is therefore drawn in a copy of the study in memory. Run folders are the source of truth, and what stands
here can be made from them again. Whoever changes a study holds the ablation's lock.
"""

import contextlib
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.exceptions import StorageInternalError
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import create_engine
from sqlalchemy.exc import SQLAlchemyError

from harness.errors import UserError
from harness.records.ablation import Axis
from harness.records.files import canonical, storing
from harness.records.locks import Lock, take
from studies.ablation.plan import PlannedSubject, Setting
from studies.configs.recorded_command import without_passwords
from studies.runs.folders import study_lock

SAMPLER_SEED = 0
"""The sampler's seed in every search. The next setting depends on it, the trial's number and the trials before."""

CONNECT_SECONDS = 10
"""How long a database server may take to answer."""

RETRY_SECONDS = 2
"""Before the tables of a database are looked for again."""

OWNER = "ditbench_id"
"""User attribute of a study: the id in the record of the ablation that it belongs to."""


class KernelLock(JournalFileOpenLock):
    """A file lock that the kernel lets go of when its holder is killed; Optuna's own locks would outlive it.

    Whoever gets it first cuts off a last line that a full disk or a loss of power left unfinished: the next line would
    be appended to it, and Optuna could read neither.
    """

    def __init__(self, journal: Path, lock: Path) -> None:
        self._journal, self._lock = journal, lock
        self._held: Lock | None = None

    def acquire(self) -> bool:
        self._held = take(self._lock)
        content = self._journal.read_bytes()
        if content and not content.endswith(b"\n"):
            os.truncate(self._journal, content.rfind(b"\n") + 1)
        return True

    def release(self) -> None:
        assert self._held is not None
        self._held.release()


@contextlib.contextmanager
def reaching(url: str, journal: Path) -> Iterator[None]:
    """Turn what a database or the disk answers within the block into one line.

    Raises:
        UserError: the database cannot be reached, or its driver is not installed.
        StorageError: the disk refuses the journal.
    """
    try:
        with storing(journal):
            yield
    except (SQLAlchemyError, StorageInternalError, ImportError) as error:
        if not url:
            raise
        raise UserError(f"storage {without_passwords(url)} {_reason(error, url)}") from None


def _reason(error: Exception, url: str) -> str:
    """What went wrong with a database, and the way out."""
    cause = error.__cause__ if isinstance(error, StorageInternalError) and error.__cause__ else error
    text = without_passwords(" ".join(str(getattr(cause, "orig", None) or cause).split()))
    password = url.partition("://")[2].rpartition("@")[0].partition(":")[2]
    text = text.replace(password, "***") if password else text
    if isinstance(error, ImportError):
        return "needs a driver that is not installed: for PostgreSQL, pip install 'ditbench[postgres]'"
    return f"cannot be used ({text[:300]}): start its server, correct the URL, or leave --storage out"


def connect(url: str, runs: str, study: str) -> BaseStorage:
    """The storage of a study; call it, and use it, within `reaching`."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if not url:
        journal = journal_path(runs, study)
        lock = KernelLock(journal, study_lock(runs, study, "optuna"))
        return JournalStorage(JournalFileBackend(str(journal), lock))
    # A server that was started again has closed the connections it knew.
    options = {"pool_pre_ping": True, "connect_args": _connect_args(url)}
    try:
        return RDBStorage(url, engine_kwargs=options)
    except (SQLAlchemyError, StorageInternalError):
        # Commands on two studies that make the tables of an empty database at once: one of them finds them half made.
        time.sleep(RETRY_SECONDS)
        return RDBStorage(url, engine_kwargs=options)


def check_reachable(url: str) -> None:
    """Raise `UserError` for a database that does not answer, before anything is made for it."""
    if url:
        with reaching(url, Path()):
            engine = create_engine(url, connect_args=_connect_args(url))
            engine.connect().close()
            engine.dispose()


def _connect_args(url: str) -> dict[str, Any]:
    return {"connect_timeout": CONNECT_SECONDS} if url.startswith("postgresql") else {}


def journal_path(runs: str, study: str) -> Path:
    """The journal of a study."""
    return Path(runs) / study / "optuna.journal"


# -- one method -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrialLedger:
    """The trials of one method, numbered from 0."""

    study: optuna.Study
    storage: BaseStorage
    study_id: int
    is_search: bool

    def trials(self) -> list[FrozenTrial]:
        """All trials, by number."""
        return self.study.get_trials(deepcopy=False)

    def trial(self, number: int) -> FrozenTrial:
        """One trial."""
        return self.storage.get_trial(self._id(number))

    def add(self, subject: PlannedSubject, setting: Setting, cell: str) -> int:
        """Queue a setting; returns its number."""
        distributions = {axis.name: found for axis in subject.axes if (found := self._distribution(axis))}
        params = {axis.name: as_choice(setting[axis.name]) for axis in subject.axes if axis.name in distributions}
        self.study.add_trial(
            optuna.trial.create_trial(
                state=TrialState.WAITING,
                params=params,
                distributions=distributions,
                user_attrs={"setting": dict(setting), "cell": cell},
            )
        )
        return len(self.trials()) - 1

    def propose(self, subject: PlannedSubject) -> dict[str, Any]:
        """The setting that the search tries next, given what is known of the trials before it.

        It is drawn from a stream of this trial's own, so that a command that goes on draws as if it had not stopped.
        """
        known = self.trials()
        sampler = optuna.samplers.TPESampler(seed=sampler_seed(self.study.study_name, len(known)), constant_liar=True)
        copy = optuna.create_study(
            study_name=self.study.study_name,
            direction=self.study.direction,
            sampler=sampler,
            pruner=self.study.pruner,
            storage=optuna.storages.InMemoryStorage(),
        )
        copy.add_trials([_remembered(trial) for trial in known])
        distributions = {axis.name: found for axis in subject.axes if (found := self._distribution(axis))}
        params = copy.ask(fixed_distributions=distributions).params
        return {axis.name: _level(axis, params[axis.name]) for axis in subject.axes}

    def begin(self, number: int) -> None:
        """A trial is worked on."""
        if self.trial(number).state == TrialState.WAITING:
            self.storage.set_trial_state_values(self._id(number), TrialState.RUNNING)

    def queue(self, number: int) -> None:
        """A trial is to be taken up by a later command."""
        if self.trial(number).state == TrialState.RUNNING:
            self.storage.set_trial_state_values(self._id(number), TrialState.WAITING)

    def note(self, number: int, **facts: Any) -> None:
        """User attributes of a trial that is not over."""
        if not self.trial(number).state.is_finished():
            for key, value in facts.items():
                self.storage.set_trial_user_attr(self._id(number), key, value)

    def report(self, number: int, values: Mapping[int, float]) -> None:
        """What evaluations of a trial that is not over found, by point; each is told once."""
        trial = self.trial(number)
        for point, value in values.items():
            if not trial.state.is_finished() and point not in trial.intermediate_values and math.isfinite(value):
                self.storage.set_trial_intermediate_value(self._id(number), point, value)

    def prunes(self, number: int) -> bool:
        """Whether the pruner would stop a trial after what was reported of it."""
        return bool(self.study.pruner.prune(self.study, self.trial(number)))

    def tell(self, number: int, outcome: str, value: float | None, seeds: Sequence[int]) -> None:
        """Bring a trial to its end, once: `complete` with a value, or `pruned` or `diverged` without one."""
        if self.trial(number).state.is_finished():
            return
        self.begin(number)
        self.note(number, outcome=outcome, seeds=list(seeds))
        if outcome == "complete":
            self.study.tell(number, value)
        else:
            self.study.tell(number, state=TrialState.PRUNED)

    def _id(self, number: int) -> int:
        return self.storage.get_trial_id_from_study_id_trial_number(self.study_id, number)

    def _distribution(self, axis: Axis) -> BaseDistribution | None:
        """An axis for Optuna; None for free text of a grid, which may gain any level. A search keeps its choices."""
        values = (*axis.levels, *([] if axis.default in axis.levels else [axis.default]))
        if self.is_search:
            return CategoricalDistribution([as_choice(value) for value in values])
        if axis.kind == "int":
            return IntDistribution(min(values), max(values))
        if axis.kind == "float":
            return FloatDistribution(min(values), max(values))
        return CategoricalDistribution(axis.choices) if axis.choices else None


def as_choice(value: Any) -> Any:
    """A level as Optuna keeps it: a number, a truth value or text."""
    return value if isinstance(value, bool | int | float | str) else canonical(value)


def _level(axis: Axis, choice: Any) -> Any:
    """The level that was kept as a choice."""
    return next(value for value in (*axis.levels, axis.default) if as_choice(value) == choice)


def _remembered(trial: FrozenTrial) -> FrozenTrial:
    """A trial as the sampler is to see it: one that waits is under way."""
    state = TrialState.RUNNING if trial.state == TrialState.WAITING else trial.state
    return optuna.trial.create_trial(
        state=state,
        value=trial.value,
        params=trial.params,
        distributions=trial.distributions,
        intermediate_values=trial.intermediate_values,
    )


def sampler_seed(study: str, number: int) -> int:
    """The seed of the draw for one trial."""
    words = np.frombuffer(study.encode().ljust(-(-len(study.encode()) // 4) * 4, b"\0"), dtype=np.uint32)
    return int(np.random.SeedSequence([SAMPLER_SEED, number, *words.tolist()]).generate_state(1)[0])


def make_pruner(name: str, points: int) -> optuna.pruners.BasePruner:
    """A pruner over evaluation points 1 to `points`."""
    if name == "median":
        return optuna.pruners.MedianPruner()
    if name == "hyperband":
        return optuna.pruners.HyperbandPruner(min_resource=1, max_resource=points)
    return optuna.pruners.NopPruner()


def owner_of(storage: BaseStorage, name: str) -> str | None:
    """The id of the ablation that a study belongs to, "" for one without id and trials; None when there is none."""
    found = next((study for study in optuna.get_all_study_summaries(storage) if study.study_name == name), None)
    if found is None:
        return None
    return str(found.user_attrs.get(OWNER, "a study of another program" if found.n_trials else ""))


def open_ledger(
    storage: BaseStorage, name: str, owner: str, direction: str, pruner: optuna.pruners.BasePruner, is_search: bool
) -> TrialLedger:
    """A method's trials; the study is made if need be."""
    before = owner_of(storage, name)
    if before is None:
        towards = StudyDirection.MINIMIZE if direction == "lower" else StudyDirection.MAXIMIZE
        study = optuna.create_study(study_name=name, storage=storage, direction=towards, pruner=pruner)
    else:
        study = optuna.load_study(study_name=name, storage=storage, pruner=pruner)
    if not before:
        study.set_user_attr(OWNER, owner)
    return TrialLedger(study, storage, storage.get_study_id_from_name(name), is_search)
