"""Digests of the files of a data set: each content is read once, later starts compare size and modification time."""

import contextlib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from harness.data import cache as caches
from harness.errors import UserError
from harness.machine.progress import OnProgress
from harness.records.files import digest, file_digest

FILES_QUEUED = 1024
"""Files that wait for a thread to read them; one takes 2 kB in the queue."""


def file_digests(
    whole: Path, root: Path, names: Sequence[str], cache: Path, on_progress: OnProgress | None
) -> list[list[Any]]:
    """[path relative to `root`, size, SHA-256 of the content] of every file of the data set at `whole`.

    Contents are read once; a file whose size and modification time are as before keeps its stored digest. Of several
    processes that need the list at once one reads, while the others wait.
    """
    listing = cache / f"files-{digest(str(whole.resolve()))[:12]}.json"
    states = {name: _file_state(root / name) for name in names}
    stored = _stored_digests(listing, on_progress)
    if _changed(states, stored):
        with caches.holding(listing.with_suffix(".lock"), waits=True):
            stored = _stored_digests(listing, None)
            if changed := _changed(states, stored):
                shas = {name: state[2] for name, state in stored.items()}
                shas |= _read_all(root, [name for name in changed if name in states], on_progress)
                stored = {name: [*states[name], shas[name]] for name in names}
                caches.write_long(listing, [[name, *state] for name, state in stored.items()])
    return [[name, stored[name][0], stored[name][2]] for name in names]


def _stored_digests(listing: Path, on_progress: OnProgress | None) -> dict[str, list[Any]]:
    """Size, modification time and SHA-256 by path."""
    return {name: state for name, *state in caches.read_small(listing, on_progress) or []}


def _changed(states: dict[str, list[int]], stored: dict[str, list[Any]]) -> list[str]:
    """Files that are not in the list as they are now, or are there no more."""
    changed = [name for name, state in states.items() if name not in stored or stored[name][:2] != state]
    return changed + [name for name in stored if name not in states]


def _read_all(root: Path, names: list[str], on_progress: OnProgress | None) -> dict[str, str]:
    """SHA-256 of files by path, read by as many threads as there are cores."""

    def read(name: str) -> str:
        with reading(root / name):
            return file_digest(root / name)

    shas: dict[str, str] = {}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for first in range(0, len(names), FILES_QUEUED):
            together = names[first : first + FILES_QUEUED]
            for name, sha in zip(together, pool.map(read, together), strict=True):
                shas[name] = sha
                if on_progress is not None:
                    on_progress("reading files", len(shas), len(names))
    return shas


def _file_state(path: Path) -> list[int]:
    """Size in bytes and modification time in ns."""
    with reading(path):
        state = path.stat()
    return [state.st_size, state.st_mtime_ns]


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn a file or folder that the system will not read into a `UserError` that names it."""
    try:
        yield
    except OSError as error:
        raise UserError(f"data.path: cannot read {path} ({error.strerror}): make it readable or remove it") from None
