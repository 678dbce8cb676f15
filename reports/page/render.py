"""The self-contained page: everything a reader needs in one HTML file that asks for nothing from outside."""

import base64
import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import markupsafe

from reports.figures.style import DARK, LIGHT, CellStyle
from reports.page.figures import ShownFigure
from reports.sections import Section
from reports.tables.cells import Cell, columns, sort_key

TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True, kw_only=True)
class Page:
    """What a page shows: its head, and sections."""

    name: str
    """What it is about, the largest words on it."""
    kind: str
    """What it is, such as `ablation`, for the title of its window."""
    headline: Sequence[str]
    """The first sentences."""
    points: Sequence[str] = ()
    """Further ones, as a list below them."""
    notes: Sequence[str] = ()
    """What a reader must know before the numbers."""
    links: Sequence[tuple[str, str]] = ()
    """Pages of the studies that this one puts together: names and addresses."""
    sections: Sequence[Section] = ()
    figures: Mapping[str, ShownFigure] = field(default_factory=dict)
    """The figures of all sections, by the names of their files."""
    styles: Mapping[str, CellStyle] = field(default_factory=dict)
    """The styles of the study's cells; tables know a cell's name by its being here."""


def render(page: Page) -> str:
    """The page as text. Every label goes through the template's escaping."""
    script = TEMPLATES.joinpath("page.js").read_text()
    return (
        templates()
        .get_template("page.html")
        .render(page=page, script=markupsafe.Markup(script), script_hash=script_hash(script), light=LIGHT, dark=DARK)
    )


def templates() -> jinja2.Environment:
    """The templates of pages, in which every label is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=one_direction,
    )
    environment.filters |= {"breakable": breakable, "columns": columns, "sort_key": sort_key, "cell": cell}
    return environment


def cell(text: str) -> Cell:
    """Any text of a table as a cell."""
    return text if isinstance(text, Cell) else Cell(text)


def script_hash(script: str) -> str:
    """How the page's policy names the one script that may run: by what it is, so that no other one can."""
    return f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}"


TURNING = {ord(mark): "\ufffd" for mark in "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"}
"""Characters that turn the direction of all text after them."""


def one_direction(value: Any) -> Any:
    """A value of the page; text without marks that would turn around what stands beside it."""
    is_text = isinstance(value, str) and not isinstance(value, markupsafe.Markup)
    return value.translate(TURNING) if is_text else value


def breakable(text: str) -> markupsafe.Markup:
    """Escaped text that may break after the separators of labels and metric names."""
    parts = re.split(r"(?<=[_+,=/.])", one_direction(text))
    return markupsafe.Markup("<wbr>").join(markupsafe.escape(part) for part in parts)
