"""Checkpoints: written whole or not at all, read without executing anything, damage named."""

import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from harness import checkpoint
from harness.checkpoint import GROUPS, Counters
from harness.errors import UserError
from harness.records import file_digest, read_json, write_json
from harness.weights import load_tensors

COUNTERS = Counters(step=7, train_seconds=1.5, trace="ab" * 32)


def tensors(value: float = 1.0) -> dict[str, dict[str, Tensor]]:
    """A few tensors in every group, with the types that a run has; the method keeps no state."""
    generator = torch.Generator().manual_seed(0)
    drawn = {group: {"w": value * torch.randn(3, 4, generator=generator)} for group in GROUPS}
    drawn["backbone"]["transposed"] = torch.arange(6.0).reshape(2, 3).T
    drawn["optimizer"] = {"0.step": torch.tensor(7.0), "0.exp_avg": torch.full((2,), value)}
    return {**drawn, "method": {}}


def assert_equal(found: Mapping[str, Mapping[str, Tensor]], wanted: Mapping[str, Mapping[str, Tensor]]) -> None:
    assert found.keys() == wanted.keys()
    for group in wanted:
        assert found[group].keys() == wanted[group].keys(), group
        for name, value in wanted[group].items():
            assert torch.equal(found[group][name], value), f"{group} {name}"
            assert found[group][name].dtype == value.dtype


