"""The wheel: what it holds, and a report made by it alone, elsewhere, without torch."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.e2e.conftest import ROOT
from tests.unit.reports.records_factory import MAIN, write_study

REPORT = """
import sys
from studies.cli import main
status = main(["report", sys.argv[1]])
ours = {name.split(".")[0]: module.__file__ for name, module in sys.modules.items()
        if name.split(".")[0] in ("harness", "reports", "studies") and module.__file__}
assert all(path.startswith(sys.argv[2]) for path in ours.values()), ours
assert "torch" not in sys.modules, "a report must start without torch"
sys.exit(status)
"""


def run(command: list[str], folder: Path, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run elsewhere than in the source tree, which must not be importable."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    result = subprocess.run(command, capture_output=True, text=True, timeout=280, env=environment, cwd=folder)
    assert result.returncode == 0, result.stdout + result.stderr
    return result


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the source tree, so that no build folder appears in it; without network."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    everywhere, at_the_root = (
        shutil.ignore_patterns(".*", "*.egg-info", "__pycache__"),
        {"runs", "cache", "build", "dist"},
    )

    def ignored(at: str, names: list[str]) -> set[str]:
        return everywhere(at, names) | (at_the_root & set(names) if Path(at) == ROOT else set())

    shutil.copytree(ROOT, source, ignore=ignored)
    run([sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder)], source)
    (built,) = folder.glob("*.whl")
    return built


@pytest.mark.slow
def test_it_holds_the_packages_and_their_data_and_no_tests(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    own = {name for name in names if not name.split("/")[0].endswith(".dist-info")}
    assert {name.split("/")[0] for name in own} == {"harness", "methods", "studies", "reports"}
    for folder in ("harness", "methods", "studies", "reports"):
        # Every file of these folders is code or data that runs need.
        files = [path.relative_to(ROOT) for path in (ROOT / folder).rglob("*") if path.is_file()]
        wanted = {str(path) for path in files if "__pycache__" not in path.parts and not path.name.startswith(".")}
        assert wanted == {name for name in own if name.startswith(f"{folder}/")}
    for name in (
        "harness/assets/digits_autoencoder/config.json",
        "harness/assets/digits_autoencoder/diffusion_pytorch_model.safetensors",
        "studies/presets/digits.yaml",
        "reports/claims.yaml",
        "reports/published/published_results.csv",
        "reports/page/templates/page.html",
    ):
        assert name in own


@pytest.mark.slow
def test_it_reports_a_study_elsewhere(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    options = ["--quiet", "--no-deps", "--no-index", "--no-compile", "--target", str(site)]
    run([sys.executable, "-m", "pip", "install", *options, str(wheel)], tmp_path)
    assert (site / "bin" / "ditbench").is_file()
    study = write_study(tmp_path / "runs", {"sit": "sit", "repa": "repa"}, seeds=(0,))

    result = run([sys.executable, "-c", REPORT, str(study), str(site)], tmp_path, site)

    assert result.stdout.splitlines()[0] == f"{MAIN} after 800 steps"
    assert "† The method was trained towards features" in result.stdout
    assert result.stdout.splitlines()[-1] == f"report: {study / 'report' / 'index.html'}"
    assert (study / "report" / "index.html").is_file()
    assert (study / "report" / "figures" / "main.csv").is_file()
