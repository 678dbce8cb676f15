"""What an ablation is: labels, the plan on record, what a study may not change, and how it may grow."""

import functools
import pickle
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import methods
from harness.config import RunConfig
from harness.errors import UserError
from harness.records.files import read_json, write_json
from studies.ablation import axes
from studies.ablation.plan import (
    LONGEST_LABEL,
    AblationPlan,
    PlannedSubject,
    axis_field,
    axis_name,
    differences,
    grown,
    joined,
    plan_record,
    recorded_sections,
    refusal,
    text_of,
)
from studies.configs.cells import run_config
from studies.configs.sections import nominal_shape, resolve_sections
from studies.configs.settings import build_parser, parse

Cell = Callable[..., RunConfig]


@pytest.fixture(scope="module")
def cell() -> Cell:
    """A cell of the embedded preset with overrides, as `compare` builds it."""
    parser = build_parser("ablate", "")

    @functools.cache
    def build(method: str, *words: str) -> RunConfig:
        config = run_config(parser, parse(parser, ["--config", "digits", "--method", method, *words]))
        return replace(config, cell=method)

    return build


def resolved(config: RunConfig) -> RunConfig:
    return resolve_sections(config, nominal_shape(config))


def grid(cell: Cell, asked: Mapping[str, Any], *words: str, method: str = "vae_repa", **fields: Any) -> AblationPlan:
    subject = axes.grid_subject(cell(method, *words), asked)
    settings = axes.grid_settings(subject, fields.get("kind") == "one_at_a_time")
    control = resolved(cell(methods.control(), *words))
    return AblationPlan(
        **{"kind": "grid", "seeds": (0, 1), **fields}, subjects=(subject,), settings=settings, control=control
    )


@functools.cache
def searched(cell: Cell, name: str) -> PlannedSubject:
    return axes.search_subject(cell(name))


def search(cell: Cell, *names: str, **fields: Any) -> AblationPlan:
    subjects = tuple(searched(cell, name) for name in names)
    given = {"seeds": (0, 1), "trials": 4, **fields}
    return AblationPlan(kind="search", subjects=subjects, control=resolved(cell(methods.control())), **given)


# -- cells ----------------------------------------------------------------------------------------------------------


def test_a_setting_has_one_label_whatever_axes_asked_for_it(cell: Cell) -> None:
    one = axes.grid_subject(cell("vae_repa"), {"block": "3,4"})
    two = axes.grid_subject(cell("vae_repa"), {"head_layers": "2,5", "block": "3"})
    found = axes.search_subject(cell("vae_repa"))
    assert one.cell({"block": 3}) == two.cell({"block": 3, "head_layers": 5}) == found.cell({"block": 3})
    assert two.cell({"block": 3, "head_layers": 2}).label == "vae_repa,block=3,head_layers=2"


def test_the_default_cell_is_the_one_of_a_comparison(cell: Cell) -> None:
    """So a setting that equals the default, or that spells out what 0 stands for, is the same run."""
    subject = axes.grid_subject(cell("vae_repa"), {"block": "2,3", "head_width": "64"})
    default = resolved(cell("vae_repa"))
    assert (
        subject.cell(subject.default()) == subject.cell({}) == subject.cell({"block": 0, "head_width": 256}) == default
    )
    assert default.label == "vae_repa"


def test_a_cell_is_refused_with_field_and_range(cell: Cell) -> None:
    subject = axes.grid_subject(cell("vae_repa"), {"block": "2"})
    with pytest.raises(UserError, match=r"vae_repa\.block is 9: the backbone has blocks 1 to 6"):
        subject.cell({"block": 9})


@pytest.mark.parametrize(
    ("value", "text"),
    [(3, "3"), (0.1, "0.1"), (1e-05, "1e-05"), (1.0, "1.0"), (True, "true"), ("l1", "l1"), ("a,b", "a+b")],
)
def test_values_in_labels(value: Any, text: str) -> None:
    assert text_of(value) == text


def test_a_long_label_stays_unique_and_short(cell: Cell) -> None:
    name = "repa+sra+vae_repa"
    subject = axes.search_subject(cell(name))
    far = {axis.name: next(level for level in reversed(axis.levels) if level != axis.default) for axis in subject.axes}
    near = {**far, "vae_repa.t_max": 1.0}
    labels = [subject.cell(setting).label for setting in (far, near)]
    assert len(set(labels)) == 2
    assert all(len(label.encode()) <= LONGEST_LABEL and label.startswith(f"{name},repa.block=") for label in labels)


def test_an_ablation_travels_between_processes(cell: Cell) -> None:
    asked = grid(cell, {"block": "1,2"})
    assert pickle.loads(pickle.dumps(asked)) == asked


# -- the plan on record ---------------------------------------------------------------------------------------------


