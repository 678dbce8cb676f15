"""The command line's two stages: what starts without torch, exit statuses, one-line errors, printed configs."""

import importlib
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from harness.errors import UserError
from studies import cli
from studies.terminal import quiet

ROOT = Path(__file__).parents[3]


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Sequence[str]], int]], None]:
    """Replace the command `doctor` by a function."""

    def replace(command: Callable[[Sequence[str]], int]) -> None:
        module = ModuleType("studies.commands.doctor")
        module.main = command  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "studies.commands.doctor", module)

    return replace


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=environment, cwd=ROOT
    )


# -- dispatch -------------------------------------------------------------------------------------------------------


def test_the_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    printed = capsys.readouterr().out
    for name, text in cli.COMMANDS.items():
        assert any(line.split() == [name, *text.split()] for line in printed.splitlines()), name


def test_without_a_command_the_help_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    assert cli.main(["--debug"]) == 2
    assert "usage: ditbench COMMAND" in capsys.readouterr().out


def test_every_command_has_its_module() -> None:
    files = {path.stem for path in (ROOT / "studies" / "commands").glob("*.py")} - {"__init__", "common"}
    assert files == {name.replace("-", "_") for name in cli.COMMANDS}
    for name in files:
        assert callable(importlib.import_module(f"studies.commands.{name}").main)


def test_words_go_to_the_command_and_its_status_comes_back(
    stub: Callable[[Callable[[Sequence[str]], int]], None],
) -> None:
    given: list[list[str]] = []

    def command(words: Sequence[str]) -> int:
        given.append(list(words))
        return 1

    stub(command)
    assert cli.main(["doctor", "a", "--debug", "--format", "json"]) == 1
    assert given == [["a", "--format", "json"]]


def test_what_starts_without_torch() -> None:
    """Help and wrong words answer at once; `report` is tested on a study where the wheel is."""
    code = """
import sys
from studies.cli import main
helped = ("report", "claims", "methods", "doctor", "sync")
for words in (["--help"], ["nothing"], ["report"], *([name, "--help"] for name in helped)):
    try:
        main(words)
    except SystemExit as end:
        assert end.code == 0, words
heavy = {"torch", "pandas", "mlflow", "jsonargparse"} & sys.modules.keys()
assert not heavy, heavy
"""
    result = run_python(code)
    assert result.returncode == 0, result.stderr


# -- errors ---------------------------------------------------------------------------------------------------------


def raising(error: BaseException) -> Callable[[Sequence[str]], int]:
    def command(words: Sequence[str]) -> int:
        raise error

    return command


def test_a_wrong_input_is_one_line_and_status_2(
    stub: Callable[[Callable[[Sequence[str]], int]], None], capsys: pytest.CaptureFixture[str]
) -> None:
    stub(raising(UserError("data.path is\n  wrong: give\nanother")))
    assert cli.main(["doctor"]) == 2
    assert capsys.readouterr() == ("", "ditbench: data.path is wrong: give another\n")
    assert cli.main(["doctor", "--debug"]) == 2
    shown = capsys.readouterr().err
    assert "Traceback (most recent call last):" in shown
    assert shown.endswith("\nditbench: data.path is wrong: give another\n")


def test_a_bug_keeps_its_traceback(stub: Callable[[Callable[[Sequence[str]], int]], None]) -> None:
    stub(raising(ValueError("not for users")))
    with pytest.raises(ValueError, match="not for users"):
        cli.main(["doctor"])


def test_an_interrupt_says_how_to_go_on(
    stub: Callable[[Callable[[Sequence[str]], int]], None], capsys: pytest.CaptureFixture[str]
) -> None:
    stub(raising(KeyboardInterrupt()))
    assert cli.main(["doctor"]) == 130
    said = "ditbench: interrupted; run again, train, compare, ablate go on from the last checkpoint\n"
    assert capsys.readouterr().err == said


