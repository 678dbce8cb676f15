"""`ditbench overhead`: what each method costs, counted without weights, and measured on this machine."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser, Namespace, set_parsing_settings

import methods
from harness.config import RuntimeConfig
from studies.configs.settings import comma_list, parse
from studies.terminal.quiet import quiet_libraries

if TYPE_CHECKING:
    from studies.costs.overhead import Request

MODELS = ("SiT-S/2", "SiT-B/2", "SiT-L/2", "SiT-XL/2")
MEASURED = ("SiT-S/2",)


def main(argv: Sequence[str]) -> int:
    """Count, measure where asked to, save all renderings and print the tables."""
    quiet_libraries()
    parser = command_parser()
    namespace = parse(parser, argv)
    from reports.costs.overhead import Overhead, check_folder, write
    from studies.costs.overhead import counted_rows, measured_rows, shapes
    from studies.terminal.display import Display

    made = parser.instantiate(namespace)
    asked = request(namespace, made)
    folder = Path(namespace.out)
    check_folder(folder)
    with Display(stderr=True) as display:
        how = (made.runtime, display.report, namespace.batch_size, namespace.rounds)
        measured = measured_rows(asked, *how) if namespace.measure else []
        counted = counted_rows(asked, display.report)
    overhead = Overhead(control=methods.control(), shapes=shapes(asked), counted=counted, measured=measured)
    paths = write(overhead, folder)
    if namespace.format == "json":
        print(json.dumps(plain(overhead, paths), indent=1, ensure_ascii=False))
    else:
        show(overhead, folder)
    return 0


def command_parser() -> ArgumentParser:
    """Options of the command."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(
        prog="ditbench overhead",
        description="Show what each method costs. Nothing is trained and no weights are read.",
        exit_on_error=False,
        allow_abbrev=False,
    )
    control = methods.control()
    parser.add_argument(
        *("--models",), type=comma_list, default=[],
        help=f"backbones, SiT-<size>/<patch> (default: {','.join(MODELS)}; with --measure {','.join(MEASURED)})",
    )  # fmt: skip
    parser.add_argument(
        *("--methods",), type=comma_list, default=methods.names(),
        help=f"methods, and sums such as a+b; {control} is always there, as all others are compared with it",
    )  # fmt: skip
    parser.add_argument("--input_size", type=int, default=32, help="side of the latents; images are 8 times as large")
    parser.add_argument("--in_channels", type=int, default=4, help="channels of the latents")
    parser.add_argument("--num_classes", type=int, default=1000, help="classes of the data")
    parser.add_argument("--out", type=str, default="overhead", help="folder for JSON, CSV, Markdown, LaTeX and PNG")
    parser.add_argument("--format", choices=("table", "json"), default="table", help="table (default) or json")
    parser.add_argument(
        "--measure", action="store_true", help="also time training steps and forward passes, and measure peak memory"
    )
    for name, text in (
        ("batch_size", "images a step; 0 = 8 on a CPU, 32 elsewhere"),
        ("rounds", "times that every row has its turn, 6 or more; 0 = 6 on a CPU, 50 elsewhere"),
    ):
        parser.add_argument(f"--{name}", type=int, default=0, help=f"with --measure: {text}")
    parser.add_class_arguments(RuntimeConfig, "runtime")
    for name in methods.names():
        parser.add_class_arguments(methods.load(name).Config, name)
    return parser


def request(namespace: Namespace, made: Namespace) -> "Request":
    """What is to be counted, with the sections of `made`; `UserError` for unknown names and sizes that do not fit."""
    from studies.costs.overhead import Request

    models = namespace.models or (MEASURED if namespace.measure else MODELS)
    for name in namespace.methods:
        methods.load(name)
    shapes = {name: namespace[name] for name in ("input_size", "in_channels", "num_classes")}
    sections = {name: made[name] for name in methods.names()}
    return Request(models=tuple(models), methods=tuple(namespace.methods), sections=sections, **shapes)


def plain(overhead: Any, paths: Sequence[Path]) -> dict[str, Any]:
    """All that was found, for programs."""
    from reports.costs.overhead import published_rows, record

    return {**record(overhead), "published": published_rows(overhead), "files": [str(path) for path in paths]}


def show(overhead: Any, folder: Path) -> None:
    """Print the tables with what one needs to read them, then where the files are."""
    from reports.costs.overhead import sections
    from studies.terminal.tables import console, print_table

    for section in sections(overhead):
        console().print(section.title)
        print_table(section.rows, "left" if section.is_text else "right")
        console().print("".join(f"\n{note}" for note in section.notes).removeprefix("\n") + "\n")
    console().print(f"saved in {folder}: JSON, CSV, Markdown, LaTeX and PNG")
