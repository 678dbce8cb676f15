"""Checkpoints: written whole or not at all, read without executing anything, damage named."""

import multiprocessing
import os
import pickle
import re
import resource
import signal
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from harness.errors import StorageError, UserError
from harness.frozen.weights import load_tensors
from harness.records.files import digest, file_digest, read_json, write_json
from harness.training import checkpoint
from harness.training.checkpoint import GROUPS, Counters, Damaged, Found

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


def flips(content: bytes) -> Iterator[bytes]:
    """The content with one bit of one byte flipped: every byte, another bit in each."""
    for offset in range(len(content)):
        flipped = bytearray(content)
        flipped[offset] ^= 1 << offset % 8
        yield bytes(flipped)


@pytest.mark.parametrize("group", GROUPS)
def test_a_damaged_file_is_refused_and_named(tmp_path: Path, group: str) -> None:
    checkpoint.save(tmp_path, "step_00000007", tensors(), COUNTERS)
    file = tmp_path / "step_00000007" / f"{group}.safetensors"
    content = file.read_bytes()
    for damaged in [*flips(content), content[:-1], content[:10], b"", content + b" "]:
        file.write_bytes(damaged)
        with pytest.raises(Damaged, match=rf"{group}\.safetensors is damaged: the same command goes on from the"):
            checkpoint.load(file.parent)
    file.unlink()
    with pytest.raises(Damaged, match=rf"{group}\.safetensors is damaged"):
        checkpoint.load(file.parent)


def test_a_flipped_counter_is_refused(tmp_path: Path) -> None:
    """Every bit of state.json: what still says the same, such as 1E-5 for 1e-5, may be read."""
    checkpoint.save(tmp_path, "step_00000007", tensors(), COUNTERS)
    file = tmp_path / "step_00000007" / "state.json"
    content = file.read_bytes()
    damaged = [content.replace(b'"step": 7', b'"step": 8'), content[:-40], b"[]", b"3", b"{}", *flips(content)]
    for state in damaged:
        file.write_bytes(state)
        with pytest.raises(Damaged, match=r"state\.json is damaged"):
            checkpoint.load(file.parent)


def test_counters_of_another_form_are_refused(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, "step_00000007", tensors(), COUNTERS)
    file = tmp_path / "step_00000007" / "state.json"
    state = read_json(file)
    del state["digest"]
    state["counters"]["unheard_of"] = 1
    write_json(file, {**state, "digest": digest(state)})
    with pytest.raises(Damaged, match=r"state\.json is damaged"):
        checkpoint.load(file.parent)


# -- what a continued run finds ---------------------------------------------------------------------------------------


def step_of(path: Path) -> Counters:
    return Counters(step=int(path.name[-8:]))


@pytest.fixture
def three(tmp_path: Path) -> list[Path]:
    """Checkpoints of steps 4, 8 and 12, each with its step as value."""
    paths = [tmp_path / checkpoint.name_of(step) for step in (4, 8, 12)]
    for path in paths:
        checkpoint.save(tmp_path, path.name, tensors(float(path.name[-8:])), step_of(path))
    return paths


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


def test_the_newest_checkpoint_is_found(tmp_path: Path, three: list[Path]) -> None:
    found = checkpoint.newest(tmp_path)
    assert found.tensors is not None
    assert_equal(found.tensors, tensors(12.0))
    assert (found.counters, found.notices) == (Counters(step=12), ())
    assert sorted(tmp_path.iterdir()) == three


def test_without_checkpoints_a_run_starts_anew(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "missing"):
        assert checkpoint.newest(folder) == Found(tensors=None, counters=Counters(), notices=())


