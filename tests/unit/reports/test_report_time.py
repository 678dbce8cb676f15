"""The time that a large study's report takes: 200 runs with 5,000 logged steps and 50 evaluations each."""

import hashlib
import json
import time
from pathlib import Path

import numpy as np
import pytest

from harness.records.run_folder import RunFolder
from reports.report import write_report
from tests.unit.reports.records_factory import MAIN, write_run

CELLS, SEEDS, LOGGED, POINTS, EVERY = 20, 10, 5000, 50, 20

LIMIT_S = 120
"""Four times what the report may take on two cores that have nothing else to do."""


def write_large_study(runs: Path, cells: int = CELLS, seeds: int = SEEDS, logged: int = LOGGED) -> Path:
    """One method's cells beside the control; all but the curves is that of a small run."""
    for seed in range(seeds):
        traces = [hashlib.sha256(f"{seed} {i}".encode()).hexdigest() for i in range(logged)]
        for cell in ["sit", *(f"vae_repa,block={i}" for i in range(1, cells))]:
            folder = write_run(runs, "large", cell, cell.split(",")[0], seed, "sit", amount=8 * EVERY)
            manifest = {k: v for k, v in folder.manifest().items() if k != "format"}
            manifest["config"]["budget"]["amount"] = logged * EVERY
            manifest["config"]["evaluation"]["points"] = POINTS
            folder.write_manifest(manifest)
            write_curves(folder, [seed, len(cell), ord(cell[-1])], traces)
    return runs / "large"


def write_curves(folder: RunFolder, entropy: list[int], traces: list[str]) -> None:
    """Lines like the last of a small run, with numbers that fall and clocks that go on."""
    num = len(traces)
    noise = np.random.default_rng(entropy).standard_normal(num)
    values = ((1 + 10 * np.exp(-np.arange(num) * 5 / num)) * (1 + 0.05 * noise)).tolist()
    train, evaluation = folder.lines("train")[-1], folder.lines("eval")[-1]
    rates = {name: train[name] / train["step"] for name in train if name.endswith(("seconds", "gflops", "images"))}

    def at(place: int) -> dict[str, float]:
        step = EVERY * (place + 1)
        return {"step": step, **{name: rate * step for name, rate in rates.items()}}

    lines = [
        train | at(i) | {"base": value, "grad_norm": value, "trace": trace}
        for i, (value, trace) in enumerate(zip(values, traces, strict=True))
    ]
    every = num // POINTS
    evaluations = [
        evaluation | at(every * point - 1) | {"point": point, "metrics": scaled(evaluation, values[every * point - 1])}
        for point in range(1, POINTS + 1)
    ]
    for name, records in (("train", lines), ("eval", evaluations)):
        (folder.path / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def scaled(evaluation: dict[str, dict[str, float]], factor: float) -> dict[str, float]:
    return {name: value * factor for name, value in evaluation["metrics"].items()}


@pytest.mark.full
@pytest.mark.timeout(900)
def test_a_report_of_200_runs_is_made_in_time(tmp_path, capsys):
    study = write_large_study(tmp_path)
    started = time.perf_counter()
    paths = write_report(study)
    time_s = time.perf_counter() - started
    with capsys.disabled():
        print(f"\nreport of {CELLS * SEEDS} runs with {LOGGED} points each: {time_s:.1f} s")
    assert len(paths.study.runs) == CELLS * SEEDS and paths.study.main_metrics[0] == MAIN
    assert time_s < LIMIT_S
