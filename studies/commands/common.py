"""What several commands share."""

import argparse
import logging
import os
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NoReturn

import yaml

from harness.config import RunConfig
from harness.errors import UserError

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser as JsonParser

LIBRARY_SETTINGS = {
    "KINETO_LOG_LEVEL": "5",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    # Asking whether there is a GPU must not start CUDA in the process that workers are forked from.
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
    # The last one: a worker that was killed leaves semaphores, which are cleaned up after it.
    "PYTHONWARNINGS": "ignore::FutureWarning,ignore::DeprecationWarning,ignore:resource_tracker:UserWarning",
    # MLflow's own settings would hold up a run for four minutes when its server is away, and print among our lines.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}
"""Set for the libraries of a command where the environment does not set them."""


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, as those of every other wrong input."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self.prog.removeprefix('ditbench ')}: {message}; see {self.prog} --help")


def quiet_libraries() -> None:
    """Keep notices off the terminal, unless the environment says otherwise."""
    for name, value in LIBRARY_SETTINGS.items():
        os.environ.setdefault(name, value)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    for name in ("torch.distributed", "accelerate", "diffusers"):
        logging.getLogger(name).setLevel(logging.ERROR)


def add_side_by_side(parser: "JsonParser", option: str) -> None:
    """The options of a command that trains cells side by side and shares a study with other commands."""
    parser.add_argument(
        option, type=int | Literal["auto"], default=0,
        help="cells side by side; 0 = one on the CPU, else one a GPU; auto = on the CPU as many, with the threads "
        "divided, as train most images a second together, measured once and then remembered: cells that share a device "
        "are left out of comparisons by seconds",
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
    from studies.settings import as_plain, nominal_shape, resolve_sections

    plain = [as_plain(resolve_sections(config, nominal_shape(config))) for config in configs]
    for document in plain:
        document |= document.pop("sections")
    print(yaml.safe_dump_all(plain, sort_keys=False).rstrip())
    return 0
