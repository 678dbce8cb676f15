"""Released weights in our backbone against the official forward pass, written out from its formulas.

The reference knows nothing of `harness.backbones.sit`: plain tensor operations on tensors under the official names, as
`methods.md` section 1 states them (willisma/SiT models.py:98-330; sihyun-yu/REPA models/sit.py:242-289).

Shapes: N images, C channels, H W latent height and width, T tokens, D width, A attention heads, p side of a patch.
"""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from harness import official
from harness.backbones.sit import SiT
from harness.method import BackboneShape
from tests.unit.harness.official_factory import (
    CHANNELS,
    CLASSES,
    DEPTH,
    PATCH,
    SIDE,
    WIDTH,
    State,
    released,
    released_shapes,
)

HEADS, NUM = 2, 5
"""SiT-pico has 2 attention heads."""


# -- the official forward pass ----------------------------------------------------------------------------------------


def linear(x: Tensor, state: State, name: str) -> Tensor:
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def norm(x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + 1e-6)


def attention(x_NTD: Tensor, state: State, name: str, heads: int) -> Tensor:
    """One head at a time; qkv holds all queries, then all keys, then all values, each head by head."""
    queries, keys, values = linear(x_NTD, state, f"{name}.qkv").chunk(3, dim=-1)
    width, parts = x_NTD.shape[-1] // heads, []
    for a in range(heads):
        q, k, v = (part[..., a * width : (a + 1) * width] for part in (queries, keys, values))
        scores = torch.exp(q @ k.transpose(1, 2) / math.sqrt(width))
        parts.append(scores / scores.sum(-1, keepdim=True) @ v)
    return linear(torch.cat(parts, dim=-1), state, f"{name}.proj")


def embedded(x_NCHW: Tensor, state: State) -> Tensor:
    """Each patch times the p x p kernel, token by token, plus the file's own position table."""
    weight, p = state["x_embedder.proj.weight"], PATCH
    side = x_NCHW.shape[-1] // p
    tokens = [
        torch.einsum("ncpq,dcpq->nd", x_NCHW[:, :, i * p : i * p + p, j * p : j * p + p], weight)
        for i in range(side)
        for j in range(side)
    ]
    return torch.stack(tokens, dim=1) + state["x_embedder.proj.bias"] + state["pos_embed"]


def condition(t_N: Tensor, y_N: Tensor, state: State) -> Tensor:
    frequency = torch.tensor([10000 ** (-i / 128) for i in range(128)], dtype=t_N.dtype)
    angle = t_N[:, None] * frequency
    features = torch.cat([torch.cos(angle), torch.sin(angle)], dim=1)
    time = linear(silu(linear(features, state, "t_embedder.mlp.0")), state, "t_embedder.mlp.2")
    return time + state["y_embedder.embedding_table.weight"][y_N]


