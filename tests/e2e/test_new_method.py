"""A new method is one new file: the one printed in docs/new-method.md, in a copy of the tree, with no other edit."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest

from harness.records.run_folder import RunFolder
from tests.e2e.conftest import ROOT, Place, run_process

PAGE = (ROOT / "docs" / "new-method.md").read_text()
NAME = "class_head"
MAX_LINES = 40


def printed_file() -> str:
    """The Python file on the page."""
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    return code


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tree with the new file in it."""
    copy = tmp_path_factory.mktemp("tree") / "ditbench"
    for folder in ("harness", "methods", "studies", "reports", "tests"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", copy)
    (copy / "methods" / f"{NAME}.py").write_text(printed_file())
    return copy


def test_the_page_keeps_its_word() -> None:
    assert len(printed_file().splitlines()) < MAX_LINES
    assert f"methods/{NAME}.py" in PAGE
    for path in re.findall(r"\]\(\.\./([\w/.]+)\)", PAGE):
        assert (ROOT / path).is_file(), path


def test_it_is_listed(tree: Path) -> None:
    result = run_process([sys.executable, "-m", "studies.cli", "methods", "--format", "json"], tree, tree)
    assert result.returncode == 0, result.stderr
    rows = {row["method"]: row for row in json.loads(result.stdout)}
    assert rows[NAME]["adds"] == "Lets block k name the class through a linear layer."
    assert "sit" in rows


@pytest.mark.full
def test_the_contract_tests_hold_it_to_the_rules(
    tree: Path, shared_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DITBENCH_TEST_CACHE", str(shared_cache))
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)  # which may add lines to what is printed
    words = ["-m", "pytest", "tests/contract", "-k", NAME, "-p", "no:cacheprovider", "-vv"]
    result = run_process([sys.executable, *words], tree, tree)
    assert result.returncode == 0, result.stdout
    cases = [line for line in result.stdout.splitlines() if f"[{NAME}" in line]
    assert len(cases) >= 8, "one case a rule"
    assert all("PASSED" in case for case in cases), result.stdout
    assert f"test_weight_zero_leaves_the_backbone_bitwise_equal_to_vanilla[{NAME}-fp32]" in result.stdout


@pytest.mark.slow
def test_it_is_compared(tree: Path, shared_cache: Path) -> None:
    place = Place(tree, shared_cache)
    words = place.words(
        *("compare", "--study", "mine", "--methods", f"sit,{NAME}", "--seeds", "0", "--budget.amount", "3"),
        *("--evaluation.points", "1", "--output.log_every", "1", "--output.mlflow", "false", f"--{NAME}.block", "3"),
    )
    result = run_process([sys.executable, "-m", "studies.cli", *words], tree, tree)
    assert (result.returncode, result.stderr) == (0, "")
    sit, new = (RunFolder(place.runs / "mine" / cell / "seed0") for cell in ("sit", NAME))
    facts = new.manifest()["method_facts"]
    # SiT-pico is 64 wide, and the digits have ten classes and the null class.
    assert (facts["taps"], facts["terms"], facts["head_parameters"]) == ([3], {NAME: 0.1}, 64 * 11 + 11)
    assert new.manifest()["digests"] == sit.manifest()["digests"]
    assert [line["trace"] for line in new.lines("train")] == [line["trace"] for line in sit.lines("train")]
    assert all(line["terms"].keys() == {NAME} for line in new.lines("train"))
    assert new.lines("eval")[0]["gradient_norms"][NAME] > 0
    page = (place.runs / "mine" / "report" / "index.html").read_text()
    assert NAME in page
    assert NAME in result.stdout
