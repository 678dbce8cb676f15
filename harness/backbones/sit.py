"""SiT, the backbone: a diffusion transformer with adaLN-Zero blocks (arXiv 2401.08740, 2212.09748).

Parameter names and initialisation equal willisma/SiT models.py:98-330, so released weights load. No head, no method
name and no label dropout lives here; methods read hidden states through `taps`.

Shapes: N images, C channels, H W latent height and width, T tokens, D width, P = p*p*C numbers of a token's patch.
"""

import dataclasses
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed
from timm.models.vision_transformer import Attention, Mlp
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from harness.errors import UserError

SIZES: dict[str, tuple[int, int, int]] = {
    # size: depth, width, attention heads
    "pico": (4, 64, 2),
    "nano": (6, 128, 4),
    "micro": (8, 256, 4),
    "S": (12, 384, 6),
    "B": (12, 768, 12),
    "L": (24, 1024, 16),
    "XL": (28, 1152, 16),
}
"""S to XL are the papers' sizes; pico, nano and micro are ours, for CPUs."""


def parse_name(name: str) -> dict[str, int]:
    """Constructor arguments of a name such as `SiT-XL/2` or `SiT-nano/2` (size, then patch size)."""
    match = re.fullmatch(r"SiT-(\w+)/(\d+)", name)
    if match is None or match[1] not in SIZES or int(match[2]) < 1:
        raise UserError(f"model.name is {name!r}: give SiT-<size>/<patch> with a size of {', '.join(SIZES)}")
    depth, width, heads = SIZES[match[1]]
    return {"depth": depth, "hidden_size": width, "num_heads": heads, "patch_size": int(match[2])}


@dataclass(frozen=True, kw_only=True)
class NetworkShape:
    """The whole numbers that a backbone is built from."""

    depth: int
    hidden_size: int
    num_heads: int
    input_size: int
    patch_size: int
    in_channels: int
    num_classes: int


