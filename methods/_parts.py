"""Parts that methods share: the MLP head, and default blocks by backbone size."""

from collections.abc import Mapping, Sequence

from torch import nn

from harness.method import BackboneShape


def mlp(widths: Sequence[int], activation: str = "silu") -> nn.Sequential:
    """Linear layers of the given widths with an activation (silu or gelu) between them."""
    layers: list[nn.Module] = []
    for index in range(len(widths) - 1):
        if index:
            layers.append(nn.SiLU() if activation == "silu" else nn.GELU(approximate="tanh"))
        layers.append(nn.Linear(widths[index], widths[index + 1]))
    return nn.Sequential(*layers)


def default_block(backbone: BackboneShape, by_size: Mapping[str, int], fraction: float) -> int:
    """The block of a published size, or `fraction` of another depth, rounded, at least 1."""
    return by_size.get(backbone.size, max(1, round(fraction * backbone.depth)))
