"""`ditbench evaluate`: evaluate a run's EMA backbone again."""

import json
from collections.abc import Sequence

from harness.records import number, write_json
from studies import saved
from studies.commands.common import quiet_libraries


def main(argv: Sequence[str]) -> int:
    """Evaluate, store the record in `<run>/evaluations/`, and print it. The run's own records stay as they are."""
    quiet_libraries()
    parser = saved.build_parser("evaluate", "Evaluate a run's EMA backbone, under its own protocol or another.")
    parser.add_argument("--format", choices=("table", "json"), default="table", help="table (default) or json")
    namespace, folder = saved.parse(parser, argv)
    from studies.display import Display
    from studies.run import open_lab
    from studies.tables import console, print_table

    with Display() as display:
        lab = open_lab(saved.recorded_config(folder, parser, namespace), display.report)
    backbone, step = saved.load_backbone(folder, lab, namespace.step)
    evaluation = lab.evaluator.evaluate(backbone)
    record = {"step": step, "protocol": lab.evaluator.digest, "metrics": evaluation.metrics}
    target = folder.path / "evaluations" / lab.evaluator.digest[:12]
    target.mkdir(parents=True, exist_ok=True)
    write_json(target / f"step_{step:08d}.json", {**record, "settings": lab.evaluator.protocol})
    if namespace.format == "json":
        print(json.dumps(record, indent=1))
        return 0
    lines = lab.evaluator.lines()
    print_table(
        [
            {"metric": name, f"step {step}": f"{number(value):.4g}", **_lines(lines, name)}
            for name, value in evaluation.metrics.items()
        ]
    )
    for warning in lab.evaluator.warnings:
        console(stderr=True).print(f"warning: {warning}")
    return 0


def _lines(lines: dict[str, dict[str, float]], name: str) -> dict[str, str]:
    """The floor and the reconstructions under the same metric, where they have it."""
    return {line: f"{values[name]:.4g}" if name in values else "" for line, values in lines.items()}
