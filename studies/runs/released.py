"""A released checkpoint, opened for evaluation and sampling under a config of ours. No method code runs."""

import argparse
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from jsonargparse import ArgumentParser, Namespace

from harness import official
from harness.backbones.sit import SiT
from harness.config import FinalConfig, RunConfig, require
from harness.errors import UserError
from harness.machine.progress import OnProgress
from harness.records.files import file_digest
from studies.configs import cells, settings
from studies.runs.lab import Lab, open_lab
from studies.runs.saved import Opened, require_final


@dataclass(frozen=True, kw_only=True)
class Release:
    """A file, and how it is read: the arguments of `harness.official.load`."""

    path: Path
    source: str
    which: Literal["ema", "model"]


# -- the command line -------------------------------------------------------------------------------------------------


def route(argv: Sequence[str]) -> tuple[bool, list[str]]:
    """Whether a released checkpoint is asked for, and the words of the command.

    `--checkpoint` without `--source` names a run of ours or a file in its `checkpoints/`, and becomes its run and step.

    Raises:
        UserError: when it names neither.
    """
    words = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    words.add_argument("--checkpoint", nargs="?", const="", default=None)
    words.add_argument("--source", nargs="?", const="", default=None)
    given, rest = words.parse_known_args(list(argv))
    if given.checkpoint is None or given.source is not None:
        return given.source is not None, list(argv)
    path = Path(given.checkpoint)
    if path.is_dir() and (path / "manifest.json").is_file():
        return False, [str(path), *rest]
    ours = re.fullmatch(r"(?:ema|step)_(\d{8})(?:\.safetensors)?", path.name)
    if ours and path.exists() and path.parent.name == "checkpoints":
        return False, [str(path.parent.parent), "--step", str(int(ours[1])), *rest]
    raise UserError(
        f"--checkpoint {path} is neither a run of ours nor a file in its checkpoints/: for a released file "
        f"give --source ({', '.join(official.LAYOUTS)}) and --config as well"
    )


def build_parser(command: str, description: str) -> ArgumentParser:
    """Parser of a command that reads a released checkpoint: the file, and the config it is seen under."""
    parser = settings.build_parser(command, description)
    parser.add_argument("--checkpoint", type=str, default="", help="file as its authors' code saved it")
    parser.add_argument("--source", type=str, default="", help=f"whose code that was: {', '.join(official.LAYOUTS)}")
    parser.add_argument("--which", choices=("ema", "model"), default="ema", help="moving average, or raw weights")
    return parser


def parse_to_open(parser: ArgumentParser, argv: Sequence[str]) -> tuple[Namespace, Callable[[OnProgress], Opened]]:
    """The command's own words, and how to open what they name; model, data and protocol are those of its config."""
    namespace = settings.parse(parser, argv)
    require(bool(namespace.checkpoint), "--source says whose file it is: name the file too, with --checkpoint")
    release = Release(path=Path(namespace.checkpoint), source=namespace.source, which=namespace.which)
    config = cells.run_config(parser, namespace)
    protocol = namespace.get("protocol", "evaluation")  # not every command generates images
    if protocol == "final":
        require_final(config.final.num_samples)
    config = replace(config, evaluation=config.protocols[protocol], final=FinalConfig())
    return namespace, lambda report: open_released(release, config, report)


# -- opening ----------------------------------------------------------------------------------------------------------


def open_released(release: Release, config: RunConfig, on_progress: OnProgress) -> Opened:
    """Read a released backbone, then the data that it is seen with.

    Raises:
        UserError: when the file is not of that source, not of the config's model, or does not fit data and autoencoder.
    """
    # The file first: it is refused within seconds, where data may take hours.
    state, _ = official.load(release.path, release.source, release.which)
    backbone = official.build(state, config.model.name)
    lab = open_lab(config, on_progress)
    fit(release.path, backbone, lab)
    sha256 = file_digest(release.path)
    facts = {
        "file": release.path.name,
        "sha256": sha256,
        "source": official.LAYOUTS[release.source].repository,
        "which": release.which,
        "model": config.model.name,
    }
    return Opened(
        lab=lab,
        backbone=backbone.to(lab.accelerator.device),
        title=f"{release.path.name} ({release.which})",
        facts={"checkpoint": facts},
        # The same file has the same folder, wherever it lies.
        folder=Path(config.output.runs) / "released" / f"{release.path.stem}-{sha256[:12]}",
        file=release.which,
    )


def fit(path: Path, backbone: SiT, lab: Lab) -> None:
    """Refuse a backbone of other latents or classes than those of data and autoencoder."""
    shape = lab.shape
    its = (backbone.num_classes, backbone.input_size, backbone.in_channels)
    ours = (shape.num_classes, shape.input_size, shape.in_channels)
    told = "{0} classes and latents of {1} x {1} x {2}"
    require(
        its == ours,
        f"checkpoint {path} has {told.format(*its)}, but the data {told.format(*ours)}: "
        "set data and autoencoder as the checkpoint was trained",
    )
