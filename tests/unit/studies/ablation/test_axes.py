"""Axes of an ablation: levels as they are typed, search spaces, and what a wrong one is answered with."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

import methods
from harness.config import RunConfig
from harness.errors import UserError
from harness.method import Disclosure, Method
from studies.ablation import axes
from studies.configs.cells import run_config
from studies.configs.settings import build_parser, parse

SUM = "repa+vae_repa"
Cells = Callable[[str], RunConfig]


@pytest.fixture(scope="module")
def cells() -> Cells:
    """The embedded preset's cell of a method: 6 blocks of width 128."""
    parser = build_parser("ablate", "")
    made = {}
    for name in (*methods.names(), SUM):
        config = run_config(parser, parse(parser, ["--config", "digits", "--method", name]))
        made[name] = replace(config, cell=name)
    return made.__getitem__


def labels(config: RunConfig, asked: Mapping[str, Any], one_at_a_time: bool = False) -> list[str]:
    subject = axes.grid_subject(config, asked)
    return [subject.cell(setting).label for setting in axes.grid_settings(subject, one_at_a_time)]


def refusal(config: RunConfig, asked: Mapping[str, Any]) -> str:
    with pytest.raises(UserError) as error:
        axes.grid_settings(axes.grid_subject(config, asked), False)
    return str(error.value)


# -- levels ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "axis", "asked", "expected"),
    [
        ("vae_repa", "block", "1,2,3", (1, 2, 3)),
        ("vae_repa", "block", " 3 , 1 ", (3, 1)),
        ("vae_repa", "block", [2, 4], (2, 4)),
        ("vae_repa", "block", 5, (5,)),
        ("vae_repa", "block", "all", (1, 2, 3, 4, 5, 6)),
        ("vae_repa", "block", "0,2", (1, 2)),
        ("vae_repa", "head_width", "0,64", (256, 64)),
        ("vae_repa", "weight", "1,1e-3,.5", (1.0, 0.001, 0.5)),
        ("vae_repa", "weight", [1, 2], (1.0, 2.0)),
        ("vae_repa", "loss", "l1,cosine", ("l1", "cosine")),
        ("vae_repa", "loss", "all", ("smooth_l1", "cosine", "l1", "l2")),
        ("vae_repa", "target", "all", ("sample", "mean")),
        ("sra", "teacher_fp32", "all", (False, True)),
        ("sra", "teacher_fp32", "True,false", (True, False)),
        ("sra", "teacher_fp32", [False, True], (False, True)),
        ("repa", "encoders", "efficientnet_lite0,efficientnet_lite2", ("efficientnet_lite0", "efficientnet_lite2")),
        (
            "repa", "encoders", '["efficientnet_lite0,efficientnet_lite2", "efficientnet_lite0"]',
            ("efficientnet_lite0,efficientnet_lite2", "efficientnet_lite0"),
        ),
        (SUM, "vae_repa.block", "2,3", (2, 3)),
    ],
)  # fmt: skip
def test_levels_have_the_type_of_their_field_and_are_resolved(
    cells: Cells, method: str, axis: str, asked: Any, expected: tuple[Any, ...]
) -> None:
    subject = axes.grid_subject(cells(method), {axis: asked})
    found = subject.axes[0].levels
    assert found == expected
    assert [type(level) for level in found] == [type(level) for level in expected]


def test_axes_stand_in_the_order_of_the_fields_with_kind_and_default(cells: Cells) -> None:
    asked = {"target": "all", "loss": "l1", "head_layers": "2", "weight": "0.5", "block": "3"}
    subject = axes.grid_subject(cells("vae_repa"), asked)
    found = [(axis.name, axis.kind, axis.default, axis.choices) for axis in subject.axes]
    assert found == [
        ("block", "int", 1, ()),
        ("weight", "float", 1.0, ()),
        ("loss", "choice", "smooth_l1", ("smooth_l1", "cosine", "l1", "l2")),
        ("head_layers", "int", 5, ()),
        ("target", "choice", "sample", ("sample", "mean")),
    ]


