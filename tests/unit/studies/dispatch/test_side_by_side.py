"""`--jobs auto`: the table, what is chosen from it, and the measurement."""

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from harness.config import DataConfig, ModelConfig, OptimizerConfig, OutputConfig, RunConfig, RuntimeConfig
from harness.machine import ram
from harness.records.run_folder import RunFolder, run_path
from studies.configs.cells import Comparison
from studies.dispatch import side_by_side
from studies.dispatch.side_by_side import Split, choose, cpu_name, fastest, images_per_s, split_words, table_words
from tests.unit.harness.records.plain_records import CONFIG, manifest

SIX = {1: 20.0, 2: 24.0, 3: 25.0, 6: 21.0}
"""Images a second of as many processes on six threads."""


@pytest.fixture
def asked(tmp_path: Path) -> Comparison:
    """Eight runs of the smallest model on six threads."""
    config = RunConfig(
        method="vae_repa",
        model=ModelConfig(name="SiT-pico/2"),
        data=DataConfig(name="digits", image_size=32),
        optimizer=OptimizerConfig(batch_size=4),
        runtime=RuntimeConfig(device="cpu", precision="fp32", threads=6),
        output=OutputConfig(runs=str(tmp_path / "runs"), cache=str(tmp_path / "cache")),
    )
    return Comparison(cells=tuple(replace(config, cell=c) for c in "abcd"), seeds=(0, 1), baseline="a")


@pytest.fixture
def speeds(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[tuple[int, int]]]:
    """`speeds(table)`: the machine has those images a second; returns the list of what is measured."""

    def use(table: dict[int, float]) -> list[tuple[int, int]]:
        asked: list[tuple[int, int]] = []

        def measure(config: RunConfig, shape: object, processes: int, threads: int) -> float:
            asked.append((processes, threads))
            return table[processes]

        monkeypatch.setattr(side_by_side, "images_per_s", measure)
        return asked

    return use


