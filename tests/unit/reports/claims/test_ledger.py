"""The claims ledger as text, files, a section of the page, and the command `ditbench claims`."""

import csv
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from harness.records.files import write_json
from harness.records.run_folder import RunFolder, UserError
from reports.claims import ledger as claims_ledger
from reports.claims.statements import load_ledger
from reports.costs import table as costs
from reports.result import section as result
from reports.study.load import load_study
from studies import cli
from tests.unit.reports.records_factory import MAIN, run_folder, set_values, write_ablation, write_lines, write_run

ROOT = Path(__file__).parents[4]
VAE_REPA = {"block": 1, "weight": 1.0, "loss": "smooth_l1", "head_layers": 5, "t_min": 0.0, "t_max": 1.0}
SECTIONS: dict[str, dict[str, Any] | None] = {"sit": None, "repa": {"block": 2, "weight": 0.5}, "vae_repa": VAE_REPA}
BETTER = "vae-repa-better-than-vanilla"
NUM_CLAIMS = len(load_ledger().claims)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """VAE-REPA differs from vanilla by -3, -5, -4, REPA by -1, -3 and -2; until the last evaluation all have 300."""
    runs = tmp_path_factory.mktemp("runs")
    for cell, section in SECTIONS.items():
        for seed in range(3):
            write_run(runs, "digits", cell, cell, seed, "sit", section=section)
    study = runs / "digits"
    for folder in map(RunFolder, study.glob("*/seed*")):
        lines = [{**line, "metrics": {**line["metrics"], MAIN: 300.0}} for line in folder.lines("eval")]
        write_lines(folder, "eval", lines)
    set_values(study, "sit", 20.0, 22.0, 24.0)
    set_values(study, "vae_repa", 17.0, 17.0, 20.0)
    set_values(study, "repa", 19.0, 19.0, 22.0)
    return study


