"""Settings in which cells differ."""

import pytest

from reports.setup.differing import DifferingSetting, differing_settings
from reports.study.load import load_study
from tests.unit.reports.records_factory import edit_manifest, run_folder, write_study


@pytest.fixture
def study(tmp_path):
    return write_study(tmp_path, {"sit": "sit", "repa": "repa", "repa,block=3": "repa"})


def change(study, cell, seed, section, name, value):
    folder = run_folder(study, cell, seed)
    config = folder.manifest()["config"]
    config[section][name] = value
    edit_manifest(folder, config=config)


def test_a_method_has_settings_that_others_lack(study):
    change(study, "repa,block=3", 0, "sections", "repa", {"block": 3, "weight": 0.5})
    change(study, "repa,block=3", 1, "sections", "repa", {"block": 3, "weight": 0.5})
    assert differing_settings(load_study(study)) == [
        DifferingSetting("repa.block", ("–", "2", "3")),
        DifferingSetting("repa.encoders", ("–", "efficientnet_lite2", "–")),
        DifferingSetting("repa.head_width", ("–", "512", "–")),
        DifferingSetting("repa.weight", ("–", "0.5", "0.5")),
    ]


def test_shared_settings_are_named_where_cells_or_seeds_differ(study):
    for seed in (0, 1):
        change(study, "repa", seed, "optimizer", "micro_batch", 16)
        change(study, "repa", seed, "output", "log_every", 7)
    change(study, "repa,block=3", 1, "runtime", "threads", 4)
    change(study, "sit", 0, "runtime", "compile", True)
    change(study, "sit", 1, "runtime", "compile", True)
    found = {setting.name: setting.values for setting in differing_settings(load_study(study))}
    assert {name: values for name, values in found.items() if not name.startswith("repa.")} == {
        "optimizer.micro_batch": ("0", "16", "0"),
        "runtime.threads": ("2", "2", "2 or 4"),
        "runtime.compile": ("true", "false", "false"),
    }


def test_cells_of_one_method_with_the_same_settings_do_not_differ(tmp_path):
    assert differing_settings(load_study(write_study(tmp_path, {"sit": "sit", "twin": "sit"}, seeds=(0,)))) == []
