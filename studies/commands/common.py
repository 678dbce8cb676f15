"""What several commands share."""

import argparse
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

import yaml

from harness.config import RunConfig
from harness.errors import UserError

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser as JsonParser


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, as those of every other wrong input."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self.prog.removeprefix('ditbench ')}: {message}; see {self.prog} --help")


def add_side_by_side(parser: "JsonParser", option: str) -> None:
    """The options of a command that trains cells side by side and shares a study with other commands."""
    parser.add_argument(
        option, type=int, default=0,
        help="cells side by side, with the CPU's threads divided; 0 = one on the CPU, else one a GPU: cells that share "
        "a device are left out of comparisons by seconds",
    )  # fmt: skip
    parser.add_argument(
        "--no_wait", action="store_true",
        help="end when other commands hold all runs that are left, instead of waiting for them",
    )  # fmt: skip


def is_main_process() -> bool:
    """Whether this is the process that prints and writes, of those that a launcher such as torchrun started."""
    return int(os.environ.get("RANK", "0")) == 0


def print_config(configs: Sequence[RunConfig]) -> int:
    """Print configs as YAML, one document a cell, with size defaults resolved; `ditbench train --config` reads one."""
    from studies.configs.sections import as_plain, nominal_shape, resolve_sections

    plain = [as_plain(resolve_sections(config, nominal_shape(config))) for config in configs]
    for document in plain:
        document |= document.pop("sections")
    print(yaml.safe_dump_all(plain, sort_keys=False).rstrip())
    return 0
