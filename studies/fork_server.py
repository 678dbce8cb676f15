"""The process that workers are forked from. It has loaded their libraries and used no device, so that each worker
starts in a fraction of a second, and none inherits threads or a device from another.
"""

import multiprocessing
import signal
from multiprocessing import forkserver

CONTEXT = multiprocessing.get_context("forkserver")
"""Makes processes and pipes."""


def start_server() -> None:
    """Start it, unless it runs; returns at once, while it loads."""
    CONTEXT.set_forkserver_preload(["studies.worker"])
    # Ctrl-C reaches every process of a terminal; the command alone answers it.
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        forkserver.ensure_running()
    finally:
        signal.signal(signal.SIGINT, before)