def forward(state: State, x_NCHW: Tensor, t_N: Tensor, y_N: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Everything the official network predicts, [N, C', H, W] with all C' channels, and every block's output."""
    h_NTD, c_ND, hidden = embedded(x_NCHW, state), condition(t_N, y_N, state), []
    for i in range(DEPTH):
        name = f"blocks.{i}"
        modulation = linear(silu(c_ND), state, f"{name}.adaLN_modulation.1")[:, None]
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation.chunk(6, dim=-1)
        h_NTD = h_NTD + gate_a * attention(norm(h_NTD) * (1 + scale_a) + shift_a, state, f"{name}.attn", HEADS)
        inner = linear(norm(h_NTD) * (1 + scale_m) + shift_m, state, f"{name}.mlp.fc1")
        h_NTD = h_NTD + gate_m * linear(gelu(inner), state, f"{name}.mlp.fc2")
        hidden.append(h_NTD)
    shift, scale = linear(silu(c_ND), state, "final_layer.adaLN_modulation.1")[:, None].chunk(2, dim=-1)
    numbers = linear(norm(h_NTD) * (1 + scale) + shift, state, "final_layer.linear")
    channels, side = numbers.shape[-1] // PATCH**2, x_NCHW.shape[-1]
    out = torch.zeros(len(x_NCHW), channels, side, side, dtype=x_NCHW.dtype)
    for row in range(side):
        for column in range(side):
            token = (row // PATCH) * (side // PATCH) + column // PATCH
            first = ((row % PATCH) * PATCH + column % PATCH) * channels
            out[:, :, row, column] = numbers[:, token, first : first + channels]
    return out, hidden


# -- agreement --------------------------------------------------------------------------------------------------------


@pytest.fixture
def inputs() -> tuple[Tensor, Tensor, Tensor]:
    """Latents, times with both ends, and labels with the null class."""
    generator = torch.Generator().manual_seed(5)
    x_NCHW = torch.randn(NUM, CHANNELS, SIDE, SIDE, generator=generator)
    return x_NCHW, torch.tensor([0.0, 0.04, 0.37, 0.81, 1.0]), torch.tensor([0, 3, CLASSES, 6, 1])


def loaded(state: State, source: str, folder: Path) -> SiT:
    """The state through a file, into our backbone, with every tensor in its place."""
    torch.save(state, folder / "file.pt")
    backbone, _ = official.load(folder / "file.pt", source)
    model = official.build(backbone, "SiT-pico/2")
    fresh = SiT.from_name("SiT-pico/2", input_size=SIDE, in_channels=CHANNELS, num_classes=CLASSES)
    assert fresh.load_state_dict(backbone, strict=True)
    return model


def difference(a: Tensor, b: Tensor) -> float:
    return float((a.detach().double() - b.detach().double()).abs().max())


@pytest.mark.parametrize("source", ["repa", "sra"])
def test_weights_of_our_convention_give_the_official_outputs(
    source: str, inputs: tuple[Tensor, Tensor, Tensor], tmp_path: Path
) -> None:
    state = released()
    expected, hidden = forward(state, *inputs)
    velocity, taps = loaded(state, source, tmp_path)(*inputs, taps=(1, DEPTH))
    assert expected.abs().mean() > 0.3
    assert difference(velocity, expected) < 1e-5
    assert difference(taps[1], hidden[0]) < 1e-5 and difference(taps[DEPTH], hidden[-1]) < 1e-5


def test_the_first_sit_runs_in_our_time_and_with_our_sign(
    inputs: tuple[Tensor, Tensor, Tensor], tmp_path: Path
) -> None:
    state = released(out_channels=2 * CHANNELS)
    x_NCHW, t_N, y_N = inputs
    theirs, _ = forward(state, x_NCHW, 1 - t_N, y_N)
    assert theirs.shape == (NUM, 2 * CHANNELS, SIDE, SIDE)
    velocity, _ = loaded(state, "sit", tmp_path)(x_NCHW, t_N, y_N)
    assert velocity.shape == (NUM, CHANNELS, SIDE, SIDE)
    assert difference(velocity, -theirs[:, :CHANNELS]) < 1e-5
    # Each of the three parts of the conversion is seen: the others are far away.
    unturned, _ = forward(state, x_NCHW, t_N, y_N)
    for other in (theirs[:, :CHANNELS], -theirs[:, CHANNELS:], -unturned[:, :CHANNELS]):
        assert difference(velocity, other) > 0.1


def test_the_conversion_is_as_exact_as_float32(inputs: tuple[Tensor, Tensor, Tensor], tmp_path: Path) -> None:
    """Against the formulas in float64: folding time adds no more error than the network's own arithmetic."""
    x_NCHW, t_N, y_N = inputs
    state = {"sit": released(2 * CHANNELS), "repa": released()}
    exact = {
        "sit": -forward({k: v.double() for k, v in state["sit"].items()}, x_NCHW.double(), 1 - t_N.double(), y_N)[0],
        "repa": forward({k: v.double() for k, v in state["repa"].items()}, x_NCHW.double(), t_N.double(), y_N)[0],
    }
    errors = {s: difference(loaded(state[s], s, tmp_path)(*inputs)[0], exact[s][:, :CHANNELS]) for s in state}
    assert 0 < errors["repa"] < 1e-5
    assert errors["sit"] < 4 * errors["repa"]


def test_a_reversed_time_reflects_each_pair_of_columns(tmp_path: Path) -> None:
    """cos(f (1-t)) = cos f cos(f t) + sin f sin(f t), sin(f (1-t)) = sin f cos(f t) - cos f sin(f t), at f = 1."""
    state = released(2 * CHANNELS)
    weight = torch.zeros(WIDTH, 256)
    weight[0, 0], weight[1, 128] = 1.0, 1.0  # frequency 1 is the first: its cosine in row 0, its sine in row 1
    torch.save(state | {"t_embedder.mlp.0.weight": weight}, tmp_path / "file.pt")
    found = official.load(tmp_path / "file.pt", "sit")[0]["t_embedder.mlp.0.weight"]
    expected = torch.zeros(WIDTH, 256)
    expected[0, 0], expected[0, 128] = 0.5403023, 0.8414710  # cos 1, sin 1
    expected[1, 0], expected[1, 128] = 0.8414710, -0.5403023
    assert difference(found, expected) < 1e-7


def test_the_first_channels_of_each_pixel_are_kept_with_their_sign_turned(tmp_path: Path) -> None:
    """8 numbers a pixel, 4 pixels a patch: rows 0-3, 8-11, 16-19 and 24-27 stay, in that order."""
    state = released(2 * CHANNELS)
    rows = torch.arange(32.0)
    state |= {"final_layer.linear.bias": rows, "final_layer.linear.weight": rows[:, None].repeat(1, WIDTH)}
    torch.save(state, tmp_path / "file.pt")
    backbone, _ = official.load(tmp_path / "file.pt", "sit")
    kept = [-0.0, -1, -2, -3, -8, -9, -10, -11, -16, -17, -18, -19, -24, -25, -26, -27]
    assert backbone["final_layer.linear.bias"].tolist() == kept
    assert backbone["final_layer.linear.weight"][:, 5].tolist() == kept


@pytest.mark.parametrize("name", ["SiT-S/2", "SiT-B/2", "SiT-L/2", "SiT-XL/2"])
def test_names_and_shapes_at_the_published_sizes(name: str, shape_of: Callable[[str], BackboneShape]) -> None:
    shape = shape_of(name)
    with torch.device("meta"):
        ours = SiT.from_name(name)
    official_ones = released_shapes(shape.depth, shape.hidden_size, 4, 2, 256, 1000, 4)
    assert {key: tuple(value.shape) for key, value in ours.state_dict().items()} == official_ones
