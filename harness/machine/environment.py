"""What machine and software a run uses: device and precision are resolved here, versions and commit recorded."""

import ctypes
import importlib.metadata
import os
import platform
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch

from harness.config import RuntimeConfig
from harness.errors import UserError
from harness.records.schema import EnvironmentRecord

PACKAGES = (
    *("ditbench", "torch", "torchvision", "timm", "diffusers", "accelerate", "safetensors", "numpy", "scipy", "pandas"),
    *("scikit-learn", "torch-fidelity", "fvcore", "mlflow", "optuna", "matplotlib"),
)
"""Packages whose versions stand in every manifest."""

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
"""Parameters of mallopt(3): how much free memory at the end of the heap is given back, and from which size on blocks
have a map of their own, which is given back as soon as they are freed."""
LARGEST_KEPT = 2**25
"""32 MB, the size up to which glibc itself comes to keep blocks. Of larger ones the aligned allocation of releases
before 2.38 can leave holes that it cannot use again."""
MALLOC_VARIABLES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")
"""Environment variables by which a user tells glibc the same."""


def resolve_device(name: str) -> torch.device:
    """`auto` is cuda where there is one, else cpu; mps only when asked for (it has no float64)."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"runtime.device is {name!r}: give auto, cpu, cuda or mps") from None
    missing = (device.type == "cuda" and not torch.cuda.is_available()) or (
        device.type == "mps" and not torch.backends.mps.is_available()
    )
    if missing or device.type not in ("cpu", "cuda", "mps"):
        raise UserError(f"runtime.device is {name!r}, which this machine does not have: give auto or cpu")
    return device


def has_fast_bf16(device: torch.device) -> bool:
    """Whether bf16 matrix products are faster than fp32 ones: GPUs since Ampere, CPUs with avx512_bf16 or AMX."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return False


def resolve_precision(precision: str, device: torch.device) -> str:
    """`auto` is bf16 where the device is fast at it, else fp32; anything else is taken as it is."""
    if precision == "auto":
        return "bf16" if has_fast_bf16(device) else "fp32"
    return precision


def resolve_runtime(runtime: RuntimeConfig) -> RuntimeConfig:
    """The runtime section without `auto`, threads included; `compile` depends on the run, see `compilation`."""
    device = resolve_device(runtime.device)
    return replace(
        runtime,
        device=device.type,
        precision=resolve_precision(runtime.precision, device),  # type: ignore[arg-type]
        tf32=runtime.tf32 and device.type == "cuda",
        threads=runtime.threads or torch.get_num_threads(),
    )


def apply_runtime(runtime: RuntimeConfig) -> None:
    """Set torch's threads and TF32 for this process, and have it keep the memory that it frees."""
    keep_freed_memory()
    torch.set_num_threads(runtime.threads)
    torch.backends.cuda.matmul.allow_tf32 = runtime.tf32
    torch.backends.cudnn.allow_tf32 = runtime.tf32


def keep_freed_memory() -> None:
    """Have glibc keep freed memory for later; nothing where there is another library, or where the user has said how.

    Tensors on a CPU are allocated and freed in every operation. Left to itself glibc gives large ones back to the
    system, and each page that is touched anew costs a fault: an eighth to a third of the time of encoders, extractors
    and the autoencoder (`docs/performance.md`).
    """
    if sys.platform != "linux" or any(name in os.environ for name in MALLOC_VARIABLES):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(TRIM_THRESHOLD, -1)  # never
        mallopt(MMAP_THRESHOLD, LARGEST_KEPT)


def describe(runtime: RuntimeConfig) -> EnvironmentRecord:
    """The environment as it stands in a manifest: shown, with a warning where compared runs differ."""
    commit, dirty = git_state()
    device = torch.device(runtime.device)
    return {
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{device.type} {platform.machine()}",
        "precision": runtime.precision,
        "threads": runtime.threads,
        "git_commit": commit,
        "git_dirty": dirty,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": versions(),
    }


def versions() -> dict[str, str]:
    """Versions of the packages that decide numbers; a missing one is left out."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def source_folder() -> Path:
    """The folder that holds the packages: the top of a checkout, or of an installation."""
    return Path(__file__).resolve().parents[2]


def git_state() -> tuple[str, bool]:
    """Commit of the source tree and whether it has uncommitted changes; ("", False) outside a git checkout."""
    root = source_folder()

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}
        return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")) != root:
            return "", False
        return git("rev-parse", "HEAD"), bool(git("status", "--porcelain"))
    except (OSError, subprocess.CalledProcessError):
        return "", False
