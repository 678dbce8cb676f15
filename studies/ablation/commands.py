"""Begin and end of a command that runs an ablation."""

import secrets
from collections.abc import Mapping, Sequence
from typing import Any

import optuna

from harness.errors import UserError
from harness.records.files import read_json
from harness.records.metrics import metric
from harness.tracking.store import mark, open_parent
from studies.ablation.book import OVER, entries_of, study_name
from studies.ablation.plan import RECORD, AblationPlan, PlannedSubject, differences, grown, joined, plan_record, refusal
from studies.ablation.storage import check_reachable, journal_path, owner_of, reaching
from studies.ablation.trials import AblationAgenda
from studies.configs.recorded_command import recorded_command
from studies.dispatch.leases import claim, held
from studies.runs.folders import is_done, lease_path, study_lock


def prepare(ablation: AblationPlan) -> AblationAgenda:
    """Make or open an ablation's record and trials, add what they lack, and tell Optuna what is over already.

    Raises:
        UserError: the study holds another ablation, or the trials of another folder of runs; or the storage cannot be
            reached. Nothing has changed then.
        StorageError: the disk refuses a file.
    """
    output, study = ablation.control.output, ablation.control.study
    check_reachable(ablation.storage)
    with (
        held(study_lock(output.runs, study, "ablation")),
        reaching(ablation.storage, journal_path(output.runs, study)),
    ):
        ablation, record = _merged(ablation)
        agenda = AblationAgenda(ablation)
        _refuse_other_owner(agenda, record["id"])
        agenda._write(record)
        for subject in ablation.subjects:
            _fill(agenda, record, subject)
        for entry in record["trial_list"]:
            agenda._settle(record, entry)
        agenda._write(record)
    agenda._parent = _open_parent(agenda)
    return agenda


def _merged(ablation: AblationPlan) -> tuple[AblationPlan, dict[str, Any]]:
    """The ablation and the study's record, each with what the other asks for."""
    path, command = ablation.folder / RECORD, recorded_command()
    if not path.exists():
        direction = metric(ablation.objective).direction if ablation.objective else "lower"
        own = {"id": secrets.token_hex(8), "direction": direction, "mlflow_run": "", "trial_list": []}
        return ablation, {**plan_record(ablation), **own, "commands": [command]}
    before = read_json(path)
    if lines := differences(before, plan_record(ablation)):
        raise UserError(refusal(ablation.folder, lines))
    ablation = joined(ablation, before)
    record = grown(before, plan_record(ablation))
    return ablation, {**record, "commands": [c for c in record["commands"] if c != command] + [command]}


def _refuse_other_owner(agenda: AblationAgenda, own: str) -> None:
    """Two folders of runs must not share a study: each would lack runs that the other's trials count on."""
    for subject in agenda.ablation.subjects:
        name = study_name(agenda.study, subject)
        if owner_of(agenda._storage, name) not in (None, "", own):
            raise UserError(
                f"the storage holds a study {name!r} of another folder of runs: give another --study, "
                "or remove it with: optuna delete-study"
            )


def _fill(agenda: AblationAgenda, record: dict[str, Any], subject: PlannedSubject) -> None:
    """Trials on record that the storage lost, then those asked for that it lacks; a search begins with the default."""
    ledger = agenda._ledgers[subject.method]
    for entry in entries_of(record, subject.method)[len(ledger.trials()) :]:
        ledger.add(subject, entry["setting"], entry["cell"])
    known = {trial.user_attrs["cell"] for trial in ledger.trials()}
    for cell in agenda._cells[subject.method]:
        if cell.label not in known:
            ledger.add(subject, subject.setting_of(cell), cell.label)
    agenda._take_up(record, subject)


def _open_parent(agenda: AblationAgenda) -> str:
    """The study's parent run in MLflow, made once; "" where MLflow is away."""
    config = agenda.ablation.control
    with held(study_lock(config.output.runs, config.study, "mlflow")):
        run_id = open_parent(config.output, config.study)
        with agenda._locked():
            record = agenda._read()
            record["mlflow_run"] = run_id or record["mlflow_run"]
            agenda._write(record)
    return str(record["mlflow_run"])


def withdraw(agenda: AblationAgenda) -> None:
    """Take back what `prepare` made, where no run has begun: the data or weights of the plan may be wrong.

    Otherwise the plan put right would be refused as another ablation.
    """
    journal = journal_path(agenda._runs, agenda.study)
    with agenda._locked():
        if any(agenda.ablation.folder.glob("*/seed*/manifest.json")):
            return
        for subject in agenda.ablation.subjects:
            optuna.delete_study(study_name=study_name(agenda.study, subject), storage=agenda._storage)
        journal.unlink(missing_ok=True)
        (agenda.ablation.folder / RECORD).unlink()


def finish(agenda: AblationAgenda) -> None:
    """Queue the trials of runs that failed for a later command, and close MLflow's parent run."""
    with agenda._locked():
        record = agenda._read()
        for entry in record["trial_list"]:
            if entry["state"] not in OVER:
                if _is_to_be_tried_again(agenda, entry, record["seeds"]):
                    agenda._ledgers[entry["method"]].queue(entry["number"])
                agenda._settle(record, entry)
        agenda._write(record)
    mark(agenda.ablation.control.output, record["mlflow_run"], "finished")


def _is_to_be_tried_again(agenda: AblationAgenda, entry: Mapping[str, Any], seeds: Sequence[int]) -> bool:
    """Whether a trial has a run that failed, and nobody is at any of its runs."""
    folders = [agenda._folder(entry["cell"], seed) for seed in seeds]
    if not any(folder.status() == "failed" for folder in folders):
        return False
    leases = [
        claim(lease_path(agenda._runs, agenda.study, entry["cell"], seed))
        for seed, folder in zip(seeds, folders, strict=True)
        if not is_done(folder)
    ]
    for lease in leases:
        if lease:
            lease.release()
    return all(leases)
