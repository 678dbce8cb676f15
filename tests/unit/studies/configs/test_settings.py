"""From YAML and command line to typed configs: presets, overrides, cells, and what a wrong word is answered with."""

from argparse import ArgumentTypeError
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

import methods
from harness.config import DataConfig, RunConfig
from harness.errors import UserError
from studies.configs import settings
from studies.configs.cells import Comparison, comparison, run_config
from studies.configs.sections import as_plain, nominal_shape, resolve_sections
from studies.configs.settings import build_parser, comma_list, parse, whole_numbers

DIGITS = ("--config", "digits")
PRESET = yaml.safe_load((settings.PRESETS / "digits.yaml").read_text())


def trained(*words: str) -> RunConfig:
    """The config of `ditbench train` with these words."""
    parser = build_parser("train", "")
    return run_config(parser, parse(parser, words))


def compared(*words: str) -> Comparison:
    """What `ditbench compare` runs with these words."""
    parser = build_parser("compare", "")
    return comparison(parser, parse(parser, words))


def written(path: Path, value: Any) -> str:
    path.write_text(yaml.safe_dump(value, sort_keys=False))
    return str(path)


def refusal(words: Sequence[str], command: str = "train") -> str:
    """The one line that a user sees."""
    with pytest.raises(UserError) as error:
        trained(*words) if command == "train" else compared(*words)
    return " ".join(str(error.value).split())


# -- values ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("a,b", ["a", "b"]),
        (" a , b ", ["a", "b"]),
        (["a", "b"], ["a", "b"]),
        ("a", ["a"]),
        ("", []),
        ("a,,b", ["a", "b"]),
        (3, ["3"]),
    ],
)
def test_comma_lists(value: Any, expected: list[str]) -> None:
    assert comma_list(value) == expected


@pytest.mark.parametrize(("value", "expected"), [("0,1,2", [0, 1, 2]), ([3, 4], [3, 4]), (5, [5]), ("", [])])
def test_whole_numbers(value: Any, expected: list[int]) -> None:
    assert whole_numbers(value) == expected


@pytest.mark.parametrize("value", ["a", "1.5", "0,x", "-1", [0, -2], "1e3"])
def test_other_numbers_are_refused(value: Any) -> None:
    with pytest.raises(ArgumentTypeError, match=r"whole numbers such as 0,1,2|give 0 or more"):
        whole_numbers(value)


# -- presets and overrides ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", settings.preset_names())
@pytest.mark.parametrize("words", [["--config"], []])
def test_every_preset_is_a_comparison(name: str, words: list[str]) -> None:
    given = ["--config", name] if words else [f"--config={name}"]
    found = compared(*given)
    assert found.baseline == methods.control()
    for cell in found.cells:
        resolve_sections(cell, nominal_shape(cell))


def test_the_digits_preset_is_the_file() -> None:
    found = compared(*DIGITS)
    assert [cell.method for cell in found.cells] == PRESET["methods"]
    assert list(found.seeds) == PRESET["seeds"]
    for cell in found.cells:
        assert cell.optimizer.lr == PRESET["optimizer"]["lr"]
        assert cell.evaluation.sampler.kind == PRESET["evaluation"]["sampler"]["kind"]
        assert cell.optimizer.beta1 == 0.9, "what the preset does not set keeps its default"
    assert found.cells[1].sections["repa"].encoders == PRESET["repa"]["encoders"]


def test_overrides_follow_the_preset_and_the_last_one_wins() -> None:
    config = trained(*DIGITS, "--optimizer.lr", "2e-3", "--optimizer.lr=3e-3", "--seed", "7", "--cell", "mine")
    assert (config.optimizer.lr, config.seed, config.label) == (3e-3, 7, "mine")
    assert config.evaluation.sampler.num_steps == PRESET["evaluation"]["sampler"]["num_steps"]
    assert trained("--optimizer.lr", "2e-5", *DIGITS).optimizer.lr == PRESET["optimizer"]["lr"], "the later one wins"


def test_a_file_of_ones_own(tmp_path: Path) -> None:
    path = written(tmp_path / "mine.yaml", {"data": {"name": "digits", "image_size": 32}, "repa": {"weight": 0.25}})
    config = trained("--config", path, "--method", "repa")
    assert config.sections["repa"].weight == 0.25
    with pytest.raises(UserError, match=r"neither a file nor a preset; presets are .*digits"):
        trained("--config", str(tmp_path / "other.yaml"))


