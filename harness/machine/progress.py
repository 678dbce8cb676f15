"""The callback that work of more than a few seconds tells of its progress."""

from collections.abc import Callable

Report = Callable[[str, int, int], None]
"""Progress: what is being made, how much of it is done, how much there is."""


def tell(report: Report | None, notice: str) -> None:
    """Pass a notice on as a piece of work that is done."""
    if report is not None:
        report(notice, 1, 1)