@pytest.mark.parametrize("method", [*(name for name in methods.names() if name != methods.control()), SUM])
def test_every_field_of_a_method_can_be_an_axis(cells: Cells, method: str) -> None:
    """Each at its default, which is always a legal level."""
    config = cells(method)
    for part, section in config.sections.items():
        for name in type(section).__dataclass_fields__:
            axis = f"{part}.{name}" if "+" in method else name
            assert labels(config, {axis: [getattr(section, name)]}) == [method]


# -- settings -------------------------------------------------------------------------------------------------------


def test_a_grid_is_the_product_with_the_default_first(cells: Cells) -> None:
    found = labels(cells("vae_repa"), {"head_layers": "2,5", "block": "1,2,3"})
    assert found[0] == "vae_repa"
    assert sorted(found) == [
        "vae_repa",
        "vae_repa,block=2",
        "vae_repa,block=2,head_layers=2",
        "vae_repa,block=3",
        "vae_repa,block=3,head_layers=2",
        "vae_repa,head_layers=2",
    ]


def test_the_default_is_there_where_no_level_is_the_default(cells: Cells) -> None:
    assert labels(cells("vae_repa"), {"block": "3"}) == ["vae_repa", "vae_repa,block=3"]


def test_one_at_a_time_leaves_all_but_one_at_the_default(cells: Cells) -> None:
    found = labels(cells("vae_repa"), {"block": "1,2", "loss": "l1,l2", "head_layers": "5,2"}, one_at_a_time=True)
    assert found == ["vae_repa", "vae_repa,block=2", "vae_repa,loss=l1", "vae_repa,loss=l2", "vae_repa,head_layers=2"]


def test_settings_that_only_hold_together_are_checked_together(cells: Cells) -> None:
    """t_min 0.6 alone is legal, t_max 0.5 alone is legal; together the method refuses them."""
    assert len(labels(cells("vae_repa"), {"t_min": "0.6", "t_max": "0.7,0.8"})) == 3
    assert "t_min 0.6 and t_max 0.5" in refusal(cells("vae_repa"), {"t_min": "0.0,0.6", "t_max": "0.5,1.0"})


def test_a_sum_labels_the_part(cells: Cells) -> None:
    found = labels(cells(SUM), {"repa.weight": "0.5,1", "vae_repa.block": "3"})
    assert found == [
        "repa+vae_repa",
        "repa+vae_repa,vae_repa.block=3",
        "repa+vae_repa,repa.weight=1.0,vae_repa.block=3",
    ]


def test_a_huge_grid_is_refused_before_it_is_built(cells: Cells) -> None:
    many = [*range(1, 23)]
    asked = {"head_layers": many, "weight": [0.1 * k for k in many], "beta": many}
    assert refusal(cells("vae_repa"), asked) == "grid has 10648 settings: give fewer levels, for at most 10000"


# -- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "asked", "line"),
    [
        ("vae_repa", {"block": "1,7"}, "grid.block: vae_repa.block is 7: the backbone has blocks 1 to 6"),
        ("vae_repa", {"head_layers": "65"}, "grid.head_layers: vae_repa.head_layers is 65: give 1 to 64"),
        ("vae_repa", {"weight": "nan"}, "grid.weight: vae_repa.weight is nan: give a finite number"),
        ("vae_repa", {"block": "1,x"}, "grid.block is 'x': give whole numbers, separated by commas"),
        ("vae_repa", {"block": "1.5"}, "grid.block is '1.5': give whole numbers, separated by commas"),
        ("vae_repa", {"block": [True]}, "grid.block is 'true': give whole numbers, separated by commas"),
        ("vae_repa", {"weight": "a"}, "grid.weight is 'a': give numbers, separated by commas"),
        ("vae_repa", {"loss": "l3"}, "grid.loss is 'l3': give some of smooth_l1, cosine, l1, l2, separated by commas"),
        ("sra", {"teacher_fp32": "1"}, "grid.teacher_fp32 is '1': give some of false, true, separated by commas"),
        ("vae_repa", {"block": ""}, "grid.block is empty: give its levels, such as --grid.block 1,2,3"),
        ("vae_repa", {"block": []}, "grid.block is empty: give its levels, such as --grid.block 1,2,3"),
        ("vae_repa", {"block": "2,2"}, "grid.block names 2 twice: leave one out"),
        ("vae_repa", {"block": "0,1"}, "grid.block names 1 twice, as 0 and as 1: leave one out"),
        ("sra", {"beta": "all"}, "grid.beta is 'all': the method declares no search space for it, so list its levels"),
        ("sit", {"block": "1"}, "method is 'sit', which has nothing to set: give --method, such as deep_supervision"),
        ("sra", {"blok": "1"}, "grid.blok is no axis of sra: did you mean grid.block? its axes are block, teacher_"),
        ("sra", {"lr": "1"}, "grid.lr is no axis of sra: its axes are block, teacher_block, weight, loss, beta, noi"),
        (SUM, {"block": "1"}, "grid.block is no axis of repa+vae_repa: did you mean grid.repa.block? its axes are"),
        ("vae_repa", {"vae_repa.block": "1"}, "grid.vae_repa.block is no axis of vae_repa: did you mean grid.block?"),
    ],
)
def test_refusals_name_axis_value_and_range(cells: Cells, method: str, asked: Mapping[str, Any], line: str) -> None:
    assert refusal(cells(method), asked).startswith(line)


