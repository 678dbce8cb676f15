"""Keeps libraries from printing what no user of ditbench asked for."""

import logging
import os
import warnings
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass

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


def quiet_libraries() -> None:
    """Keep notices off the terminal, unless the environment says otherwise."""
    for name, value in LIBRARY_SETTINGS.items():
        os.environ.setdefault(name, value)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    for name in ("torch.distributed", "accelerate", "diffusers"):
        logging.getLogger(name).setLevel(logging.ERROR)
