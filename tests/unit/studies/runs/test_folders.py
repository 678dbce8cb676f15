"""Runs of an earlier version: finished ones are done, others are not continued."""

from pathlib import Path

import pytest

from harness.errors import UserError
from harness.records.run_folder import RunFolder
from studies.runs.folders import is_done, refuse_older_run
from tests.unit.harness.records.plain_records import manifest


def folder_with(path: Path, **fields: object) -> RunFolder:
    folder = RunFolder(path)
    folder.create()
    folder.write_manifest(manifest(**fields))
    return folder


@pytest.mark.parametrize("status", ["running", "failed"])
def test_an_older_run_that_is_not_over_is_refused(tmp_path: Path, status: str) -> None:
    with pytest.raises(UserError, match=r"was made by ditbench 0\.1\.0 .*with that version, or give another --study"):
        refuse_older_run(folder_with(tmp_path, status=status, format=1))


def test_an_older_run_that_is_over_is_done(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, status="finished", format=1)
    refuse_older_run(folder)
    assert is_done(folder)


def test_a_run_of_this_version_and_none_at_all_are_not_refused(tmp_path: Path) -> None:
    refuse_older_run(folder_with(tmp_path / "own"))
    refuse_older_run(RunFolder(tmp_path / "none"))
