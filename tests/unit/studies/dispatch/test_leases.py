"""Leases end with their holder, also when it is killed; a run knows whether it has company on its device."""

import errno
import fcntl
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from harness.errors import UserError
from harness.records.locks import holder
from studies.dispatch import leases
from studies.dispatch.leases import claim, clear_away, held, presence
from studies.runs.folders import lease_path, study_lock

ROOT = Path(__file__).parents[4]

HEAD = "import sys; from pathlib import Path; from studies.dispatch.leases import *\n"

Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start() -> Iterator[Start]:
    """`start(code, *words)`: another process that imported the module and printed a line."""
    running: list[subprocess.Popen[str]] = []

    def run(code: str, *words: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [
                sys.executable,
                "-c",
                f"import sys\nfrom pathlib import Path\nfrom studies.dispatch.leases import *\n{code}",
                *words,
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        running.append(process)
        return process

    yield run
    for process in running:
        process.kill()
        process.communicate()


def said(process: "subprocess.Popen[str]") -> str:
    """The next line of a process."""
    assert process.stdout is not None
    return process.stdout.readline().strip()


def end(process: "subprocess.Popen[str]", how: signal.Signals | None = None) -> None:
    """Kill a process, or let it go on to its end."""
    if how is None:
        process.communicate("\n", timeout=30)
    else:
        process.send_signal(how)
        process.wait(timeout=30)


@pytest.fixture
def devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A registry of devices of this test's own, for other processes too."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(leases.tempfile, "tempdir", None)
    assert leases.registry().parent == tmp_path
    return leases.registry()


# -- runs -----------------------------------------------------------------------------------------------------------

HOLD = """
lease = claim(Path(sys.argv[1]))
print("held" if lease else "taken", flush=True)
sys.stdin.readline()
if lease:
    lease.release()
"""


def test_where_a_lease_is(tmp_path: Path) -> None:
    path = lease_path(tmp_path, "digits", "repa,block=2", 3)
    assert path == tmp_path / "digits" / ".leases" / "repa,block=2--seed3.lock"


@pytest.mark.parametrize("how", [None, signal.SIGKILL])
def test_one_process_at_a_time(tmp_path: Path, start: Start, how: signal.Signals | None) -> None:
    """A lease is free again when its holder lets go, and when it is killed."""
    path = lease_path(tmp_path, "s", "sit", 0)
    other = start(HOLD, str(path))
    assert said(other) == "held"
    assert claim(path) is None
    assert holder(path).endswith(f", process {other.pid}")
    end(other, how)
    ours = claim(path)
    assert ours is not None
    third = start(HOLD, str(path))
    assert said(third) == "taken"
    ours.release()


def test_a_lease_says_who_holds_it_and_its_file_stays(tmp_path: Path) -> None:
    path = lease_path(tmp_path, "s", "sit", 0)
    ours = claim(path)
    assert ours is not None
    facts = json.loads(path.read_text())
    assert facts["pid"] == os.getpid()
    assert facts.keys() == {"host", "pid", "since"}
    ours.release()
    assert (path.read_text(), holder(path)) == ("", "")
    again = claim(path)
    assert again is not None
    again.release()


def test_a_place_without_locks_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"^output\.runs: cannot write to .*/file/s/\.leases \("):
        claim(lease_path(tmp_path / "file", "s", "sit", 0))
    with pytest.raises(UserError, match=r"^output\.runs: cannot write to "), held(tmp_path / "file" / "report.lock"):
        pass


def test_a_file_system_without_locks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(handle: int, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    path = lease_path(tmp_path, "s", "sit", 0)
    with pytest.raises(UserError, match=rf"^output\.runs: cannot lock {path} \(No locks available\): "):
        claim(path)


def test_what_is_no_lock_file_is_not_cleared_away(tmp_path: Path) -> None:
    study, stranger = tmp_path / "s", study_lock(tmp_path, "s", "notes")
    with held(study_lock(tmp_path, "s", "ablation")):
        stranger.write_text("the only copy")
    clear_away(study)
    assert stranger.read_text() == "the only copy"
    assert study_lock(tmp_path, "s", "ablation").exists()


WAITS = """
print("asks", flush=True)
with held(Path(sys.argv[1])):
    print("in", flush=True)
"""


def test_the_second_waits_for_the_first(tmp_path: Path, start: Start) -> None:
    path = tmp_path / "report.lock"
    with held(path):
        other = start(WAITS, str(path))
        assert said(other) == "asks"
        assert select.select([other.stdout], [], [], 0.3)[0] == []
    assert said(other) == "in"


def test_a_folder_of_locks_alone_is_cleared_away(tmp_path: Path) -> None:
    study = tmp_path / "s"
    clear_away(study)
    with held(study_lock(tmp_path, "s", "ablation")):
        clear_away(study)
        assert study_lock(tmp_path, "s", "ablation").exists(), "somebody is at it"
    (study / "ablation.json").touch()
    clear_away(study)
    assert study_lock(tmp_path, "s", "ablation").exists(), "it is a study"
    (study / "ablation.json").unlink()
    clear_away(study)
    assert list(tmp_path.iterdir()) == []


def test_who_waits_for_a_lock_that_is_cleared_away_holds_the_next_one(tmp_path: Path, start: Start) -> None:
    """Otherwise two processes would hold locks on two files of one name."""
    path = tmp_path / "report.lock"
    with held(path):
        other = start(WAITS, str(path))
        assert said(other) == "asks"
        assert select.select([other.stdout], [], [], 0.3)[0] == []
        path.unlink()
    assert said(other) == "in"
    assert path.exists()


# -- devices --------------------------------------------------------------------------------------------------------

PRESENT = """
with presence(sys.argv[1], sys.argv[2]) as company:
    print(company(), flush=True)
    sys.stdin.readline()
    print(company(), flush=True)
"""


@pytest.mark.parametrize("how", [None, signal.SIGKILL])
def test_company_on_a_device(devices: Path, start: Start, how: signal.Signals | None) -> None:
    with presence("cpu", "ours") as company:
        assert not company()
        other = start(PRESENT, "cpu", "theirs")
        assert said(other) == "True"
        assert company()
        end(other, how)
        assert not company(), "who ended or was killed is no company"
        assert [path.name for path in (devices / "cpu").iterdir()] == [f"ours.{os.getpid()}"]
    assert list((devices / "cpu").iterdir()) == []


def test_other_devices_and_ones_own_group_are_no_company(devices: Path, start: Start) -> None:
    with presence("cuda-0", "ours") as company:
        elsewhere, ours = start(PRESENT, "cuda-1", "theirs"), start(PRESENT, "cuda-1", "ours")
        assert said(elsewhere) in ("True", "False")
        assert said(ours) in ("True", "False")
        assert company(), "the group has a process on the device of another group"
        end(elsewhere)
        assert not company()


def test_a_link_in_the_registry_is_no_company_and_is_not_followed(devices: Path, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("the only copy")
    with presence("cpu", "ours") as company:
        (devices / "cpu" / "theirs.1").symlink_to(precious)
        assert not company()
    (devices / "cpu" / f"mine.{os.getpid()}").symlink_to(precious)
    with presence("cpu", "mine") as company:
        assert company(), "it cannot sign in"
    assert precious.read_text() == "the only copy"


def test_a_run_that_cannot_look_does_not_count_as_alone(devices: Path) -> None:
    devices.write_text("in the way")
    with presence("cpu", "ours") as company:
        assert company()
