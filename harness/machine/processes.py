"""Several processes that train one run together: what the main one decides, and what all of them add up.

With one process each of these is the identity. All processes must call them at the same places. Apart from them, a
thread beside the main one.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from typing import Any, TypeVar

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


Begin = Callable[..., Future[Any]]
"""`begin(function, *arguments)` has the work done, one piece after another, and gives its future."""


@contextlib.contextmanager
def beside(device: torch.device) -> Iterator[Begin]:
    """A thread for work beside the caller's, who keeps a GPU busy; what has not begun at the end is dropped.

    On a CPU the caller does the work at once: its cores have enough to do, and two pieces at a time took 8% longer.
    """
    if device.type == "cpu":
        yield at_once
        return
    # A thread of its own would compute on the machine's first GPU.
    current = (torch.cuda.set_device, (torch.cuda.current_device(),)) if device.type == "cuda" else (None, ())
    with in_thread(*current) as begin:
        yield begin


@contextlib.contextmanager
def in_thread(prepare: Callable[..., None] | None = None, arguments: tuple[Any, ...] = ()) -> Iterator[Begin]:
    """A thread of its own, which calls `prepare` first."""
    thread = ThreadPoolExecutor(1, initializer=prepare, initargs=arguments)
    try:
        yield thread.submit
    finally:
        thread.shutdown(cancel_futures=True)


def at_once(function: Callable[..., T], *arguments: Any) -> Future[T]:
    """Do the work in the caller's thread."""
    done: Future[T] = Future()
    done.set_result(function(*arguments))
    return done


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
