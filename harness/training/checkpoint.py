"""Checkpoints: safetensors and JSON, written whole or not at all, and read without executing anything.

`checkpoints/step_00000100/` holds backbone, heads, EMA and optimiser apart, the method's own state, and `state.json`
with the counters, a SHA-256 of every file and one of its own. `checkpoints/ema_00000100.safetensors` is the EMA
backbone alone, with its SHA-256 in the file's metadata.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from harness.errors import StorageError, UserError
from harness.records.files import canonical, digest, file_digest, put_back, replaced, storing, sync_path, write_json

GROUPS = ("backbone", "heads", "ema", "optimizer", "method")
"""The groups of tensors of a whole checkpoint, each in a file of its own."""


@dataclass(frozen=True, kw_only=True)
class Counters:
    """Where a run stands; with the tensors, all that is needed to continue it to the bit."""

    step: int = 0
    """The number of updates that the run has made."""
    train_seconds: float = 0.0
    """The seconds that went into training so far."""
    evaluation_seconds: float = 0.0
    """The seconds that went into evaluations so far."""
    io_seconds: float = 0.0
    """The seconds that went into writing records and checkpoints so far."""
    trace: str = ""
    """The last link of the batch-trace chain, that of the last update, as hex."""


class Damaged(UserError):
    """A file of a checkpoint is not what was written."""

    def __init__(self, file: Path, way_out: str) -> None:
        super().__init__(f"{file} is damaged: {way_out}")
        self.file = file


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a run continues from."""

    tensors: dict[str, dict[str, Tensor]] | None
    """The tensors of each group; None when no whole checkpoint is left, so that the run starts anew."""
    counters: Counters
    notices: tuple[str, ...]
    """A line for each thing that was wrong in the folder, with what became of it."""


def save(folder: Path, name: str, tensors: Mapping[str, Mapping[str, Tensor]], counters: Counters) -> None:
    """Write a whole checkpoint `folder/name`, replacing one of that name. `StorageError` when the disk refuses."""
    with replaced(folder / name) as temporary:
        for group in GROUPS:
            _write_tensors(temporary / f"{group}.safetensors", _plain(tensors[group]))
        digests = {group: file_digest(temporary / f"{group}.safetensors") for group in GROUPS}
        state = {"counters": asdict(counters), "sha256": digests}
        # The state carries a digest of its own: a flipped digit of a counter would be trained on.
        write_json(temporary / "state.json", {**state, "digest": digest(state)})


def _plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as they are written."""
    return {name: value.detach().contiguous().cpu() for name, value in tensors.items()}


def _write_tensors(file: Path, plain: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    try:
        save_file(plain, file, metadata)
    except SafetensorError as error:
        # The library tells of a full disk in words only.
        found = re.search(r"\(os error (\d+)\)", str(error))
        if found is None:
            raise
        code = int(found[1])
        raise StorageError(code, os.strerror(code), str(file)) from error


def name_of(step: int) -> str:
    """The name of the folder that holds the checkpoint after `step` updates."""
    return f"step_{step:08d}"


def whole(folder: Path) -> list[Path]:
    """The whole checkpoints, oldest first; what an interrupted write left behind is not among them."""
    return [path for path in sorted(folder.glob("step_*")) if (path / "state.json").is_file()]


LEFTOVERS = (".*.tmp", ".tmp*", ".*.old", ".*.lock")
"""The names of what an interrupted write leaves behind; `.tmp*` are safetensors' own temporary files."""
SET_ASIDE = ".damaged"
"""The ending of a damaged checkpoint's hidden name; the checkpoint is kept until the next one is written."""


def prune(folder: Path, keep: int) -> None:
    """Remove all but the last `keep` whole checkpoints, those set aside, and what interrupted writes left behind."""
    for path in [*whole(folder)[:-keep], *folder.glob(f".*{SET_ASIDE}"), *_leftovers(folder)]:
        _remove(path)


def newest(folder: Path) -> Found:
    """The newest undamaged checkpoint, for a run that continues; the folder is tidied, which the notices tell.

    Damaged checkpoints are set aside, so that `prune` counts the whole ones only. Of several processes one calls this
    before the others.
    """
    notices = _tidied(folder)
    damaged: list[str] = []
    for path in sorted(folder.glob("step_*"), reverse=True):
        try:
            tensors, counters = load(path)
        except Damaged as error:
            aside = path.with_name(f".{path.name}{SET_ASIDE}")
            _remove(aside)
            path.rename(aside)
            damaged.append(f"{error.file} is damaged: its checkpoint is set aside as {aside.name}")
        else:
            there = [f"the run goes on from {path.name}"] if damaged else []
            return Found(tensors=tensors, counters=counters, notices=(*notices, *damaged, *there))
    there = ["no whole checkpoint is left: the run starts anew"] if damaged else []
    return Found(tensors=None, counters=Counters(), notices=(*notices, *damaged, *there))