class Evil:
    """Pickles to a call that leaves a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.mark,)


@pytest.fixture
def evil(tmp_path: Path) -> tuple[bytes, Path]:
    """The bytes of a malicious pickle, and the file that exists once it was executed."""
    mark = tmp_path / "executed"
    content = pickle.dumps(Evil(mark), protocol=2)
    pickle.loads(content)
    assert mark.exists(), "the pickle does nothing, so these tests could not fail"
    mark.unlink()
    return content, mark


def test_a_round_trip_gives_the_same_bits(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, "step_00000007", tensors(), COUNTERS)
    found, counters = checkpoint.load(tmp_path / "step_00000007")
    assert_equal(found, tensors())
    assert counters == COUNTERS


def test_saving_again_replaces_the_whole_checkpoint(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, "step_00000007", tensors(1.0), COUNTERS)
    checkpoint.save(tmp_path, "step_00000007", tensors(2.0), COUNTERS)
    assert_equal(checkpoint.load(tmp_path / "step_00000007")[0], tensors(2.0))
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000007"]


@pytest.mark.parametrize("group", GROUPS)
def test_a_damaged_file_is_refused_and_named(tmp_path: Path, group: str) -> None:
    checkpoint.save(tmp_path, "step_00000007", tensors(), COUNTERS)
    file = tmp_path / "step_00000007" / f"{group}.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match=rf"{group}\.safetensors is damaged: remove .*step_00000007, and"):
        checkpoint.load(file.parent)
    file.unlink()
    with pytest.raises(UserError, match=rf"{group}\.safetensors is damaged"):
        checkpoint.load(file.parent)


def test_a_broken_state_file_is_named(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, "step_00000007", tensors(), COUNTERS)
    (tmp_path / "step_00000007" / "state.json").write_text('{"counters": {"step"')
    with pytest.raises(UserError, match=r"state\.json is not valid JSON"):
        checkpoint.load(tmp_path / "step_00000007")


def test_what_an_interrupted_write_leaves_is_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.save(tmp_path, "step_00000004", tensors(), COUNTERS)

    def killed(path: Path, value: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(checkpoint, "write_json", killed)
        checkpoint.save(tmp_path, "step_00000008", tensors(), COUNTERS)
    assert [path.name for path in checkpoint.whole(tmp_path)] == ["step_00000004"]
    # A power cut runs no clean-up: a temporary folder, and a folder that lacks its state, are not checkpoints either.
    (tmp_path / ".step_00000012.99.tmp").mkdir()
    (tmp_path / "step_00000016").mkdir()
    (tmp_path / "step_00000016" / "backbone.safetensors").write_bytes(b"half")
    assert [path.name for path in checkpoint.whole(tmp_path)] == ["step_00000004"]


def test_prune_keeps_the_last_ones_and_removes_leftovers(tmp_path: Path) -> None:
    steps = (4, 12, 8, 100)
    for step in steps:
        checkpoint.save(tmp_path, checkpoint.name_of(step), tensors(), COUNTERS)
    checkpoint.save(tmp_path, "diverged_00000009", tensors(), COUNTERS)
    checkpoint.save_ema(tmp_path, 4, tensors()["ema"])
    (tmp_path / ".step_00000016.99.tmp").mkdir()
    (tmp_path / ".step_00000016.99.tmp" / "heads.safetensors").write_bytes(b"half")
    (tmp_path / ".step_00000100.99.old").mkdir()
    (tmp_path / ".ema_00000012.safetensors.tmp").write_bytes(b"half")

    checkpoint.prune(tmp_path, 2)

    kept = sorted(path.name for path in tmp_path.iterdir())
    assert kept == ["diverged_00000009", "ema_00000004.safetensors", "step_00000012", "step_00000100"]


def test_an_ema_is_found_by_step_or_as_the_last(tmp_path: Path) -> None:
    for step in (4, 100, 12):
        checkpoint.save_ema(tmp_path, step, {"w": torch.full((2,), float(step))})
    assert checkpoint.load_ema(tmp_path)[1] == 100
    found, step = checkpoint.load_ema(tmp_path, 12)
    assert (found["w"].tolist(), step) == ([12.0, 12.0], 12)
    with pytest.raises(UserError, match=r"no EMA backbone of step 5 in .*: give one of 4, 12, 100$"):
        checkpoint.load_ema(tmp_path, 5)
    with pytest.raises(UserError, match="holds no EMA backbone: train the run"):
        checkpoint.load_ema(tmp_path / "elsewhere")


def test_optimizer_state_survives_as_named_tensors() -> None:
    def trained(steps: int) -> tuple[torch.nn.Linear, torch.optim.AdamW]:
        layer = torch.nn.Linear(3, 2)
        torch.nn.init.constant_(layer.weight, 0.5)
        torch.nn.init.zeros_(layer.bias)
        optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, fused=True)
        for _ in range(steps):
            layer(torch.ones(4, 3)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        return layer, optimizer

    layer, optimizer = trained(3)
    saved = {name: value.clone() for name, value in checkpoint.optimizer_tensors(optimizer).items()}
    assert set(saved) == {f"{i}.{name}" for i in (0, 1) for name in ("step", "exp_avg", "exp_avg_sq")}
    assert float(saved["0.step"]) == 3

    other, fresh = trained(0)
    other.load_state_dict(layer.state_dict())
    checkpoint.restore_optimizer(fresh, saved)
    for module, moved in ((layer, optimizer), (other, fresh)):
        module(torch.ones(4, 3)).square().sum().backward()
        moved.step()
    assert torch.equal(layer.weight, other.weight)


# -- nothing in a file is executed ------------------------------------------------------------------------------------


@pytest.mark.parametrize("has_digest", [False, True])
def test_a_pickle_among_the_tensors_is_refused(tmp_path: Path, evil: tuple[bytes, Path], has_digest: bool) -> None:
    """Also one whose digest was entered in state.json."""
    content, mark = evil
    checkpoint.save(tmp_path, "step_00000007", tensors(), COUNTERS)
    folder = tmp_path / "step_00000007"
    (folder / "backbone.safetensors").write_bytes(content)
    if has_digest:
        state = read_json(folder / "state.json")
        state["sha256"]["backbone"] = file_digest(folder / "backbone.safetensors")
        write_json(folder / "state.json", state)
    with pytest.raises(UserError, match=r"backbone\.safetensors is damaged"):
        checkpoint.load(folder)
    assert not mark.exists()


def test_a_pickle_beside_the_tensors_is_not_read(tmp_path: Path, evil: tuple[bytes, Path]) -> None:
    content, mark = evil
    checkpoint.save(tmp_path, "step_00000007", tensors(), COUNTERS)
    for name in ("backbone.pt", "optimizer.pt", "state.pt"):
        (tmp_path / "step_00000007" / name).write_bytes(content)
    (tmp_path / "step_00000009.pt").write_bytes(content)
    assert [path.name for path in checkpoint.whole(tmp_path)] == ["step_00000007"]
    assert_equal(checkpoint.load(tmp_path / "step_00000007")[0], tensors())
    assert not mark.exists()


def test_a_pickle_in_place_of_an_ema_is_refused(tmp_path: Path, evil: tuple[bytes, Path]) -> None:
    content, mark = evil
    checkpoint.ema_path(tmp_path, 7).write_bytes(content)
    with pytest.raises(UserError, match=r"ema_00000007\.safetensors is damaged"):
        checkpoint.load_ema(tmp_path)
    assert not mark.exists()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_pickle_as_pretrained_weights_is_refused(tmp_path: Path, evil: tuple[bytes, Path], suffix: str) -> None:
    content, mark = evil
    plain, zipped = tmp_path / f"plain{suffix}", tmp_path / f"zipped{suffix}"
    plain.write_bytes(content)
    torch.save({"weight": torch.zeros(2), "extra": Evil(mark)}, zipped)
    for path in (plain, zipped):
        with pytest.raises(UserError, match=f"{path.name} is not a file of plain weights"):
            load_tensors(path)
    assert not mark.exists()
