"""Text on the terminal. Starts without torch, so that reports do."""

import sys
from collections.abc import Mapping
from typing import Literal

from rich.console import Console
from rich.table import Table

PIPE_WIDTH = 10_000
"""Columns of what is no terminal."""


def console(stderr: bool = False) -> Console:
    """A console that leaves text as it is: no markup, so that labels such as [a] survive.

    Tables are folded to a terminal's width, and nowhere else: a file or a pipe gets one line a row.
    """
    width = None if (sys.stderr if stderr else sys.stdout).isatty() else PIPE_WIDTH
    return Console(stderr=stderr, markup=False, highlight=False, soft_wrap=True, width=width)


def print_table(rows: list[dict[str, str]], justify: Literal["left", "right"] = "right") -> None:
    """Print rows of text as a table; columns are the first row's keys, all but the first justified as asked."""
    if not rows:
        return
    table = Table(box=None, pad_edge=False)
    for index, name in enumerate(rows[0]):
        table.add_column(name, justify="left" if index == 0 else justify, overflow="fold")
    for row in rows:
        table.add_row(*row.values())
    console().print(table)


def print_fields(heading: str, fields: Mapping[str, str]) -> None:
    """Print a heading with its fields below, name and text, and an empty line; texts are folded as tables are."""
    table = Table(box=None, show_header=False, padding=(0, 0, 0, 2))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in fields.items():
        table.add_row(name, text)
    console().print(heading, soft_wrap=False)
    console().print(table)
    console().print()