@pytest.mark.parametrize("missing", [False, True])
def test_damaged_checkpoints_are_set_aside_and_told(tmp_path: Path, three: list[Path], missing: bool) -> None:
    flip(three[1] / "state.json")
    file = three[2] / "heads.safetensors"
    if missing:
        file.unlink()
    else:
        flip(file)
    found = checkpoint.newest(tmp_path)
    assert found.tensors is not None
    assert_equal(found.tensors, tensors(4.0))
    assert found.counters == Counters(step=4)
    assert found.notices == (
        f"{file} is damaged: its checkpoint is set aside as .step_00000012.damaged",
        f"{three[1] / 'state.json'} is damaged: its checkpoint is set aside as .step_00000008.damaged",
        "the run goes on from step_00000004",
    )
    again = checkpoint.newest(tmp_path)  # as another process of the same run would
    assert (again.counters, again.notices) == (found.counters, ())

    checkpoint.prune(tmp_path, 1)
    assert list(tmp_path.iterdir()) == [three[0]], "the good one was kept, not a damaged one"


def test_when_all_are_damaged_the_run_starts_anew(tmp_path: Path, three: list[Path]) -> None:
    for path in three:
        flip(path / "backbone.safetensors")
    found = checkpoint.newest(tmp_path)
    assert (found.tensors, found.counters) == (None, Counters())
    assert found.notices[-1] == "no whole checkpoint is left: the run starts anew"
    checkpoint.save(tmp_path, three[2].name, tensors(1.0), step_of(three[2]))
    assert checkpoint.newest(tmp_path).counters == Counters(step=12)
    flip(three[2] / "backbone.safetensors")
    checkpoint.newest(tmp_path)  # one was set aside under this name before


def test_what_interrupted_writes_left_is_told_and_removed(tmp_path: Path, three: list[Path]) -> None:
    half = tmp_path / ".step_00000016.tmp"
    half.mkdir()
    (half / "heads.safetensors").write_bytes(b"half")
    (tmp_path / ".step_00000016.lock").write_bytes(b"")
    ema, librarys = tmp_path / ".ema_00000012.safetensors.tmp", tmp_path / ".tmpF2ygS0"
    for path in (ema, librarys):
        path.write_bytes(b"half")
    found = checkpoint.newest(tmp_path)
    assert found.counters == Counters(step=12)
    said = "was left by an interrupted write: ignored and removed"
    assert set(found.notices) == {f"{path} {said}" for path in (half, ema, librarys)}
    assert sorted(tmp_path.iterdir()) == three


def test_a_replacement_cut_off_between_its_renames_is_undone(tmp_path: Path, three: list[Path]) -> None:
    three[2].rename(tmp_path / ".step_00000012.old")
    checkpoint.save(tmp_path / "elsewhere", three[2].name, tensors(99.0), step_of(three[2]))
    (tmp_path / "elsewhere" / three[2].name).rename(tmp_path / ".step_00000012.tmp")
    found = checkpoint.newest(tmp_path)
    assert found.tensors is not None
    assert_equal(found.tensors, tensors(12.0))
    assert found.notices == (
        f"{three[2]} is back: the write that was to replace it was interrupted",
        f"{tmp_path / '.step_00000012.tmp'} was left by an interrupted write: ignored and removed",
    )


FATAL = ("rename", "replace", "fsync", "mkdir", "unlink", "rmdir")
"""Calls to the file system at which a process is killed, besides the library's own writing."""


def _save_and_die(folder: Path, fatal: int) -> None:
    """Save a checkpoint of twos, and be killed at the n-th call; for a process of its own."""
    calls = 0

    def dying(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == fatal:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **named)

        return call

    for name in FATAL:
        setattr(os, name, dying(getattr(os, name)))
    checkpoint.save_file = dying(checkpoint.save_file)
    checkpoint.save(folder, "step_00000004", {group: {"w": torch.full((3,), 2.0)} for group in GROUPS}, COUNTERS)


def test_killed_at_any_moment_a_replacement_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    """A process that dies at its n-th call to the file system, for every n, leaves the old checkpoint or the new."""
    left, exitcode = [], -signal.SIGKILL
    while exitcode:
        folder = tmp_path / str(len(left))
        checkpoint.save(folder, "step_00000004", {group: {"w": torch.ones(3)} for group in GROUPS}, COUNTERS)
        job = multiprocessing.get_context("fork").Process(target=_save_and_die, args=(folder, len(left) + 1))
        job.start()
        job.join()
        exitcode = job.exitcode
        assert exitcode in (0, -signal.SIGKILL)
        found = checkpoint.newest(folder)
        assert found.tensors is not None, f"nothing whole is left after call {len(left) + 1}"
        assert [path.name for path in folder.iterdir()] == ["step_00000004"]
        left.append({float(group["w"][0]) for group in found.tensors.values()})
    assert len(left) > 15
    switch = left.index({2.0})
    assert 0 < switch < len(left) - 1, "no kill came before the swap, or none after it"
    assert left == [{1.0}] * switch + [{2.0}] * (len(left) - switch)


