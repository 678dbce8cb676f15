"""The process that workers are forked from. It has loaded their libraries and used no device, so that each worker
starts in a fraction of a second, and none inherits threads or a device from another.
"""

import multiprocessing
import signal
import traceback
from collections.abc import Callable, Sequence
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from typing import Any

from harness.errors import UserError
from studies.terminal.quiet import quiet_libraries

CONTEXT = multiprocessing.get_context("forkserver")
"""Makes processes and pipes."""
PRELOADED = "studies.dispatch.worker"
"""The module whose libraries the server loads. Python passes over a name that it cannot import, without a word."""


def start_server() -> None:
    """Start it, unless it runs; returns at once, while it loads."""
    CONTEXT.set_forkserver_preload([PRELOADED])
    # Ctrl-C reaches every process of a terminal; the command alone answers it.
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        forkserver.ensure_running()
    finally:
        signal.signal(signal.SIGINT, before)


def in_own_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function returns or raises in a process that has run nothing else; it ends with the call, come what may.

    Raises:
        UserError: the process was killed, as a rule for want of memory.
    """
    start_server()
    heard, told = CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(target=_answer, args=(told, function, arguments))
    process.start()
    told.close()  # so that the end of the process is the end of what is heard
    try:
        answer = heard.recv()
    except EOFError:
        process.join()
        reason = describe(process.exitcode or 0)
        raise UserError(f"memory cannot be measured ({reason}): lower batch_size, or choose a smaller model") from None
    finally:
        process.terminate()
        process.join()
    if isinstance(answer, Exception):
        raise answer
    return answer


def _answer(told: Connection, function: Callable[..., Any], arguments: Sequence[Any]) -> None:
    quiet_libraries()
    try:
        answer = function(*arguments)
    except Exception as error:
        error.add_note(traceback.format_exc())
        answer = error
    told.send(answer)


def describe(status: int) -> str:
    """How a process ended, from its exit status; a negative one is a signal."""
    if status >= 0:
        return f"its process ended with status {status}"
    name = signal.Signals(-status).name
    cause = " (often: out of memory)" if name == "SIGKILL" else ""
    return f"its process was killed by {name}{cause}"
