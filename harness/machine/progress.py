"""The callback that work of more than a few seconds tells of its progress."""

from collections.abc import Callable

OnProgress = Callable[[str, int, int], None]
"""Progress: what is being made, how much of it is done, how much there is."""


def tell(on_progress: OnProgress | None, notice: str) -> None:
    """Pass a notice on as a piece of work that is done."""
    if on_progress is not None:
        on_progress(notice, 1, 1)
