"""Released checkpoints: every container they come in, what is refused and in which line, and heads for the methods."""

import argparse
import os
import re
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import methods
from harness import official
from harness.errors import UserError, one_line
from harness.method import BackboneShape, DataShape, Method
from harness.rng import global_state_kept, stream
from tests.unit.harness.official_factory import (
    CHANNELS,
    CLASSES,
    DEPTH,
    PATCH,
    SIDE,
    WIDTH,
    State,
    ap_head,
    projectors,
    released,
    training_checkpoint,
)


def save(content: Any, folder: Path, **options: Any) -> Path:
    torch.save(content, folder / "file.pt", **options)
    return folder / "file.pt"


def same(a: State, b: State) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def wrapped(state: State) -> State:
    """As DistributedDataParallel names it."""
    return OrderedDict((f"module.{name}", value) for name, value in state.items())


# -- containers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("new_format", [True, False])
@pytest.mark.parametrize("wrap", [dict, wrapped])
def test_a_bare_state_dict_counts_as_the_average(
    wrap: Callable[[State], State], new_format: bool, tmp_path: Path
) -> None:
    state, heads = released(), projectors((12, 20), 32)
    path = save(wrap(state | heads), tmp_path, _use_new_zipfile_serialization=new_format)
    backbone, found = official.load(path, "repa")
    assert same(backbone, state) and same(found, heads)
    with pytest.raises(UserError, match=r"file\.pt is a bare state dict, which counts as ema: ask for that"):
        official.load(path, "repa", which="model")


@pytest.mark.parametrize("new_format", [True, False])
def test_a_training_checkpoint_gives_the_average_or_the_raw_weights(new_format: bool, tmp_path: Path) -> None:
    model, ema = released(seed=3) | ap_head(seed=4), released(seed=5) | ap_head(seed=6)
    # Its arguments name another model and 1000 classes: sizes come from the tensors.
    content = training_checkpoint(wrapped(model), ema, block_out_s=8)
    path = save(content, tmp_path, _use_new_zipfile_serialization=new_format)
    for which, state in (("ema", ema), ("model", model)):
        backbone, heads = official.load(path, "sra", which)
        assert same(backbone | heads, state) and sorted(heads) == sorted(ap_head())
    assert official.sizes(backbone) == {
        "input_size": SIDE,
        "patch_size": PATCH,
        "in_channels": CHANNELS,
        "hidden_size": WIDTH,
        "depth": DEPTH,
        "num_classes": CLASSES,
        "qk_norm": False,
    }


@pytest.mark.parametrize("early", [1, 3])
def test_blocks_that_older_files_count_in_two_parts_become_one_row(early: int, tmp_path: Path) -> None:
    state = released()

    def older(name: str) -> str:
        match = re.fullmatch(r"blocks\.(\d)\.(.*)", name)
        return f"decoder_blocks.{int(match[1]) - early}.{match[2]}" if match and int(match[1]) >= early else name

    legacy = {older(name): value for name, value in state.items()}
    assert "decoder_blocks.0.attn.qkv.weight" in legacy and f"blocks.{early}.attn.qkv.weight" not in legacy
    assert same(official.load(save(legacy, tmp_path), "repa")[0], state)
    with pytest.raises(UserError, match=r"holds what no SiT has, decoder_blocks\.0\..* and \d+ more"):
        official.load(tmp_path / "file.pt", "sra")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_precision_becomes_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    state = {name: value.to(dtype) for name, value in released().items()}
    backbone, _ = official.load(save(state, tmp_path), "repa")
    assert same(backbone, {name: value.float() for name, value in state.items()})


def test_what_was_loaded_outlives_the_file(tmp_path: Path) -> None:
    state = released()
    path = save(state, tmp_path)
    backbone, _ = official.load(path, "repa")
    path.write_bytes(b"\0" * path.stat().st_size)
    assert same(backbone, state)


def test_sit_keeps_every_other_tensor_as_it_is(tmp_path: Path) -> None:
    state = released(2 * CHANNELS)
    backbone, heads = official.load(save(state, tmp_path), "sit")
    changed = {name for name in state if not torch.equal(state[name], backbone[name])}
    assert changed == {"t_embedder.mlp.0.weight", "final_layer.linear.weight", "final_layer.linear.bias"}
    assert heads == {}


