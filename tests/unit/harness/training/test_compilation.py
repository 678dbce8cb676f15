"""What `compile: auto` comes to, and what must be there for it."""

from dataclasses import replace

import pytest
import torch

from harness.config import BudgetConfig, DataConfig, RunConfig, RuntimeConfig, training_digest
from harness.errors import UserError
from harness.training import compilation
from harness.training.compilation import check_compiler, compile_blocks, forward_gmacs, nominal_seconds, resolve_compile
from studies.configs.cells import comparison
from studies.configs.settings import build_parser, parse

CPU, CUDA, MPS = torch.device("cpu"), torch.device("cuda"), torch.device("mps")
LONG = BudgetConfig(amount=400_000)


@pytest.fixture(autouse=True)
def compilers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compilation, "has_compiler", lambda device: True)


def asking(compile: bool | str, budget: BudgetConfig = LONG) -> RunConfig:
    runtime = RuntimeConfig(compile=compile)  # type: ignore[arg-type]
    return RunConfig(data=DataConfig(name="digits"), runtime=runtime, budget=budget)


@pytest.mark.parametrize(
    ("name", "gmacs"), [("SiT-S/2", 6.05), ("SiT-B/2", 23.00), ("SiT-L/2", 80.69), ("SiT-XL/2", 118.62)]
)
def test_the_blocks_cost_almost_all_of_the_counted_backbone(shape_of, name, gmacs) -> None:
    """The counts are fvcore's, as they stand in the README."""
    assert forward_gmacs(shape_of(name)) == pytest.approx(gmacs, rel=0.01)


@pytest.mark.parametrize(
    ("unit", "amount", "seconds"),
    # 4 images of 5 GFLOPs are a step of 20 GFLOPs, 2 seconds at 10 GFLOP/s
    [("steps", 30, 60.0), ("images", 30, 15.0), ("train_gflops", 30.0, 3.0), ("seconds", 30.0, 30.0)],
)
def test_how_long_a_budget_lasts(unit, amount, seconds) -> None:
    assert nominal_seconds(BudgetConfig(unit=unit, amount=amount), 5.0, 4, 10.0) == pytest.approx(seconds)


@pytest.mark.parametrize("asked", [True, False])
@pytest.mark.parametrize("amount", [1, 400_000])
def test_true_and_false_are_taken_as_they_are(shape_of, asked, amount) -> None:
    assert resolve_compile(asking(asked, BudgetConfig(amount=amount)), shape_of("SiT-B/2"), MPS) is asked


@pytest.mark.parametrize(("device", "gflops"), [(CPU, 1e5), (CUDA, 1e8)])
def test_auto_compiles_from_a_thousand_nominal_seconds_on(shape_of, device, gflops) -> None:
    for amount, expected in ((0.999 * gflops, False), (1.001 * gflops, True)):
        budget = BudgetConfig(unit="train_gflops", amount=amount)
        assert resolve_compile(asking("auto", budget), shape_of("SiT-B/2"), device) is expected


def test_steps_count_with_their_batch_and_model(shape_of) -> None:
    """256 images of 6 x 22.99 GFLOPs are 35,319 GFLOPs a step, so 1e8 GFLOPs are 2,831 steps of B/2."""
    for steps, expected in ((2_800, False), (2_860, True)):
        config = asking("auto", BudgetConfig(amount=steps))
        assert resolve_compile(config, shape_of("SiT-B/2"), CUDA) is expected
        assert resolve_compile(config, shape_of("SiT-L/2"), CUDA)
        assert not resolve_compile(config, shape_of("SiT-S/2"), CUDA)


@pytest.mark.parametrize("unit", ["steps", "seconds"])
def test_auto_is_off_where_nothing_is_known_or_there_is_no_compiler(shape_of, monkeypatch, unit) -> None:
    config, shape = asking("auto", BudgetConfig(unit=unit, amount=10**9)), shape_of("SiT-B/2")
    assert resolve_compile(config, shape, CPU)
    assert not resolve_compile(config, shape, MPS)
    monkeypatch.setattr(compilation, "has_compiler", lambda device: False)
    assert not resolve_compile(config, shape, CPU)


@pytest.mark.parametrize(
    ("preset", "device", "expected"),
    [("digits", CPU, False), ("digits", CUDA, False), ("imagenet256-b2", CUDA, True), ("imagenet256-xl2", CUDA, True)],
)
def test_presets(shape_of, preset, device, expected) -> None:
    """The embedded one, whose references are eager, is too short at any size; the others are long."""
    parser = build_parser("compare", "")
    cell = comparison(parser, parse(parser, ["--config", preset])).cells[0]
    assert cell.runtime.compile == (False if preset == "digits" else "auto")
    cell = replace(cell, runtime=RuntimeConfig(compile="auto"))
    assert resolve_compile(cell, shape_of(cell.model.name), device) is expected


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


def test_compiled_runs_share_the_training_digest_of_no_eager_one(shape_of) -> None:
    digests = {
        training_digest(replace(config, runtime=replace(config.runtime, compile=resolve_compile(config, shape, CPU))))
        for config, shape in ((asking(c), shape_of("SiT-B/2")) for c in (True, "auto", False))
    }
    assert len(digests) == 2
