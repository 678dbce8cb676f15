"""`--dry_run` of the commands that train: what all of it would cost, and nothing else."""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser, Namespace

from harness.config import RunConfig, require
from harness.machine.ram import in_words
from studies.terminal.tables import console, print_table

if TYPE_CHECKING:
    from studies.costs.estimate import CellEstimate, Estimate

NOTES = (
    "Hours are those of one device, at one rate for everything; N devices take an Nth of them at best. What runs in "
    "another precision, such as the autoencoder in fp32, is slower, and reading, optimiser, metrics and records come "
    "on top.",
    "Disk is what is kept at the end; while a checkpoint is written there is one more. Memory is that of one process, "
    "without what libraries and allocators add (docs/performance.md). On a CPU both columns lie in RAM.",
)


def add_options(parser: ArgumentParser) -> None:
    """The options of a dry run."""
    parser.add_argument(
        "--dry_run", action="store_true", help="only show what it would cost: GFLOPs, hours, disk and memory"
    )
    parser.add_argument(
        "--tflops", type=float, default=0.0,
        help="dry run: sustained TFLOP/s of the machine that is meant; 0 = measure this one for some seconds",
    )  # fmt: skip
    parser.add_argument("--format", choices=("table", "json"), default="table", help="dry run: table (default) or json")


def is_asked(namespace: Namespace) -> bool:
    """Whether the command is a dry run; `UserError` for options that make sense in one only, and for a wrong rate."""
    tflops = namespace.tflops
    require(math.isfinite(tflops) and tflops >= 0, f"tflops is {tflops}: give TFLOP/s above 0, or 0 to measure them")
    given = [name for name, value in (("tflops", tflops), ("format", namespace.format != "table")) if value]
    require(namespace.dry_run or not given, f"--{' --'.join(given)} has no effect without --dry_run: give that as well")
    return bool(namespace.dry_run)


def show(cells: Sequence[tuple[RunConfig, int]], namespace: Namespace) -> int:
    """Estimate cells with their numbers of runs, and print the result."""
    from studies.costs.estimate import Planned, estimate
    from studies.terminal.display import Display

    planned = [Planned(config=config, runs=runs) for config, runs in cells]
    with Display(stderr=True) as display:
        found = estimate(planned, namespace.tflops, display.report)
    if namespace.format == "json":
        print(json.dumps(record(found), indent=1, ensure_ascii=False))
    else:
        _print(found)
    return 0


# -- for programs ---------------------------------------------------------------------------------------------------

PARTS = ("train", "evaluation", "final")
"""The parts that a run's time is divided into."""


def record(found: "Estimate") -> dict[str, Any]:
    """All of an estimate; what cells have is of one run, what `total` has is of all runs."""
    cells = [{**dataclasses.asdict(cell), "hours": hours(found, cell)} for cell in found.cells]
    everything = [(cell, hours(found, cell)) for cell in found.cells]
    total = {
        "runs": sum(cell.runs for cell in found.cells),
        **{f"{part}_gflops": _sum(found, f"{part}_gflops") for part in PARTS},
        "hours": {part: sum(cell.runs * spent[part] for cell, spent in everything) for part in PARTS},
        "disk": sum(cell.runs * sum(cell.disk.values()) for cell in found.cells),
    }
    caches = {
        "bytes": dict(found.caches),
        "gflops": found.cache_gflops,
        "hours": found.rate.hours(found.cache_gflops),
    }
    shared = {name: getattr(found, name) for name in ("study", "num_images", "num_classes")}
    rate, assumptions = dataclasses.asdict(found.rate), list(found.assumptions)
    return {**shared, "rate": rate, "assumptions": assumptions, "cells": cells, "total": total, "caches": caches}


def hours(found: "Estimate", cell: "CellEstimate") -> dict[str, float]:
    """Hours of one run, by part; training includes the second forward pass of checkpointed activations."""
    counted = {part: found.rate.hours(getattr(cell, f"{part}_gflops")) for part in PARTS}
    return {**counted, "train": counted["train"] + found.rate.hours(cell.recomputed_gflops)}


def _sum(found: "Estimate", name: str) -> float:
    return sum(cell.runs * getattr(cell, name) for cell in found.cells)


# -- for people -----------------------------------------------------------------------------------------------------


def _print(found: "Estimate") -> None:
    written, whole = console().print, record(found)
    runs = whole["total"]["runs"]
    written(f"{found.study}: {_count(len(found.cells), 'cell')}, {_count(runs, 'run')}; nothing is started or written")
    written(f"data: {found.num_images:,} images of {_count(found.num_classes, 'class', 'es')}")
    written(f"rate: {_number(found.rate.tflops)} TFLOP/s, {found.rate.source}")
    for line in found.assumptions:
        written(f"assumed: {line}")
    written("")
    print_table(table(found))
    written("")
    for line in (*cache_lines(whole["caches"]), *NOTES):
        written(line)


def table(found: "Estimate") -> list[dict[str, str]]:
    """A row a cell, all its runs together, and their sum."""
    rows = [_row(found, cell) for cell in found.cells]
    return [*rows, _last_row(record(found)["total"])] if len(rows) > 1 else rows


def _row(found: "Estimate", cell: "CellEstimate") -> dict[str, str]:
    spent = {part: cell.runs * value for part, value in hours(found, cell).items()}
    return {
        "cell": cell.cell,
        "runs": str(cell.runs),
        "GFLOPs an image": f"{cell.train_gflops_per_image:,.2f}",
        "steps": f"{cell.steps:,}",
        **_spent(cell.runs * cell.train_gflops, spent),
        "disk": in_words(cell.runs * sum(cell.disk.values())),
        "device memory": in_words(cell.memory["device"]),
        "RAM": in_words(cell.memory["ram"]),
    }


def _last_row(total: Mapping[str, Any]) -> dict[str, str]:
    return {
        "cell": "all",
        "runs": str(total["runs"]),
        "GFLOPs an image": "",
        "steps": "",
        **_spent(total["train_gflops"], total["hours"]),
        "disk": in_words(total["disk"]),
        "device memory": "",
        "RAM": "",
    }


def _spent(train_gflops: float, hours: Mapping[str, float]) -> dict[str, str]:
    """Cells of the table for compute and hours."""
    return {
        "training, PFLOPs": _number(train_gflops / 1e6),
        "training, h": _number(hours["train"]),
        "points, h": _number(hours["evaluation"]),
        "final, h": _number(hours["final"]) if hours["final"] else "-",
        "together, h": _number(sum(hours.values())),
    }


def cache_lines(caches: Mapping[str, Any]) -> list[str]:
    """The row of what is made once for all runs."""
    sizes = caches["bytes"]
    listed = ", ".join(f"{name} {in_words(size)}" for name, size in sizes.items())
    made = f"{_number(caches['gflops'] / 1e6)} PFLOPs, {_number(caches['hours'])} h"
    return [f"Caches, made once for all runs: {in_words(sum(sizes.values()))} of disk ({listed}); {made}."]


def _number(value: float) -> str:
    """Three digits, more where the whole part has more."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _count(number: int, word: str, plural: str = "s") -> str:
    return f"{number:,} {word}{plural if number != 1 else ''}"