def test_a_reader_that_went_away_is_no_error() -> None:
    code = """
import sys, types
from studies.cli import main
module = types.ModuleType("studies.commands.doctor")
module.main = lambda words: [print("x" * 100) for _ in range(10_000)] and 0
sys.modules["studies.commands.doctor"] = module
sys.exit(main(["doctor"]))
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, cwd=ROOT
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=60) == 0
    assert process.stderr.read() == b""
    process.stderr.close()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["nothing"], "command 'nothing' is not known: there are train, compare, ablate, evaluate, "),
        (["report"], "report: the following arguments are required: study; see ditbench report --help"),
        (["report", "a", "--all"], "report: unrecognized arguments: --all; see ditbench report --help"),
        (["methods", "--format", "xml"], "methods: argument --format: invalid choice: 'xml' (choose from"),
        (["doctor", "--all"], "doctor: unrecognized arguments: --all"),
        (["report", "/nowhere"], "/nowhere holds no runs: name a study folder such as runs/digits"),
        (["evaluate", "/nowhere"], "/nowhere/manifest.json is missing: is this a run folder of ditbench?"),
        (["evaluate", "/nowhere", "--format", "xml"], "argument --format: invalid choice: 'xml'"),
        (["evaluate", "/nowhere", "--evaluation.seeed", "1"], "did you mean 'evaluation.seed'?"),
        (["sample"], "the following arguments are required: run"),
        (["train", "--seed", "one"], "seed is one: give a whole number"),
        (["prepare", "--verify", "all", "--config", "digits"], "--verify is 'all': give touched or full"),
        (["prepare", "--train_autoencoder", "--config", "digits"], "--out is empty: name the folder"),
    ],
)
def test_wrong_words(words: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(words) == 2
    printed, line = capsys.readouterr()
    assert printed == ""
    assert line.startswith("ditbench: ")
    assert expected in line
    assert line.count("\n") == 1


# -- help and printed configs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(cli.COMMANDS))
def test_every_command_explains_its_options(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main([name, "--help"])
    assert end.value.code == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"usage: ditbench {name} ")
    if name in ("train", "compare", "prepare"):
        text = " ".join(printed.split())
        for expected in ("Learning rate, constant.", "Budget of a cell in that unit;", "Weight of the term."):
            assert expected in text
    if name == "compare":
        assert "--methods" in printed
        assert "--method " not in printed


def printed_config(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert cli.main([*words, "--print_config"]) == 0
    return capsys.readouterr().out


def test_a_printed_config_is_resolved_and_can_be_read_back(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = ("--model.name", "SiT-nano/2", "--method", "repa+vae_repa", "--seed", "3", "--optimizer.lr", "2e-5")
    printed = printed_config(capsys, "train", "--config", "digits", *words)
    values = yaml.safe_load(printed)
    # 6 blocks, width 128: 8/28 and 2/12 of the depth, rounded; heads of 4 D and 2 D
    assert (values["repa"]["block"], values["repa"]["head_width"]) == (2, 512)
    assert (values["vae_repa"]["block"], values["vae_repa"]["head_width"]) == (1, 256)
    assert (values["method"], values["seed"], values["optimizer"]["lr"]) == ("repa+vae_repa", 3, 2e-5)
    path = tmp_path / "printed.yaml"
    path.write_text(printed)
    assert printed_config(capsys, "train", "--config", str(path)) == printed


def test_compare_prints_a_config_for_every_cell(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = ["--cells", "{a: {method: sit}, b: {method: sra, sra: {block: 4}}}"]
    cells = list(yaml.safe_load_all(printed_config(capsys, "compare", "--config", "digits", *words)))
    assert [cell["cell"] for cell in cells] == ["a", "b"]
    assert cells[1]["sra"]["block"] == 4
    assert "sra" not in cells[0]


def test_printing_refuses_what_running_would(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train", "--config", "digits", "--method", "repa", "--repa.block", "7", "--print_config"]
    assert cli.main(words) == 2
    assert capsys.readouterr().err == "ditbench: repa.block is 7: the backbone has blocks 1 to 6\n"


def test_what_the_environment_says_to_libraries_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in quiet.LIBRARY_SETTINGS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "3")
    quiet.quiet_libraries()
    assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "3"
    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"


def test_offline_holds_for_this_command_and_all_it_starts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    assert cli.main(["methods"]) == 0 and os.environ["HF_HUB_OFFLINE"] == "0"
    assert cli.main(["methods", "--offline"]) == 0 and os.environ["HF_HUB_OFFLINE"] == "1"
    assert "--offline never tries" in cli.usage()
