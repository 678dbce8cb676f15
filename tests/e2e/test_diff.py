"""What a finished run has on record about its own fairness, and `ditbench diff` of real runs."""

import importlib.metadata
import json
import re
from collections.abc import Callable

import pytest
import torch

from harness.machine.environment import PACKAGES, git_state
from harness.records.files import digest
from harness.records.run_folder import RunFolder
from reports.study.load import load_study
from reports.study.verify import verify
from tests.e2e.conftest import FinishedStudy

Ditbench = Callable[..., tuple[int, str, str]]
DIGEST = re.compile(r"[0-9a-f]{64}")


@pytest.mark.parametrize("cell", ["sit", "vae_repa"])
def test_a_run_records_what_makes_it_comparable(finished: FinishedStudy, cell: str) -> None:
    folder = RunFolder(finished.run(cell))
    manifest = folder.manifest()
    digests, environment = manifest["digests"], manifest["environment"]
    for name in ("initial_weights", "training", "evaluation", "data", "autoencoder"):
        assert DIGEST.fullmatch(digests[name]), name
    assert digests["evaluation"] == digest(manifest["protocol"])
    assert DIGEST.fullmatch(manifest["protocol"]["extractor"]["weights"])
    assert manifest["protocol"]["autoencoder"] == digests["autoencoder"]
    in_git = bool(git_state()[0])
    assert re.fullmatch("[0-9a-f]{40}" if in_git else "", environment["git_commit"])
    assert isinstance(environment["git_dirty"], bool)
    installed = {name for name in PACKAGES if any(True for _ in importlib.metadata.distributions(name=name))}
    assert environment["packages"].keys() == installed
    assert {"torch", "numpy", "torch-fidelity"} <= installed
    assert environment["packages"]["torch"] == importlib.metadata.version("torch")
    assert environment["device"].startswith("cpu ")
    assert environment["precision"] == manifest["config"]["runtime"]["precision"] and environment["precision"] != "auto"
    assert environment["threads"] == manifest["config"]["runtime"]["threads"] == torch.get_num_threads()
    assert environment["python"] and environment["platform"]
    assert manifest["model"]["parameters"] > 0
    assert isinstance(manifest["shared_device"], bool)


@pytest.mark.parametrize("cell", ["sit", "vae_repa"])
def test_a_run_records_the_chain_of_its_batches(finished: FinishedStudy, cell: str) -> None:
    lines = RunFolder(finished.run(cell)).lines("train")
    traces = [line["trace"] for line in lines]
    assert len(set(traces)) == len(traces) == 6
    assert all(DIGEST.fullmatch(trace) for trace in traces)


def test_everything_that_must_agree_is_verified(finished: FinishedStudy) -> None:
    checks = {check.what: check for check in verify(load_study(finished.path))}
    assert checks.keys() == {
        *("data digest", "autoencoder digest", "size", "precision", "compile", "TF32"),
        *("training digest", "evaluation digest", "initial weights digest", "batch trace"),
    }
    assert all(check.num_runs == 2 and check.value for check in checks.values())
    assert checks["batch trace"].scope == "seed 0, to step 6"


def test_the_checks_are_printed(finished: FinishedStudy) -> None:
    lines = [line.split("  ")[0] for line in finished.said.out.splitlines()]
    assert lines[lines.index("agrees") + 1 : -1] == [check.what for check in verify(load_study(finished.path))]


def test_two_cells_of_a_study_are_comparable(finished: FinishedStudy, ditbench: Ditbench) -> None:
    paths = [str(finished.run(cell)) for cell in ("sit", "vae_repa")]
    status, out, _ = ditbench("diff", *paths, "--format", "json")
    assert status == 0
    found = json.loads(out)
    assert found["comparable"] and found["paired"]
    assert found["trace"] == {"step": 6, "agrees": True, "first_different": None}
    groups = {(one["group"], one["field"]) for one in found["differences"]}
    assert ("config", "method") in groups and ("method", "head_parameters") in groups
    assert "digests" not in {group for group, _ in groups}
