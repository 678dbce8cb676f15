"""Writing the joint report of several studies: a page, its figures with their data, and its tables."""

import os
import urllib.parse
from collections.abc import Sequence
from pathlib import Path

from harness.records.files import replaced, write_json
from harness.records.run_folder import UserError
from reports.figures.style import Look, cell_styles
from reports.joint import profiles
from reports.page.figures import write_figures
from reports.page.render import Page, render
from reports.study.load import Study
from reports.study.words import listed
from reports.tables.files import save_tables

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
    plans = [plan for section in sections for plan in section.all_plans]
    with replaced(folder) as new:
        figures = {figure.stem: figure for figure in write_figures(plans, look, new)}
        save_tables(sections, new)
        made_from = [{"study": study.name, "folder": str(study.path)} for study in studies]
        write_json(new / MARK, made_from)
        page = Page(
            name=listed([study.name for study in studies]),
            kind="several settings together",
            headline=profiles.headline(studies),
            links=[(study.name, _link(path, folder)) for study, path in zip(studies, pages, strict=True)],
            sections=sections,
            figures=figures,
            styles=look.styles,
        )
        (new / "index.html").write_text(render(page))
    return folder / "index.html"


def _link(path: Path, folder: Path) -> str:
    """From the joint page to a study's own."""
    return urllib.parse.quote(os.path.relpath(path.resolve(), folder.resolve()))
