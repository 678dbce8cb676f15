"""What docs/contributing/ names exists in the tree: paths, links, and the entry points that others rely on."""

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs" / "contributing").glob("*.md"))
PATH = re.compile(r"`((?:harness|methods|studies|reports|tests|docs)/[\w./*-]*|[A-Z]\w+\.md)`")
LINK = re.compile(r"\]\(([^)#:]+)\)")
NAME = re.compile(r"`((?:harness|methods)(?:\.\w+)+)")


def missing(text: str, folder: Path) -> list[str]:
    """Paths of the repository, links and dotted names in a page that lead nowhere."""
    paths = [path for path in PATH.findall(text) if not (ROOT / path).exists()]
    links = [link for link in LINK.findall(text) if not (folder / link).exists()]
    return paths + links + [name for name in NAME.findall(text) if not _is_found(name)]


def _is_found(name: str) -> bool:
    module, _, attribute = name.rpartition(".")
    try:
        return hasattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError:
        return False


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_all_that_a_page_names_exists(page: Path) -> None:
    assert missing(page.read_text(), page.parent) == []


def test_what_is_not_there_is_found() -> None:
    text = (
        "`harness/nothing.py` `harness/rng.py` [a](style.md) [b](none.md) `harness.flow.velocity(x)` `harness.flow.v`"
    )
    assert missing(text, PAGES[0].parent) == ["harness/nothing.py", "none.md", "harness.flow.v"]


def test_the_pages_are_there_and_name_paths() -> None:
    assert [page.stem for page in PAGES] == ["architecture", "glossary", "style"]
    assert all(len(PATH.findall(page.read_text())) > 5 for page in PAGES)


def test_the_glossary_has_each_word_once_in_order_with_two_sentences_at_most() -> None:
    rows = [line.strip("| ").split(" | ") for line in PAGES[1].read_text().splitlines() if line.startswith("| ")][1:]
    words = [word for row in rows for word in row[0].split(", ")]
    assert len(words) == len(set(words)) and [row[0] for row in rows] == sorted(row[0] for row in rows)
    assert all(1 <= len(re.findall(r"\.(?: |$)", row[1])) <= 2 for row in rows)
