"""Figures of a page: each is saved as files and drawn in its variants, in two processes where there is much to draw."""

import multiprocessing
import os
import threading
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from reports.figures import files
from reports.figures.plans import Plan
from reports.figures.style import DARK, LIGHT, Look, Theme

SCHEME = {"dark": "(prefers-color-scheme: dark)", "light": "(prefers-color-scheme: light)"}
NARROW = "(max-width: 640px)"
"""Media queries that pick a figure's variant."""

MANY_ROWS = 100_000
"""Rows of all frames from which on two processes draw: fewer are drawn before a second one has started."""


@dataclass(frozen=True)
class Picture:
    """A figure drawn for light and dark, wide and narrow pages, as data URIs."""

    sources: Sequence[tuple[str, str]]
    """(media query, data URI), the most specific first."""
    fallback: str
    """For wide, light pages and for print."""


@dataclass(frozen=True)
class ShownFigure:
    """A figure on the page; `stem` names its files beside the page."""

    stem: str
    picture: Picture
    alt: str
    caption: str
    files: Sequence[Path]


def picture(draw: files.Draw, look: Look, wide: Path) -> Picture:
    """Draw a figure in its variants; the one for wide, light pages is the file `wide`."""

    def drawn(theme: Theme, is_narrow: bool = False) -> str:
        return files.data_uri(files.png(draw(replace(look, theme=theme, is_narrow=is_narrow))))

    sources = [(f"{NARROW} and {SCHEME[theme.name]}", drawn(theme, is_narrow=True)) for theme in (DARK, LIGHT)]
    return Picture([*sources, (SCHEME["dark"], drawn(DARK))], files.data_uri(wide.read_bytes()))


def write_figures(plans: Sequence[Plan], look: Look, folder: Path) -> list[ShownFigure]:
    """Save every figure in `<folder>/figures/`, and draw it for the page."""
    folder.joinpath("figures").mkdir()
    write = partial(_write, look=look, folder=folder)
    if sum(len(plan.frame) for plan in plans) < MANY_ROWS:
        return [write(plan) for plan in plans]
    # Spawned, as the process of a comparison has threads, which a fork of it could not use.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, mp_context=context, initializer=end_with_parent) as pool:
        return list(pool.map(write, plans))


def _write(plan: Plan, look: Look, folder: Path) -> ShownFigure:
    stem = folder / "figures" / plan.stem
    saved = files.save(plan.drawn, plan.frame, stem, look)
    drawn = picture(plan.drawn, look, stem.with_name(f"{stem.name}.png"))
    return ShownFigure(plan.stem, drawn, plan.alt, plan.caption, saved)


def end_with_parent() -> None:
    """Let this process end when the report's is killed; it would wait for more work forever."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
