"""Checkpoints: safetensors and JSON, written whole or not at all, and read without executing anything.

`checkpoints/step_00000100/` holds backbone, heads, EMA and optimiser apart, the method's own state, and `state.json`
with the counters and a SHA-256 of every file. `checkpoints/ema_00000100.safetensors` is the EMA backbone alone.
"""

import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from harness.errors import UserError
from harness.records import file_digest, read_json, replaced, sync_tree, write_json

GROUPS = ("backbone", "heads", "ema", "optimizer", "method")
"""Tensor files of a whole checkpoint."""


@dataclass(frozen=True, kw_only=True)
class Counters:
    """Where a run stands; with the tensors, all that is needed to continue it to the bit."""

    step: int = 0
    """Updates made."""
    train_seconds: float = 0.0
    """Training time so far."""
    trace: str = ""
    """Batch-trace chain after the last update, hex."""


def save(folder: Path, name: str, tensors: Mapping[str, Mapping[str, Tensor]], counters: Counters) -> None:
    """Write a whole checkpoint `folder/name`, replacing one of that name."""
    with replaced(folder / name) as temporary:
        for group in GROUPS:
            plain = {key: value.detach().contiguous().cpu() for key, value in tensors[group].items()}
            save_file(plain, temporary / f"{group}.safetensors")
        digests = {group: file_digest(temporary / f"{group}.safetensors") for group in GROUPS}
        write_json(temporary / "state.json", {"counters": asdict(counters), "sha256": digests})


def name_of(step: int) -> str:
    """Folder name of the checkpoint after `step` updates."""
    return f"step_{step:08d}"


def whole(folder: Path) -> list[Path]:
    """Whole checkpoints, oldest first; what an interrupted write left behind is not among them."""
    return [path for path in sorted(folder.glob("step_*")) if (path / "state.json").is_file()]


def prune(folder: Path, keep: int) -> None:
    """Remove all but the last `keep` whole checkpoints, and what interrupted writes left behind."""
    leftovers = [*folder.glob(".*.tmp"), *folder.glob(".*.old")]
    for path in [*whole(folder)[:-keep], *leftovers]:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def load(path: Path) -> tuple[dict[str, dict[str, Tensor]], Counters]:
    """Tensors by group and counters of a whole checkpoint; `UserError` names a damaged file."""
    state: dict[str, Any] = read_json(path / "state.json")
    return {group: _load_group(path, group, state["sha256"]) for group in GROUPS}, Counters(**state["counters"])


def _load_group(path: Path, group: str, digests: Mapping[str, str]) -> dict[str, Tensor]:
    file = path / f"{group}.safetensors"
    try:
        if file.is_file() and file_digest(file) == digests.get(group):
            return load_file(file)
    except SafetensorError:
        pass  # a file of another kind under this name, digest and all: refused like a changed one
    raise UserError(f"{file} is damaged: remove {path}, and the run continues from the checkpoint before it")


def ema_path(folder: Path, step: int) -> Path:
    """File of the EMA backbone after `step` updates."""
    return folder / f"ema_{step:08d}.safetensors"


def save_ema(folder: Path, step: int, backbone: Mapping[str, Tensor]) -> None:
    """Write the EMA backbone alone."""
    path = ema_path(folder, step)
    temporary = path.with_name(f".{path.name}.tmp")
    save_file({key: value.detach().contiguous().cpu() for key, value in backbone.items()}, temporary)
    temporary.replace(path)
    sync_tree(folder)


def load_ema(folder: Path, step: int | None = None) -> tuple[dict[str, Tensor], int]:
    """EMA backbone and its step: the last one, or the one of a step. `UserError` lists the steps there are."""
    steps = sorted(int(path.stem.removeprefix("ema_")) for path in folder.glob("ema_*.safetensors"))
    if not steps:
        raise UserError(f"{folder} holds no EMA backbone: train the run up to its first evaluation")
    if step is not None and step not in steps:
        raise UserError(
            f"there is no EMA backbone of step {step} in {folder}: give one of {', '.join(map(str, steps))}"
        )
    chosen = steps[-1] if step is None else step
    try:
        return load_file(ema_path(folder, chosen)), chosen
    except (SafetensorError, OSError) as error:
        raise UserError(f"{ema_path(folder, chosen)} is damaged ({error}): remove it and run the cell again") from None


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """AdamW's state as named tensors: <parameter index>.<name>."""
    state = optimizer.state_dict()["state"]
    return {f"{index}.{name}": value for index, entries in state.items() for name, value in entries.items()}


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Undo `optimizer_tensors`."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
