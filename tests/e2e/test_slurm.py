"""The job scripts in docs/slurm, run by plain bash: Slurm's variables are set, and programs on PATH stand in for its.

`srun` runs its command once for each node of the job, all at once, and `scontrol` names this machine for each of them.
"""

import json
import os
import re
import stat
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from harness.records.run_folder import RunFolder
from studies.commands.compare import command_parser
from studies.configs.cells import comparison
from studies.configs.settings import parse
from tests.e2e.conftest import ROOT, STUDY, FinishedStudy, Place
from tests.e2e.test_jobs import TOGETHER, assert_trained_together, begins

SCRIPTS = ROOT / "docs" / "slurm"
BY_NODE = """
import os, subprocess, sys
nodes = range(int(os.environ.get("SLURM_JOB_NUM_NODES", "1")))
steps = [subprocess.Popen(sys.argv[1:], env={**os.environ, "SLURM_NODEID": str(node)}) for node in nodes]
sys.exit(max(step.wait() for step in steps))
"""
NOTED = """
import json, os, sys
names = ("OMP_NUM_THREADS", "SRUN_CPUS_PER_TASK", "SLURM_KILL_BAD_EXIT")
print(json.dumps([sys.argv[1:], {name: os.environ.get(name) for name in names}]))
"""
SCONTROL = """
import os, sys
assert sys.argv[1:] == ["show", "hostnames", "here[1-2]"], sys.argv
print("127.0.0.1\\n" * int(os.environ["SLURM_JOB_NUM_NODES"]), end="")
"""

CONSOLE = """
import sys
from {module} import main
if __name__ == "__main__":
    sys.exit(main())
"""
"""As pip writes the programs of a package."""


def program(folder: Path, name: str, source: str) -> None:
    """Put a program of that name into a folder."""
    path = folder / name
    path.write_text(f"#!{sys.executable}\n{source}")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def environment(folder: Path, srun: str, variables: Mapping[str, str]) -> dict[str, str]:
    """What a job script finds: Slurm's variables, its programs, and those that installing ditbench installs."""
    programs = folder / "programs"
    programs.mkdir()
    program(programs, "srun", srun)
    program(programs, "scontrol", SCONTROL)
    program(programs, "ditbench", CONSOLE.format(module="studies.cli"))
    program(programs, "torchrun", CONSOLE.format(module="torch.distributed.run"))
    kept = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    path = os.pathsep.join([str(programs), os.environ["PATH"]])
    return {**kept, "PATH": path, "PYTHONPATH": str(ROOT), **variables}


def script(name: str, place: Place, env: Mapping[str, str], *words: str) -> "subprocess.Popen[str]":
    """A job script, started in an empty folder."""
    command = ["bash", str(SCRIPTS / name), *words]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env, cwd=place.folder
    )


ARRAY = {"SLURM_JOB_ID": "71", "SLURM_ARRAY_JOB_ID": "71", "SLURM_CPUS_PER_TASK": "1"}
TWO_NODES = {
    "SLURM_JOB_ID": "54321",
    "SLURM_JOB_NODELIST": "here[1-2]",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_CPUS_PER_TASK": "2",
}


def test_an_array_task_is_a_compare_with_one_job(place: Place) -> None:
    env = environment(place.folder, NOTED, {**ARRAY, "SLURM_CPUS_PER_TASK": "8"})
    out, err = script("cells.sbatch", place, env, *place.words("compare", *STUDY)[1:]).communicate(timeout=60)
    words, settings = json.loads(out)
    assert (words[:2], words[-3:], err) == (["ditbench", "compare"], ["--jobs", "1", "--no_wait"], "")
    assert settings == {"OMP_NUM_THREADS": "8", "SRUN_CPUS_PER_TASK": "8", "SLURM_KILL_BAD_EXIT": None}
    parser = command_parser()
    namespace = parse(parser, words[2:])
    assert (comparison(parser, namespace).total, namespace.jobs, namespace.no_wait) == (2, 1, True)


def test_the_nodes_of_a_cell_meet_at_the_first(place: Place) -> None:
    variables = {**TWO_NODES, "SLURM_GPUS_ON_NODE": "4", "SLURM_CPUS_PER_TASK": "32"}
    env = environment(place.folder, NOTED, variables)
    out, err = script("one_cell.sbatch", place, env, "--config", "a file.yaml").communicate(timeout=60)
    words, settings = json.loads(out)
    assert err == ""
    assert words == [
        *("torchrun", "--nnodes", "2", "--nproc_per_node", "4", "--rdzv_backend", "c10d", "--rdzv_id", "54321"),
        *("--rdzv_endpoint", "127.0.0.1:34321", "-m", "studies.cli", "compare", "--config", "a file.yaml"),
    ]
    assert settings == {"OMP_NUM_THREADS": "8", "SRUN_CPUS_PER_TASK": "32", "SLURM_KILL_BAD_EXIT": "1"}


@pytest.mark.parametrize("name", ["cells.sbatch", "one_cell.sbatch"])
def test_what_sbatch_reads_stands_above_the_first_command(name: str) -> None:
    text = (SCRIPTS / name).read_text()
    subprocess.run(["bash", "-n", str(SCRIPTS / name)], check=True)
    options = re.findall(r"^#SBATCH (--[a-z-]+)(?:=(\S+))?$", text, re.M)
    assert len(options) == text.count("#SBATCH"), "an option of a form that this test does not know"
    assert {"--requeue", "--open-mode", "--time"} <= {option for option, _ in options}
    assert text.rindex("#SBATCH") < text.index("set -euo pipefail")


@pytest.mark.slow
@pytest.mark.full
def test_two_tasks_of_an_array_train_every_cell_once(place: Place) -> None:
    words = [*place.words("compare", *STUDY, "--output.mlflow", "false")[1:], "--runtime.device", "cpu"]
    env = environment(place.folder, BY_NODE, ARRAY)
    tasks = [script("cells.sbatch", place, {**env, "SLURM_ARRAY_TASK_ID": str(i)}, *words) for i in range(2)]
    outputs = [task.communicate(timeout=280) for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0], outputs
    for number, cell in enumerate(("sit", "vae_repa"), start=1):
        run = RunFolder(place.runs / "small" / cell / "seed0")
        assert (run.status(), len(begins(run))) == ("finished", 1)
        assert [line["step"] for line in run.lines("eval")] == [3, 6]
        assert any(f"cell {number} of 2: {cell} seed 0: finished" in out for out, _ in outputs)
    assert any(out.splitlines()[-1].startswith("report: ") for out, _ in outputs)


@pytest.mark.slow
@pytest.mark.full
def test_two_nodes_train_one_cell_together(place: Place, finished: FinishedStudy) -> None:
    env = environment(place.folder, BY_NODE, TWO_NODES)
    job = script("one_cell.sbatch", place, env, *place.words("compare", *TOGETHER)[1:])
    out, err = job.communicate(timeout=280)
    assert job.returncode == 0, err
    for number, cell in enumerate(("sit", "vae_repa"), start=1):
        assert out.count(f"cell {number} of 2: {cell} seed 0: finished") == 1
    assert_trained_together(place, finished)
    assert len(set(begins(RunFolder(place.runs / "small" / "vae_repa" / "seed0")))) == 2
