"""What is compiled, what must be there for it, and which presets ask for it."""

import pytest
import torch

from harness.config import DataConfig, RunConfig, RuntimeConfig, training_digest
from harness.errors import UserError
from harness.training import compilation
from harness.training.compilation import check_compiler, compile_blocks
from studies.configs.cells import comparison
from studies.configs.settings import build_parser, parse, preset_names

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def compilers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compilation, "has_compiler", lambda device: True)


def asking(compile: bool) -> RunConfig:
    return RunConfig(data=DataConfig(name="digits"), runtime=RuntimeConfig(compile=compile))


def test_presets() -> None:
    """The references of the embedded one are eager, and it is too short to gain; the others are long."""
    parser = build_parser("compare", "")
    compiled = {
        name: comparison(parser, parse(parser, ["--config", name])).cells[0].runtime.compile for name in preset_names()
    }
    assert compiled == {name: name.startswith("imagenet") for name in compiled}


@pytest.mark.parametrize(("device", "missing"), [(CPU, r"a C\+\+ compiler such as g\+\+"), (CUDA, "Triton")])
def test_what_cannot_be_compiled_is_refused(monkeypatch, device, missing) -> None:
    check_compiler(asking(True), device)
    monkeypatch.setattr(compilation, "has_compiler", lambda device: False)
    check_compiler(asking(False), device)
    with pytest.raises(UserError, match=f"^runtime.compile is true and {missing} was not found: install it, or give "):
        check_compiler(asking(True), device)


def test_compilers_are_looked_for(monkeypatch, tmp_path) -> None:
    monkeypatch.undo()
    monkeypatch.setenv("CXX", str(tmp_path / "g++"))
    assert not compilation.has_compiler(CPU)
    (tmp_path / "g++").write_text("#!/bin/sh\n")
    (tmp_path / "g++").chmod(0o755)
    assert compilation.has_compiler(CPU)


def test_names_of_weights_stay(make_backbone) -> None:
    backbone = make_backbone()
    names = list(backbone.state_dict())
    compile_blocks(backbone)
    assert list(backbone.state_dict()) == names


def test_compiled_runs_share_the_training_digest_of_no_eager_one() -> None:
    assert training_digest(asking(True)) != training_digest(asking(False))


def test_auto_is_refused_with_the_values_there_are() -> None:
    with pytest.raises(UserError, match=r"^runtime\.compile is auto: give true or false$"):
        parse(build_parser("compare", ""), ["--config", "digits", "--runtime.compile", "auto"])