@pytest.fixture
def study(written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy, in a working folder of its own."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(written, tmp_path / "digits", ignore=shutil.ignore_patterns("*.png"))
    return Path("digits")


def row(judged: Any, claim: str) -> dict[str, str]:
    (found,) = [row for row in claims_ledger.rows(judged) if row["claim"] == claim]
    return dict(found)


# -- text -------------------------------------------------------------------------------------------------------------


def test_a_decided_claim_in_words(study: Path) -> None:
    found = row(claims_ledger.judge_paths([study]), BETTER)
    assert found == {
        "claim": BETTER,
        "says": "VAE-REPA has a better FID than vanilla at equal steps (VAE-REPA, Tables 1 and 2; secondary)",
        "published": "28.89 against 33.02 (SiT-B/2, 400k steps); 14.3 (SiT-L/2, 400k steps); 8.2 (SiT-XL/2, 1M steps)",
        "verdict": "holds on digits, SiT-nano/2",
        "numbers": "−4.00 [−6.48, −1.52] (18.00 against 22.00)",
        "pairs of seeds": "3, 3 as claimed",
        "study": "digits",
        "of": f"vae_repa − sit, {MAIN}",
        "scale": "SiT-nano/2 on digits after 800 steps, not ImageNet",
        "missing": "–",
        "page": "–",
    }


def test_claims_that_are_not_decided_say_why(study: Path) -> None:
    judged = claims_ledger.judge_paths([study])
    favoured = row(judged, "repa-better-than-vanilla")
    assert favoured["verdict"] == "undecided"
    assert favoured["numbers"] == "−2.00 [−4.48, +0.48] † (20.00 against 22.00)"
    assert favoured["missing"] == "the interval holds 0"
    nothing = row(judged, "sra-better-than-vanilla")
    assert (nothing["verdict"], nothing["numbers"], nothing["missing"]) == ("undecided", "–", "no cell of sra")
    bias = "† The metric's network is of the family that repa was trained towards."
    assert bias in claims_ledger.notes(judged)


def test_counts_and_speed_ups_in_words(study: Path) -> None:
    judged = claims_ledger.judge_paths([study])
    compute = row(judged, "vae-repa-4-percent-compute")
    assert (compute["numbers"], compute["pairs of seeds"]) == ("+9.7%", "exact")
    assert compute["published"] == "4% (SiT-XL/2)"
    assert row(judged, "vae-repa-adds-to-repa")["published"].startswith("a difference of −3.1 (SiT-XL/2, 100k steps); ")
    assert row(judged, "repa-17.5-times-faster")["published"] == "7.9 against 8.3 (SiT-XL/2, 400k against 7M steps)"
    assert compute["verdict"] == "does not hold on digits, SiT-nano/2"
    assert row(judged, "vae-repa-no-external-parameters")["numbers"] == "0"
    faster = row(judged, "repa-17.5-times-faster")
    assert faster["numbers"] == "1.00 times † (800 against 800 steps)"
    assert faster["missing"].startswith("all seeds are there at the same evaluation")
    assert faster["of"] == f"repa / sit, {MAIN}"
    step = row(judged, "vae-repa-faster-step-than-repa")
    assert step["numbers"] == "+0.00 [+0.00, +0.00] (75.00 against 75.00) ms a step"
    assert step["missing"] == "the interval holds 0"


def test_the_summary_counts_claims_and_names_those_decided_both_ways(study: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(study, tmp_path / "other"))
    set_values(other, "vae_repa", 23.0, 27.0, 28.0)
    sentences = claims_ledger.summary(claims_ledger.judge_paths([study, other]))
    # Holding: the claim itself in one study, and no external parameters. Not holding: the claim itself in the other,
    # and the extra compute.
    assert sentences == [
        f"{NUM_CLAIMS} claims: 2 holding at another scale, 2 not holding at another scale and "
        f"{NUM_CLAIMS - 3} undecided.",
        f"{BETTER} is decided both ways: holds on digits, SiT-nano/2 (study digits) and "
        "does not hold on digits, SiT-nano/2 (study other).",
    ]


def test_the_same_folder_twice_is_one_study(study: Path) -> None:
    assert len(claims_ledger.rows(claims_ledger.judge_paths([study, study.resolve()]))) == NUM_CLAIMS


# -- files ------------------------------------------------------------------------------------------------------------


def test_the_files_hold_the_ledger(study: Path) -> None:
    judged = claims_ledger.judge_paths([study])
    paths = claims_ledger.write(judged, Path("deep/out"))
    assert [path.name for path in paths] == ["claims.json", "claims.csv", "claims.md", "claims.tex"]
    whole = json.loads(paths[0].read_text())
    assert len(whole) == NUM_CLAIMS
    (found,) = next(claim for claim in whole if claim["id"] == BETTER)["evidence"]
    assert (found["verdict"], found["words"]) == ("reproduced", "holds on digits, SiT-nano/2")
    assert found["by_seed"] == {"0": -3.0, "1": -5.0, "2": -4.0}
    assert (found["low"], found["high"]) == pytest.approx((-6.484138, -1.515862), abs=1e-6)
    lines = {line["claim"]: line for line in csv.DictReader(paths[1].read_text().splitlines())}
    assert len(lines) == NUM_CLAIMS
    assert float(lines[BETTER]["low"]) == found["low"]
    assert (lines[BETTER]["pairs"], lines[BETTER]["at_paper_scale"]) == ("3", "False")
    assert lines["sra-better-than-vanilla"]["missing"] == "no cell of sra"
    assert f"| {BETTER} |" in paths[2].read_text()
    latex = paths[3].read_text()
    assert latex.count(r"\toprule") == latex.count(r"\bottomrule") == 1
    assert re.search(rf"^{BETTER} & holds on digits, SiT-nano/2 & .* \\\\$", latex, re.MULTILINE)


def test_a_value_that_is_not_there_is_null(study: Path) -> None:
    shutil.rmtree(study / "vae_repa" / "seed1")
    shutil.rmtree(study / "vae_repa" / "seed2")
    (claim,) = [c for c in claims_ledger.record(claims_ledger.judge_paths([study])) if c["id"] == BETTER]
    (found,) = claim["evidence"]
    assert (found["pairs"], found["difference"], found["low"]) == (1, -3.0, None)


def test_a_folder_that_cannot_be_made_is_one_line(study: Path) -> None:
    Path("file").write_text("")
    with pytest.raises(UserError, match="--out: cannot write to file/out"):
        claims_ledger.write(claims_ledger.judge_paths([study]), Path("file/out"))


def test_the_link_leads_to_the_report(study: Path) -> None:
    (study / "report").mkdir()
    (study / "report" / "index.html").write_text("")
    judged = claims_ledger.judge_paths([study])
    assert row(judged, BETTER)["page"] == "digits/report/index.html#result"
    assert row(judged, "vae-repa-4-percent-compute")["page"] == "digits/report/index.html#cost"
    loaded = load_study(study)
    assert (result.section(loaded).name, costs.section(loaded).name) == ("result", "cost")


def test_the_record_of_the_overhead_command_is_read(study: Path) -> None:
    row_of = {"model": "SiT-XL/2", "targets": "cached", "external_parameters": 0}
    counted = [
        {**row_of, "label": "sit", "method": "sit", "settings": {"sit": {}}, "train_gflops_per_image": 711.70},
        {
            **row_of,
            "label": "vae_repa",
            "method": "vae_repa",
            "train_gflops_per_image": 740.29,
            "settings": {"vae_repa": {**VAE_REPA, "block": 8}},
        },
    ]
    folder = Path("overhead")
    folder.mkdir()
    write_json(folder / "overhead.json", {"control": "sit", "shapes": {"input_size": 32}, "counted": counted})
    (folder / "overhead.md").write_text("")
    judged = claims_ledger.judge_paths([folder])
    found = row(judged, "vae-repa-4-percent-compute")
    assert (found["verdict"], found["numbers"], found["page"]) == ("reproduced", "+4.0%", "overhead/overhead.md")
    assert found["scale"] == "SiT-XL/2"
    assert claims_ledger.summary(judged)[0].startswith(f"{NUM_CLAIMS} claims: 2 reproduced and ")
    write_json(folder / "overhead.json", {"control": "sit"})
    with pytest.raises(UserError, match="is no record of ditbench overhead"):
        claims_ledger.judge_paths([folder])


# -- the page ---------------------------------------------------------------------------------------------------------


def test_a_study_has_a_section_of_the_claims_it_speaks_of(study: Path) -> None:
    section = claims_ledger.section(load_study(study))
    assert section is not None
    assert section.sentences[0].endswith("scale: SiT-nano/2 on digits after 800 steps, not ImageNet.")
    (block,) = section.parts
    told = [row["claim"] for row in block.table.rows]
    assert any(text.startswith("VAE-REPA has a better FID") for text in told)
    assert not any("SRA has" in text for text in told)
    assert len(block.table.numbers) == len(told) < NUM_CLAIMS
    # Beside the page, wherever a report is moved to; here it is not written yet.
    assert {row["page"].split("#")[0] for row in block.table.numbers} == {"index.html"}
    assert section.sentences[-1].startswith(f"Of {NUM_CLAIMS - len(told)} further claims it holds no pair")


def test_a_study_that_speaks_of_none_has_no_section(tmp_path: Path) -> None:
    write_run(tmp_path, "alone", "sit", "sit", 0, "sit")
    assert claims_ledger.section(load_study(tmp_path / "alone")) is None


def test_the_section_of_an_ablation_is_of_all_its_cells(tmp_path: Path) -> None:
    """Its page shows some cells alone: here neither of the pair with block 3."""
    settings = [{"block": block, "t_min": 0.0, "t_max": 1.0} for block in (1, 2, 3, 4)]
    path = write_ablation(tmp_path, settings, settings[0], seeds=(0, 1, 2))
    shown = load_study(path).only(["sit", "vae_repa"])
    section = claims_ledger.section(shown)
    assert section is not None
    pairs = {row["of"] for row in section.parts[0].table.rows}
    assert {f"vae_repa − vae_repa,block=3, {MAIN}", f"vae_repa − vae_repa,block=4, {MAIN}"} <= pairs


# -- the command ------------------------------------------------------------------------------------------------------


def test_the_command_prints_a_block_for_every_claim(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["claims", str(study)]) == 0
    lines = capsys.readouterr().out.splitlines()
    headings = [line for line in lines if re.match(r"[a-z0-9.-]+: (holds|does not hold|undecided)", line)]
    assert len(headings) == NUM_CLAIMS
    start = lines.index(f"{BETTER}: holds on digits, SiT-nano/2")
    fields = [re.split(" {2,}", line) for line in _stripped(lines[start + 1 :])]
    assert fields == [
        ["says", "VAE-REPA has a better FID than vanilla at equal steps (VAE-REPA, Tables 1 and 2; secondary)"],
        ["published", row(claims_ledger.judge_paths([study]), BETTER)["published"]],
        ["numbers", "−4.00 [−6.48, −1.52] (18.00 against 22.00)"],
        ["pairs of seeds", "3, 3 as claimed"],
        ["of", f"vae_repa − sit, {MAIN}"],
        ["study", "digits"],
        ["scale", "SiT-nano/2 on digits after 800 steps, not ImageNet"],
    ]
    nothing = lines.index("sra-better-than-vanilla: undecided")
    assert ["missing", "no cell of sra"] in [line.split(maxsplit=1) for line in _stripped(lines[nothing:])]
    assert lines[-1] == "saved in claims: JSON, CSV, Markdown and LaTeX"
    assert {path.name for path in Path("claims").iterdir()} == {f"claims.{end}" for end in ("json", "csv", "md", "tex")}


def _stripped(lines: list[str]) -> list[str]:
    """The lines up to the first empty one."""
    return [line.strip() for line in lines[: lines.index("")]]


def test_a_terminal_of_100_columns_is_wide_enough(
    study: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cli.main(["claims", str(study)]) == 0
    wide = capsys.readouterr().out
    monkeypatch.setattr("studies.terminal.tables.PIPE_WIDTH", 100)
    assert cli.main(["claims", str(study)]) == 0
    folded = capsys.readouterr().out
    assert max(map(len, wide.splitlines())) > 100 >= max(map(len, folded.splitlines()))
    assert folded.split() == wide.split(), "lines break between words"


def test_the_command_prints_json_and_markdown(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["claims", str(study), "--format", "json", "--out", "out"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["claims"] == json.loads(Path("out/claims.json").read_text())
    assert printed["files"] == [f"out/claims.{end}" for end in ("json", "csv", "md", "tex")]
    assert cli.main(["claims", str(study), "--format", "markdown", "--out", "out"]) == 0
    assert capsys.readouterr().out == Path("out/claims.md").read_text()


def test_a_wrong_folder_is_one_line(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["claims", "nowhere"]) == 2
    assert capsys.readouterr().err == (
        "ditbench: nowhere holds no runs: name a study folder such as runs/digits, or train one first\n"
    )
    assert not Path("claims").exists()
    assert cli.main(["claims"]) == 2
    assert "see ditbench claims --help" in capsys.readouterr().err


def test_the_command_starts_without_torch(study: Path) -> None:
    code = (
        "import sys\nfrom studies.cli import main\n"
        f"assert main(['claims', {str(study.resolve())!r}, '--out', {str(Path('out').resolve())!r}]) == 0\n"
        "assert 'torch' not in sys.modules and 'methods' not in sys.modules"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert run_folder(study, "sit", 0).exists()
