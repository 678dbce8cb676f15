"""Reads a report's page: tags, attributes and text."""

from collections.abc import Callable
from html.parser import HTMLParser

from reports import report
from reports.sections import Section
from reports.study.load import Study

VOID = {"meta", "img", "source", "br", "wbr", "link", "input"}


class Page(HTMLParser):
    """Tags, attributes and text; fails on tags that close in another order than they opened."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text: list[str] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not {"style", "script"} & set(self.open):
            self.text.append(data)

    def attributes(self, tag: str, name: str) -> list[str]:
        return [attrs[name] or "" for found, attrs in self.tags if found == tag and name in attrs]


def sections_of_every_study() -> tuple[Callable[[Study], Section | None], ...]:
    """The sections that every study has: what only some have is tested beside each of it, and takes its time."""
    some = (
        "reports.costs.targets",
        "reports.result.improvement",
        "reports.final",
        "reports.claims",
        "reports.analysis",
    )
    return tuple(make for make in report.SECTIONS if not make.__module__.startswith(some))
