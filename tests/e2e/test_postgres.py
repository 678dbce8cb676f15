"""An ablation whose trials are in PostgreSQL: a server of the test's own, on loopback."""

import glob
import json
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
import pytest

from harness.records.run_folder import RunFolder
from studies.ablation.commands import prepare
from tests.e2e.conftest import Faults, Place, contents
from tests.e2e.test_jobs import Start, begins, same_records, start, until  # noqa: F401 - a fixture
from tests.unit.studies.ablation.ablation_factory import grid, with_study

pytestmark = [pytest.mark.server, pytest.mark.slow]

PASSWORD = "s3cr3t"


def binary(name: str) -> str:
    """A program of PostgreSQL; Debian keeps them off the path."""
    found = shutil.which(name) or max(glob.glob(f"/usr/lib/postgresql/*/bin/{name}"), default="")  # noqa: PTH207
    if not found:
        pytest.fail(f"PostgreSQL's {name} is missing: install it (Debian: apt-get install postgresql), then test again")
    return found


@dataclass
class Server:
    """A running server."""

    folder: Path
    port: int
    process: "subprocess.Popen[bytes]"

    @property
    def url(self) -> str:
        return f"postgresql://me:{PASSWORD}@127.0.0.1:{self.port}/postgres"

    def stop(self) -> None:
        self.process.send_signal(signal.SIGINT)  # "fast": it does not wait for its clients
        self.process.wait(60)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """The server refuses to run as root, and its user must reach its folder."""
    as_user: dict[str, Any] = {"user": "postgres"} if os.geteuid() == 0 else {}
    folder = Path(tempfile.mkdtemp(prefix="ditbench-postgres-"))
    (folder / "password").write_text(PASSWORD)
    if as_user:
        for path in (folder / "password", folder):
            shutil.chown(path, "postgres")
    data = str(folder / "data")
    options = ["--username=me", "--auth=scram-sha-256", f"--pwfile={folder / 'password'}", "--no-sync"]
    subprocess.run([binary("initdb"), "-D", data, *options], check=True, capture_output=True, cwd=folder, **as_user)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [binary("postgres"), "-D", data, "-h", "127.0.0.1", "-p", str(port), "-k", str(folder), "-F"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder, **as_user)
    running = Server(folder, port, process)
    try:
        ready = [binary("pg_isready"), "-q", "-h", "127.0.0.1", "-p", str(port)]
        until(lambda: subprocess.run(ready).returncode == 0, f"no server: {(folder / 'log').read_text()}", 60)
        yield running
    finally:
        if process.poll() is None:
            running.stop()
        shutil.rmtree(folder, ignore_errors=True)


def trials_of(url: str, name: str) -> list[optuna.trial.FrozenTrial]:
    return optuna.load_study(study_name=name, storage=optuna.storages.RDBStorage(url)).get_trials()


def test_four_processes_at_once_make_one_study(server: Server, tmp_path: Path) -> None:
    """On a database that has no tables yet; a fifth makes a study of another name."""
    ablation = grid(tmp_path, {"block": "1,2,3"}, storage=server.url)
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(5)

    def begin(name: str) -> None:
        barrier.wait()
        prepare(with_study(ablation, name))

    processes = [context.Process(target=begin, args=(name,)) for name in ("abl", "abl", "other", "abl", "abl")]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0] * 5
    assert len(trials_of(server.url, "other/vae_repa")) == 3
    trials = trials_of(server.url, "abl/vae_repa")
    assert [trial.user_attrs["cell"] for trial in trials] == ["vae_repa", "vae_repa,block=2", "vae_repa,block=3"]
    assert json.loads((ablation.folder / "ablation.json").read_text())["storage"] == "postgresql"


def test_four_workers_of_which_one_is_killed(
    server: Server,
    place: Place,
    faults: Faults,
    start: Start,  # noqa: F811
    ditbench: Callable[..., tuple[int, str, str]],
) -> None:
    """Then the server stops: one line, and nothing changed."""
    words = place.words(
        "ablate", "--study", "pg", "--method", "faulty", "--grid.weight", "1.0,2.0,3.0", "--seeds", "0",
        "--budget.amount", "6", "--evaluation.points", "2", "--output.log_every", "1", "--output.mlflow", "false",
        "--workers", "4", "--storage", server.url,
    )  # fmt: skip
    faults.are("wait")
    command = start(*words)
    worker = faults.waiting()
    os.kill(worker, signal.SIGKILL)
    until(lambda: "; it is taken up again\n" in command.out(), "the death was not noticed")
    faults.are("")
    assert (command.status(), command.err()) == (0, "")
    assert f"taken over from {os.uname().nodename}:{worker}, which is gone\n" in command.out()
    trials = trials_of(server.url, "pg/faulty")
    assert [trial.state.name for trial in trials] == ["COMPLETE"] * 3
    assert len({trial.value for trial in trials}) == 1, "the method adds nothing, and one was interrupted"
    takeovers = [note for trial in trials for note in trial.user_attrs.get("takeovers", [])]
    assert [note["from"].endswith(f":{worker}") for note in takeovers] == [True]
    sit = RunFolder(place.runs / "pg" / "sit" / "seed0")
    labels = ("faulty", "faulty,weight=2.0", "faulty,weight=3.0")
    folders = [RunFolder(place.runs / "pg" / label / "seed0") for label in labels]
    assert sorted(len(begins(folder)) for folder in folders) == [1, 1, 2]
    # The run of the killed one is taken up by the one in its place, or by another that is free before that has begun.
    assert len({pid for folder in (sit, *folders) for pid in begins(folder)}) in (4, 5)
    for folder in folders:
        assert same_records(folder, sit, "terms", "gradient_norms", "samples", "diagnostics")
    files = list((place.runs / "pg").rglob("*.json"))
    assert files and not any(PASSWORD in path.read_text() for path in files)
    assert PASSWORD not in command.out()

    before = contents(place.runs)
    server.stop()
    began = time.monotonic()
    status, out, err = ditbench(*words)
    assert (status, out) == (2, "")
    hidden = f"postgresql://me:***@127.0.0.1:{server.port}/postgres"
    assert err.startswith(f"ditbench: storage {hidden} cannot be used (")
    assert err.endswith("): start its server, correct the URL, or leave --storage out\n")
    assert err.count("\n") == 1 and PASSWORD not in err
    assert contents(place.runs) == before
    assert time.monotonic() - began < 30
