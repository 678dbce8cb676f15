"""Hugging Face's hub: files by repository, from its cache on this machine first, from the network only where allowed.

`ditbench --offline`, or HF_HUB_OFFLINE=1, allows none. A file that was had once is never asked for again.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from harness.errors import UserError

REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
"""Names of repositories: `stabilityai/sd-vae-ft-ema`."""
TIMEOUT_SECONDS = 10
"""For the first answer."""


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
            reason = (str(error) or type(error).__name__).splitlines()[0]
            break
    raise Unavailable(f"{files[0]} of {repository} cannot be had from the hub ({reason})")
