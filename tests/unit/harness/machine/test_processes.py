"""One run in one process, in two, and with accumulated gradients: the same data, the same weights, the same images."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from studies.children import CONTEXT, start_server
from studies.dispatch.crew import free_port
from tests.unit.harness.machine import processes_worker

METHODS = ("repa+vae_repa", "sra")
"""With two kinds of heads and cached tokens, and with a teacher and draws of its own."""

WAYS = {"two": (2, 0), "accumulated": (1, 4), "both": (2, 4)}
"""Number of processes, and images a forward pass (0 = all); held against one process with whole batches."""


def run_in_group(environment: dict[str, str], out: Path, cache: Path) -> None:
    """What one of several processes does: trains and generates, and writes what came out."""
    os.environ.update(environment)
    processes_worker.main(out, cache, "0,4", *METHODS)


def launch(out: Path, cache: Path, num_processes: int) -> Path:
    """Start processes with the variables that launchers set, and see them end well; their libraries are loaded."""
    out.mkdir()
    start_server()
    group = {"WORLD_SIZE": str(num_processes), "LOCAL_WORLD_SIZE": str(num_processes)}
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    shared = {**group, **meeting} if num_processes > 1 else {}
    ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} if shared else {} for rank in range(num_processes)]
    processes = [CONTEXT.Process(target=run_in_group, args=({**shared, **rank}, out, cache)) for rank in ranks]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=280)
        if process.exitcode != 0:  # the others wait for it
            for other in processes:
                other.kill()
    assert [process.exitcode for process in processes] == [0] * num_processes
    return out


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory, shared_cache: Path) -> dict[int, Path]:
    """What one process and two processes left behind."""
    folder = tmp_path_factory.mktemp("processes")
    return {number: launch(folder / str(number), shared_cache, number) for number in (1, 2)}


def facts(folder: Path, name: str) -> dict[str, Any]:
    return json.loads((folder / f"{name}.json").read_text())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("way", WAYS)
def test_the_batch_trace_is_the_same(outcomes: dict[int, Path], way: str, method: str) -> None:
    number, micro_batch = WAYS[way]
    wanted, found = facts(outcomes[1], f"{method}-0"), facts(outcomes[number], f"{method}-{micro_batch}")
    assert len(wanted["trace"]) == 64
    assert found["trace"] == wanted["trace"]
    assert found["initial_weights"] == wanted["initial_weights"]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("way", WAYS)
def test_losses_and_weights_are_the_same_up_to_rounding(outcomes: dict[int, Path], way: str, method: str) -> None:
    number, micro_batch = WAYS[way]
    reference, other = outcomes[1] / f"{method}-0", outcomes[number] / f"{method}-{micro_batch}"
    wanted, found = (facts(path.parent, path.name)["losses"] for path in (reference, other))
    assert found.keys() == wanted.keys() and len(wanted) >= 3
    for name, value in wanted.items():
        assert found[name] == pytest.approx(value, rel=2e-5), name
    initial = load_file(f"{reference}-initial.safetensors")
    before, after = (load_file(f"{path}.safetensors") for path in (reference, other))
    assert before.keys() == after.keys() == initial.keys()
    # AdamW turns the sign of a gradient that is all rounding into a step of the learning rate, which is 1e-4 here:
    # so few weights may differ by more than rounding, and none by more than the steps made.
    differences = torch.cat([(before[name] - after[name]).abs().flatten() for name in before])
    moved = torch.cat([(before[name] - initial[name]).abs().flatten() for name in before])
    assert float(differences.max()) <= 2 * 1e-4 * facts(reference.parent, reference.name)["steps"]
    assert float((differences > 1e-6).float().mean()) < 1e-3
    assert float((moved > 1e-5).float().mean()) > 0.3, "the weights have moved far more than they differ"


def test_generated_images_are_the_same_to_the_bit(outcomes: dict[int, Path]) -> None:
    """From the same weights: five chunks of 8, the last one short, so that one process of two is idle at the end."""
    wanted = np.load(outcomes[1] / "images.npy", allow_pickle=False)
    assert wanted.shape == (35, 32, 32, 3) and len(np.unique(wanted)) > 50
    assert np.array_equal(np.load(outcomes[2] / "images.npy", allow_pickle=False), wanted)
    assert facts(outcomes[2], "bad") == {"bad_images": [4, 4]}, "every tenth image of 35, from the fourth"


def test_files_of_samples_are_the_same_to_the_byte(outcomes: dict[int, Path]) -> None:
    one, two = (outcomes[number] / "images.npz" for number in (1, 2))
    assert np.array_equal(np.load(one)["arr_0"], np.load(outcomes[1] / "images.npy", allow_pickle=False))
    assert one.read_bytes() == two.read_bytes()
    assert not list(outcomes[2].glob(".*")), "nothing is left beside it"


def test_only_the_main_process_scores_and_writes(outcomes: dict[int, Path]) -> None:
    one, two = facts(outcomes[1], "evaluation"), facts(outcomes[2], "evaluation")
    assert one["metrics"] == two["metrics"], "scores of the same images"
    assert one["other_metrics"] is None and two["other_metrics"] == {}
    assert one["lines"] == two["lines"] == 2


def test_a_loss_that_is_not_finite_in_one_process_stops_all(outcomes: dict[int, Path]) -> None:
    assert facts(outcomes[2], "diverged") == {"steps": [1, 1], "parts": [["loss", "base"], ["loss", "base"]]}
