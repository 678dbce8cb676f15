"""The runs of an ablation as an agenda, and its record.

A trial is one setting of one method; its runs are that cell at every seed. Their folders are the source of truth: what
the record and Optuna's storage say of a trial is read from them, so whatever a killed process left out is made up for
by the next one that looks. Both are changed under one lock of the study.
"""

import contextlib
import math
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Self

from optuna.storages import BaseStorage

from harness.config import RunConfig
from harness.records.files import number, read_json, write_json
from harness.records.run_folder import RunFolder, run_path
from studies.ablation.book import CLOCKS, OVER, entries_of, full_name, last_value, new_entry, now, study_name
from studies.ablation.plan import RECORD, AblationPlan, PlannedSubject
from studies.ablation.storage import (
    TrialLedger,
    connect,
    journal_path,
    make_pruner,
    open_ledger,
    reaching,
)
from studies.agenda import Agenda, Context, Job
from studies.dispatch.leases import held
from studies.runs.folders import folder_of, study_lock

if TYPE_CHECKING:
    from harness.training.trainer import Event


@dataclass(frozen=True)
class Place:
    """Where a run stands in an ablation."""

    subject: PlannedSubject | None
    """None: the control."""
    index: int
    """A grid's setting, or a search's trial, from 0; 0 for the control."""
    seed: int


