"""Files as the public SiT repositories save them, small and with random weights."""

import argparse
import math
from typing import Any

import torch
from torch import Tensor

State = dict[str, Tensor]
DEPTH, WIDTH = 4, 64
"""Those of SiT-pico."""
CHANNELS, PATCH, SIDE, CLASSES = 4, 2, 8, 7


def released_shapes(
    depth: int, d: int, channels: int, p: int, tokens: int, classes: int, out_channels: int
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a released backbone, as the authors' classes register them."""

    def linear(name: str, out: int, into: int) -> dict[str, tuple[int, ...]]:
        return {f"{name}.weight": (out, into), f"{name}.bias": (out,)}

    shapes: dict[str, tuple[int, ...]] = {
        "pos_embed": (1, tokens, d),
        "x_embedder.proj.weight": (d, channels, p, p),
        "x_embedder.proj.bias": (d,),
        "y_embedder.embedding_table.weight": (classes + 1, d),
        **linear("t_embedder.mlp.0", d, 256),
        **linear("t_embedder.mlp.2", d, d),
    }
    for i in range(depth):
        shapes |= linear(f"blocks.{i}.attn.qkv", 3 * d, d) | linear(f"blocks.{i}.attn.proj", d, d)
        shapes |= linear(f"blocks.{i}.mlp.fc1", 4 * d, d) | linear(f"blocks.{i}.mlp.fc2", d, 4 * d)
        shapes |= linear(f"blocks.{i}.adaLN_modulation.1", 6 * d, d)
    return (
        shapes
        | linear("final_layer.linear", p * p * out_channels, d)
        | linear("final_layer.adaLN_modulation.1", 2 * d, d)
    )


def released(out_channels: int = CHANNELS, seed: int = 0) -> State:
    """A small released backbone with every weight random, so that no gate is closed and outputs are of order 1."""
    generator = torch.Generator().manual_seed(seed)
    shapes = released_shapes(DEPTH, WIDTH, CHANNELS, PATCH, (SIDE // PATCH) ** 2, CLASSES, out_channels)
    return {
        name: torch.randn(shape, generator=generator) / math.sqrt(math.prod(shape[1:]) if len(shape) in (2, 4) else 4)
        for name, shape in shapes.items()
    }


def projectors(z_widths: tuple[int, ...], hidden: int, seed: int = 1) -> State:
    """REPA's heads: three layers for each encoder."""
    generator = torch.Generator().manual_seed(seed)
    state: State = {}
    for i, z_width in enumerate(z_widths):
        for layer, (into, out) in zip((0, 2, 4), ((WIDTH, hidden), (hidden, hidden), (hidden, z_width)), strict=True):
            state[f"projectors.{i}.{layer}.weight"] = torch.randn(out, into, generator=generator) / math.sqrt(into)
            state[f"projectors.{i}.{layer}.bias"] = torch.randn(out, generator=generator)
    return state


def ap_head(seed: int = 2) -> State:
    """SRA's head: two layers, the inner one of twice the width."""
    generator = torch.Generator().manual_seed(seed)
    state: State = {}
    for layer, (into, out) in {"linear1": (WIDTH, 2 * WIDTH), "linear2": (2 * WIDTH, WIDTH)}.items():
        state[f"ap_head.{layer}.weight"] = torch.randn(out, into, generator=generator) / math.sqrt(into)
        state[f"ap_head.{layer}.bias"] = torch.randn(out, generator=generator)
    return state


def training_checkpoint(model: State, ema: State, **args: Any) -> dict[str, Any]:
    """What the authors' train.py saves: both states, AdamW's state of one step, and the pickled arguments."""
    # Two tensors stand for all: AdamW's first step takes longer than everything else here.
    parameters = [torch.nn.Parameter(value.clone()) for value in list(model.values())[:2]]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    arguments = argparse.Namespace(**{"model": "SiT-XL/2", "num_classes": 1000, "allow_tf32": False, "seed": 0, **args})
    return {"model": model, "ema": ema, "opt": optimizer.state_dict(), "args": arguments, "steps": 1, "epoch": 0}
