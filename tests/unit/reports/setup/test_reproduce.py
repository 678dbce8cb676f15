"""Every cell's own command gives the config of its runs again."""

import shlex
import subprocess

import pytest

from harness.records.run_folder import RunFolder, run_path
from reports.setup.reproduce import CellCommand, cell_commands, configs_read, study_commands
from reports.study.load import load_study
from studies.configs.cells import comparison, run_config
from studies.configs.sections import as_plain, nominal_shape, resolve_sections
from studies.configs.settings import build_parser, parse
from tests.unit.reports.records_factory import edit_manifest, run_folder, write_study

CELLS = "{'a, b': {method: repa+vae_repa, vae_repa: {t_max: 0.5}}, '-x': {method: sra}, '1e3': {method: sit}}"
COMPARE = (
    *("--config", "digits", "--study", "odd name; $(x)", "--seeds", "0,3", "--evaluation.sampler.num_steps", "7"),
    *("--optimizer.eps", "1e-12", "--optimizer.lr", "0.00003", "--optimizer.weight_decay", "1e-7"),
    *("--data.flip", "true", "--output.checkpoint_every", "13", "--baseline", "1e3", "--cells", CELLS),
)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A study of odd names whose manifests hold what `compare` makes of its words, sizes resolved; with its configs."""
    runs = tmp_path_factory.mktemp("runs")
    parser = build_parser("compare", "")
    asked = comparison(parser, parse(parser, COMPARE))
    configs = {}
    for config in asked.runs():
        resolved = as_plain(resolve_sections(config, nominal_shape(config)))
        configs[config.label, config.seed] = resolved
        write_study(runs, {config.label: config.method}, (config.seed,), config.study, baseline="1e3")
        folder = RunFolder(run_path(runs, config.study, config.label, config.seed))
        folder.write_manifest({k: v for k, v in folder.manifest().items() if k != "format"} | {"config": resolved})
    return load_study(runs / asked.cells[0].study), configs


def parsed(command: str) -> dict[str, object]:
    """What the words come to that a shell makes of the command."""
    echo = "ditbench() { printf '%s\\0' \"$@\"; }"
    said = subprocess.run(["sh", "-c", f"{echo}\n{command}"], capture_output=True, text=True, check=True).stdout
    name, *words = said.split("\0")[:-1]
    assert name == "train"
    parser = build_parser("train", "")
    config = run_config(parser, parse(parser, words))
    return as_plain(resolve_sections(config, nominal_shape(config)))


def test_commands_parse_to_the_configs_of_the_runs(made):
    study, configs = made
    commands = cell_commands(study)
    assert [(command.cell, command.seed, command.others) for command in commands] == [
        ("1e3", 0, (3,)),
        ("-x", 0, (3,)),
        ("a, b", 0, (3,)),
    ]
    for command in commands:
        assert parsed(command.text) == configs[command.cell, 0]
        assert parsed(f"{command.text} --seed 3") == configs[command.cell, 3]
        assert "--config" not in command.text


def test_places_are_left_out(tmp_path):
    study = write_study(tmp_path, {"sit": "sit"}, seeds=(0,))
    folder = run_folder(study, "sit", 0)
    config = folder.manifest()["config"]
    config["output"] = {"runs": "/a", "cache": "/b", "mlflow": True, "mlflow_uri": "http://me:secret@x"}
    config["output"]["log_every"] = 20
    edit_manifest(folder, config=config)
    (command,) = cell_commands(load_study(study))
    assert command.lines[0] == "ditbench train --study digits --cell sit --method sit --seed 0"
    assert [line for line in command.lines if line.startswith("--output")] == ["--output.log_every 20"]
    assert "secret" not in command.text


def test_seeds_whose_settings_differ_have_commands_of_their_own(tmp_path):
    study = write_study(tmp_path, {"sit": "sit"}, seeds=(0, 1, 2))
    config = run_folder(study, "sit", 1).manifest()["config"]
    edit_manifest(run_folder(study, "sit", 1), config={"runtime": {**config["runtime"], "threads": 8}})
    commands = cell_commands(load_study(study))
    assert [(command.seed, command.others) for command in commands] == [(0, (2,)), (1, ())]
    assert "--runtime.threads 8" in commands[1].text and "--runtime.threads 8" not in commands[0].text


def test_a_command_goes_over_several_lines():
    assert CellCommand("x", 0, (), ("a", "--b c")).text == "a \\\n  --b c"


def test_the_study_s_own_commands_and_configs(tmp_path):
    study = write_study(tmp_path, {"sit": "sit"}, seeds=(0, 1, 2))
    words = ["ditbench", "compare", "--config=my file.yaml", "--seeds", "2"]
    edit_manifest(run_folder(study, "sit", 2), command=words)
    loaded = load_study(study)
    assert study_commands(loaded) == ["ditbench compare --config digits", shlex.join(words)]
    assert configs_read(loaded) == ["digits", "my file.yaml"]
