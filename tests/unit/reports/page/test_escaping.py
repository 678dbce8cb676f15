"""Names from users and data are text everywhere: they change no tag of the page, no element of a figure, no cell of a
table. Two studies that differ in their names alone must give pages of the same structure."""

import json
import re
import shutil
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from harness.records.run_folder import RunFolder
from reports.page.figures import Picture
from reports.report import ReportPaths, write_report
from tests.unit.reports.records_factory import MAIN, diverge, fail, write_study

PAYLOADS = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onmouseover='alert(1)",
    "{{7*7}}{% raw %}",
    "</style><style>*{display:none}",
    "</title></table>",
    "<!-- --> ]]> <![CDATA[",
    "two\nlines",
    "a|b\\|c",
    "$x$ $\\frac{ x_1^2 _hidden",
    "=1+1;javascript:alert(1)",
    "m" * 300,
    "שלום عالم \u202egnp.exe",
    "&amp;&lt;",
)
EVERYTHING = " ".join(PAYLOADS)
LABELS = [f"{i:02} {payload}" for i, payload in enumerate(PAYLOADS)]
PICTURE = Picture([("(max-width: 640px)", "data:,")], "data:,")


class Page(HTMLParser):
    """Tags with the names of their attributes, in order; and the text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, tuple[str, ...]]] = []
        self.values: list[tuple[str, str]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag != "wbr":  # there are as many as a name has separators
            self.tags.append((tag, tuple(sorted(name for name, _ in attrs))))
        self.values += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        self.tags.append((f"/{tag}", ()))

    def handle_comment(self, data: str) -> None:
        self.tags.append(("comment", ()))

    def handle_decl(self, decl: str) -> None:
        self.tags.append(("declaration", ()))

    def handle_data(self, data: str) -> None:
        self.text += data


def renamed(value: Any, text: str) -> Any:
    """The value with `text` in all that is text, keys too."""
    if isinstance(value, Mapping):
        return {
            f"{name}{text}" if name.startswith("repa") else name: renamed(item, text) for name, item in value.items()
        }
    if isinstance(value, list):
        return [renamed(item, text) for item in value]
    return f"{value}{text}" if isinstance(value, str) else value


def write_named_study(plain: Path, study: Path, labels: list[str], text: str) -> Path:
    """A study with these cell labels in which every other name ends in `text`; one run failed, one diverged."""
    for i, label in enumerate(labels):
        run = RunFolder(study / f"cell{i:02}" / "seed0")
        shutil.copytree(plain / ("repa" if i else "sit") / "seed0", run.path)
        rename_manifest(run, label, labels[0], text)
        rename_lines(run, text)
    diverge(RunFolder(study / "cell02" / "seed0"), 312, f"terms/{text}", kept=3)
    failed = RunFolder(study / "cell03" / "seed0")
    fail(failed, f"error {text}")
    detail = {**failed.manifest()["status_detail"], "log": f"log {text}"}
    failed.write_manifest({**without_format(failed), "status_detail": detail})
    return study


def without_format(run: RunFolder) -> dict[str, Any]:
    return {name: value for name, value in run.manifest().items() if name != "format"}


def rename_manifest(run: RunFolder, label: str, baseline: str, text: str) -> None:
    manifest = without_format(run)
    digests = {f"{key}{text}" if key.startswith("encoder/") else key: v for key, v in manifest["digests"].items()}
    plain = {"digests": digests, "status": "finished", "cell": label, "baseline": baseline}
    budget = {"budget": manifest["config"]["budget"]}
    lines = {f"line{text}": {MAIN + text: 3.1}}
    renamed_one = renamed(manifest, text)
    run.write_manifest({**renamed_one, **plain, "lines": lines, "config": {**renamed_one["config"], **budget}})


def rename_lines(run: RunFolder, text: str) -> None:
    """Metrics and terms are named by extractors and methods, so they may hold anything too."""
    for name, field in (("eval", "metrics"), ("train", "terms")):
        lines = run.lines(name)  # type: ignore[arg-type]
        for line in lines:
            line[field] = {f"{key}{text}": value for key, value in line[field].items()}
        (run.path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], ReportPaths]:
    """`reports("harmless" | "hostile")`. Pictures of the page are not drawn: the SVG files show the same figures."""
    patch = pytest.MonkeyPatch()
    patch.setattr("reports.page.figures.picture", lambda draw, look, wide: PICTURE)
    folder = tmp_path_factory.mktemp("runs")
    plain = write_study(folder, {"sit": "sit", "repa": "repa"}, seeds=(0,))
    calm = [f"{i:02} plain" for i in range(len(PAYLOADS))]
    harmless = write_named_study(plain, folder / "harmless", calm, "plain")
    name = "".join(PAYLOADS[:6]).replace("/", "")
    hostile = write_named_study(plain, folder / name, LABELS, EVERYTHING)
    written = {"harmless": write_report(harmless), "hostile": write_report(hostile)}
    patch.undo()
    return written.__getitem__


pytestmark = pytest.mark.filterwarnings("ignore:Glyph")


def test_names_change_no_tag_of_the_page(reports):
    harmless, hostile = (Page(reports(name).page.read_text()) for name in ("harmless", "hostile"))
    assert hostile.tags == harmless.tags
    assert [tag for tag, _ in hostile.tags].count("script") == 1, "the page's own"
    assert {tag for tag, _ in hostile.tags}.isdisjoint({"comment", "iframe"})
    assert not any(name.startswith("on") for name, _ in hostile.values)


def test_names_stand_in_the_page_as_they_are(reports):
    text = Page(reports("hostile").page.read_text()).text
    assert [label for label in LABELS if label.replace("\u202e", "\ufffd") not in text] == []


def test_no_name_turns_the_text_beside_it_around(reports):
    assert "\u202e" not in reports("hostile").page.read_text()
    assert "\u202e" in reports("hostile").table_csv.read_text(), "data stay as they are"


def test_links_lead_beside_the_page_and_to_the_study(reports):
    for name, value in Page(reports("hostile").page.read_text()).values:
        if name == "href":
            assert re.match(r"#|figures/|\w+\.(csv|md|tex|json)$|\.\./cell", value)


def test_styles_hold_colours_alone(reports):
    styles = [value for name, value in Page(reports("hostile").page.read_text()).values if name == "style"]
    assert styles
    assert all(set(style) <= set("-ld: ;#0123456789abcdef") for style in styles)


def test_figures_hold_no_elements_of_names(reports):
    harmless, hostile = (
        [ElementTree.parse(path).getroot() for path in sorted(reports(name).figures) if path.suffix == ".svg"]
        for name in ("harmless", "hostile")
    )
    assert len(hostile) == len(harmless) > 5
    for plain, root in zip(harmless, hostile, strict=True):
        assert {element.tag for element in root.iter()} <= {element.tag for element in plain.iter()}
        assert {a for element in root.iter() for a in element.attrib} <= {
            a for element in plain.iter() for a in element.attrib
        }


def test_tables_come_back_whole(reports):
    paths = reports("hostile")
    table = pd.read_csv(paths.table_csv)
    assert table["cell"].tolist() == LABELS
    assert f"{MAIN}{EVERYTHING}" in table.columns
    drawn = pd.read_csv(paths.folder / "figures" / "main.csv")
    assert {cell for cell in drawn["cell"] if cell[:2].isdigit()} == set(LABELS)


@pytest.mark.parametrize("stem", ["final", "equal_cost", "cost"])
def test_markdown_rows_keep_their_fields(reports, stem):
    tables = {name: (reports(name).folder / f"{stem}.md").read_text() for name in ("harmless", "hostile")}
    fields = {name: [num_fields(line) for line in text.splitlines()] for name, text in tables.items()}
    assert fields["hostile"] == fields["harmless"]
    # One table of the result, one a clock at equal cost, and two of costs.
    assert sum(num > 1 for num in fields["hostile"]) in (2 + len(PAYLOADS), 2 * (2 + len(PAYLOADS)))
    assert not set("<>") & set(tables["hostile"])


def num_fields(line: str) -> int:
    return line.replace("\\\\", "").replace("\\|", "").count("|")


@pytest.mark.parametrize("stem", ["final", "equal_cost", "cost"])
def test_latex_rows_keep_their_fields_and_names_are_no_commands(reports, stem):
    commands = {}
    for name in ("harmless", "hostile"):
        text = (reports(name).folder / f"{stem}.tex").read_text()
        lines = [re.sub(r"\\[{}$&#_%]", "", line) for line in text.splitlines() if not line.startswith("%")]
        plain = [re.sub(r"\\text\w+\{\}", "", line) for line in lines]
        commands[name] = [(line.count("&"), re.findall(r"\\\w+|\\\\|[$%#_^~]", line)) for line in plain]
    assert commands["hostile"] == commands["harmless"]