def test_files_add_up(tmp_path: Path) -> None:
    path = written(tmp_path / "more.yaml", {"budget": {"amount": 12}})
    config = trained(*DIGITS, "--config", path)
    assert (config.budget.amount, config.optimizer.lr) == (12, PRESET["optimizer"]["lr"])


def test_only_the_methods_own_sections_are_kept() -> None:
    assert trained(*DIGITS, "--method", "sit").sections.keys() == {"sit"}
    config = trained(*DIGITS, "--method", "repa+vae_repa", "--vae_repa.weight", "0.5")
    assert config.sections.keys() == {"repa", "vae_repa"}
    assert config.sections["vae_repa"].weight == 0.5
    assert trained(*DIGITS, "--method", "repa").sections == {"repa": config.sections["repa"]}


# -- what a wrong word is answered with -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--optimizer.lrr", "1"], "key 'optimizer.lrr' is not known: did you mean 'optimizer.lr'?"),
        (["--optimiser.lr", "1"], "key 'optimiser.lr' is not known: did you mean 'optimizer.lr'?"),
        (["--repa.blok=4"], "key 'repa.blok' is not known: did you mean 'repa.block'?"),
        (["--metod", "sit"], "key 'metod' is not known: did you mean 'method'?"),
        (["--evaluation.sampler.num_step", "4"], "key 'evaluation.sampler.num_step' is not known: did you mean "
         "'evaluation.sampler.num_steps'?"),
        (["--zzzzzzzz", "4"], "key 'zzzzzzzz' is not known: see --help for all keys"),
    ],
)  # fmt: skip
def test_an_unknown_key_names_the_nearest(words: list[str], expected: str) -> None:
    assert refusal([*DIGITS, *words]) == expected


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"optimizer": {"lrr": 1}}, "key 'optimizer.lrr' is not known: did you mean 'optimizer.lr'?"),
        ({"optimiser": {"lr": 1}}, "key 'optimiser.lr' is not known: did you mean 'optimizer.lr'?"),
        ({"vae_repa": {"blck": 1}}, "key 'vae_repa.blck' is not known: did you mean 'vae_repa.block'?"),
        ({"evaluation": {"sampler": {"kinds": "x"}}}, "key 'evaluation.sampler.kinds' is not known: did you mean "
         "'evaluation.sampler.kind'?"),
    ],
)  # fmt: skip
def test_an_unknown_key_in_a_file_names_the_nearest(tmp_path: Path, content: dict[str, Any], expected: str) -> None:
    assert refusal([*DIGITS, "--config", written(tmp_path / "wrong.yaml", content)]) == expected


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--optimizer.lr", "fast"], "optimizer.lr is fast: give a number"),
        (["--optimizer.lr", "-1"], "optimizer.lr is -1.0: give a rate above 0"),
        (["--seed", "1.5"], "seed is 1.5: give a whole number"),
        (["--model.qk_norm", "maybe"], "model.qk_norm is maybe: give true or false"),
        (["--sra.loss", "l3"], "sra.loss is l3: give one of smooth_l1, cosine_tokens"),
        (["--budget.amount", "0"], "budget.amount is 0: give 1 or more steps"),
        (
            ["--evaluation.sampler.kind", "euler"],
            "evaluation.sampler.kind is euler: give one of ode-euler, ode-heun, sde-euler-maruyama",
        ),
        (["--seed", "-1"], "seed is -1: give 0 or more"),
        (["--method", "repaa"], "method 'repaa' is not known (did you mean repa?): there are"),
        (["--method", "repa+nothing"], "method 'nothing' is not known"),
        (["--method", "repa+repa"], "method 'repa+repa' names a part twice"),
        (["--method", ""], "method '' is not known"),
    ],
)
def test_wrong_values_are_named(words: list[str], expected: str) -> None:
    assert expected in refusal([*DIGITS, *words])


def test_a_file_that_is_no_yaml(tmp_path: Path) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text("optimizer: [1, 2")
    assert refusal(["--config", str(path)]).startswith(
        f"--config {path} cannot be read as YAML, line 1: expected ',' or ']', but got "
    )
    path.write_bytes(bytes(range(128, 256)))
    assert refusal(["--config", str(path)]).startswith(f"--config {path} cannot be read as YAML: ")
    path.write_text("just words")
    assert refusal(["--config", str(path)]).startswith(f"--config {path} is no mapping of keys to values")
    path.write_text("optimizer:\n  lr: 1.0\n  lr: 2.0")
    assert refusal(["--config", str(path)]) == f"--config {path} cannot be used, line 3: optimizer.lr is given twice"


