"""What a worker prints goes to a log file of its run; a failure is noted there and in the manifest."""

import contextlib
import faulthandler
import os
import socket
import sys
import traceback
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from io import FileIO
from pathlib import Path
from typing import Any

from harness.config import RunConfig
from harness.errors import StorageError, UserError
from harness.tracking.store import mark
from studies.runs.folders import folder_of

LOG = "log.txt"
"""In a run's folder: when and where it was worked on, what the libraries printed, and the trace of a failure."""


def record_failure(config: RunConfig, message: str, trace: str, began: datetime) -> None:
    """Put a failure on record and close the run in MLflow, unless another process of this attempt has.

    That it cannot be recorded (a full disk is the likely cause of both) must not hide the failure itself.
    """
    detail = {"error": message, "trace": trace, "log": LOG, "ended": datetime.now(UTC).isoformat()}
    folder = folder_of(config)
    with contextlib.suppress(OSError, UserError):
        before = folder.manifest()
        if has_failed_since(before, began):
            return
        folder.update_manifest(status="failed", status_detail=detail)
        mark(config.output, before.get("mlflow_run", ""), "failed")


def has_failed_since(manifest: Mapping[str, Any], when: datetime) -> bool:
    """Whether a run has been tried and failed since then."""
    ended = manifest["status_detail"].get("ended", "")
    return manifest["status"] == "failed" and bool(ended) and datetime.fromisoformat(ended) >= when


def one_line(error: Exception) -> str:
    """An error as one line; its type only where the message is not meant for the user."""
    text = str(error) if isinstance(error, (UserError, StorageError)) else f"{type(error).__name__}: {error}"
    return " ".join(text.split())


@contextlib.contextmanager
def logged(path: Path, captured: bool) -> Iterator[None]:
    """Note in a run's log when the block begins and ends, and the trace of its error.

    With `captured`, whatever it prints goes there as well, also from C code, and the stack of a crash.
    """
    with path.open("ab", buffering=0) as log, printing_to(log) if captured else contextlib.nullcontext():
        note(log, f"{datetime.now(UTC).isoformat()} {socket.gethostname()} process {os.getpid()}: begins\n")
        try:
            yield
        except BaseException as error:
            note(log, "".join(traceback.format_exception(error)))
            raise
        finally:
            note(log, f"{datetime.now(UTC).isoformat()} {socket.gethostname()} process {os.getpid()}: ends\n")


def note(log: FileIO, text: str) -> None:
    """Write to a log at once. That a full disk refuses it must not hide the error that it tells of."""
    with contextlib.suppress(OSError):
        log.write(text.encode(errors="backslashreplace"))


@contextlib.contextmanager
def printing_to(log: FileIO) -> Iterator[None]:
    """Send the process's standard output and error, and the stack of a crash, to a file within the block."""
    kept = [(number, os.dup(number)) for number in (1, 2)]
    for number, _ in kept:
        os.dup2(log.fileno(), number)
    faulthandler.enable(file=2)
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):  # as in `note`
                stream.flush()
        for number, copy in kept:
            os.dup2(copy, number)
            os.close(copy)