@pytest.mark.parametrize(
    ("table", "processes"),
    [
        ({1: 20.0, 2: 20.9}, 1),  # 4.5% are not worth the clock of seconds
        ({1: 20.0, 2: 21.0}, 2),
        ({1: 20.0, 2: 24.0, 3: 25.0}, 2),
        ({1: 20.0, 2: 24.0, 3: 25.3}, 3),
        ({1: 20.0, 2: 0.0}, 1),
    ],
)
def test_more_processes_must_be_faster_by_a_twentieth(table: dict[int, float], processes: int) -> None:
    assert fastest([Split(k, 6 // k, rate) for k, rate in table.items()]).processes == processes


def test_the_line() -> None:
    splits = [Split(1, 2, 28.44), Split(2, 1, 35.06)]
    both = "2 processes of 1 thread each: 35.1 images/s together; 1 process of 2 threads: 28.4"
    assert table_words(splits, splits[1]) == both
    assert table_words(splits[:1], splits[0]) == "1 process of 2 threads: 28.4 images/s"
    assert split_words(1, 1) == "1 process of 1 thread"
    assert split_words(3, 4) == "3 processes of 4 threads each"


def test_a_machine_is_measured_once(asked: Comparison, speeds: Callable[..., list[tuple[int, int]]]) -> None:
    measured = speeds(SIX)
    chosen = choose(asked)
    assert measured == [(1, 6), (2, 3), (3, 2), (6, 1)]
    assert (chosen.processes, chosen.threads) == (2, 3)
    assert choose(asked) == chosen and len(measured) == 4
    other = tuple(replace(cell, optimizer=OptimizerConfig(batch_size=8)) for cell in asked.cells)
    choose(replace(asked, cells=other))
    assert len(measured) == 8, "another batch is another table"
    (path, _) = sorted(Path(asked.cells[0].output.cache).glob("side-by-side-*.json"))
    path.write_text(json.dumps({"value": {"key": {}, "splits": []}, "digest": "wrong"}))
    assert choose(asked) == chosen


def test_what_died_is_measured_again(asked: Comparison, speeds: Callable[..., list[tuple[int, int]]]) -> None:
    table = {1: 20.0, 2: 0.0}
    measured = speeds(table)
    assert choose(asked).processes == 1
    table |= SIX
    assert choose(asked).processes == 2
    assert measured == [(1, 6), (2, 3), (2, 3), (3, 2), (6, 1)]


def test_only_what_may_be_used_is_measured(
    asked: Comparison, speeds: Callable[..., list[tuple[int, int]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    two = replace(asked, cells=asked.cells[:2], seeds=(0,))
    measured = speeds(SIX)
    choose(two)
    assert measured == [(1, 6), (2, 3)], "there are two runs"
    choose(asked)
    assert measured == [(1, 6), (2, 3), (3, 2), (6, 1)], "what is known is not measured again"
    monkeypatch.setattr(ram, "free_ram", lambda: 0)
    assert choose(asked).processes == 1, "the others have no room"


def test_nothing_is_measured_where_nothing_can_be_divided(
    asked: Comparison, speeds: Callable[..., list[tuple[int, int]]]
) -> None:
    measured = speeds(SIX)
    one_run = choose(replace(asked, cells=asked.cells[:1], seeds=(0,)))
    assert (one_run.processes, one_run.threads) == (1, 6)
    runtime = replace(asked.cells[0].runtime, threads=1)
    one_thread = choose(replace(asked, cells=tuple(replace(cell, runtime=runtime) for cell in asked.cells)))
    assert (one_thread.processes, one_thread.threads) == (1, 1)
    assert one_thread.reason == "1 process of 1 thread, as there is nothing to divide"
    assert measured == []


def test_nothing_is_divided_further_once_that_is_slower(
    asked: Comparison, speeds: Callable[..., list[tuple[int, int]]]
) -> None:
    measured = speeds({1: 20.0, 2: 17.9})
    assert choose(asked).processes == 1
    assert measured == [(1, 6), (2, 3)]


@pytest.mark.parametrize(("begun", "processes"), [(6, 1), (3, 2), (1, 6), (8, 1)])
def test_a_study_keeps_the_threads_it_was_begun_with(
    asked: Comparison, speeds: Callable[..., list[tuple[int, int]]], begun: int, processes: int
) -> None:
    measured = speeds(SIX)
    third = asked.runs()[2]
    folder = RunFolder(run_path(third.output.runs, third.study, third.label, third.seed))
    folder.create()
    folder.write_manifest(manifest(config={**CONFIG, "runtime": {"threads": begun}}))
    chosen = choose(asked)
    assert (chosen.processes, chosen.threads) == (processes, begun)
    assert chosen.reason.endswith(", as this study was begun with")
    assert measured == []


@pytest.mark.parametrize(("size", "images"), [("pico", 64), ("S", 11), ("XL", 1)])
def test_a_measured_step_takes_seconds(asked: Comparison, size: str, images: int) -> None:
    """At 256 tokens an image of S costs 6 x 6.05 GFLOPs, so 11 of them 400; one of XL costs more."""
    config = replace(
        asked.cells[0],
        model=ModelConfig(name=f"SiT-{size}/2"),
        data=DataConfig(name="digits", image_size=128),  # the autoencoder of the digits divides by 4
        optimizer=OptimizerConfig(batch_size=64),
    )
    resolved, shape = side_by_side.control_run(config)
    assert shape.num_tokens == 256
    assert resolved.method == "sit"
    assert resolved.optimizer.batch_size == images


def test_the_names_of_processors(tmp_path: Path) -> None:
    info = tmp_path / "cpuinfo"
    info.write_text("processor\t: 0\nmodel name\t: AMD EPYC 9\nprocessor\t: 1\nmodel name\t: AMD EPYC 9\n")
    assert cpu_name(info) == "AMD EPYC 9"
    info.write_text("processor\t: 0\n")
    assert cpu_name(info)
    assert cpu_name(tmp_path / "none")


def test_speed_counts_whole_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of 0.75 s: three of them fill two seconds, and 3 x 4 images took 2.25 s."""
    now = itertools.count()
    monkeypatch.setattr(side_by_side.time, "perf_counter", lambda: clock[0])
    clock = [0.0]

    def step() -> None:
        clock[0] += 0.75
        next(now)

    assert side_by_side.speed(step, 4) == pytest.approx(12 / 2.25)
    assert next(now) == 3


def test_processes_are_measured_together(asked: Comparison) -> None:
    """In processes of their own, whose threads are not this one's; what dies in one of them has no speed."""
    before = torch.get_num_threads()
    config, shape = side_by_side.control_run(asked.cells[0])
    assert images_per_s(config, shape, 2, 1) > 0
    assert torch.get_num_threads() == before
    broken = replace(config, model=ModelConfig(name="SiT-none/2"))
    assert images_per_s(broken, shape, 1, 1) == 0