@pytest.mark.parametrize(
    "key", ["study", "seed", "model.name", "data.image_size", "evaluation.sampler.kind", "sra.beta"]
)
def test_a_key_with_nothing_behind_it(tmp_path: Path, key: str) -> None:
    content: Any = None
    for name in reversed(key.split(".")):
        content = {name: content}
    line = refusal([*DIGITS, "--config", written(tmp_path / "empty.yaml", content)])
    assert line == f"{key} is empty: give it a value, or leave the key out for its default"


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--budget.amount", "x"], "budget.amount is x: give a whole number or a number"),
        (["--data", "3"], "data is '3': it is a section, so set the keys in it, as in --help"),
        (["--ema.decay", "-1e-9"], "ema.decay has no value: give one, and write --ema.decay=VALUE where it begins "
         "with a dash"),
        (["--ema.decay=-1e-9"], "ema.decay is -1e-09: give 0 or more and less than 1"),
    ],
)  # fmt: skip
def test_words_that_the_parser_does_not_take(words: list[str], line: str) -> None:
    assert refusal([*DIGITS, *words]) == line


def test_an_empty_word_is_named() -> None:
    assert refusal([*DIGITS, "--optimizer.lr", " "]) == "optimizer.lr is empty: give a number"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"seeds": "0,one"}, "'0,one' is not a list of whole numbers such as 0,1,2"),
        ({"seeds": [0, -1]}, "[0, -1] holds a negative number: give 0 or more"),
        ({"seeds": None}, "seeds is empty: give at least one"),
        ({"methods": None, "cells": None}, "methods is empty: give --methods"),
        ({"cells": ["sit"]}, "['sit'] is not a mapping of labels to settings"),
        ({"ema": None}, "ema is None: it is a section"),
        ({"optimizer": 3}, "optimizer is 3: it is a section, so set the keys in it"),
        ({"repa": "weight"}, "repa is 'weight': it is a section"),
        ({"cells": {"a": {"method": "repa", "repa": 1}}}, "repa is 1: it is a section"),
        ({"evaluation": {"sampler": 3}}, "evaluation.sampler is 3: it is a section"),
        (["sit"], "is no mapping of keys to values"),
    ],
)
def test_a_file_with_values_of_the_wrong_kind(tmp_path: Path, content: Any, expected: str) -> None:
    assert expected in refusal([*DIGITS, "--config", written(tmp_path / "wrong.yaml", content)], "compare")


HOSTILE = ["a/b", "..", "../up", ".hidden", "a\\b", "line\nbreak", "nul\0", "x" * 300, "é" * 150]


@pytest.mark.parametrize("name", HOSTILE)
def test_names_that_would_leave_or_break_the_folder(name: str) -> None:
    assert refusal([*DIGITS, f"--study={name}"]).startswith("study is ")
    assert refusal([*DIGITS, f"--cell={name}"]).startswith("cell is ")
    assert len(refusal([*DIGITS, f"--study={name}"]).splitlines()) == 1
    with pytest.raises(UserError, match="cell is "):
        RunConfig(data=DataConfig(name="digits"), cell=name)


def test_a_cell_may_not_take_the_place_of_the_report(tmp_path: Path) -> None:
    assert "cell is 'report', where the study's report goes" in refusal([*DIGITS, "--cell", "report"])
    cells = written(tmp_path / "cells.yaml", {"cells": {"report": {"method": "sit"}}})
    assert "cell is 'report'" in refusal([*DIGITS, "--config", cells], "compare")


@pytest.mark.parametrize("name", ["repa+vae_repa", "repa,block=2", "größer", "a b", "[red]", "%s", "x" * 200])
def test_names_with_blanks_signs_and_letters_are_fine(name: str) -> None:
    config = trained(*DIGITS, f"--study={name}", f"--cell={name}")
    assert (config.study, config.label) == (name, name)


# -- comparisons ----------------------------------------------------------------------------------------------------


def test_the_short_form_makes_a_cell_for_every_method() -> None:
    found = compared(*DIGITS, "--methods", "repa, sit,repa+vae_repa", "--seeds", "3,1")
    assert [(cell.label, cell.method) for cell in found.cells] == [
        ("repa", "repa"),
        ("sit", "sit"),
        ("repa+vae_repa", "repa+vae_repa"),
    ]
    assert found.baseline == "sit"
    runs = [(run.seed, run.label) for run in found.runs()]
    assert runs == [(seed, label) for seed in (3, 1) for label in ("repa", "sit", "repa+vae_repa")]


