"""How many cells run side by side, with how many threads, on which devices."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from harness.config import BudgetConfig, DataConfig, OutputConfig, RunConfig, RuntimeConfig
from harness.errors import UserError
from harness.records.run_folder import RunFolder, run_path
from studies.configs.cells import Comparison
from studies.dispatch import plan
from studies.dispatch.plan import WorkerPlan, check_group, in_group, make_plan, visible_gpus
from tests.unit.harness.records.plain_records import manifest


@pytest.fixture
def asked(tmp_path: Path) -> Comparison:
    """Three cells at two seeds, with six threads, on the CPU."""
    config = RunConfig(
        data=DataConfig(name="digits"),
        runtime=RuntimeConfig(device="cpu", threads=6),
        output=OutputConfig(runs=str(tmp_path)),
    )
    cells = tuple(replace(config, cell=cell) for cell in "abc")
    return Comparison(cells=cells, seeds=(0, 1), baseline="a")


def finish(asked: Comparison, num: int) -> None:
    """Put the end of the first runs on record."""
    for config in asked.runs()[:num]:
        folder = RunFolder(run_path(config.output.runs, config.study, config.label, config.seed))
        folder.create()
        folder.write_manifest(manifest(status="finished"))


def on_gpus(asked: Comparison, count: int, monkeypatch: pytest.MonkeyPatch) -> Comparison:
    """The comparison on a machine with GPUs."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(plan.environment, "resolve_device", lambda name: torch.device("cuda"))
    return asked


@pytest.mark.parametrize(
    ("jobs", "workers", "threads"),
    # six runs: more workers would have nothing to do
    [(0, 1, 6), (1, 1, 6), (2, 2, 3), (4, 4, 1), (6, 6, 1), (20, 6, 1)],
)
def test_threads_are_divided(asked: Comparison, jobs: int, workers: int, threads: int) -> None:
    divided, made = make_plan(asked, jobs, 1)
    assert made == WorkerPlan(workers=workers, shares_device=workers > 1)
    assert {cell.runtime.threads for cell in divided.cells} == {threads}
    assert [cell.cell for cell in divided.cells] == ["a", "b", "c"]


def test_threads_do_not_depend_on_what_is_left(asked: Comparison) -> None:
    """Their number changes the last bits."""
    finish(asked, 5)
    divided, made = make_plan(asked, 3, 1)
    assert divided.cells[0].runtime.threads == 2
    assert made == WorkerPlan(workers=1), "one run is left, so it is alone"
    finish(asked, 6)
    assert make_plan(asked, 3, 1)[1].workers == 1


def test_torchs_own_number_of_threads_is_divided_too(asked: Comparison, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    runtime = RuntimeConfig(device="cpu")
    asked = replace(asked, cells=tuple(replace(cell, runtime=runtime) for cell in asked.cells))
    assert make_plan(asked, 1, 1)[0].cells[0].runtime.threads == 0, "left to the worker, which finds the same number"
    assert make_plan(asked, 2, 1)[0].cells[0].runtime.threads == 4


def test_each_worker_sees_its_own_gpu(asked: Comparison, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    _, made = make_plan(on_gpus(asked, 3, monkeypatch), 0, 1)
    assert made == WorkerPlan(workers=3, gpus=("0", "1", "2"))
    assert [made.devices(worker)["CUDA_VISIBLE_DEVICES"] for worker in range(3)] == ["0", "1", "2"]


def test_more_jobs_than_gpus_take_turns_on_them(asked: Comparison, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a,5")
    divided, made = make_plan(on_gpus(asked, 2, monkeypatch), 3, 1)
    assert made == WorkerPlan(workers=3, gpus=("GPU-a", "5"), shares_device=True)
    assert [made.devices(worker)["CUDA_VISIBLE_DEVICES"] for worker in range(3)] == ["GPU-a", "5", "GPU-a"]
    assert divided.cells[0].runtime.threads == 2


def test_several_gpus_a_cell(asked: Comparison, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    asked = on_gpus(asked, 5, monkeypatch)
    divided, made = make_plan(asked, 0, 2)
    assert made == WorkerPlan(workers=2, processes=2, gpus=("0", "1", "2", "3", "4"))
    assert [made.devices(worker)["CUDA_VISIBLE_DEVICES"] for worker in range(2)] == ["0,1", "2,3"]
    assert divided.cells[0].runtime.threads == 1
    with pytest.raises(UserError, match=r"^--gpus_per_cell is 6: this command sees 5 CUDA devices"):
        make_plan(asked, 0, 6)


def test_no_device_is_named_on_the_cpu() -> None:
    assert WorkerPlan(workers=2).devices(1) == {}


def test_a_hidden_gpu_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert visible_gpus() == ()


def test_a_budget_in_seconds_runs_one_at_a_time(asked: Comparison, monkeypatch: pytest.MonkeyPatch) -> None:
    budget = BudgetConfig(unit="seconds", amount=5)
    asked = on_gpus(replace(asked, cells=tuple(replace(cell, budget=budget) for cell in asked.cells)), 4, monkeypatch)
    assert make_plan(asked, 0, 1)[1].workers == 1
    with pytest.raises(UserError, match=r"^--jobs is 2 with budget\.unit seconds: "):
        make_plan(asked, 2, 1)


@pytest.mark.parametrize(("jobs", "gpus_per_cell"), [(2, 1), (0, 2)])
def test_launchers_take_neither(jobs: int, gpus_per_cell: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert not in_group()
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert not in_group()
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert in_group()
    check_group(0, 1)
    check_group(1, 1)
    with pytest.raises(UserError, match=r"^--jobs is \d and --gpus_per_cell is \d: under torchrun"):
        check_group(jobs, gpus_per_cell)
