"""Checkpoints of the public SiT repositories, read into our backbone. Nothing in a file is executed.

A file is a training checkpoint, `{"model": ..., "ema": ..., "opt": ..., "args": Namespace, ...}`, or a bare state
dict, as the released ones are. Backbone names are ours already; a table says in what else a repository differs:

- REPA and SRA keep their heads beside the backbone, and run time as we do: t = 0 is data (sihyun-yu/REPA
  models/sit.py:206-287, utils.py load_legacy_checkpoints; vvvvvjdy/SRA SiT-SRA/models/sit.py:214,272-297).
- SiT runs time the other way, so that its velocity is data - noise, and predicts 2 C channels of which the first C are
  that velocity (willisma/SiT models.py:157,245-246, transport/path.py:126-130). Both are folded into its weights, so
  that ours(x, t, y) = - theirs(x, 1 - t, y)[:, :C] up to rounding.

SiT guides three of four channels (willisma/SiT models.py:257-262), which no weights can hold: our sampler guides all.
A DiT file has the names and shapes of SiT's, and cannot be told apart from one.

Shapes: D width, C latent channels, p side of a token's patch, T tokens, F frequencies of the time embedding.
"""

import argparse
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from harness.backbones.sit import SIZES, SiT, parse_name
from harness.config import require
from harness.errors import UserError
from harness.rng import global_state_kept

State = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The differences between a repository's files and our backbone."""

    repository: str
    head: str = ""
    """First part of the names of its heads."""
    late_blocks: str = ""
    """Name under which older files count the blocks after the aligned one from 0 again."""
    out_factor: int = 1
    """Predicted channels over latent channels; the first C are the velocity."""
    data_at_one: bool = False
    """t = 1 is data, and the velocity is data - noise."""


LAYOUTS = {
    "repa": Layout(repository="sihyun-yu/REPA", head="projectors", late_blocks="decoder_blocks"),
    "sra": Layout(repository="vvvvvjdy/SRA", head="ap_head"),
    "sit": Layout(repository="willisma/SiT", out_factor=2, data_at_one=True),
}
"""Layouts by the name that `load` takes as `source`."""

PATCH, TABLE, POSITIONS = "x_embedder.proj.weight", "y_embedder.embedding_table.weight", "pos_embed"
QKV, QK_NORM = "blocks.0.attn.qkv.weight", "blocks.0.attn.q_norm.weight"
TIME, FINAL = "t_embedder.mlp.0.weight", "final_layer.linear"


def load(path: str | Path, source: str, which: Literal["ema", "model"] = "ema") -> tuple[State, State]:
    """Weights of a released backbone, float32 on the CPU.

    Args:
        path: the file, as its authors' code saved it.
        source: whose code that was, one of `LAYOUTS`.
        which: the moving average or the raw weights; a bare state dict counts as the moving average.

    Returns:
        the backbone's state, which `build` and `SiT.load_state_dict` take, and the heads' under their released names,
        which the method's `load_released` takes.

    Raises:
        UserError: for an unknown source, a file that asks for code, and one that is not of this source.
    """
    require(source in LAYOUTS, f"source is {source!r}: give one of {', '.join(LAYOUTS)}")
    require(which in ("ema", "model"), f"which is {which!r}: give ema or model")
    path, layout = Path(path), LAYOUTS[source]
    state = _renamed(_tensors(_chosen(_read(path), which, path), path), layout)
    heads = {name: value for name, value in state.items() if _first(name) in _heads()}
    backbone = {name: value for name, value in state.items() if name not in heads}
    _check(backbone, heads, layout, path)
    return _converted(backbone, layout), heads


def build(backbone: Mapping[str, Tensor], model: str) -> SiT:
    """The backbone of a loaded state, in eval mode on the CPU; the named model gives its attention heads.

    Raises:
        UserError: when the tensors are not of that model; it names the one they are of.
    """
    found, named = sizes(backbone), parse_name(model)
    same = all(found.get(key, value) == value for key, value in named.items())
    require(same, f"model.name is {model}, but the checkpoint holds {describe(found)}: name what it holds")
    with global_state_kept(), torch.device("meta"):
        empty = SiT(**{**named, **found})
    empty.load_state_dict(dict(backbone), assign=True)
    return empty.eval()


