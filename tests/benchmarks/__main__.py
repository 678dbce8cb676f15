"""`make bench`: every benchmark of this folder, or those that are named; tables on the terminal, all of it in one JSON.

A benchmark is a module with `TITLE`, what it measures in one line, and `measure()`, which gives rows of a table. All
numbers of a benchmark are measured in one run, in turns where they are compared. None is run by the test suite.
"""

import argparse
import datetime
import importlib
import json
import pkgutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import tests.benchmarks
from harness.config import RuntimeConfig
from harness.machine import environment

PLACE = Path("build/bench.json")


def benchmarks() -> dict[str, Any]:
    """Modules of this folder that measure something, by name."""
    names = sorted(module.name for module in pkgutil.iter_modules(tests.benchmarks.__path__) if module.name[0] != "_")
    modules = {name: importlib.import_module(f"tests.benchmarks.{name}") for name in names}
    return {name: module for name, module in modules.items() if hasattr(module, "measure")}


def markdown(rows: list[Mapping[str, Any]]) -> str:
    """Rows as a table for docs/performance.md; numbers with 4 digits."""
    head = list(rows[0])
    lines = [head, ["---"] * len(head)] + [[shown(row.get(name)) for name in head] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def shown(value: Any) -> str:
    """A cell of a table."""
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def main() -> None:
    known = benchmarks()
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"one of {', '.join(known)}; all where none is named")
    parser.add_argument("--json", type=Path, default=PLACE, help=f"where the numbers go (default: {PLACE})")
    arguments = parser.parse_args()
    unknown = sorted(set(arguments.names) - set(known))
    if unknown:
        parser.error(f"no benchmark is called {', '.join(unknown)}: give some of {', '.join(known)}")
    runtime = environment.resolve_runtime(RuntimeConfig())
    environment.apply_runtime(runtime)
    found: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "environment": environment.describe(runtime),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "benchmarks": {},
    }
    for name in arguments.names or known:
        module = known[name]
        print(f"\n## {name}: {module.TITLE}\n", flush=True)
        rows = module.measure()
        print(markdown(rows), flush=True)
        found["benchmarks"][name] = {"title": module.TITLE, "rows": rows}
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")
    print(f"\nwritten: {arguments.json}")


if __name__ == "__main__":
    main()
