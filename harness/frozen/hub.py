"""Hugging Face's hub: files by repository, from its cache on this machine first, from the network only where allowed.

`ditbench --offline`, or HF_HUB_OFFLINE=1, allows none. A file that was had once is never asked for again.
"""

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from harness.errors import UserError
from harness.machine.disk import free_bytes, size_in_words
from harness.machine.progress import OnProgress

REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
"""Names of repositories: `stabilityai/sd-vae-ft-ema`."""
TIMEOUT_SECONDS = 10
"""Seconds that the hub has for its first answer."""


class Unavailable(UserError):
    """The hub has no such file, or is away."""


def is_offline() -> bool:
    """Whether the network must not be tried."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def fetch(repository: str, files: Sequence[str]) -> Path | None:
    """The first of `files` that the repository has; None where nothing is on this machine and we are offline.

    Raises:
        Unavailable: when the network was tried, and gave none of the files.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError

    for file in files:
        kept = try_to_load_from_cache(repository, file)
        if isinstance(kept, str):
            return Path(kept)
    if is_offline():
        return None
    reason = f"it has no {' and no '.join(files)}"
    for file in files:
        try:
            # Asked once: the download itself tries a network that is away for half a minute.
            get_hf_file_metadata(hf_hub_url(repository, file), timeout=TIMEOUT_SECONDS)
            return Path(hf_hub_download(repository, file))
        except EntryNotFoundError:
            continue
        except Exception as error:  # of the hub, of its HTTP library, or of the disk
            reason = _reason(error)
            break
    raise Unavailable(f"{files[0]} of {repository} cannot be had from the hub ({reason})")


def _reason(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


# -- data sets: many files at once ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Listing:
    """The files of a data set's repository at one commit."""

    commit: str
    sizes: Mapping[str, int]
    """Bytes by name."""


def cache_of(dataset: str) -> Path:
    """Folder of the hub's cache on this machine that holds a data set, or will."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE) / f"datasets--{dataset.replace('/', '--')}"


def known_files(dataset: str) -> list[str]:
    """Names of all files of a data set when it was last fetched, wherever they are; none when it never was."""
    try:
        from huggingface_hub import get_cached_repo_tree
        from huggingface_hub.errors import CachedRepoTreeNotFoundError, HFValidationError
    except ImportError:
        raise UserError("data sets of the hub need huggingface-hub 2: pip install 'ditbench[hf]'") from None
    try:
        return [file.path for file in get_cached_repo_tree(dataset, repo_type="dataset") if _stays_inside(file.path)]
    except (CachedRepoTreeNotFoundError, HFValidationError):
        return []


def find_all(dataset: str, files: Sequence[str], commit: str = "") -> Path | None:
    """Folder in which all of `files` lie as in the repository; None when the cache of this machine lacks one.

    Args:
        commit: of the repository; "" = the one that was last fetched.
    """
    cache = cache_of(dataset)
    try:
        # The cache's layout: huggingface.co/docs/huggingface_hub/guides/manage-cache
        folder = cache / "snapshots" / (commit or (cache / "refs" / "main").read_text().strip())
    except FileNotFoundError:
        return None
    return folder if all((folder / file).is_file() for file in files) else None


def list_files(dataset: str) -> Listing:
    """What the hub has of a data set; `Unavailable` says why it cannot be had."""
    from huggingface_hub import HfApi

    with _asking(dataset):
        info = HfApi().dataset_info(dataset, timeout=TIMEOUT_SECONDS, files_metadata=True)
        sizes = {file.rfilename: file.size or 0 for file in info.siblings or [] if _stays_inside(file.rfilename)}
        return Listing(str(info.sha), sizes)


def fetch_all(dataset: str, listing: Listing, files: Sequence[str], on_progress: OnProgress | None = None) -> Path:
    """Fetch what the cache lacks of `files`, one after another, so that what is whole stays; returns as `find_all`.

    Raises:
        Unavailable: the hub does not give a file.
        UserError: the disk of the hub's cache has no room.
    """
    from huggingface_hub import hf_hub_download, snapshot_download

    missing = [file for file in files if find_all(dataset, [file], listing.commit) is None]
    size, free = sum(listing.sizes[file] for file in missing), free_bytes(cache_of(dataset))
    if size > free:
        raise UserError(
            f"HF_HOME: {cache_of(dataset)} needs {size_in_words(size)} for {dataset} and the disk has "
            f"{size_in_words(free)} left: make room or name another folder"
        )
    with _asking(dataset), _no_bars():
        for number, file in enumerate(missing, start=1):
            hf_hub_download(dataset, file, repo_type="dataset", revision=listing.commit)
            if on_progress is not None:
                on_progress(f"files of {dataset} ({size_in_words(size)})", number, len(missing))
        # Has nothing left to fetch, but puts on record that these are the repository's files.
        patterns = [re.sub(r"([*?[])", r"[\1]", file) for file in files]
        snapshot_download(dataset, repo_type="dataset", allow_patterns=patterns)
    folder = find_all(dataset, files)
    if folder is None:
        raise Unavailable(f"{dataset} changed on the hub while it was fetched, so try again")
    return folder


def _stays_inside(name: str) -> bool:
    """Whether a name from the network is one of a file inside its repository."""
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts


@contextlib.contextmanager
def _asking(dataset: str) -> Iterator[None]:
    """Turn whatever goes wrong with the network into one line."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        yield
    except GatedRepoError:
        raise Unavailable(
            f"{dataset} is gated: accept its terms at huggingface.co/datasets/{dataset}, then log in with "
            "`hf auth login` or set HF_TOKEN"
        ) from None
    except RepositoryNotFoundError:
        raise Unavailable(f"the hub has no data set {dataset}, or it is private and HF_TOKEN is not set") from None
    except Exception as error:  # of the hub, of its HTTP library, or of the disk
        raise Unavailable(f"{dataset} cannot be had from the hub ({_reason(error)})") from None


@contextlib.contextmanager
def _no_bars() -> Iterator[None]:
    """Keep the hub's own progress off the terminal: ours is shown."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
