"""`ditbench analyze`: what the blocks of trained backbones represent, as records that reports draw."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from harness.errors import UserError
from harness.records.files import number
from studies.commands.common import Parser, is_main_process
from studies.terminal.quiet import quiet_libraries

DESCRIPTION = (
    "Analyse what the blocks of EMA backbones represent: alignment with a frozen encoder and with the latents, linear "
    "probes, and pictures of principal components. Records go into analysis/ of each run, and `ditbench report` draws "
    "them. For a released checkpoint give --checkpoint FILE --source repa|sra|sit --config CONFIG."
)
QUANTITIES = ("cknna_encoder", "cka_encoder", "cknna_latent", "cka_latent", "probe_accuracy")
"""Columns of the printed table, in this order."""
PASSED_ON = {
    "--runtime.device": "auto, cpu, cuda or mps (default: as the run recorded it)",
    "--runtime.threads": "CPU threads of torch; 0 = torch's own choice (default: as the run recorded it)",
    "--runtime.precision": "fp32, bf16 or auto (default: the run's)",
    "--output.cache": "folder of the caches (default: as the run recorded it)",
}
"""Settings of a run that may be given anew."""


def main(argv: Sequence[str]) -> int:
    """Analyse every checkpoint, write the records and print them."""
    quiet_libraries()
    is_released = any(word.partition("=")[0] == "--source" for word in argv)
    found, form = _analyse_released(argv) if is_released else _analyse_runs(argv)
    if is_main_process():
        _show(found, form)
    return 0


def _analyse_runs(argv: Sequence[str]) -> tuple[dict[str, Any], str]:
    """The records of runs and of files in their checkpoints, by the place of each, and the format."""
    from studies.runs import released, saved
    from studies.runs.analyze import Analyst, require_weights, study_encoder
    from studies.terminal.display import Display

    parser = Parser(prog="ditbench analyze", description=DESCRIPTION)
    parser.add_argument("checkpoints", nargs="+", help="run folders (their last EMA weights), or files in checkpoints/")
    _add_options(parser)
    for name, text in PASSED_ON.items():
        parser.add_argument(name, default="", help=text)
    options = vars(parser.parse_args(argv))
    shared = [f"{name}={value}" for name in PASSED_ON if (value := options[name.removeprefix("--")])]
    opened_by = saved.build_parser("analyze", DESCRIPTION)
    # What is wrong with any of them is told before the first one is analysed.
    words = [released.route(["--checkpoint", path])[1] for path in options["checkpoints"]]
    for each in words:
        require_weights(Path(each[0]))
    openings = [saved.parse_to_open(opened_by, [*each, *shared])[1] for each in words]
    encoders = [options["encoder"] or study_encoder(Path(each[0])) for each in words]
    analyst, found = Analyst(_settings(options)), {}
    with Display(stderr=True) as display:
        for path, opening, encoder in zip(options["checkpoints"], openings, encoders, strict=True):
            display.report(path, 1, 1)
            found[path] = analyst.analyse(opening(display.report), encoder)
    return found, options["format"]


def _analyse_released(argv: Sequence[str]) -> tuple[dict[str, Any], str]:
    """The record of a released checkpoint, by its file, and the format."""
    from studies.runs import released
    from studies.runs.analyze import PACKAGED, Analyst
    from studies.terminal.display import Display

    parser = released.build_parser("analyze", DESCRIPTION)
    _add_options(parser)
    namespace, opening = released.parse_to_open(parser, argv)
    options = {name: namespace[name] for name in (*_settings_names(), "encoder", "format")}
    with Display(stderr=True) as display:
        record = Analyst(_settings(options)).analyse(opening(display.report), options["encoder"] or PACKAGED)
    return {namespace.checkpoint: record}, options["format"]


# -- options --------------------------------------------------------------------------------------------------------

WHOLE = {
    "images": "held-out images of alignment and probe scores, evenly spaced",
    "probe_images": "training images that probes are fitted on, evenly spaced; 0 = no probe",
    "pictures": "held-out images with pictures",
    "neighbours": "k of CKNNA",
    "chunk": "images that go through the networks together; memory grows with it",
}
"""Options that are whole numbers, and fields of `AnalysisConfig`."""


def _add_options(parser: Any) -> None:
    """What is analysed, for both kinds of checkpoints; defaults are those of `AnalysisConfig`."""
    from harness.analysis.blocks import AnalysisConfig
    from studies.runs.analyze import PACKAGED

    encoder = f"frozen encoder to compare with (default: what the study's methods aligned with, else {PACKAGED})"
    parser.add_argument("--encoder", type=str, default="", help=encoder)
    parser.add_argument("--blocks", type=str, default="all", help="such as 1,2,4, counted from 1 (default: all)")
    times = ",".join(f"{t:g}" for t in AnalysisConfig.times)
    told = f"times at which latents are noised, 0 = data, 1 = noise (default: {times})"
    parser.add_argument("--times", type=str, default=times, help=told)
    for name, text in WHOLE.items():
        default = getattr(AnalysisConfig, name)
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{text} (default: {default})")
    # `--seed` is that of training.
    parser.add_argument("--noise_seed", type=int, default=AnalysisConfig.seed, help="seed of the noise (default: 0)")
    parser.add_argument("--format", choices=("table", "json"), default="table", help="table (default) or json")


def _settings_names() -> tuple[str, ...]:
    return ("blocks", "times", "noise_seed", *WHOLE)


def _settings(options: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of `AnalysisConfig`; `UserError` for lists that are none."""
    blocks = () if options["blocks"] == "all" else _numbers(options, "blocks", int, "1,2,4")
    times = _numbers(options, "times", float, "0.1,0.5,0.9")
    whole = {name: options[name] for name in WHOLE}
    return {"blocks": tuple(blocks), "times": tuple(times), "seed": options["noise_seed"], **whole}


def _numbers(options: Mapping[str, Any], name: str, kind: type, example: str) -> list[Any]:
    try:
        return [kind(part) for part in options[name].split(",")]
    except ValueError:
        raise UserError(f"--{name} {options[name]} is not a list such as {example}") from None


# -- printing -------------------------------------------------------------------------------------------------------


def _show(found: Mapping[str, Any], form: str) -> None:
    """Print the records as a JSON object by checkpoint, or a line for every time and block of each."""
    from studies.terminal.tables import console, print_table

    if form == "json":
        print(json.dumps(found, indent=1))
        return
    for path, record in found.items():
        settings = record["settings"]
        console().print(f"{path}: {settings['images']['num']} held-out images, encoder {settings['encoder']['name']}")
        print_table([_row(line) for line in record["values"]])
    console().print("\nditbench report draws them, with the pictures.")


def _row(line: Mapping[str, Any]) -> dict[str, str]:
    source = f"block {line['block']}" if "block" in line else line["source"]
    shown = {name: f"{number(line[name]):.4f}" if name in line else "" for name in QUANTITIES}
    return {"source": source, "t": f"{line['t']:g}" if "t" in line else "", **shown}
