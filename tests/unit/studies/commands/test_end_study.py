"""The end of a command that trains: its report, or why there is none."""

from pathlib import Path

import pytest

from harness.errors import UserError
from studies.commands.report import end_study
from studies.dispatch.board import Failure


def test_a_study_without_runs_has_no_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An error, but where something failed anyway, or others may still be at its runs."""
    study = tmp_path / "s"
    study.mkdir()
    with pytest.raises(UserError):
        end_study(study, [])
    assert capsys.readouterr().err == ""
    end_study(study, [], is_over=False)
    assert capsys.readouterr().err.startswith("no report: ")
    end_study(study, [Failure("sit/seed0", "RuntimeError: boom")])
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "failed: sit/seed0: RuntimeError: boom" and lines[1].startswith("no report: ")