def patchify(latent: Tensor, p: int) -> Tensor:
    """(N, C, H, W) -> (N, T, p*p*C): tokens row by row; inside a token row p, column q, then channel (fastest)."""
    n, c, h, w = latent.shape
    split = latent.reshape(n, c, h // p, p, w // p, p)
    return split.permute(0, 2, 4, 3, 5, 1).reshape(n, (h // p) * (w // p), p * p * c)


def unpatchify(tokens: Tensor, p: int) -> Tensor:
    """(N, T, p*p*C) -> (N, C, H, W) for a square grid; undoes `patchify` exactly."""
    n, t, numbers = tokens.shape
    side, c = math.isqrt(t), numbers // (p * p)
    split = tokens.reshape(n, side, side, p, p, c)
    return split.permute(0, 5, 1, 3, 2, 4).reshape(n, c, side * p, side * p)


def position_table(width: int, side: int) -> Tensor:
    """Fixed 2-D sin-cos positions, float32 [side*side, width].

    The first half of the channels encodes the column, the second half the row; in each half sines come before
    cosines (willisma/SiT models.py:268-310).
    """
    frequency = 1.0 / 10000 ** (np.arange(width // 4, dtype=np.float64) / (width / 4))
    row, column = np.meshgrid(np.arange(side), np.arange(side), indexing="ij")

    def encode(position: np.ndarray) -> np.ndarray:
        angle = np.outer(position.reshape(-1), frequency)
        return np.concatenate([np.sin(angle), np.cos(angle)], axis=1)

    return torch.from_numpy(np.concatenate([encode(column), encode(row)], axis=1)).float()


class TimestepEmbedder(nn.Module):
    """256 numbers, 128 cosines then 128 sines of t * 10000^(-i/128) with t in [0, 1] unscaled, then an MLP."""

    def __init__(self, hidden_size: int, num_frequencies: int = 256) -> None:
        super().__init__()
        self.num_frequencies = num_frequencies
        self.mlp = nn.Sequential(
            nn.Linear(num_frequencies, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
        )

    def frequencies(self, t_N: Tensor) -> Tensor:
        """[N, num_frequencies], float32: t must not fall to bf16, where 100,000 times have 1,267 values."""
        half = self.num_frequencies // 2
        exponent = torch.arange(half, dtype=torch.float32, device=t_N.device) / half
        angle = t_N.float()[:, None] * torch.exp(-math.log(10000) * exponent)
        return torch.cat([angle.cos(), angle.sin()], dim=-1)

    def forward(self, t_N: Tensor) -> Tensor:
        return self.mlp(self.frequencies(t_N))


class LabelEmbedder(nn.Module):
    """A table with one row a class and a last row for the null class."""

    def __init__(self, num_classes: int, hidden_size: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, hidden_size)

    def forward(self, y_N: Tensor) -> Tensor:
        return self.embedding_table(y_N)


def modulate(x_NTD: Tensor, shift_ND: Tensor, scale_ND: Tensor) -> Tensor:
    """x * (1 + scale) + shift, the same for every token of an image."""
    return x_NTD * (1 + scale_ND.unsqueeze(1)) + shift_ND.unsqueeze(1)


PLAIN_TOKENS = 256
"""Sequences up to this length are attended to by plain products where a CPU's step is in bf16; see `attend`."""


def attend(q: Tensor, k: Tensor, v: Tensor, plain_tokens: int = PLAIN_TOKENS) -> Tensor:
    """softmax(q k^T / sqrt(d)) v for queries, keys and values [N, heads, T, d].

    In bf16 on a CPU sequences up to `plain_tokens` (the papers' have 256) take plain products: that with v in bf16, and
    q k^T in fp32, as torch's fused kernel has it. Their backward pass is faster than the kernel's and as exact; the
    price is that weights [N, heads, T, T] are kept for it (`docs/performance.md`).
    """
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.shape[-2] <= plain_tokens:
        with torch.autocast("cpu", enabled=False):  # it would cast q and k back
            q, k = (value.to(torch.float32, memory_format=torch.contiguous_format) for value in (q, k))
            weights = (q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2)).softmax(-1)
            return weights.to(v.dtype) @ v.contiguous()
    return F.scaled_dot_product_attention(q, k, v)


class SelfAttention(Attention):
    """timm's attention with `attend` at its heart."""

    plain_tokens = PLAIN_TOKENS
    """The most tokens that are multiplied by plain products, as `attend` takes it."""

    def forward(self, x_NTD: Tensor) -> Tensor:  # type: ignore[override]  # no masks here
        n, t, d = x_NTD.shape
        q, k, v = self.qkv(x_NTD).reshape(n, t, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(attend(self.q_norm(q), self.k_norm(k), v, self.plain_tokens).transpose(1, 2).reshape(n, t, d))


class Block(nn.Module):
    """Attention and MLP, each modulated and gated by the condition (adaLN-Zero)."""

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float, qk_norm: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.attn = SelfAttention(
            hidden_size, num_heads=num_heads, qkv_bias=True, qk_norm=qk_norm, norm_layer=nn.LayerNorm
        )
        self.norm2 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(
            in_features=hidden_size,
            hidden_features=int(hidden_size * mlp_ratio),
            act_layer=lambda: nn.GELU(approximate="tanh"),  # type: ignore[arg-type]  # timm calls it like a class
        )
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    def forward(self, x_NTD: Tensor, c_ND: Tensor) -> Tensor:
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(c_ND).chunk(6, dim=1)
        x_NTD = x_NTD + gate_a.unsqueeze(1) * self.attn(modulate(self.norm1(x_NTD), shift_a, scale_a))
        return x_NTD + gate_m.unsqueeze(1) * self.mlp(modulate(self.norm2(x_NTD), shift_m, scale_m))


class FinalLayer(nn.Module):
    """Modulated LayerNorm and the projection of each token to its patch."""

    def __init__(self, hidden_size: int, numbers: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(hidden_size, numbers)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x_NTD: Tensor, c_ND: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c_ND).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x_NTD), shift, scale))


class SiT(nn.Module):
    """The backbone. Label `num_classes` is the null class.

    Args:
        input_size: latent height and width.
        patch_size: side of a token's patch; divides `input_size`.
        in_channels: latent channels; the output has as many.
        hidden_size: width D, a multiple of 4 (positions) and of `num_heads`.
        depth: blocks, counted from 1 everywhere.
        num_heads: attention heads.
        num_classes: classes without the null class.
        mlp_ratio: MLP width over D.
        qk_norm: LayerNorm on queries and keys.
    """

    def __init__(
        self,
        input_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        num_classes: int = 1000,
        mlp_ratio: float = 4.0,
        qk_norm: bool = False,
    ) -> None:
        super().__init__()
        if input_size % patch_size:
            raise UserError(
                f"patch size {patch_size} does not divide the latent size {input_size}: choose another patch"
            )
        if hidden_size % num_heads or hidden_size % 4:
            raise UserError(f"hidden_size {hidden_size} must be a multiple of 4 and of num_heads {num_heads}")
        self.input_size, self.patch_size, self.in_channels = input_size, patch_size, in_channels
        self.hidden_size, self.depth, self.num_heads, self.num_classes = hidden_size, depth, num_heads, num_classes
        self.x_embedder = PatchEmbed(input_size, patch_size, in_channels, hidden_size, bias=True)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size)
        self.pos_embed = nn.Parameter(
            position_table(hidden_size, input_size // patch_size).unsqueeze(0), requires_grad=False
        )
        self.blocks = nn.ModuleList([Block(hidden_size, num_heads, mlp_ratio, qk_norm) for _ in range(depth)])
        self.final_layer = FinalLayer(hidden_size, patch_size * patch_size * in_channels)
        self.checkpoint_activations = False
        """Run each block once more in the backward pass instead of keeping what lies inside of it."""
        self.initialize()

    @classmethod
    def from_name(cls, name: str, **overrides: Any) -> "SiT":
        """Build from a name such as `SiT-XL/2`; overrides win over the table."""
        return cls(**{**parse_name(name), **overrides})

    @classmethod
    def of(cls, shape: NetworkShape, qk_norm: bool = False) -> "SiT":
        """Build the network of a shape, such as a `BackboneShape` of `harness.method`."""
        numbers = {item.name: getattr(shape, item.name) for item in dataclasses.fields(NetworkShape)}
        return cls(**numbers, qk_norm=qk_norm)

    def initialize(self, generator: torch.Generator | None = None) -> None:
        """Draw all weights anew (willisma/SiT models.py:186-221): from `generator`, or torch's global state if None."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight, generator=generator)
                nn.init.zeros_(module.bias)
        patch = self.x_embedder.proj
        nn.init.xavier_uniform_(patch.weight.view(patch.weight.shape[0], -1), generator=generator)
        nn.init.zeros_(cast(Tensor, patch.bias))
        time_in, _, time_out = self.t_embedder.mlp
        for weight in (self.y_embedder.embedding_table.weight, time_in.weight, time_out.weight):
            nn.init.normal_(cast(Tensor, weight), std=0.02, generator=generator)
        zeroed = [block.adaLN_modulation[1] for block in self._blocks()]
        for linear in [*zeroed, self.final_layer.adaLN_modulation[1], self.final_layer.linear]:
            nn.init.zeros_(cast(Tensor, linear.weight))
            nn.init.zeros_(cast(Tensor, linear.bias))

    def _blocks(self) -> list[Block]:
        return [cast(Block, block) for block in self.blocks]

    def _embed(self, x: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens [N, T, D] and condition [N, D]."""
        return self.x_embedder(x) + self.pos_embed, self.t_embedder(t) + self.y_embedder(y)

    def forward(self, x: Tensor, t: Tensor, y: Tensor, taps: Iterable[int] = ()) -> tuple[Tensor, dict[int, Tensor]]:
        """Velocity at (x, t, y), and the outputs of chosen blocks.

        Args:
            x: noised latents [N, C, H, W].
            t: times [N] in [0, 1].
            y: labels [N]; `num_classes` is the null class.
            taps: blocks to return, counted from 1.

        Returns:
            velocity [N, C, H, W] and {block: hidden [N, T, D]}, each hidden state after both residual additions.
        """
        taps = frozenset(taps)
        assert all(1 <= tap <= self.depth for tap in taps), f"taps {sorted(taps)} outside 1..{self.depth}"
        hidden: dict[int, Tensor] = {}
        h_NTD, c_ND = self._embed(x, t, y)
        for number, block in enumerate(self.blocks, start=1):
            if self.checkpoint_activations and torch.is_grad_enabled():
                # Blocks draw nothing, so there is no random state to keep. Autocast's state is kept.
                h_NTD = checkpoint(block, h_NTD, c_ND, use_reentrant=False, preserve_rng_state=False)
            else:
                h_NTD = block(h_NTD, c_ND)
            if number in taps:
                hidden[number] = h_NTD
        return unpatchify(self.final_layer(h_NTD, c_ND), self.patch_size), hidden

    def hidden(self, x: Tensor, t: Tensor, y: Tensor, block: int) -> Tensor:
        """Output [N, T, D] of `block` (from 1), running nothing after it; bitwise equal to the tap."""
        assert 1 <= block <= self.depth, f"block {block} outside 1..{self.depth}"
        h_NTD, c_ND = self._embed(x, t, y)
        for module in self.blocks[:block]:
            h_NTD = module(h_NTD, c_ND)
        return h_NTD
