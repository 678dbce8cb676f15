"""Tables compile as they are: with the booktabs package and nothing else, whatever the labels hold."""

import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from reports.page import figures
from reports.report import write_report
from reports.tables.formats import ACCENTS, LATEX, LATIN, latex_table
from tests.programs import needed
from tests.unit.reports.records_factory import edit_manifest, run_folder, write_ablation, write_study

pytestmark = [pytest.mark.latex, pytest.mark.filterwarnings("ignore:Glyph")]

LABELS = (
    *("repa_block=3", "50% & more", "#1 {x}", "$x_1^2$ ~ \\frac{1}", "\\input{passwd}", "a|b<c>\"d'`e`", "[2em]", "*"),
    *("größer ≤ 5 µm – “so”", "שלום عالم", "日本 🎉", "m" * 150, "\\end{tabular}", "ĄĐþŋ e\u0301 \u0301", "--- ?` !`"),
)
LETTERS = "".join(map(chr, [*range(0x20, 0x180), *range(0x370, 0x3D0), *map(ord, LATEX), *map(ord, LATIN | ACCENTS)]))
"""Latin letters of every kind, Greek ones, all that is written as a command, and accents that stand alone."""


@pytest.fixture(scope="session")
def pdflatex() -> str:
    return needed("texlive-latex-base texlive-latex-recommended", "pdflatex")


def compiled(pdflatex: str, folder: Path, tables: Sequence[Path]) -> str:
    """Put every table in a document as a paper does; the log of pdflatex, which must not have stopped."""
    pages = "".join(f"\\begin{{table}}\\input{{{path.resolve()}}}\\end{{table}}\\clearpage\n" for path in tables)
    head = "\\documentclass{article}\\usepackage{booktabs}\\tracinglostchars=2\\begin{document}\n"
    (folder / "paper.tex").write_text(f"{head}{pages}\\end{{document}}\n")
    command = [pdflatex, "-interaction=nonstopmode", "-halt-on-error", "paper.tex"]
    result = subprocess.run(command, cwd=folder, capture_output=True, timeout=120)
    log = (folder / "paper.log").read_text(errors="replace")
    assert result.returncode == 0, log[-2000:]
    assert (folder / "paper.pdf").stat().st_size > 1000
    return log


def test_every_table_of_reports_compiles(pdflatex, tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "picture", lambda draw, look, wide: figures.Picture([], "data:,"))
    monkeypatch.setattr("reports.figures.files.save", lambda draw, frame, stem, look: [])
    cells = {label: ("sit", "repa")[i > 0] for i, label in enumerate(LABELS)}
    hostile = write_study(tmp_path / "runs", cells, baseline=LABELS[0])
    edit_manifest(run_folder(hostile, LABELS[1], 0), shared_device=True)
    settings = [{"loss": name} for name in ("smooth_l1", "[a]*&%#_{}~^\\", "größer ≤ 5 µm", "שלום 日本 🎉")]
    ablation = write_ablation(tmp_path / "runs", settings, {"loss": "smooth_l1"})
    for study in (hostile, ablation):
        tables = sorted(write_report(study).folder.glob("*.tex"))
        assert {"final.tex", "cost.tex", "equal_cost.tex"} <= {path.name for path in tables}
        log = compiled(pdflatex, tmp_path, tables)
        assert "Missing character" not in log
        assert "Undefined" not in log


def test_every_letter_compiles(pdflatex, tmp_path):
    rows = [{"letter": letter, "again": f"a{letter}b", "*": f"{letter} {letter}"} for letter in LETTERS]
    for place in range(0, len(rows), 40):  # a page holds no more rows
        (tmp_path / f"letters_{place:03}.tex").write_text(latex_table(rows[place : place + 40], [LETTERS]))
    log = compiled(pdflatex, tmp_path, sorted(tmp_path.glob("letters_*.tex")))
    assert "Missing character" not in log


def test_a_wide_table_compiles(pdflatex, tmp_path):
    rows = [{f"column_{i} of a very wide table": f"−{i}.5 [−1.0, +1.0] †" for i in range(40)}] * 30
    (tmp_path / "wide.tex").write_text(latex_table(rows, ["A note. " * 300]))
    compiled(pdflatex, tmp_path, [tmp_path / "wide.tex"])


def test_a_table_that_does_not_compile_is_seen(pdflatex, tmp_path):
    (tmp_path / "bad.tex").write_text(latex_table([{"cell": "x"}]).replace("x", "\\nocommand"))
    with pytest.raises(AssertionError, match="Undefined control sequence"):
        compiled(pdflatex, tmp_path, [tmp_path / "bad.tex"])
