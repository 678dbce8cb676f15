"""A run on disk, opened again for evaluation and sampling: its config, and its EMA backbone. No method code runs.

`studies.runs.released` has the same functions for checkpoints of other people's code.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser, Namespace, set_parsing_settings

from harness.backbones.sit import SiT
from harness.config import EvaluationConfig, OutputConfig, RunConfig, RuntimeConfig, require
from harness.errors import UserError
from harness.evaluation.evaluate import Evaluator
from harness.evaluation.generate import generate_rounds, labels_for
from harness.evaluation.samples_file import Destination
from harness.machine.processes import from_main, is_main
from harness.machine.progress import OnProgress
from harness.records.run_folder import RunFolder
from harness.records.schema import Origin
from harness.rng import global_state_kept
from harness.training import checkpoint
from studies.configs.refusals import explain
from studies.configs.sections import SECTIONS
from studies.runs.lab import Lab, open_lab

OVERRIDES: Mapping[str, type] = {"evaluation": EvaluationConfig, "runtime": RuntimeConfig, "output": OutputConfig}
"""Sections of a run that may be given anew when it is evaluated or sampled."""


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A backbone on its device, and what it is seen with: data, autoencoder and evaluator."""

    lab: Lab
    backbone: SiT
    title: str
    """The name that its images and metrics are shown under."""
    facts: Origin
    """First fields of its records."""
    folder: Path
    """Its records go into `evaluations/` of this folder."""
    file: str
    """Name of the files of its records."""


def build_parser(command: str, description: str, run_needed: bool = True) -> ArgumentParser:
    """Parser of a command that reads a run: the run, a step, and the sections that may change."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(
        prog=f"ditbench {command}", description=description, exit_on_error=False, allow_abbrev=False
    )
    run_help = "run folder, such as runs/digits/sit/seed0"
    if run_needed:
        parser.add_argument("run", type=str, help=run_help)
    else:
        parser.add_argument("run", type=str, nargs="?", default="", help=run_help)
    parser.add_argument("--step", type=int, default=-1, help="step of the EMA backbone; -1 = the last one kept")
    for name, section in OVERRIDES.items():
        parser.add_class_arguments(section, name)
    return parser


def add_protocol(parser: ArgumentParser) -> None:
    """The option that puts the protocol of the end of a run in the place of that of its points."""
    parser.add_argument(
        "--protocol",
        choices=("evaluation", "final"),
        default="evaluation",
        help="section that says how images are made: evaluation, or final with its own samples, sampler and seed",
    )


def parse(parser: ArgumentParser, argv: Sequence[str]) -> tuple[Namespace, RunFolder]:
    """Parse; what is not given on the command line is as the run recorded it."""
    asked = parse_words(parser, argv)
    folder = RunFolder(Path(asked.run))
    recorded: dict[str, Any] = {**folder.manifest()["config"]}
    if asked.get("protocol") == "final":
        final = recorded.get("final", {})
        require_final(final.get("num_samples", 0))
        recorded["evaluation"] |= final
    parser.set_defaults({f"{name}.{key}": value for name in OVERRIDES for key, value in recorded[name].items()})
    return parse_words(parser, argv), folder


def require_final(num_samples: int) -> None:
    """Refuse `--protocol final` where there is none."""
    way_out = "there is no such protocol; give --evaluation.num_samples and --evaluation.sampler.* instead"
    require(num_samples > 0, f"--protocol final: final.num_samples is 0, so {way_out}")


def parse_to_open(parser: ArgumentParser, argv: Sequence[str]) -> tuple[Namespace, Callable[[OnProgress], Opened]]:
    """The words of a command, and how to open the backbone that they name."""
    namespace, folder = parse(parser, argv)
    config = recorded_config(folder, parser, namespace)

    def opening(on_progress: OnProgress) -> Opened:
        lab = open_lab(config, on_progress)
        backbone, step = load_backbone(folder, lab, namespace.step)
        file = f"step_{step:08d}"
        return Opened(
            lab=lab, backbone=backbone, title=f"step {step}", facts={"step": step}, folder=folder.path, file=file
        )

    return namespace, opening


def parse_words(parser: ArgumentParser, argv: Sequence[str]) -> Namespace:
    """Parse; what is not given on the command line has its default."""
    try:
        return parser.parse_args(list(argv))
    except ArgumentError as error:
        raise UserError(explain(str(error), parser)) from None


def recorded_config(folder: RunFolder, parser: ArgumentParser, namespace: Namespace) -> RunConfig:
    """The run's shared sections as recorded, with the overrides; without the method's own section."""
    manifest = folder.manifest()
    recorded: dict[str, Any] = {**manifest["config"]}
    given = parser.instantiate(namespace)
    types = {item.name: item.type for item in dataclasses.fields(RunConfig)}
    shared: dict[str, Any] = {}
    for name in SECTIONS:
        if name == "final":
            continue  # what is asked for stands in `evaluation`
        section: Any = types[name]
        shared[name] = given[name] if name in OVERRIDES else section(**recorded[name])
    return RunConfig(study=manifest["study"], cell=manifest["cell"], method=manifest["method"], **shared)


def load_backbone(folder: RunFolder, lab: Lab, step: int) -> tuple[SiT, int]:
    """The EMA backbone of a step (-1: the last one), and its step."""
    tensors, found = checkpoint.load_ema(folder.checkpoints, None if step < 0 else step)
    with global_state_kept():
        backbone = SiT.of(lab.shape, lab.config.model.qk_norm)
    backbone.load_state_dict(tensors)
    return backbone.to(lab.accelerator.device).eval(), found


def evaluators(lab: Lab, seeds: Sequence[int]) -> Iterator[Evaluator]:
    """The lab's evaluator under each evaluation seed; under its own where none is given."""
    require(len(set(seeds)) == len(seeds), f"--seeds {','.join(map(str, seeds))} names a seed twice")
    own = lab.evaluator
    for seed in seeds or [own.config.seed]:
        yield own if seed == own.config.seed else own.under(dataclasses.replace(own.config, seed=seed))


def write_samples(lab: Lab, backbone: SiT, num: int, out: Path, is_npz: bool) -> int:
    """Generate `num` images and write them as they come; returns how many of those made here had a non-finite latent.

    All processes generate and the main one alone writes. Images that an interrupted call left behind are kept.
    """
    config, accelerator = lab.config.evaluation, lab.accelerator
    recipe = {
        "protocol": lab.evaluator.digest,
        "weights": checkpoint.tensors_digest({name: value.cpu() for name, value in backbone.state_dict().items()}),
        "num": num,
        "device": accelerator.device.type,
    }
    bad_images = 0
    with contextlib.ExitStack() as held:
        writer = None
        if is_main(accelerator):
            side = lab.config.data.image_size
            to = Destination(out=out, is_npz=is_npz, num=num, side=side, chunk=config.chunk, recipe=recipe)
            writer = held.enter_context(to.writer())
            if writer.done:
                lab.on_progress(f"{writer.done} of {num} images are there already", 1, 1)
        done = from_main(accelerator, writer.done if writer else 0)
        for part in generate_rounds(backbone, lab.prepared.autoencoder, config, num, accelerator, done):
            bad_images += part.bad_images
            if writer:
                writer.add(part.images_NHWC)
                lab.on_progress("images", part.start + len(part.images_NHWC), num)
        if writer:
            writer.finish(labels_for(0, num, backbone.num_classes).numpy())
    return bad_images
