"""What several commands share."""

import logging
import os
import warnings
from collections.abc import Sequence

import yaml

from harness.config import RunConfig


def quiet_libraries() -> None:
    """Keep libraries' notices off the terminal, and libraries off the network unless told otherwise."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("KINETO_LOG_LEVEL", "5")
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    for name in ("torch.distributed", "accelerate", "diffusers"):
        logging.getLogger(name).setLevel(logging.ERROR)


def print_config(configs: Sequence[RunConfig]) -> int:
    """Print configs as YAML, one document a cell, with size defaults resolved."""
    from studies.settings import as_plain, nominal_shape, resolve_sections

    plain = [as_plain(resolve_sections(config, nominal_shape(config))) for config in configs]
    print(yaml.safe_dump_all(plain, sort_keys=False).rstrip())
    return 0
