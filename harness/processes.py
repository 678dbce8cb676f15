"""Several processes that train one run together: what the main one decides, and what all of them add up.

With one process each of these is the identity. All processes must call them at the same places.
"""

import contextlib
from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs, broadcast_object_list
from torch import Tensor

from harness.config import RuntimeConfig

T = TypeVar("T")

PATIENCE = timedelta(days=1)
"""How long a process waits for another: the others wait while the main one scores an evaluation."""


def open_accelerator(runtime: RuntimeConfig) -> Accelerator:
    """The device of a resolved runtime section, and the process group when a launcher started several processes."""
    # A term may be absent in some steps, and then its head has no gradient in any process.
    distributed = DistributedDataParallelKwargs(find_unused_parameters=True, broadcast_buffers=False)
    return Accelerator(
        cpu=runtime.device == "cpu",
        mixed_precision="no",
        kwargs_handlers=[distributed, InitProcessGroupKwargs(timeout=PATIENCE)],
    )


def is_main(accelerator: Accelerator) -> bool:
    """Whether this process decides and records."""
    return accelerator.is_main_process


def from_main(accelerator: Accelerator, value: T) -> T:
    """The main process's value, in every process."""
    if accelerator.num_processes == 1:
        return value
    box = [value]
    broadcast_object_list(box)
    return box[0]


@contextlib.contextmanager
def main_first(accelerator: Accelerator) -> Iterator[None]:
    """The main process runs the block first, the others after it: for files that the first one makes or mends."""
    with accelerator.main_process_first():
        yield


def gathered(accelerator: Accelerator, values_N: Tensor) -> Tensor:
    """Every process's values, one after another by rank; they have one shape and dtype."""
    if accelerator.num_processes == 1:
        return values_N
    return accelerator.gather(values_N)


def means(accelerator: Accelerator, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """0-dim values as means over processes. A value that is not finite in one process is so in all of them."""
    if accelerator.num_processes == 1 or not values:
        return dict(values)
    total = accelerator.reduce(torch.stack([value.float() for value in values.values()]), "sum")
    return dict(zip(values, (total / accelerator.num_processes).unbind(), strict=True))