def test_what_an_interrupted_write_leaves_is_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.save(tmp_path, "step_00000004", tensors(), COUNTERS)

    def killed(path: Path, value: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(checkpoint, "write_json", killed)
        checkpoint.save(tmp_path, "step_00000008", tensors(), COUNTERS)
    assert [path.name for path in checkpoint.whole(tmp_path)] == ["step_00000004"]
    # A power cut runs no clean-up: a temporary folder, and a folder that lacks its state, are not checkpoints either.
    (tmp_path / ".step_00000012.tmp").mkdir()
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


def test_any_flipped_bit_or_cut_of_an_ema_is_refused(tmp_path: Path) -> None:
    values = {"w": torch.arange(3.0), "scalar": torch.tensor(2.5), "half": torch.ones(2, 2, dtype=torch.bfloat16)}
    checkpoint.save_ema(tmp_path, 7, values)
    assert all(torch.equal(checkpoint.load_ema(tmp_path)[0][name], value) for name, value in values.items())
    file = checkpoint.ema_path(tmp_path, 7)
    content = file.read_bytes()
    for damaged in [*flips(content), content[:-1], content[: len(content) // 2], content[:7], b"", content + b"\0"]:
        file.write_bytes(damaged)
        with pytest.raises(Damaged, match=r"ema_00000007\.safetensors is damaged: .*; give another --step, or"):
            checkpoint.load_ema(tmp_path)


def test_an_ema_without_a_checksum_is_refused(tmp_path: Path) -> None:
    save_file({"w": torch.ones(2)}, checkpoint.ema_path(tmp_path, 7))
    with pytest.raises(Damaged, match="its checksum is wrong"):
        checkpoint.load_ema(tmp_path)


def test_the_checksum_covers_names_types_shapes_and_bytes() -> None:
    value = torch.tensor([[1.0, 2.0]])
    others = [
        {"v": value},
        {"w": value.reshape(2, 1)},
        {"w": value.view(torch.int32)},
        {"w": value + 1},
        {"w": value, "v": value},
        {},
    ]
    found = {checkpoint.tensors_digest(tensors) for tensors in [{"w": value}, *others]}
    assert len(found) == len(others) + 1
    assert checkpoint.tensors_digest({"a": value, "b": value}) == checkpoint.tensors_digest({"b": value, "a": value})


@pytest.mark.parametrize("what", ["whole", "ema"])
def test_a_full_disk_is_one_clear_error_and_harms_nothing(tmp_path: Path, what: str) -> None:
    """A limit on the size of files answers as a full disk does, in the middle of a file."""
    checkpoint.save(tmp_path, "step_00000004", tensors(), COUNTERS)
    checkpoint.save_ema(tmp_path, 4, tensors()["ema"])
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    large = {group: {"w": torch.zeros(10_000)} for group in GROUPS}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(StorageError) as caught:
            if what == "whole":
                checkpoint.save(tmp_path, "step_00000008", large, COUNTERS)
            else:
                checkpoint.save_ema(tmp_path, 8, large["ema"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    name = r"step_00000008\.tmp/backbone|ema_00000008"
    assert re.fullmatch(
        rf"cannot write .*({name})\.safetensors\S* \(File too large\): make room .* from the last checkpoint",
        str(caught.value),
    )
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert checkpoint.newest(tmp_path).counters == COUNTERS


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
        del state["digest"]
        state["sha256"]["backbone"] = file_digest(folder / "backbone.safetensors")
        write_json(folder / "state.json", {**state, "digest": digest(state)})
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
