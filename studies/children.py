"""The process that workers are forked from. It has loaded their libraries and used no device, so that each worker
starts in a fraction of a second, and none inherits threads or a device from another.
"""

import multiprocessing
import signal
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from typing import Any

from harness.errors import UserError
from studies.terminal.quiet import quiet_libraries

CONTEXT = multiprocessing.get_context("forkserver")
"""Makes processes and pipes."""
PRELOADED = "studies.dispatch.worker"
"""The module whose libraries the server loads. Python passes over a name that it cannot import, without a word."""
GRACE_SECONDS = 5
"""Between asking a process to end and killing it."""


@dataclass(frozen=True, eq=False)
class Child:
    """A process that was forked from the server."""

    process: ForkServerProcess
    heard: Connection
    """What the process says; at its end comes an `EOFError`."""

    def ended(self) -> int:
        """Wait for the end of the process; returns its exit status, which is negative after a signal."""
        self.process.join()
        return self.process.exitcode or 0


def start_server() -> None:
    """Start it, unless it runs; returns at once, while it loads."""
    CONTEXT.set_forkserver_preload([PRELOADED])
    # Ctrl-C reaches every process of a terminal; the command alone answers it.
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        forkserver.ensure_running()
    finally:
        signal.signal(signal.SIGINT, before)


def start_child(target: Callable[..., None], *arguments: Any) -> Child:
    """Start a process that calls `target` with the arguments and, last, the connection to tell through."""
    heard, told = CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(target=target, args=(*arguments, told))
    process.start()
    told.close()  # so that the end of the process is the end of what is heard
    return Child(process, heard)


def end_children(children: Iterable[Child]) -> None:
    """End processes, whatever they do, and wait until they are gone."""
    processes = [child.process for child in children]
    for process in processes:
        process.terminate()
    for process in processes:
        process.join(GRACE_SECONDS)
        if process.is_alive():
            process.kill()
            process.join()


def in_own_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function returns or raises in a process that has run nothing else; it ends with the call, come what may.

    Raises:
        UserError: the process was killed, as a rule for want of memory.
    """
    start_server()
    child = start_child(_answer, function, *arguments)
    try:
        answer = child.heard.recv()
    except EOFError:
        reason = ending_in_words(child.ended())
        raise UserError(f"memory cannot be measured ({reason}): lower batch_size, or choose a smaller model") from None
    finally:
        end_children([child])
    if isinstance(answer, Exception):
        raise answer
    return answer


def _answer(function: Callable[..., Any], *arguments: Any) -> None:
    """Tell what a function returns or raises; the connection to tell through is the last argument."""
    *given, told = arguments
    quiet_libraries()
    try:
        answer = function(*given)
    except Exception as error:
        error.add_note(traceback.format_exc())
        answer = error
    told.send(answer)


def ending_in_words(status: int) -> str:
    """How a process ended, from its exit status; a negative one is a signal."""
    if status >= 0:
        return f"its process ended with status {status}"
    name = signal.Signals(-status).name
    cause = " (often: out of memory)" if name == "SIGKILL" else ""
    return f"its process was killed by {name}{cause}"