def _tidied(folder: Path) -> list[str]:
    """Undo or remove what interrupted writes left behind; returns a line for each."""
    olds = sorted(folder.glob(".step_*.old"))
    cut_off = [folder / old.name.removeprefix(".").removesuffix(".old") for old in olds]
    notices = [
        f"{path} is back: the write that was to replace it was interrupted" for path in cut_off if put_back(path)
    ]
    for path in _leftovers(folder):
        _remove(path)
        if path.suffix != ".lock":
            notices.append(f"{path} was left by an interrupted write: ignored and removed")
    return notices


def _leftovers(folder: Path) -> list[Path]:
    return sorted(path for pattern in LEFTOVERS for path in folder.glob(pattern))


def _remove(path: Path) -> None:
    """Remove a file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def load(path: Path) -> tuple[dict[str, dict[str, Tensor]], Counters]:
    """The tensors by group and the counters of a checkpoint; `Damaged` names a file that is not as it was written."""
    counters, digests = _read_state(path / "state.json")
    return {group: _load_group(path / f"{group}.safetensors", digests[group]) for group in GROUPS}, counters


def _read_state(file: Path) -> tuple[Counters, dict[str, str]]:
    """The counters, and the SHA-256 of each group's file."""
    try:
        state = json.loads(file.read_bytes())
        if state.pop("digest") == digest(state):
            return Counters(**state["counters"]), state["sha256"]
    except (ValueError, TypeError, KeyError, AttributeError, FileNotFoundError, NotADirectoryError):
        pass  # no JSON, or JSON of another form, or no file: refused like a changed one
    raise _damaged(file)


def _load_group(file: Path, sha256: str) -> dict[str, Tensor]:
    try:
        if file.is_file() and file_digest(file) == sha256:
            return load_file(file)
    except SafetensorError:
        pass  # a file of another kind under this name, digest and all: refused like a changed one
    raise _damaged(file)


def _damaged(file: Path) -> Damaged:
    return Damaged(file, "the same command goes on from the checkpoint before it")


def ema_path(folder: Path, step: int) -> Path:
    """The file of the EMA backbone after `step` updates."""
    return folder / f"ema_{step:08d}.safetensors"


def save_ema(folder: Path, step: int, backbone: Mapping[str, Tensor]) -> None:
    """Write the EMA backbone alone, with a checksum in the file. `StorageError` when the disk refuses."""
    path = ema_path(folder, step)
    temporary, plain = path.with_name(f".{path.name}.tmp"), _plain(backbone)
    with storing(path):
        try:
            _write_tensors(temporary, plain, {CHECKSUM: tensors_digest(plain)})
            sync_path(temporary)
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync_path(folder)


CHECKSUM = "sha256"
"""The key of the checksum in the file's metadata."""


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """The SHA-256 over names, types, shapes and bytes of tensors on the CPU, as hex; their order does not matter."""
    found = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        found.update(canonical([name, str(value.dtype), list(value.shape)]).encode())
        found.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def ema_steps(folder: Path) -> list[int]:
    """The steps of which there is an EMA backbone, in their order."""
    return sorted(int(path.stem.removeprefix("ema_")) for path in folder.glob("ema_*.safetensors"))


def load_ema(folder: Path, step: int | None = None) -> tuple[dict[str, Tensor], int]:
    """An EMA backbone and its step: the last one, or that of `step`. `UserError` lists the steps there are."""
    steps = ema_steps(folder)
    if not steps:
        raise UserError(f"{folder} holds no EMA backbone: train the run up to its first evaluation")
    if step is not None and step not in steps:
        raise UserError(
            f"there is no EMA backbone of step {step} in {folder}: give one of {', '.join(map(str, steps))}"
        )
    chosen = steps[-1] if step is None else step
    return _read_ema(ema_path(folder, chosen)), chosen


def _read_ema(path: Path) -> dict[str, Tensor]:
    reason = "its checksum is wrong"
    try:
        with safe_open(path, framework="pt") as file:
            tensors, metadata = file.get_tensors(), file.metadata() or {}
        if metadata.get(CHECKSUM) == tensors_digest(tensors):
            return tensors
    except (SafetensorError, OSError) as error:
        reason = str(error)
    raise Damaged(path, f"{reason}; give another --step, or remove the run folder and train it again")


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """AdamW's state as named tensors; a name is <parameter index>.<name>."""
    state = optimizer.state_dict()["state"]
    return {f"{index}.{name}": value for index, entries in state.items() for name, value in entries.items()}


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put back into the optimiser what `optimizer_tensors` took from it."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
