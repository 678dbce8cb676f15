"""Writing the joint report of several studies: a page, its figures with their data, and its tables."""

import os
import urllib.parse
from collections.abc import Mapping, Sequence
from pathlib import Path

import markupsafe

from harness.records.files import replaced, write_json
from harness.records.run_folder import UserError
from reports.figures.style import DARK, LIGHT, Look, cell_styles
from reports.joint import profiles
from reports.page import render as page
from reports.page.figures import ShownFigure, write_figures
from reports.sections import Section, saved_tables
from reports.study.load import Study
from reports.study.words import listed

MARK = "joint.json"
"""What the report was made from. A folder that holds it may be replaced by a joint report."""


def check(studies: Sequence[Study], folder: Path) -> None:
    """`UserError` where studies may not be put together, or where their report would replace something else."""
    profiles.check_together(studies)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out: {folder} is a file: name a folder")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / MARK).is_file():
        raise UserError(f"--out: {folder} holds other files, which the report would replace: name a folder of its own")


def write_joint(studies: Sequence[Study], pages: Sequence[Path], folder: Path) -> Path:
    """Write the report of studies that were verified one by one; returns the page.

    Args:
        studies: the same comparison in several settings.
        pages: each study's own page.
        folder: where to; it is replaced as a whole.

    Raises:
        UserError: the studies may not be put together, or the folder holds other files.
    """
    check(studies, folder)
    sections = profiles.sections(studies)
    look = Look(cell_styles(studies[0].cells, studies[0].baseline))
    plans = [plan for section in sections for plan in section.plans]
    with replaced(folder) as new:
        pictures = {figure.stem: figure for figure in write_figures(plans, look, new)}
        for section in sections:
            for name, (numbers, markdown, latex) in saved_tables(section.blocks).items():
                numbers.to_csv(new / f"{name}.csv", index=False)
                (new / f"{name}.md").write_text(markdown)
                (new / f"{name}.tex").write_text(latex)
        made_from = [{"study": study.name, "folder": str(study.path)} for study in studies]
        write_json(new / MARK, made_from)
        links = [(study.name, _link(path, folder)) for study, path in zip(studies, pages, strict=True)]
        (new / "index.html").write_text(_render(studies, sections, pictures, links, look))
    return folder / "index.html"


def _link(path: Path, folder: Path) -> str:
    """From the joint page to a study's own."""
    return urllib.parse.quote(os.path.relpath(path.resolve(), folder.resolve()))


def _render(
    studies: Sequence[Study],
    sections: Sequence[Section],
    pictures: Mapping[str, ShownFigure],
    links: Sequence[tuple[str, str]],
    look: Look,
) -> str:
    """The page as text."""
    script = page.TEMPLATES.joinpath("page.js").read_text()
    return (
        page.templates()
        .get_template("joint.html")
        .render(
            title=listed([study.name for study in studies]),
            headline=profiles.headline(studies),
            sections=sections,
            figures=pictures,
            links=links,
            styles=look.styles,
            script=markupsafe.Markup(script),
            script_hash=page.script_hash(script),
            light=LIGHT,
            dark=DARK,
        )
    )
