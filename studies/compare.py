"""A comparison: every cell at every seed under one budget, one data stream, one evaluator."""

import os
import traceback
from dataclasses import dataclass
from pathlib import Path

from harness.config import RunConfig, require
from harness.errors import UserError
from studies.display import Display
from studies.run import Lab, check_cell, folder_of, open_lab, run_cell
from studies.settings import Comparison


@dataclass(frozen=True)
class Failure:
    """A run that ended with an error; the others went on."""

    run: str
    message: str


def run_comparison(comparison: Comparison) -> list[Failure]:
    """Run what is missing of a comparison, and return the runs that failed.

    Every cell is checked before the first one trains, so that a typo in the last cell costs no hours. An unwritable
    folder of studies is refused before the data is read.
    """
    runs = comparison.runs()
    check_writable(Path(runs[0].output.runs))
    with Display(len(runs), runs[0].budget) as display:
        lab = open_lab(runs[0], display.report)
        for config in comparison.cells:
            check_cell(lab, config, comparison.seeds)
        failures = []
        for number, config in enumerate(runs, start=1):
            display.begin(number, config)
            failures += _guarded(lab, config, comparison.baseline, display)
    return failures


def check_writable(folder: Path) -> None:
    """Raise `UserError` when a folder, which need not exist yet, cannot be made or written to."""
    standing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    ok = standing.is_dir() and os.access(standing, os.W_OK)
    require(ok, f"output.runs is {str(folder)!r}: {standing} cannot be written to; name a folder you may write to")


def _guarded(lab: Lab, config: RunConfig, baseline: str, display: Display) -> list[Failure]:
    """Run one cell; an error is recorded with its trace and returned, so that the other cells go on."""
    folder = folder_of(config)
    try:
        for event in run_cell(lab, config, baseline):
            display.event(event)
        return []
    except UserError:
        raise
    except Exception as error:
        if folder.exists():
            folder.update_manifest(
                status="failed", status_detail={"error": str(error), "trace": traceback.format_exc()}
            )
        message = " ".join(f"{type(error).__name__}: {error}".split())
        display.failed(message)
        return [Failure(run=f"{config.label}/seed{config.seed}", message=message)]
