"""LayerSync (arXiv 2510.12581): pull an early block towards a later block of the same forward pass."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from harness.config import require, require_finite
from harness.method import BackboneShape, Disclosure, Method, Progress, StepView, Term
from methods._losses import cosine, mean_over
from methods._parts import default_block

BLOCKS = {"S": 3, "B": 3, "L": 8, "XL": 8}
TARGET_BLOCKS = {"S": 7, "B": 7, "L": 18, "XL": 16}
"""XL from the authors' README, L from a secondary source; B and S are ours, by proportion."""


@dataclass(frozen=True, kw_only=True)
class LayersyncConfig:
    """LayerSync's settings; the defaults are the authors' where they state them."""

    block: int = 0
    """Block that is pulled, counted from 1; 0 = by size: 3 (S, B), 8 (L, XL), else 8/28 of the depth."""
    target_block: int = 0
    """Later block that it is pulled to, counted from 1; 0 = by size: 7 (S, B), 18 (L), 16 (XL), else 16/28 of the
    depth, and at least the next one."""
    weight: float = 0.2
    """Weight of the term."""

    def __post_init__(self) -> None:
        require_finite(self, "layersync")


class Layersync(Method):
    """term = - mean of cos(h_k, sg(h_k')) over images and tokens (vita-epfl/LayerSync transport.py:167-172)."""

    Config = LayersyncConfig
    disclosure = Disclosure(
        summary="Aligns an early block with a later block of the same forward pass; no head, no extra pass.",
        paper="LayerSync, arXiv 2510.12581",
        note="the release's default pair 8 <- 8 has no gradient and is refused; the pairs of S and B are ours",
    )
    config: LayersyncConfig

    @classmethod
    def resolve(cls, config: LayersyncConfig, backbone: BackboneShape) -> LayersyncConfig:
        block = backbone.check_block("layersync.block", config.block or default_block(backbone, BLOCKS, 8 / 28))
        by_default = max(block + 1, default_block(backbone, TARGET_BLOCKS, 16 / 28))
        target_block = backbone.check_block("layersync.target_block", config.target_block or by_default)
        require(
            block < target_block,
            f"layersync.target_block is {target_block}: give a block after layersync.block, which is {block}",
        )
        return replace(config, block=block, target_block=target_block)

    def taps(self, progress: Progress) -> tuple[int, ...]:
        return (self.config.block, self.config.target_block)

    def terms(self, view: StepView, hidden: Mapping[int, Tensor]) -> dict[str, Term]:
        value_N = cosine(hidden[self.config.block], hidden[self.config.target_block].detach())
        return {"layersync": Term(-mean_over(value_N), self.config.weight)}

    def search_space(self) -> dict[str, Any]:
        return {
            # Every choice of one goes with every choice of the other.
            "block": list(range(1, self.config.target_block)),
            "target_block": list(range(self.config.target_block, self.backbone.depth + 1)),
            "weight": [0.1, 0.2, 0.3, 0.5],
        }