def test_cells_with_settings_of_their_own(tmp_path: Path) -> None:
    cells = {
        "early": {"method": "repa", "repa": {"block": 1}},
        "late": {"method": "repa", "repa": {"block": 5, "weight": 0.25}},
        "both": {"method": "repa+vae_repa", "vae_repa": {"t_max": 0.5}},
    }
    path = written(tmp_path / "cells.yaml", {"cells": cells, "baseline": "early"})
    found = compared(*DIGITS, "--config", path, "--repa.weight", "0.75")
    early, late, both = found.cells
    assert found.baseline == "early"
    assert (early.sections["repa"].block, early.sections["repa"].weight) == (1, 0.75)
    assert (late.sections["repa"].block, late.sections["repa"].weight) == (5, 0.25)
    assert (both.sections["repa"].block, both.sections["vae_repa"].t_max) == (0, 0.5)
    assert early.sections["repa"].encoders == "efficientnet_lite2", "a cell changes only what it names"
    assert [cell.label for cell in found.cells] == list(cells)


def test_cells_win_over_methods_and_come_from_the_command_line_too() -> None:
    found = compared(*DIGITS, "--methods", "sra", "--cells", "{a: {method: sit}, 2: {method: repa}}")
    assert [(cell.label, cell.method) for cell in found.cells] == [("a", "sit"), ("2", "repa")]
    assert found.baseline == "a"


def test_without_the_control_the_first_cell_is_the_baseline() -> None:
    assert compared(*DIGITS, "--methods", "vae_repa,repa").baseline == "vae_repa"
    assert compared(*DIGITS, "--methods", "vae_repa,repa", "--baseline", "repa").baseline == "repa"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--methods", "sit,repa", "--baseline", "sra"], "baseline is 'sra': the cells are sit, repa"),
        (["--methods", "sit,sit"], "methods ['sit', 'sit'] name one twice"),
        (["--methods", ""], "methods is empty: give --methods or --config"),
        (["--methods", "sit,nothing"], "method 'nothing' is not known"),
        (["--seeds", ""], "seeds is empty: give at least one"),
        (["--seeds", "0,1,0"], "seeds [0, 1, 0] name a seed twice"),
        (["--seeds", "0,one"], "'0,one' is not a list of whole numbers"),
        (["--seeds", "0,-1"], "holds a negative number"),
        (["--cells", "{a: {repa: {block: 1}}}"], "cells.a is {'repa': {'block': 1}}: give at least its method"),
        (["--cells", "{a: sit}"], "cells.a is 'sit': give at least its method"),
        (["--cells", "[a, b]"], "is not a mapping of labels to settings"),
        (["--cells", "{a: {method: sit, optimizer: {lr: 1}}}"], "cells.a sets optimizer: a cell may set its method"),
        (["--cells", "{a: {method: repa, repa: {blok: 1}}}"], "cells.a: key 'repa.blok' is not known: did you mean "
         "'repa.block'?"),
        (["--cells", "{a: {method: repa, repa: {block: x}}}"], "cells.a: "),
        (["--cells", "{a/b: {method: repa}}"], "cell is 'a/b'"),
    ],
)  # fmt: skip
def test_comparisons_that_cannot_be(words: list[str], expected: str) -> None:
    assert expected in refusal([*DIGITS, *words], "compare")


# -- printed configs ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "block", "teacher_block", "width"),
    # methods.md section 7; pico has 4 blocks: 8/28 and 20/28 of 4, rounded, and heads of 2 D
    [("SiT-S/2", 3, 8, 768), ("SiT-B/2", 3, 8, 1536), ("SiT-XL/2", 8, 20, 2304), ("SiT-pico/2", 1, 3, 128)],
)
def test_size_defaults_are_resolved_without_data(model: str, block: int, teacher_block: int, width: int) -> None:
    config = trained(*DIGITS, "--method", "sra", "--model.name", model)
    section = as_plain(resolve_sections(config, nominal_shape(config)))["sections"]["sra"]
    assert (section["block"], section["teacher_block"], section["head_width"]) == (block, teacher_block, width)


def test_plain_values_of_a_config_are_yaml() -> None:
    config = trained(*DIGITS, "--method", "repa+sra")
    plain = as_plain(config)
    assert yaml.safe_load(yaml.safe_dump(plain)) == plain
    assert plain["sections"].keys() == {"repa", "sra"}
    split = {"holdout": 0.5, "split_seed": 0, "flip": False}
    assert plain["data"] == {"name": "digits", "path": "", "latents": "", "image_size": 32, **split}