class AblationAgenda(Agenda):
    """The control and every trial at every seed: a grid seed by seed, a search trial by trial.

    A search decides a trial when no run of those before it is free. With a pruner, the first seed of a trial is
    watched, and its other seeds wait until that came through.
    """

    retakes = 1

    def __init__(self, ablation: AblationPlan, parent: str = "") -> None:
        """`parent` is the MLflow run that every run is a child of."""
        self.ablation, self._parent = ablation, parent
        self.seeds = ablation.seeds
        self._cells = {subject.method: _cells(ablation, subject) for subject in ablation.subjects}
        self.cells = (ablation.control, *(cell for cells in self._cells.values() for cell in cells))
        self._asked: dict[tuple[str, int], RunConfig] = {}
        """A search's cells by method and trial, as far as they were looked up."""

    def __getstate__(self) -> dict[str, Any]:
        opened = ("_storage", "_ledgers")
        return {key: value for key, value in self.__dict__.items() if key not in opened}

    # -- what there is to run ---------------------------------------------------------------------------------------

    @property
    def total(self) -> int:
        return self._slots * len(self.seeds)

    @property
    def _slots(self) -> int:
        """The control and all trials."""
        number = self.ablation.trials or len(self.ablation.settings)
        return 1 + number * len(self.ablation.subjects)

    def _place(self, number: int) -> Place:
        if self.ablation.kind == "search":
            slot, seed = divmod(number - 1, len(self.seeds))
        else:
            seed, slot = divmod(number - 1, self._slots)
        if slot == 0:
            return Place(None, 0, self.seeds[seed])
        # The methods of a search take turns.
        index, method = divmod(slot - 1, len(self.ablation.subjects))
        return Place(self.ablation.subjects[method], index, self.seeds[seed])

    def job(self, number: int) -> Job | None:
        place = self._place(number)
        cell = self._cell(place)
        if cell is None:
            return None
        context = Context(baseline=self.ablation.control.label, mlflow_parent=self._parent)
        return Job(number, replace(cell, seed=place.seed), context)

    def _cell(self, place: Place) -> RunConfig | None:
        if place.subject is None:
            return self.ablation.control
        known = self._cells[place.subject.method]
        if place.index < len(known):
            return known[place.index]
        key = (place.subject.method, place.index)
        if key not in self._asked:
            entries = entries_of(self._read(), place.subject.method)
            if place.index >= len(entries):
                return None
            self._asked[key] = place.subject.cell(entries[place.index]["setting"])
        return self._asked[key]

    def with_threads(self, threads: int) -> Self:
        control = _with_threads(self.ablation.control, threads)
        subjects = tuple(replace(s, base=_with_threads(s.base, threads)) for s in self.ablation.subjects)
        return type(self)(replace(self.ablation, control=control, subjects=subjects), self._parent)

    # -- around a run -----------------------------------------------------------------------------------------------

    def check_metrics(self, names: Sequence[str]) -> None:
        full_name(self.ablation.objective, names)

    def settled(self, job: Job) -> str:
        """The other seeds of a trial that its first seed did not come through are never needed."""
        status = self._first_status(job)
        return f"left out, {status} at seed {self.seeds[0]}" if status in ("pruned", "diverged") else ""

    def due(self, number: int) -> Job | None:
        job, place = self.job(number), self._place(number)
        if job is None:
            assert place.subject is not None
            self._ask(place.subject, place.index)
            job = self.job(number)
            assert job is not None, number
        return job if self._first_status(job) in ("", "finished") else None

    def _first_status(self, job: Job) -> str:
        """What became of the first seed of a job's trial, where that decides about the job; else ""."""
        is_control = self._place(job.number).subject is None
        if self.ablation.pruner == "none" or is_control or job.config.seed == self.seeds[0]:
            return ""
        return folder_of(replace(job.config, seed=self.seeds[0])).status() or "not begun"

    def begins(self, job: Job) -> str:
        config, place = job.config, self._place(job.number)
        is_left = folder_of(config).status() == "running"
        before = ""
        if place.subject is not None:
            with self._locked():
                before = self._note_begin(place, config, is_left)
        return f"taken over from {before or 'a process'}, which is gone" if is_left else ""

    def _note_begin(self, place: Place, config: RunConfig, is_left: bool) -> str:
        """Put on record who is at a trial's run; returns who was."""
        record = self._read()
        entry = self._entry(record, place)
        ledger, own = self._ledgers[entry["method"]], f"{socket.gethostname()}:{os.getpid()}"
        attributes = ledger.trial(entry["number"]).user_attrs
        holders = attributes.get("holders", {})
        before = str(holders.get(str(config.seed), ""))
        ledger.begin(entry["number"])
        ledger.note(entry["number"], holders={**holders, str(config.seed): own})
        if is_left:
            takeover = {"seed": config.seed, "from": before, "by": own, "time": now()}
            ledger.note(entry["number"], takeovers=[*attributes.get("takeovers", []), takeover])
        entry["state"] = "running"
        entry["started"] = entry["started"] or now()
        entry["workers"] = list(dict.fromkeys([*entry["workers"], own]))
        self._write(record)
        return before

    def watch(self, job: Job, event: "Event") -> bool:
        place = self._place(job.number)
        if self.ablation.pruner == "none" or place.subject is None or place.seed != self.seeds[0]:
            return False
        with self._locked():
            record, ledger = self._read(), self._ledgers[place.subject.method]
            entry = self._entry(record, place)
            self._name_objective(record, [event.record])
            self._report(record, entry, [event.record])
            self._write(record)
            return not ledger.trial(entry["number"]).state.is_finished() and ledger.prunes(entry["number"])

    def ended(self, job: Job) -> None:
        config = job.config
        record = self._read()
        if record["objective"] and not self._open_entries(record, config.label):
            return
        with self._locked():
            record = self._read()
            self._name_objective(record, folder_of(config).lines("eval"))
            for entry in self._open_entries(record, config.label):
                self._settle(record, entry)
            self._write(record)

    def _entry(self, record: Mapping[str, Any], place: Place) -> dict[str, Any]:
        """A trial's entry; those of a grid were added in another order where it has grown."""
        assert place.subject is not None
        entries = entries_of(record, place.subject.method)
        if self.ablation.kind == "search":
            return entries[place.index]
        label = self._cells[place.subject.method][place.index].label
        return next(entry for entry in entries if entry["cell"] == label)

    def _open_entries(self, record: Mapping[str, Any], cell: str) -> list[dict[str, Any]]:
        """The trials of a cell that are not over: a search may try a setting twice."""
        return [entry for entry in record["trial_list"] if entry["cell"] == cell and entry["state"] not in OVER]

    # -- trials -----------------------------------------------------------------------------------------------------

    def _ask(self, subject: PlannedSubject, index: int) -> None:
        """Decide a search's trial, unless another worker has."""
        with self._locked():
            record, ledger = self._read(), self._ledgers[subject.method]
            if len(ledger.trials()) <= index:
                setting = ledger.propose(subject)
                ledger.add(subject, setting, subject.cell(setting).label)
            self._take_up(record, subject)
            self._write(record)

    def _take_up(self, record: dict[str, Any], subject: PlannedSubject) -> None:
        """Put on record the trials of the storage that it lacks."""
        known = len(entries_of(record, subject.method))
        for trial in self._ledgers[subject.method].trials()[known:]:
            record["trial_list"].append(new_entry(subject, trial))

    def _settle(self, record: dict[str, Any], entry: dict[str, Any]) -> None:
        """Bring a trial's entry up to its runs' records, and tell Optuna when it is over."""
        ledger = self._ledgers[entry["method"]]
        folders = [self._folder(entry["cell"], seed) for seed in record["seeds"]]
        statuses = [folder.status() for folder in folders]
        self._name_objective(record, [line for folder in folders for line in folder.lines("eval")[:1]])
        self._report(record, entry, folders[0].lines("eval"))
        entry["spent"] = {"budget": sum(map(self._share, folders)) / len(folders)}
        values = [last_value(folder, record) for folder in folders]
        state = self._state_of(statuses, values)
        entry["value"] = sum(values) / len(values) if state == "complete" else None
        if state:
            ledger.tell(entry["number"], state, entry["value"], record["seeds"])
            entry |= {"state": state, "ended": entry["ended"] or now()}
            return
        frozen = ledger.trial(entry["number"])
        # A trial that was told and has gained seeds is told by its runs alone.
        is_running = "running" in statuses if frozen.state.is_finished() else frozen.state.name == "RUNNING"
        entry |= {"state": "running" if is_running else "waiting", "ended": ""}

    def _state_of(self, statuses: Sequence[str | None], values: Sequence[float]) -> str:
        """How a trial ended; "" while it goes on."""
        first = statuses[0]
        if "pruned" in statuses:
            return "pruned"
        if first == "diverged" and self.ablation.pruner != "none":
            return "diverged"
        if any(status not in ("finished", "diverged") for status in statuses):
            return ""
        return "complete" if "diverged" not in statuses and all(map(math.isfinite, values)) else "diverged"

    def _report(self, record: dict[str, Any], entry: dict[str, Any], lines: Sequence[Mapping[str, Any]]) -> None:
        """Tell the pruner what the first seed's evaluations found."""
        if self.ablation.pruner == "none" or not record["objective"]:
            return
        values = {line["point"]: number(line["metrics"][record["objective"]]) for line in lines}
        self._ledgers[entry["method"]].report(entry["number"], values)
        entry["intermediate"] |= {str(point): value for point, value in values.items()}

    def _name_objective(self, record: dict[str, Any], lines: Sequence[Mapping[str, Any]]) -> None:
        """The objective by its full name, which the first evaluation shows."""
        if lines and not record["objective"]:
            record["objective"] = full_name(self.ablation.objective, list(lines[0]["metrics"]))

    def _share(self, folder: RunFolder) -> float:
        """The part of its budget that a run has spent."""
        budget, lines = self.ablation.control.budget, folder.lines("train")
        if folder.status() == "finished":
            return 1.0
        return min(1.0, lines[-1][CLOCKS[budget.unit]] / budget.amount) if lines else 0.0

    # -- the study's files ------------------------------------------------------------------------------------------

    @property
    def _runs(self) -> str:
        return self.ablation.control.output.runs

    @property
    def study(self) -> str:
        """Name of the study."""
        return self.ablation.control.study

    def _folder(self, cell: str, seed: int) -> RunFolder:
        return RunFolder(run_path(self._runs, self.study, cell, seed))

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Change the record and the storage within the block, alone."""
        journal = journal_path(self._runs, self.study)
        with held(study_lock(self._runs, self.study, "ablation")), reaching(self.ablation.storage, journal):
            yield

    def _read(self) -> dict[str, Any]:
        record: dict[str, Any] = read_json(self.ablation.folder / RECORD)
        return record

    def _write(self, record: Mapping[str, Any]) -> None:
        write_json(self.ablation.folder / RECORD, record)

    @cached_property
    def _storage(self) -> BaseStorage:
        return connect(self.ablation.storage, self._runs, self.study)

    @cached_property
    def _ledgers(self) -> dict[str, TrialLedger]:
        """By method; opened once the record is there."""
        record, points = self._read(), self.ablation.control.evaluation.points
        return {
            subject.method: open_ledger(
                self._storage,
                study_name(self.study, subject),
                record["id"],
                record["direction"],
                make_pruner(self.ablation.pruner, points),
                self.ablation.kind == "search",
            )
            for subject in self.ablation.subjects
        }


def _cells(ablation: AblationPlan, subject: PlannedSubject) -> list[RunConfig]:
    """The cells of a method that are known beforehand: a grid's all, a search's default."""
    settings = [subject.default()] if ablation.kind == "search" else ablation.settings
    return [subject.cell(setting) for setting in settings]


def _with_threads(config: RunConfig, threads: int) -> RunConfig:
    return replace(config, runtime=replace(config.runtime, threads=threads))
