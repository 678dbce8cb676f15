"""Parts that methods share: the MLP head, released weights for it, encoders by name, and default blocks by size."""

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from harness.config import require
from harness.errors import UserError
from harness.method import BackboneShape


def mlp(widths: Sequence[int], activation: str = "silu") -> nn.Sequential:
    """Linear layers of the given widths with an activation (silu or gelu) between them."""
    layers: list[nn.Module] = []
    for index in range(len(widths) - 1):
        if index:
            layers.append(nn.SiLU() if activation == "silu" else nn.GELU(approximate="tanh"))
        layers.append(nn.Linear(widths[index], widths[index + 1]))
    return nn.Sequential(*layers)


def load_renamed(head: nn.Module, released: Mapping[str, Tensor], names: Mapping[str, str]) -> None:
    """Load a head from tensors under other names.

    Args:
        head: the module to fill.
        released: all heads of a release, by name.
        names: start of a released name -> what stands for it in the head's own names.

    Raises:
        UserError: when a tensor is missing or does not fit.
    """
    state = {
        own + name.removeprefix(start): value
        for name, value in released.items()
        for start, own in names.items()
        if name.startswith(start)
    }
    try:
        head.load_state_dict(state)
    except RuntimeError as error:
        # The first line names the module's class, the second the first tensor that is wrong.
        reason = (str(error).splitlines()[1:] or [str(error)])[0].strip().rstrip(".")
        raise UserError(
            f"released head {next(iter(names))}* does not fit ({reason}): set its sizes as released"
        ) from None


def default_block(backbone: BackboneShape, by_size: Mapping[str, int], fraction: float) -> int:
    """The block of a published size, or `fraction` of another depth, rounded, at least 1."""
    return by_size.get(backbone.size, max(1, round(fraction * backbone.depth)))


def default_width(backbone: BackboneShape) -> int:
    """Width of a head's hidden layers: 2048 as REPA released it, from SiT-S up; below that 4 times the backbone's."""
    return 2048 if backbone.hidden_size >= 384 else 4 * backbone.hidden_size


def encoder_names(section: str, encoders: str) -> tuple[str, ...]:
    """The frozen encoders that a section's field `encoders` names, separated by commas, or a `UserError`."""
    names = tuple(encoders.split(","))
    require(all(names), f"{section}.encoders is {encoders!r}: name at least one encoder, separated by commas")
    require(len(set(names)) == len(names), f"{section}.encoders is {encoders!r}: name each encoder once")
    return names


def head_name(encoder: str) -> str:
    """The encoder's name without the dots of timm's, which a module's name may not have."""
    return encoder.replace(".", "_")