def sizes(backbone: Mapping[str, Tensor]) -> dict[str, Any]:
    """Arguments of `SiT` as the tensors have them; the number of attention heads shows under qk_norm only."""
    width, channels, patch, _ = backbone[PATCH].shape
    norm = backbone.get(QK_NORM)
    return {
        "input_size": math.isqrt(backbone[POSITIONS].shape[1]) * patch,
        "patch_size": patch,
        "in_channels": channels,
        "hidden_size": width,
        "depth": len(_block_numbers(backbone)),
        "num_classes": backbone[TABLE].shape[0] - 1,
        "qk_norm": norm is not None,
        **({} if norm is None else {"num_heads": max(1, width // max(1, norm.numel()))}),
    }


def describe(found: Mapping[str, Any]) -> str:
    """The name of a model of these sizes, as `SiT-B/2`, or the sizes in words where there is none."""
    depth, width, patch = found["depth"], found["hidden_size"], found["patch_size"]
    for size, (its_depth, its_width, heads) in SIZES.items():
        if (depth, width, found.get("num_heads", heads)) == (its_depth, its_width, heads):
            return f"SiT-{size}/{patch}"
    return f"{depth} blocks of width {width} and patches of {patch}, which no size of {', '.join(SIZES)} has"


# -- reading ----------------------------------------------------------------------------------------------------------


def _read(path: Path) -> Any:
    """What the file holds. Of Python's objects it may hold an argparse.Namespace, which runs no code."""
    require(path.is_file(), f"checkpoint {path} is not there: give the path of a file")
    try:
        with path.open("rb") as file:
            is_zip = file.read(4) == b"PK\x03\x04"
        with torch.serialization.safe_globals([argparse.Namespace]):
            # Mapped where the format allows it: the optimizer's half of a training checkpoint is then never read.
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except Exception as error:  # torch raises many types on broken files
        raise UserError(
            f"checkpoint {path} is not one of plain weights ({_reason(error)}): "
            "download it again, or save its tensors alone"
        ) from error


def _reason(error: Exception) -> str:
    """Why torch refused a file, without its advice to load it in the way that executes what is in it."""
    if asked := re.search(r"GLOBAL (\S+)", str(error)):
        return f"it asks for {asked[1]}"
    said = (str(error).splitlines() or [""])[0].split(". ")[0].rstrip(".")
    return said if said and "Weights only" not in said else "it is damaged, or no file of torch.save"


def _chosen(content: Any, which: str, path: Path) -> Any:
    """The state dict that is asked for."""
    require(isinstance(content, dict), f"checkpoint {path} holds a {type(content).__name__}: give one of named tensors")
    nested = any(isinstance(content.get(key), Mapping) for key in ("ema", "model"))
    if not nested:
        require(which == "ema", f"checkpoint {path} is a bare state dict, which counts as ema: ask for that")
        return content
    there = ", ".join(sorted(map(str, content)))
    require(
        isinstance(content.get(which), Mapping), f"checkpoint {path} holds no {which}, but {there}: ask for another"
    )
    return content[which]


def _tensors(chosen: Mapping[Any, Any], path: Path) -> State:
    """Float32 copies, which outlive the mapped file."""
    require(bool(chosen), f"checkpoint {path} holds no tensors: give another file")
    for name, value in chosen.items():
        # Contiguous: what a stride of 0 repeats could be of any size, whatever the file's.
        ok = isinstance(value, Tensor) and value.layout == torch.strided and value.is_floating_point()
        ok = ok and value.is_contiguous() and isinstance(name, str)
        require(ok, f"checkpoint {path}: {name!r} is no tensor of weights: give another file")
    return {name: value.detach().to(torch.float32, copy=True) for name, value in chosen.items()}


def _renamed(state: State, layout: Layout) -> State:
    """Our names: without the wrapper's `module.`, and with all blocks counted together."""
    if all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): value for name, value in state.items()}
    early = len(_block_numbers(state))

    def ours(name: str) -> str:
        late = re.fullmatch(rf"{layout.late_blocks}\.(\d{{1,4}})\.(.+)", name) if layout.late_blocks else None
        return f"blocks.{early + int(late[1])}.{late[2]}" if late else name

    return {ours(name): value for name, value in state.items()}


def _block_numbers(names: Iterable[str]) -> set[int]:
    """Numbers, from 0, of the blocks that tensors are named after."""
    return {int(match[1]) for name in names if (match := re.match(r"blocks\.(\d{1,4})\.", name))}


def _first(name: str) -> str:
    return name.partition(".")[0]


def _heads() -> dict[str, str]:
    """First part of the names of heads -> the source that has them."""
    return {layout.head: source for source, layout in LAYOUTS.items() if layout.head}


# -- checking ---------------------------------------------------------------------------------------------------------


def _check(backbone: State, heads: State, layout: Layout, path: Path) -> None:
    """Refuse what is not a backbone of this layout, in one line that says which tensor shows it."""
    for name, axes in ((PATCH, 4), (POSITIONS, 3), (TABLE, 2), (QKV, 2), (f"{FINAL}.weight", 2)):
        ok = name in backbone and backbone[name].ndim == axes and backbone[name].numel() > 0
        require(ok, f"checkpoint {path} holds no SiT ({name} is missing or not of {axes} axes): give another file")
    for name in heads:
        ok = _first(name) == layout.head
        require(ok, f"checkpoint {path} is not of {layout.repository} ({name}): give source {_heads()[_first(name)]}")
    found = sizes(backbone)
    channels, predicted = found["in_channels"], backbone[f"{FINAL}.weight"].shape[0] / found["patch_size"] ** 2
    fits = [source for source, other in LAYOUTS.items() if predicted == channels * other.out_factor]
    require(
        predicted == channels * layout.out_factor,
        f"checkpoint {path} is not of {layout.repository} (it predicts {predicted:g} channels, not "
        f"{channels * layout.out_factor}): give {'source ' + ' or '.join(fits) if fits else 'another file'}",
    )
    _check_shapes(backbone, found, layout, path)


def _check_shapes(backbone: State, found: Mapping[str, Any], layout: Layout, path: Path) -> None:
    """Refuse missing, unknown and misshapen tensors; the first of each kind is named."""
    wanted = _shapes(found, layout, path)
    missing, unknown = sorted(wanted.keys() - backbone), sorted(backbone.keys() - wanted.keys())
    misshapen = sorted(name for name, shape in wanted.items() if name in backbone and backbone[name].shape != shape)
    for names, fault in ((missing, "lacks"), (unknown, "holds what no SiT has,"), (misshapen, "has misshapen")):
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        require(not names, f"checkpoint {path} {fault} {names[0] if names else ''}{more}: give another file or source")


def _shapes(found: Mapping[str, Any], layout: Layout, path: Path) -> dict[str, torch.Size]:
    """Shape of every tensor of a released backbone of these sizes."""
    try:
        with global_state_kept(), torch.device("meta"):
            model = SiT(**{"num_heads": 1, **found})
    except UserError as error:
        raise UserError(f"checkpoint {path} holds no SiT: {error}") from None
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    for name in (f"{FINAL}.weight", f"{FINAL}.bias"):
        rows, *columns = shapes[name]
        shapes[name] = torch.Size([rows * layout.out_factor, *columns])
    return shapes


# -- converting -------------------------------------------------------------------------------------------------------


def _converted(backbone: State, layout: Layout) -> State:
    """The state with which our backbone gives its velocity: noise - data at t = 1 for noise, C channels."""
    found, sign = sizes(backbone), -1 if layout.data_at_one else 1
    channels, patch = found["in_channels"], found["patch_size"]
    changed = dict(backbone)
    if layout.data_at_one:
        changed[TIME] = _turned(backbone[TIME])
    for name in (f"{FINAL}.weight", f"{FINAL}.bias"):
        # Rows are in unpatchify's order (row in the patch, column, channel), channel fastest: models.py:223-235.
        rows = backbone[name].unflatten(0, (patch * patch, channels * layout.out_factor))
        changed[name] = (sign * rows[:, :channels]).flatten(0, 1)
    return changed


def _turned(weight: Tensor) -> Tensor:
    """First time-embedding layer [D, 2 F] that reads t where the released one reads 1 - t.

    Its features are cos(f t), then sin(f t). With cos(f (1 - t)) = cos f cos(f t) + sin f sin(f t) and
    sin(f (1 - t)) = sin f cos(f t) - cos f sin(f t), each pair of columns is reflected. In float64: the released
    frequencies are float32 numbers (willisma/SiT models.py:38-45), and everything after them is exact to rounding.
    """
    half = weight.shape[1] // 2
    frequency = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32) / half).double()
    cosines, sines = weight.double().split(half, dim=1)
    turned = (
        cosines * frequency.cos() + sines * frequency.sin(),
        cosines * frequency.sin() - sines * frequency.cos(),
    )
    return torch.cat(turned, dim=1).float()
