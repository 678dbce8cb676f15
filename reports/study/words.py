"""Numbers of things, and lists of names, in sentences."""

from collections.abc import Sequence


def listed(names: Sequence[str], limit: int = 6) -> str:
    """`a, b and c`, shortened where there are many."""
    if len(names) > limit:
        return f"{', '.join(names[:limit])} and {len(names) - limit} more"
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def with_all(num: int, num_shown: int) -> str:
    """What a file holds beside a table of some cells alone: `with all 13 cells`; "" where these are all."""
    return f"with all {num} cells" if num_shown < num else ""


def be(names: Sequence[str]) -> str:
    """`is` or `are`."""
    return "is" if len(names) == 1 else "are"


def count(num: int, noun: str) -> str:
    """`1 seed`, `2 seeds`."""
    return f"{num} {noun}" if num == 1 else f"{num} {noun}s"
