"""A disk that fills up while `ditbench train` writes a checkpoint, and the same command once there is room again.

The disk is a small tmpfs in a user namespace; where namespaces are not allowed, a limit on the size of files that is
set when the checkpoint is written, which the system answers in the same way.
"""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from harness.errors import StorageError
from harness.records.run_folder import RunFolder
from harness.training import checkpoint
from studies.dispatch.logs import logged
from tests.e2e.conftest import TIMES, Place, contents, run_process, say

TRAIN = (
    *("train", "--study", "small", "--method", "vae_repa", "--budget.amount", "6", "--output.mlflow", "false"),
    *("--evaluation.points", "2", "--output.log_every", "1", "--output.checkpoint_every", "2"),
)
"""Evaluated after steps 3 and 6, whole checkpoints after 2, 3, 4 and 6, of which one is kept."""
RUN = Path("runs") / "small" / "vae_repa" / "seed0"

MOUNTED = """
import os, shutil, subprocess, sys
from pathlib import Path
import studies.dispatch.worker  # the libraries of both commands, once
from studies.cli import main

def attempt(name):
    child = os.fork()
    if child == 0:
        for number, kind in ((1, "out"), (2, "err")):
            os.dup2(os.open(f"{name}.{kind}", os.O_CREAT | os.O_WRONLY), number)
        sys.exit(main(sys.argv[2:]))
    Path(f"{name}.status").write_text(str(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])))

subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={sys.argv[1]}", "tmpfs", "runs"], check=True)
attempt("first")
shutil.copytree("runs", "full")
subprocess.run(["mount", "-o", "remount,size=1g", "runs"], check=True)
attempt("again")
shutil.copytree("runs", "done")
"""
"""In a namespace of its own: the command on a disk of so many bytes, a copy of what it left, and the command again,
each in a process of its own.
"""

LIMITED = """
import resource, sys
from harness import checkpoint
from studies.cli import main

save = checkpoint.save

def limited(folder, name, tensors, counters):
    if name == "step_00000006":
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))
    save(folder, name, tensors, counters)

checkpoint.save = limited
sys.exit(main(sys.argv[1:]))
"""


@dataclass(frozen=True)
class Attempt:
    """What a command left, and what it said."""

    folder: RunFolder
    status: int
    err: str


def can_mount() -> bool:
    """Whether this user may mount a tmpfs in a namespace."""
    command = ["unshare", "-Urm", "sh", "-c", "mount -t tmpfs -o size=64k tmpfs /mnt"]
    return shutil.which("unshare") is not None and subprocess.run(command, capture_output=True).returncode == 0


def run_on_a_small_disk(place: Place, size: int) -> tuple[Attempt, Attempt]:
    place.runs.mkdir()
    command = ["unshare", "-Urm", sys.executable, "-c", MOUNTED, str(size), *place.words(*TRAIN)]
    result = run_process(command, place.folder)
    assert result.returncode == 0, result.stderr

    def attempt(name: str, copy: str) -> Attempt:
        run = RunFolder(place.folder / copy / RUN.relative_to("runs"))
        said = {kind: (place.folder / f"{name}.{kind}").read_text() for kind in ("status", "err")}
        return Attempt(run, int(said["status"]), said["err"])

    return attempt("first", "full"), attempt("again", "done")


def run_under_a_limit(place: Place) -> tuple[Attempt, Attempt]:
    first = run_process([sys.executable, "-c", LIMITED, *place.words(*TRAIN)], place.folder)
    shutil.copytree(place.runs, place.folder / "full")
    again = place.process(*place.words(*TRAIN))
    kept = RunFolder(place.folder / "full" / RUN.relative_to("runs"))
    done = RunFolder(place.folder / RUN)
    return Attempt(kept, first.returncode, first.stderr), Attempt(done, again.returncode, again.stderr)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, shared_cache: Path) -> RunFolder:
    place = Place(tmp_path_factory.mktemp("undisturbed"), shared_cache)
    said = say(*place.words(*TRAIN))
    assert said.status == 0, said.err
    return RunFolder(place.folder / RUN)


@pytest.fixture(scope="module", params=["disk", pytest.param("limit", marks=pytest.mark.full)])
def attempts(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    shared_cache: Path,
    undisturbed: RunFolder,
) -> tuple[Attempt, Attempt]:
    """The command on a disk that fills up while it writes its last checkpoint, and again with room."""
    place = Place(tmp_path_factory.mktemp("full"), shared_cache)
    if request.param == "disk" and can_mount():
        return run_on_a_small_disk(place, disk_size(undisturbed))
    return run_under_a_limit(place)


def disk_size(run: RunFolder) -> int:
    """Holds two whole checkpoints with one EMA backbone, as after step 3, but not with both, as after step 6."""
    page = 4096
    sizes = {path: -(-path.stat().st_size // page) * page for path in run.path.rglob("*") if path.is_file()}
    ema = sum(size for path, size in sizes.items() if path.name == "ema_00000006.safetensors")
    whole = sum(size for path, size in sizes.items() if path.parent.name.startswith("step_"))
    assert whole > 2 * ema > 20 * page
    return sum(sizes.values()) + whole - ema // 2


@pytest.mark.slow
def test_a_full_disk_is_said_in_one_line(attempts: tuple[Attempt, Attempt]) -> None:
    full, _ = attempts
    assert full.status == 1
    assert "Traceback" not in full.err
    (line,) = full.err.splitlines()
    reason = r"\((No space left on device|File too large)\)"
    assert re.search(
        rf"cannot write \S+/\.step_00000006\.tmp/\w+\.safetensors {reason}: make room there .* goes on", line
    )


@pytest.mark.slow
def test_a_full_disk_leaves_the_checkpoint_before_it(attempts: tuple[Attempt, Attempt]) -> None:
    folder = attempts[0].folder
    assert [path.name for path in checkpoint.whole(folder.checkpoints)] == ["step_00000004"]
    assert checkpoint.load(folder.checkpoints / "step_00000004")[1].step == 4
    assert not list(folder.checkpoints.glob(".*")), "no half-written file takes up room"
    assert [line["step"] for line in folder.lines("train")] == [1, 2, 3, 4, 5, 6]
    assert (folder.path / "train.jsonl").read_text().endswith("}\n")
    manifest = folder.manifest()
    assert manifest["status"] == "failed" and "cannot write" in manifest["status_detail"]["error"]


def records(folder: RunFolder, name: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder.path / f"{name}.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


@pytest.mark.slow
def test_with_room_again_the_same_command_ends_like_an_undisturbed_run(
    attempts: tuple[Attempt, Attempt], undisturbed: RunFolder
) -> None:
    _, again = attempts
    assert again.status == 0, again.err
    assert again.folder.status() == "finished"
    for name in ("train", "eval"):
        assert records(again.folder, name) == records(undisturbed, name)
    ours, theirs = contents(again.folder.path), contents(undisturbed.path)
    assert ours.keys() == theirs.keys()
    equal = [name for name in theirs if name.endswith((".safetensors", ".png"))]
    assert len(equal) == len(checkpoint.GROUPS) + 2 + 2
    assert all(ours[name] == theirs[name] for name in equal)


@pytest.mark.parametrize("captured", [False, True])
def test_a_log_on_a_full_disk_does_not_hide_the_error(tmp_path: Path, captured: bool) -> None:
    (tmp_path / "log.txt").symlink_to("/dev/full")
    with pytest.raises(StorageError, match=r"cannot write train\.jsonl"), logged(tmp_path / "log.txt", captured):
        raise StorageError(errno.ENOSPC, os.strerror(errno.ENOSPC), "train.jsonl")
