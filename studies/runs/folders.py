"""Where a run is on disk, and whether it is over. Free of torch."""

from pathlib import Path

from harness.config import RunConfig
from harness.errors import UserError
from harness.records.run_folder import RunFolder, run_path
from harness.records.schema import FORMAT, WRITTEN_BY


def folder_of(config: RunConfig) -> RunFolder:
    """The folder of a run."""
    return RunFolder(run_path(config.output.runs, config.study, config.label, config.seed))


def lease_of(config: RunConfig) -> Path:
    """The lock file of a run."""
    return lease_path(config.output.runs, config.study, config.label, config.seed)


def is_done(folder: RunFolder) -> bool:
    """Whether the run came to its end."""
    return folder.status() in ("finished", "diverged", "pruned")


def refuse_older_run(folder: RunFolder) -> None:
    """Raise `UserError` for a run that an earlier version began and that is not over: this one would go on with it in
    another way."""
    if not folder.exists() or is_done(folder):
        return
    version = WRITTEN_BY.get(folder.manifest().get("format", FORMAT))
    if version:
        raise UserError(
            f"{folder.path} was made by ditbench {version} and is not over: continue it with that version, "
            "or give another --study"
        )


LEASES = ".leases"
"""Folder of a study's lock files."""


def study_lock(runs: str | Path, study: str, name: str) -> Path:
    """The lock file of that name in a study."""
    return Path(runs) / study / LEASES / f"{name}.lock"


def lease_path(runs: str | Path, study: str, cell: str, seed: int) -> Path:
    """The lock file of a run."""
    return study_lock(runs, study, f"{cell}--seed{seed}")