def test_the_plan_of_a_grid(cell: Cell, tmp_path: Path) -> None:
    plan = plan_record(grid(cell, {"head_layers": "2,5", "block": "3"}, objective="fd", workers=2))
    write_json(tmp_path / "ablation.json", plan)
    read = read_json(tmp_path / "ablation.json")
    assert read == plan, "plain values only"
    base = read.pop("base")
    assert base["optimizer"]["lr"] == 4e-3 and base["data"]["name"] == "digits"
    assert not base.keys() & {"study", "cell", "method", "seed", "sections"}
    entry = read.pop("methods")["vae_repa"]
    assert entry["section"]["block"] == 1 and entry["section"]["head_width"] == 256
    assert entry["space"]["t_max"] == [0.5, 1.0]
    assert entry["default_cell"] == "vae_repa"
    assert entry["axes"] == [
        {"name": "block", "kind": "int", "default": 1, "levels": [3], "choices": []},
        {"name": "head_layers", "kind": "int", "default": 5, "levels": [2, 5], "choices": []},
    ]
    assert read == {
        "format": 2,
        "study": "digits",
        "kind": "grid",
        "objective": "",
        "objective_asked": "fd",
        "seeds": [0, 1],
        "control": "sit",
        "trials": 0,
        "sampler": {},
        "pruner": "none",
        "storage": "journal",
        "workers": 2,
        "budget": {"unit": "steps", "amount": 420},
        "points": 3,
        "model": {"name": "SiT-nano/2", "depth": 6},
    }


def test_the_plan_of_a_search_tells_no_password(cell: Cell) -> None:
    asked = search(cell, "repa+vae_repa", storage="postgresql+psycopg://me:secret@host/db")
    plan = plan_record(asked)
    assert plan["storage"] == "postgresql" and "secret" not in str(plan)
    assert plan["sampler"] == {"name": "tpe", "seed": 0} and plan["trials"] == 4
    assert plan["methods"]["repa+vae_repa"]["section"].keys() == {"repa", "vae_repa"}


@pytest.mark.parametrize(("method", "axis"), [("repa", "block"), ("repa+vae_repa", "repa.block")])
def test_axes_and_sections_of_a_sum_name_the_part(cell: Cell, method: str, axis: str) -> None:
    assert axis_name(method, "repa", "block") == axis
    assert axis_field(method, axis) == ("repa", "block")
    plan = plan_record(search(cell, method))
    entry = plan["methods"][method]
    assert ("repa" in entry["section"]) == (method != "repa"), "a single method has its section itself on record"
    sections = recorded_sections(method, entry)
    assert tuple(sections) == methods.parts(method)
    assert sections["repa"]["encoders"] == "efficientnet_lite2"


# -- what may not change --------------------------------------------------------------------------------------------


GRID = {"block": "1,2"}


@pytest.mark.parametrize(
    ("words", "first"),
    [
        (("--vae_repa.weight", "0.5"), "vae_repa.weight 1.0, now 0.5"),
        (("--optimizer.lr", "0.01"), "optimizer.lr 0.004, now 0.01"),
        (("--budget.amount", "7"), "budget.amount 420, now 7"),
        (("--evaluation.sampler.num_steps", "8"), "evaluation.sampler.num_steps 6, now 8"),
        (("--model.name", "SiT-pico/2"), "model.name 'SiT-nano/2', now 'SiT-pico/2'"),
    ],
)
def test_preset_and_protocol_may_not_change(cell: Cell, words: tuple[str, ...], first: str) -> None:
    lines = differences(plan_record(grid(cell, GRID)), plan_record(grid(cell, GRID, *words)))
    assert lines[0] == first


def test_a_study_that_left_compile_to_the_machine_goes_on(cell: Cell) -> None:
    """Version 0.1.0 put `auto` on record."""
    before, now = (plan_record(grid(cell, GRID, "--runtime.compile", value)) for value in ("false", "true"))
    assert differences(before, now) == ["runtime.compile False, now True"]
    before["base"]["runtime"]["compile"] = "auto"
    assert differences(before, now) == []


def test_another_data_set_method_or_kind_is_named_alone(cell: Cell) -> None:
    before = plan_record(grid(cell, GRID))
    other_data = grid(cell, GRID, "--data.name", "imagefolder", "--data.path", "x", "--vae_repa.weight", "0.1")
    assert differences(before, plan_record(other_data)) == ["data.name 'digits', now 'imagefolder'"]
    other_method = plan_record(grid(cell, {"block": "1,2"}, method="sra"))
    assert differences(before, other_method) == ["method 'vae_repa', now 'sra'"]
    turns = plan_record(grid(cell, GRID, kind="one_at_a_time"))
    assert differences(before, turns) == ["kind 'grid', now 'one_at_a_time'"]


