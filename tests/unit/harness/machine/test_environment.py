"""Device and precision are resolved before a run, versions and commit recorded."""

import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from harness.config import RuntimeConfig
from harness.errors import UserError
from harness.machine import environment

CPU = torch.device("cpu")


@pytest.fixture
def threads_kept() -> Iterator[None]:
    threads, tf32 = torch.get_num_threads(), torch.backends.cuda.matmul.allow_tf32
    cudnn = torch.backends.cudnn.allow_tf32
    yield
    torch.set_num_threads(threads)
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = tf32, cudnn


@pytest.mark.parametrize(("has_cuda", "expected"), [(True, "cuda"), (False, "cpu")])
def test_auto_is_cuda_where_there_is_one(monkeypatch: pytest.MonkeyPatch, has_cuda: bool, expected: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert environment.resolve_device("auto").type == expected, "mps has no float64: only when asked for"
    assert environment.resolve_device("cpu") == CPU
    assert environment.resolve_device("mps").type == "mps"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gpu", "runtime.device is 'gpu': give auto, cpu, cuda or mps"),
        ("", "runtime.device is '': give auto, cpu, cuda or mps"),
        ("cuda", "runtime.device is 'cuda', which this machine does not have: give auto or cpu"),
        ("cuda:1", "runtime.device is 'cuda:1', which this machine does not have"),
        ("mps", "runtime.device is 'mps', which this machine does not have"),
        ("meta", "runtime.device is 'meta', which this machine does not have"),
    ],
)
def test_devices_that_cannot_be_used(monkeypatch: pytest.MonkeyPatch, name: str, message: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(UserError) as error:
        environment.resolve_device(name)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("bf16", "amx", "expected"), [(True, False, "bf16"), (False, True, "bf16"), (False,) * 2 + ("fp32",)]
)
def test_auto_precision_on_a_cpu(monkeypatch: pytest.MonkeyPatch, bf16: bool, amx: bool, expected: str) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert environment.resolve_precision("auto", CPU) == expected
    assert environment.resolve_precision("fp32", CPU) == "fp32"
    assert environment.resolve_precision("bf16", CPU) == "bf16"


@pytest.mark.parametrize(("capability", "expected"), [((7, 5), "fp32"), ((8, 0), "bf16"), ((9, 0), "bf16")])
def test_auto_precision_on_a_gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], expected: str) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert environment.resolve_precision("auto", torch.device("cuda")) == expected


def test_a_resolved_runtime_holds_no_auto(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    resolved = environment.resolve_runtime(RuntimeConfig())
    assert resolved.device == "cpu"
    assert resolved.precision in ("fp32", "bf16")
    assert resolved.threads == torch.get_num_threads()
    assert resolved.tf32 is False, "there is no TF32 on a CPU, so it may not tell two CPU runs apart"
    assert environment.resolve_runtime(resolved) == resolved
    assert environment.resolve_runtime(RuntimeConfig(threads=3)).threads == 3


def test_threads_and_tf32_are_applied(threads_kept: None) -> None:
    environment.apply_runtime(RuntimeConfig(device="cpu", precision="fp32", tf32=False, threads=2))
    assert torch.get_num_threads() == 2
    assert not torch.backends.cuda.matmul.allow_tf32
    assert not torch.backends.cudnn.allow_tf32
    environment.apply_runtime(RuntimeConfig(device="cpu", precision="fp32", tf32=True, threads=1))
    assert torch.get_num_threads() == 1
    assert torch.backends.cuda.matmul.allow_tf32
    assert torch.backends.cudnn.allow_tf32


FAULTS = """
import resource
import torch
from harness.machine.environment import keep_freed_memory

keep_freed_memory()
torch.set_num_threads(1)
mlp = torch.nn.Sequential(torch.nn.Linear(128, 512), torch.nn.GELU(), torch.nn.Linear(512, 128))
for _ in range(2):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        with torch.no_grad():
            mlp(torch.ones(2048, 128))
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def test_a_network_that_runs_again_touches_no_new_pages() -> None:
    """Its largest tensors are 1,024 pages of 4 kB; given back, they fault anew in each of ten rounds."""
    clean = {name: value for name, value in os.environ.items() if name not in environment.MALLOC_VARIABLES}
    printed = subprocess.run([sys.executable, "-c", FAULTS], check=True, capture_output=True, text=True, env=clean)
    assert platform.libc_ver()[0] != "glibc" or int(printed.stdout) < 1000


@pytest.mark.parametrize("variable", ["", *environment.MALLOC_VARIABLES])
def test_what_the_user_tells_glibc_counts(monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    calls: list[tuple[int, int]] = []
    library = SimpleNamespace(mallopt=lambda parameter, value: calls.append((parameter, value)))
    monkeypatch.setattr(environment.ctypes, "CDLL", lambda name: library)
    monkeypatch.setattr(environment.sys, "platform", "linux")
    for name in environment.MALLOC_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    if variable:
        monkeypatch.setenv(variable, "")
    environment.keep_freed_memory()
    # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h.
    assert calls == ([] if variable else [(-1, -1), (-3, 32 * 1024**2)])


def test_other_libraries_have_no_such_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment.ctypes, "CDLL", lambda name: SimpleNamespace())
    environment.keep_freed_memory()


def test_the_description_names_what_decides_numbers() -> None:
    described = environment.describe(RuntimeConfig(device="cpu", precision="fp32", threads=2))
    assert described["device"].startswith("cpu ")
    assert (described["precision"], described["threads"]) == ("fp32", 2)
    assert torch.__version__.startswith(described["packages"]["torch"])
    assert {"torch", "diffusers", "torch-fidelity", "numpy"} <= described["packages"].keys()


def test_a_package_that_is_missing_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "PACKAGES", ("numpy", "no-such-package-anywhere"))
    assert list(environment.versions()) == ["numpy"]


def git(folder: Path, *arguments: str) -> str:
    names = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
    command = ["git", "-C", str(folder), *names, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout.strip()


def test_the_source_folder_holds_the_packages() -> None:
    """One level off, no run would record its commit."""
    folder = environment.source_folder()
    assert (folder / "harness" / "method.py").is_file() and (folder / "studies" / "cli.py").is_file()


def test_the_commit_of_the_source_tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a checkout: commit and whether it is dirty. Inside another project's checkout, or outside any: nothing."""
    inside = tmp_path / "checkout" / "harness" / "machine" / "environment.py"
    inside.parent.mkdir(parents=True)
    monkeypatch.setattr(environment, "__file__", str(inside))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    assert environment.git_state() == ("", False)

    inside.touch()
    git(tmp_path / "checkout", "init", "-q")
    git(tmp_path / "checkout", "add", ".")
    git(tmp_path / "checkout", "commit", "-q", "-m", "first")
    commit = git(tmp_path / "checkout", "rev-parse", "HEAD")
    assert environment.git_state() == (commit, False)
    (tmp_path / "checkout" / "new.txt").touch()
    assert environment.git_state() == (commit, True)

    installed = tmp_path / "checkout" / "site-packages" / "harness" / "machine" / "environment.py"
    monkeypatch.setattr(environment, "__file__", str(installed))
    installed.parent.mkdir(parents=True)
    assert environment.git_state() == ("", False)


def test_without_git_there_is_no_commit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert environment.git_state() == ("", False)
