"""Where a run is on disk, and whether it is over. Free of torch."""

from pathlib import Path

from harness.config import RunConfig
from harness.records.run_folder import RunFolder, run_path
from studies.lease import lease_path


def folder_of(config: RunConfig) -> RunFolder:
    """The folder of a run."""
    return RunFolder(run_path(config.output.runs, config.study, config.label, config.seed))


def lease_of(config: RunConfig) -> Path:
    """The lock file of a run."""
    return lease_path(config.output.runs, config.study, config.label, config.seed)


def is_done(folder: RunFolder) -> bool:
    """Whether the run came to its end."""
    return folder.status() in ("finished", "diverged", "pruned")
