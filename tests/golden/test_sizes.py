"""Parameter counts of backbones and heads, as printed in methods.md sections 1, 3, 4 and 5, and in closed form.

Everything is built on the meta device: no weight is stored.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from harness.backbones.sit import SIZES, SiT
from harness.method import BackboneShape, DataShape
from methods import load


def num_trainable(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def meta_backbone(name: str, **overrides: Any) -> SiT:
    with torch.device("meta"):
        return SiT.from_name(name, **overrides)


@pytest.mark.parametrize(
    ("name", "millions"), [("SiT-S/2", 32.86), ("SiT-B/2", 130.30), ("SiT-L/2", 457.82), ("SiT-XL/2", 674.82)]
)
def test_published_backbone_sizes(name: str, millions: float) -> None:
    assert round(num_trainable(meta_backbone(name)) / 1e6, 2) == millions


@pytest.mark.parametrize("size", SIZES)
def test_backbone_size_in_closed_form(size: str) -> None:
    depth, d, _ = SIZES[size]
    p, c, k = 2, 4, 10
    patches, final = p * p * c * d + d, d * p * p * c + p * p * c + 2 * d * d + 2 * d
    time, labels = 256 * d + d + d * d + d, (k + 1) * d
    # qkv 3, proj 1, MLP 4 + 4, modulation 6 times D^2; biases 3 + 1 + 4 + 1 + 6 times D
    blocks = depth * (18 * d * d + 15 * d)
    expected = patches + final + time + labels + blocks
    assert num_trainable(meta_backbone(f"SiT-{size}/2", num_classes=k)) == expected


HEADS = [
    ("repa", {}, {"S": 6.56, "B": 7.34, "L": 7.87, "XL": 8.13}),
    ("sra", {}, {"S": 0.59, "B": 2.36, "L": 4.20, "XL": 5.31}),
    ("vae_repa", {}, {"S": 2.08, "B": 8.29, "L": 14.72, "XL": 18.63}),
    ("vae_repa", {"head_layers": 2}, {"B": 1.21}),
]


@pytest.mark.parametrize(
    ("method", "fields", "size", "millions"),
    [(method, fields, size, m) for method, fields, sizes in HEADS for size, m in sizes.items()],
)
def test_head_sizes(
    shape_of: Callable[[str], BackboneShape], method: str, fields: dict[str, Any], size: str, millions: float
) -> None:
    backbone = shape_of(f"SiT-{size}/2")
    data = DataShape(image_size=256, num_classes=1000, encoder_width=lambda name: 768)  # DINOv2 ViT-B
    cls = load(method)
    with torch.device("meta"):
        built = cls(cls.resolve(cls.Config(**fields), backbone), backbone, data)
    assert round(num_trainable(built.heads) / 1e6, 2) == millions