@pytest.mark.parametrize(
    "words",
    [
        ("--runtime.threads", "7"),
        ("--runtime.checkpoint_activations", "true"),
        ("--output.log_every", "3"),
        ("--optimizer.micro_batch", "4"),
    ],
)
def test_what_a_continued_run_may_change_an_ablation_may(cell: Cell, words: tuple[str, ...]) -> None:
    assert differences(plan_record(grid(cell, GRID)), plan_record(grid(cell, GRID, *words))) == []


def test_a_grid_may_grow_and_change_hands(cell: Cell) -> None:
    before = plan_record(grid(cell, GRID))
    more = grid(cell, {"block": "3", "head_layers": "2"}, seeds=(2, 3), workers=4)
    assert differences(before, plan_record(more)) == []


def test_storage_and_objective_may_not_change(cell: Cell) -> None:
    before = plan_record(grid(cell, GRID))
    assert differences(before, plan_record(grid(cell, GRID, storage="postgresql://h/d"))) == [
        "storage 'journal', now 'postgresql'"
    ]
    assert differences(before, plan_record(grid(cell, GRID, objective="velocity_loss"))) == [
        "objective 'main', now 'velocity_loss'"
    ]


def test_a_search_may_get_more_trials_and_nothing_else(cell: Cell) -> None:
    before = plan_record(search(cell, "sra"))
    assert differences(before, plan_record(search(cell, "sra", trials=9, workers=2))) == []
    assert differences(before, plan_record(search(cell, "sra", seeds=(0, 1, 2)))) == ["seeds [0, 1], now [0, 1, 2]"]
    assert differences(before, plan_record(search(cell, "sra", pruner="median"))) == ["pruner 'none', now 'median'"]
    assert differences(before, plan_record(search(cell, "sra", "repa"))) == ["method 'sra', now 'repa+sra'"]
    narrower = plan_record(search(cell, "sra"))
    narrower["methods"]["sra"]["space"]["weight"] = [0.1, 0.2]
    assert differences(before, narrower) == ["search space of sra, weight: [0.1, 0.2, 0.5], now [0.1, 0.2]"]


def test_a_refusal_shows_three_differences_and_counts_the_rest() -> None:
    assert refusal(Path("runs/a"), ["x 1, now 2"]) == "runs/a holds another ablation: x 1, now 2: give another --study"
    line = refusal(Path("runs/a"), ["a", "b", "c", "d", "e"])
    assert line == "runs/a holds another ablation: a; b; c and 2 more: give another --study"


# -- growth ---------------------------------------------------------------------------------------------------------


def test_growth_joins_axes_levels_and_seeds_and_fills_in_settings(cell: Cell) -> None:
    """Blocks 1 and 2 first; then block 4 with two heads: every setting ever tried has a value on both axes."""
    first = {**plan_record(grid(cell, {"block": "2,1"})), "id": "i", "objective": "fd_x", "trial_list": []}
    first["trial_list"] = [{"method": "vae_repa", "cell": "vae_repa,block=2", "setting": {"block": 2}}]
    asked = joined(grid(cell, {"head_layers": "2,5", "block": "4"}, seeds=(1, 2)), first)
    assert [(axis.name, axis.levels) for axis in asked.subjects[0].axes] == [
        ("block", (1, 2, 4)),
        ("head_layers", (2, 5)),
    ]
    record = grown(first, plan_record(asked))
    assert record["seeds"] == [0, 1, 2] and record["id"] == "i" and record["objective"] == "fd_x"
    assert record["trial_list"][0]["setting"] == {"block": 2, "head_layers": 5}
    levels = {axis["name"]: axis["levels"] for axis in record["methods"]["vae_repa"]["axes"]}
    assert levels == {"block": [1, 2, 4], "head_layers": [2, 5]}

    narrow = joined(grid(cell, {"block": "1,3"}), record)
    assert [dict(setting) for setting in narrow.settings] == [
        {"block": 1, "head_layers": 5},
        {"block": 3, "head_layers": 5},
    ]
    subject: PlannedSubject = narrow.subjects[0]
    assert subject.cell(narrow.settings[1]).label == "vae_repa,block=3"
    assert differences(record, plan_record(narrow)) == []


def test_growth_of_a_search_keeps_the_larger_number_of_trials(cell: Cell) -> None:
    before = {**plan_record(search(cell, "sra", trials=9)), "trial_list": []}
    assert grown(before, plan_record(joined(search(cell, "sra", trials=4), before)))["trials"] == 9
    assert grown(before, plan_record(joined(search(cell, "sra", trials=12), before)))["trials"] == 12


def test_text_levels_keep_their_order_as_they_join(cell: Cell) -> None:
    before = {**plan_record(grid(cell, {"loss": "l2,cosine"})), "trial_list": []}
    asked = joined(grid(cell, {"loss": "l1,l2"}), before)
    assert asked.subjects[0].axes[0].levels == ("l2", "cosine", "l1")