def test_loading_and_building_leave_the_global_random_state_alone(tmp_path: Path) -> None:
    path, before = save(released(), tmp_path), torch.get_rng_state()
    official.build(official.load(path, "repa")[0], "SiT-pico/2")
    assert torch.equal(torch.get_rng_state(), before)


# -- models -----------------------------------------------------------------------------------------------------------


def test_a_built_backbone_is_whole_and_keeps_the_files_positions(tmp_path: Path) -> None:
    state = released()
    model = official.build(official.load(save(state, tmp_path), "repa")[0], "SiT-pico/2")
    assert same(model.state_dict(), state) and not model.training
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["pos_embed"]
    assert (model.num_heads, model.input_size, model.num_classes) == (2, SIDE, CLASSES)


@pytest.mark.parametrize("heads", [2, 4])
def test_normalised_queries_and_keys_show_the_number_of_heads(heads: int, tmp_path: Path) -> None:
    state = released()
    for i in range(DEPTH):
        for norm in ("q_norm", "k_norm"):
            state |= {f"blocks.{i}.attn.{norm}.{kind}": torch.rand(WIDTH // heads) for kind in ("weight", "bias")}
    backbone, _ = official.load(save(state, tmp_path), "sra")
    if heads == 2:
        assert same(official.build(backbone, "SiT-pico/2").state_dict(), state)
    else:
        with pytest.raises(UserError, match="holds 4 blocks of width 64 and patches of 2, which no size of pico, "):
            official.build(backbone, "SiT-pico/2")


def test_another_model_than_the_files_is_refused_with_the_right_one(tmp_path: Path) -> None:
    backbone, _ = official.load(save(released(), tmp_path), "repa")
    for name in ("SiT-XL/2", "SiT-pico/4"):
        with pytest.raises(UserError, match=rf"^model\.name is {name}, but the checkpoint holds SiT-pico/2: name"):
            official.build(backbone, name)
    with pytest.raises(UserError, match=r"model\.name is 'DiT-XL/2': give SiT-<size>/<patch>"):
        official.build(backbone, "DiT-XL/2")
    shallow = {name: value for name, value in backbone.items() if not name.startswith("blocks.3.")}
    with pytest.raises(UserError, match=r"holds 3 blocks of width 64 and patches of 2, which no size of pico, nano, "):
        official.build(shallow, "SiT-pico/2")


# -- refusals ---------------------------------------------------------------------------------------------------------


class Code:
    """Runs a command when it is unpickled by Python's own loader."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (os.system, (f"touch {self.path}",))


class Arguments(argparse.Namespace):
    """Not the class that is allowed, though it is one of its kind."""


@pytest.mark.parametrize("new_format", [True, False])
@pytest.mark.parametrize("place", ["args", "bare", "namespace", "subclass"])
def test_nothing_in_a_file_is_executed(place: str, new_format: bool, tmp_path: Path) -> None:
    mark, content = tmp_path / "executed", training_checkpoint(released(), released())
    code = Code(mark)
    content |= {
        "args": {"args": {"args": code}},
        "bare": {"ema": released() | {"extra": code}},
        "namespace": {"args": argparse.Namespace(model="SiT-XL/2", callback=code)},
        "subclass": {"args": Arguments(model="SiT-XL/2")},
    }[place]
    path = save(content, tmp_path, _use_new_zipfile_serialization=new_format)
    asked = "test_official.Arguments" if place == "subclass" else "(posix|nt).system"
    with pytest.raises(UserError, match=rf"not one of plain weights \(it asks for \S*{asked}\): download it again"):
        official.load(path, "repa")
    assert not mark.exists()
    if place != "subclass":  # the file would have run its command, had it been read in the other way
        torch.load(path, weights_only=False)
        assert mark.exists()


def without(state: State, *names: str) -> State:
    return {name: value for name, value in state.items() if name not in names}


WRONG: dict[str, tuple[str, Callable[[], Any], str]] = {
    "8 channels are SiT's": ("repa", lambda: released(8), r"of sihyun-yu/REPA .*8 channels, not 4\): give source sit$"),
    "4 channels are not": ("sit", released, r"of willisma/SiT .*4 channels, not 8\): give source repa or sra$"),
    "6 are nobody's": ("sra", lambda: released(6), r"of vvvvvjdy/SRA .*6 channels, not 4\): give another file$"),
    "REPA's heads": ("sra", lambda: released() | projectors((3,), 5), r"of vvvvvjdy/SRA .*projectors.*source repa$"),
    "SRA's head": ("sit", lambda: released(8) | ap_head(), r"of willisma/SiT \(ap_head\..*: give source sra$"),
    "a missing tensor": (
        "repa",
        lambda: without(released(), "blocks.2.mlp.fc1.bias", "x_embedder.proj.bias"),
        r"lacks blocks\.2\.mlp\.fc1\.bias and 1 more: give another file or source$",
    ),
    "no backbone": ("repa", lambda: projectors((3,), 5), r"holds no SiT \(x_embedder\.proj\.weight is missing"),
    "no positions": ("repa", lambda: without(released(), "pos_embed"), r"holds no SiT \(pos_embed is missing"),
    "no blocks": (
        "repa",
        lambda: {name: value for name, value in released().items() if not name.startswith("blocks.")},
        r"holds no SiT \(blocks\.0\.attn\.qkv\.weight is missing",
    ),
    "a tensor too many": ("repa", lambda: released() | {"blocks": torch.ones(1)}, r"what no SiT has, blocks: give"),
    "a block of a huge number": (
        "repa",
        lambda: released() | {f"blocks.{'9' * 5000}.attn": torch.ones(1)},
        r"what no SiT has, blocks\.9+",
    ),
    "a misshapen tensor": (
        "repa",
        lambda: released() | {"blocks.1.mlp.fc1.weight": torch.ones(10, WIDTH)},
        r"has misshapen blocks\.1\.mlp\.fc1\.weight: give",
    ),
    "positions of no square": (
        "repa",
        lambda: released() | {"pos_embed": torch.ones(1, 15, WIDTH)},
        "has misshapen pos",
    ),
    "an empty tensor": (
        "repa",
        lambda: released() | {"x_embedder.proj.weight": torch.ones(WIDTH, 4, 0, 0)},
        r"x_embedder\.proj\.weight is missing or not of 4 axes",
    ),
    "a width of no SiT": (
        "repa",
        lambda: released() | {"x_embedder.proj.weight": torch.ones(30, 4, 2, 2)},
        r"holds no SiT: hidden_size 30 must be a multiple of 4",
    ),
    "whole numbers": (
        "repa",
        lambda: released() | {"pos_embed": torch.ones(1, 16, WIDTH, dtype=torch.int64)},
        "'pos_emb",
    ),
    "a sparse tensor": (
        "repa",
        lambda: released() | {"pos_embed": torch.eye(4).to_sparse()},
        "'pos_embed' is no tensor",
    ),
    "a repeated number": (
        "repa",
        lambda: released() | {"pos_embed": torch.ones(1).expand(10**15)},
        "'pos_embed' is no tensor of weights",
    ),
    "names that are none": ("repa", lambda: {1: torch.ones(1)}, "1 is no tensor of weights"),
    "another container": ("repa", lambda: {"state_dict": released()}, "'state_dict' is no tensor of weights"),
    "nothing": ("repa", dict, r"holds no tensors: give another file$"),
    "a list": ("repa", lambda: [torch.ones(1)], "holds a list: give one of named tensors"),
    "a tensor": ("repa", lambda: torch.ones(1), "holds a Tensor: give one of named tensors"),
    "raw weights only": ("repa", lambda: {"model": released(), "steps": 3}, r"holds no ema, but model, steps: ask for"),
    "an unknown source": ("dit", released, r"^source is 'dit': give one of repa, sra, sit$"),
}


@pytest.mark.filterwarnings("ignore:Validating sparse tensor invariants")
@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_said_in_one_line(case: str, tmp_path: Path) -> None:
    source, content, message = WRONG[case]
    with pytest.raises(UserError) as caught:
        official.load(save(content(), tmp_path), source)
    line = one_line(caught.value)
    assert re.search(message, line), line
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("new_format", [True, False])
def test_a_file_cut_short_at_any_length_is_refused(new_format: bool, tmp_path: Path) -> None:
    path = save(released(), tmp_path, _use_new_zipfile_serialization=new_format)
    whole = path.read_bytes()
    for length in (0, 3, 4, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(
            UserError, match=r"file\.pt is not one of plain weights \(.*\): download it again"
        ) as caught:
            official.load(path, "repa")
        # torch's own message tells how to load a file in the way that executes what is in it.
        assert "weights_only" not in str(caught.value) and len(str(caught.value)) < 300


def test_files_that_are_none_are_refused(tmp_path: Path) -> None:
    (tmp_path / "page.pt").write_text("<html>not found</html>")
    for name in ("missing.pt", ".", "\0"):
        with pytest.raises(UserError, match=r"is not there: give the path of a file$"):
            official.load(tmp_path / name, "repa")
    with pytest.raises(UserError, match=r"page\.pt is not one of plain weights"):
        official.load(tmp_path / "page.pt", "repa")
    with pytest.raises(UserError, match="which is 'raw': give ema or model"):
        official.load(tmp_path / "page.pt", "repa", which="raw")  # type: ignore[arg-type]


# -- heads ------------------------------------------------------------------------------------------------------------


def build_method(name: str, **fields: Any) -> Method:
    """The method on SiT-pico's shapes; encoder `a` has 12 numbers a token and `b` 20."""
    shape = BackboneShape.of("SiT-pico/2", input_size=SIDE, in_channels=CHANNELS, num_classes=CLASSES)
    data = DataShape(image_size=32, num_classes=CLASSES, encoder_width=lambda encoder: {"a": 12, "b": 20}[encoder])
    cls = methods.load(name)
    with global_state_kept():
        return cls(cls.resolve(cls.Config(**fields), shape), shape, data)


def by_hand(x: Tensor, state: State, layers: list[str]) -> np.ndarray:
    """Linear layers with SiLU between them, in float64."""
    value = x.double().numpy()
    for number, layer in enumerate(layers):
        value = value / (1 + np.exp(-value)) if number else value
        value = value @ state[f"{layer}.weight"].double().numpy().T + state[f"{layer}.bias"].double().numpy()
    return value


def test_repas_projectors_become_the_heads_of_its_encoders_in_order(tmp_path: Path) -> None:
    state = projectors((12, 20), 32)
    _, heads = official.load(save(released() | state, tmp_path), "repa")
    method, x = build_method("repa", encoders="a,b", head_width=32), torch.randn(3, WIDTH, generator=stream(0, "noise"))
    method.load_released(heads)
    for index, encoder in enumerate(("a", "b")):
        expected = by_hand(x, state, [f"projectors.{index}.{layer}" for layer in (0, 2, 4)])
        assert np.abs(method.heads[encoder](x).detach().numpy() - expected).max() < 1e-5


def test_sras_head_becomes_the_head(tmp_path: Path) -> None:
    state = ap_head()
    _, heads = official.load(save(released() | state, tmp_path), "sra")
    method, x = build_method("sra"), torch.randn(3, WIDTH, generator=stream(0, "noise"))
    method.load_released(heads)
    expected = by_hand(x, state, ["ap_head.linear1", "ap_head.linear2"])
    assert np.abs(method.heads["align"](x).detach().numpy() - expected).max() < 1e-5


def test_heads_that_do_not_fit_are_refused_in_one_line() -> None:
    two = projectors((12, 20), 32)
    wrong: list[tuple[Method, State, str]] = [
        (build_method("repa", encoders="a", head_width=32), two, r"^repa\.encoders is 'a': the release has 2 heads$"),
        (
            build_method("repa", encoders="b,a", head_width=32),
            two,
            r"projectors\.0\.\* does not fit .*mismatch for 4\.",
        ),
        (build_method("repa", encoders="a,b"), two, r"projectors\.0\.\* does not fit .*: set its sizes as released$"),
        (build_method("repa", encoders="a"), ap_head(), r"^repa\.encoders is 'a': the release has 0 heads$"),
        (
            build_method("sra"),
            without(ap_head(), "ap_head.linear2.bias"),
            r'ap_head\.linear1\.\* .*Missing .*"2\.bias"',
        ),
        (build_method("sra"), projectors((12,), 32), r"ap_head\.linear1\.\* does not fit \(Missing"),
        (build_method("sit"), ap_head(), r"^sit knows no released heads: leave them out$"),
        (build_method("vae_repa"), ap_head(), r"^vae_repa knows no released heads"),
    ]
    for method, heads, message in wrong:
        with pytest.raises(UserError) as caught:
            method.load_released(heads)
        assert re.search(message, str(caught.value)) and "\n" not in str(caught.value), caught.value
