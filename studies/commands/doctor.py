"""`ditbench doctor`: what this machine has."""

import json
from collections.abc import Sequence
from typing import Any

from studies.commands.common import Parser
from studies.terminal.quiet import quiet_libraries


def main(argv: Sequence[str]) -> int:
    """Print device, threads, bf16 support, versions, and where weights were found."""
    parser = Parser(prog="ditbench doctor", description="Show device, versions and weights.")
    parser.add_argument("--format", choices=("table", "json"), default="table", help="table (default) or json")
    arguments = parser.parse_args(argv)
    quiet_libraries()
    facts = examine()
    if arguments.format == "json":
        print(json.dumps(facts, indent=1))
        return 0
    from studies.terminal.tables import print_table

    machine = {key: value for key, value in facts.items() if key not in ("packages", "weights")}
    print_table([{"machine": key, "value": str(value)} for key, value in machine.items()], "left")
    print()
    print_table([{"package": name, "version": version} for name, version in facts["packages"].items()], "left")
    print()
    print_table([{"weights": w["name"], "found": _place(w)} for w in facts["weights"]], "left")
    return 0


def _place(weights: dict[str, str]) -> str:
    """The path of weights, and what is wrong with them, or what the user can do."""
    path, advice = weights["path"], weights["advice"]
    if not path:
        return f"missing: {advice}"
    return f"{path} ({advice})" if advice else path


def examine() -> dict[str, Any]:
    """All facts as plain values."""
    import torch

    from harness.config import OutputConfig, RuntimeConfig
    from harness.data.cache import cache_folder
    from harness.frozen import autoencoder, weights
    from harness.machine import environment

    runtime = environment.resolve_runtime(RuntimeConfig())
    device = torch.device(runtime.device)
    described = environment.describe(runtime)
    shipped = [
        {"name": f"autoencoder {path.name.removesuffix('_autoencoder')}", "path": str(path), "advice": ""}
        for path in sorted(autoencoder.ASSETS.glob("*_autoencoder"))
    ]
    found = [
        {"name": asset.name, "path": str(asset.path or ""), "advice": asset.advice} for asset in weights.inventory()
    ]
    return {
        "device": described["device"],
        "threads": runtime.threads,
        "fast bf16": environment.has_fast_bf16(device),
        "precision auto": runtime.precision,
        "cache": str(cache_folder(OutputConfig())),
        "python": described["python"],
        "platform": described["platform"],
        "commit": described["git_commit"] + (" with changes" if described["git_dirty"] else ""),
        "packages": described["packages"],
        "weights": shipped + found,
    }
