"""`ditbench evaluate`: evaluate a run's EMA backbone again or a released one, or score anybody's images."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any

from harness.config import require
from harness.records.files import number, write_json
from harness.records.run_folder import RunFolder
from studies.commands.common import is_main_process
from studies.terminal.quiet import quiet_libraries

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

    from studies.runs.saved import Opened
    from studies.runs.scored import Protocol

DESCRIPTION = (
    "Evaluate a run's EMA backbone, under its own protocol or another. For a released checkpoint give --checkpoint "
    "FILE --source repa|sra|sit --config CONFIG. With --samples the images of a file are scored "
    "instead, under the protocol of a run, of --config, or of --evaluation.reference and the options."
)


def main(argv: Sequence[str]) -> int:
    """Evaluate, store the record in `<run>/evaluations/`, and print it. The run's own records stay as they are."""
    quiet_libraries()
    given = {word.partition("=")[0] for word in argv}
    return evaluate_file(argv, "--config" in given) if "--samples" in given else evaluate_weights(argv)


def _add_options(parser: "ArgumentParser") -> "ArgumentParser":
    parser.add_argument("--samples", type=str, default="", help="a .npz with arr_0 (uint8 NHWC), or a folder of PNGs")
    parser.add_argument("--format", choices=("table", "json"), default="table", help="table (default) or json")
    return parser


def evaluate_weights(argv: Sequence[str]) -> int:
    """Evaluate the backbone of a run or of a released checkpoint; of several processes the main one scores."""
    from studies.configs.settings import whole_numbers
    from studies.runs import released, saved

    is_released, words = released.route(argv)
    source = released if is_released else saved
    parser = _add_options(source.build_parser("evaluate", DESCRIPTION))
    saved.add_protocol(parser)
    if not is_released:  # whose config has seeds already, those of training
        several = (
            "evaluation seeds, such as 0,1,2: how far the noise of an evaluation goes (default: --evaluation.seed)"
        )
        parser.add_argument("--seeds", type=whole_numbers, default=[], help=several)
    namespace, opening = source.parse_to_open(parser, words)
    given = any(word.partition("=")[0] == "--seeds" for word in words)
    from studies.terminal.display import Display

    with Display() as display:
        opened = opening(display.report)
    evaluate_backbone(opened, namespace.seeds if given else [], namespace.format)
    return 0


def evaluate_backbone(opened: "Opened", seeds: Sequence[int], form: str) -> None:
    """Evaluate under every evaluation seed, store the records and print them."""
    from harness.machine.processes import is_main
    from studies.runs.saved import evaluators

    lab = opened.lab
    records: list[dict[str, Any]] = []
    for evaluator in evaluators(lab, seeds):
        found = evaluator.evaluate(opened.backbone)
        speed = {"evaluation_images_per_s": found.images_per_s}
        records.append({**opened.facts, "protocol": evaluator.digest, "metrics": found.metrics, **speed})
        if is_main(lab.accelerator):
            _store(opened.folder, opened.file, records[-1], evaluator.protocol)
    if not is_main(lab.accelerator):
        return
    if len(records) > 1:
        _show_seeds(records, seeds, lab.evaluator.warnings, form)
    else:
        lines = {} if form == "json" else lab.evaluator.lines()
        _show(records[0], opened.title, lines, lab.evaluator.warnings, form)
    if form != "json":
        _show_speed(records[-1]["evaluation_images_per_s"])


def evaluate_file(argv: Sequence[str], has_config: bool) -> int:
    """Score the images of a file."""
    if not is_main_process():
        return 0
    from studies.runs.scored import score_file
    from studies.terminal.display import Display

    samples, form, protocol, folder = _parse_with_config(argv) if has_config else _parse_with_run(argv)
    with Display(stderr=True) as display:
        found = score_file(Path(samples), protocol, display.report)
    if folder is not None:
        _store(folder.path, f"samples_{found.record['sha256'][:12]}", found.record, found.settings)
    _show(found.record, Path(samples).name, {}, found.warnings, form)
    return 0


def _parse_with_config(argv: Sequence[str]) -> "tuple[str, str, Protocol, RunFolder | None]":
    """The file, the format and the protocol of a config; nothing is stored."""
    from studies.configs import cells, settings
    from studies.runs.scored import Protocol

    parser = _add_options(settings.build_parser("evaluate", DESCRIPTION))
    namespace = settings.parse(parser, argv)
    return namespace.samples, namespace.format, Protocol.of(cells.run_config(parser, namespace)), None


def _parse_with_run(argv: Sequence[str]) -> "tuple[str, str, Protocol, RunFolder | None]":
    """The file, the format, and the protocol of a run, whose folder takes the record; without a run, of the options."""
    from studies.runs import saved
    from studies.runs.scored import Protocol

    parser = _add_options(saved.build_parser("evaluate", DESCRIPTION, run_needed=False))
    asked = saved.parse_words(parser, argv)
    require(asked.step < 0, f"--step is {asked.step} and has no meaning with --samples: leave it out")
    if asked.run:
        namespace, folder = saved.parse(parser, argv)
        protocol = Protocol.of(saved.recorded_config(folder, parser, namespace))
        return namespace.samples, namespace.format, protocol, folder
    sections = {name: parser.instantiate(asked)[name] for name in saved.OVERRIDES}
    require(
        bool(sections["evaluation"].reference),
        "--samples have nothing to be compared with: name a run, or give --config or --evaluation.reference",
    )
    return asked.samples, asked.format, Protocol(**sections, data=None), None


def _store(folder: Path, name: str, record: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Keep a record and its protocol in a folder, apart from a run's own records."""
    target = folder / "evaluations" / record["protocol"][:12]
    target.mkdir(parents=True, exist_ok=True)
    write_json(target / f"{name}.json", {**record, "settings": settings})


def _show(
    record: Mapping[str, Any], title: str, lines: Mapping[str, Mapping[str, float]], warnings: Sequence[str], form: str
) -> None:
    """Print a record as JSON, or as a table with the floor and the reconstructions where they have the metric."""
    from studies.terminal.tables import console, print_table

    if form == "json":
        print(json.dumps(record, indent=1))
        return
    rows = []
    for name, value in record["metrics"].items():
        known = {line: f"{values[name]:.4g}" if name in values else "" for line, values in lines.items()}
        rows.append({"metric": name, title: f"{number(value):.4g}", **known})
    print_table(rows)
    for warning in warnings:
        console(stderr=True).print(f"warning: {warning}")


def _show_speed(images_per_s: Mapping[str, float]) -> None:
    """Print how fast the images of an evaluation were made and read."""
    from studies.terminal.tables import console

    parts = ", ".join(f"{what} {speed:.4g}" for what, speed in images_per_s.items())
    console().print(f"images/s: {parts}")


def _show_seeds(records: Sequence[Mapping[str, Any]], seeds: Sequence[int], warnings: Sequence[str], form: str) -> None:
    """Print several records as a JSON list, or as a table with mean and standard deviation over the seeds."""
    from studies.terminal.tables import console, print_table

    if form == "json":
        print(json.dumps(records, indent=1))
        return
    rows = []
    for name in records[0]["metrics"]:
        values = [number(record["metrics"][name]) for record in records]
        shown = {f"seed {seed}": f"{value:.4g}" for seed, value in zip(seeds, values, strict=True)}
        rows.append({"metric": name, **shown, "mean": f"{mean(values):.4g}", "sd": f"{stdev(values):.2g}"})
    print_table(rows)
    for warning in warnings:
        console(stderr=True).print(f"warning: {warning}")