def test_an_encoder_that_is_not_there_is_found_before_anything_starts(cells: Cells) -> None:
    line = refusal(cells("repa"), {"encoders": "efficientnet_lite0,resnet"})
    assert line.startswith("grid.encoders: encoder 'resnet' is not known: give one of efficientnet_lite0")


# -- search ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [*(name for name in methods.names() if name != methods.control()), SUM])
def test_every_choice_of_a_declared_space_builds_and_the_default_is_one(cells: Cells, method: str) -> None:
    """A choice that could not be built would be refused here, as the one of the next but one test is."""
    subject = axes.search_subject(cells(method))
    assert {axis.name: axis.levels for axis in subject.axes} == subject.space
    for axis in subject.axes:
        assert axis.default in axis.levels
        assert set(subject.space[axis.name]) == set(axes.search_space(subject.base)[axis.name])


def test_a_default_of_the_users_own_joins_the_choices(cells: Cells) -> None:
    config = cells("vae_repa")
    own = replace(config, sections={"vae_repa": replace(config.sections["vae_repa"], weight=0.3)})
    weight = next(axis for axis in axes.search_subject(own).axes if axis.name == "weight")
    assert weight.levels == (0.1, 0.3, 0.5, 1.0)


def test_a_choice_that_the_other_settings_forbid_is_found_beforehand(cells: Cells) -> None:
    config = cells("vae_repa")
    own = replace(config, sections={"vae_repa": replace(config.sections["vae_repa"], reduction="sum")})
    with pytest.raises(UserError, match="reduction is 'sum' with loss 'cosine'"):
        axes.search_subject(own)


def test_a_method_without_a_space_is_refused(cells: Cells) -> None:
    with pytest.raises(UserError, match="method 'sit' declares no search space"):
        axes.search_subject(cells("sit"))


@dataclass(frozen=True, kw_only=True)
class OddConfig:
    name: str = "a,b/c"
    size: int = 1
    shape: tuple[int, ...] = (1,)


class Odd(Method):
    Config = OddConfig
    disclosure = Disclosure(summary="Has text that can name no folder.", paper="none")

    def terms(self, view: Any, hidden: Any) -> dict[str, Any]:
        return {}


def test_text_that_can_name_no_folder_has_a_label_of_its_own(
    cells: Cells, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(methods, "load", lambda name: Odd)
    config = replace(cells("sit"), method="odd", cell="odd", sections={"odd": OddConfig()})
    found = labels(config, {"name": ["x/y", "x_y", "a,b", ""]})
    assert len(set(found)) == 5
    assert found[1].startswith("odd,name=x_y~") and found[2] == "odd,name=x_y" and found[3] == "odd,name=a+b"
    assert all("/" not in label for label in found)


def test_a_field_of_another_type_is_no_axis(cells: Cells, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(methods, "load", lambda name: Odd)
    config = replace(cells("sit"), method="odd", cell="odd", sections={"odd": OddConfig()})
    assert refusal(config, {"shape": "1"}) == "grid.shape is no axis of odd: its axes are name, size"
