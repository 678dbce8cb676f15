"""What `compare` and `ablate` ask of their workers."""

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import pytest
from jsonargparse import ArgumentParser

from harness.config import DataConfig, OutputConfig, RunConfig, RuntimeConfig
from harness.errors import UserError
from studies import children
from studies.commands import ablate
from studies.commands import compare as command
from studies.configs.cells import Comparison
from studies.configs.settings import parse
from studies.dispatch import execute
from studies.dispatch.board import Board
from studies.dispatch.crew import Crew
from studies.dispatch.plan import WorkerPlan
from studies.dispatch.turns import Task
from studies.terminal.display import Display


@pytest.fixture
def asked(tmp_path: Path) -> Comparison:
    config = RunConfig(
        data=DataConfig(name="digits"),
        runtime=RuntimeConfig(device="cpu", threads=2),
        output=OutputConfig(runs=str(tmp_path)),
    )
    return Comparison(cells=(config,), seeds=(0, 1), baseline="sit")


@pytest.mark.parametrize("waits", [True, False])
def test_workers_wait_for_others_unless_that_is_refused(
    asked: Comparison, waits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans: list[WorkerPlan] = []
    monkeypatch.setattr(children, "start_server", lambda: None)
    monkeypatch.setattr(execute, "run_in_workers", lambda agenda, plan: plans.append(plan) or [])
    assert command.run(asked, 2, 1, waits=waits) == []
    assert ablate.run(cast(Any, asked), 2, waits=waits) == []
    assert plans == [WorkerPlan(workers=2, shares_device=True, waits=waits)] * 2
    with Display(asked) as display:
        crew = Crew(asked, plans[0], Board(asked, display), datetime.now(UTC))
    task = Task(**crew._task(), tell=lambda message: None)
    assert (task.waits, task.shares_device) == (waits, True)


@pytest.mark.parametrize(("parser", "option"), [(command.command_parser, "jobs"), (ablate.command_parser, "workers")])
def test_workers_are_a_number(parser: Callable[[], ArgumentParser], option: str) -> None:
    with pytest.raises(UserError, match=f"^{option} is auto: give a whole number$"):
        parse(parser(), ["--config", "digits", f"--{option}", "auto"])
