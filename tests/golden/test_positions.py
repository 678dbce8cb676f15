"""The fixed position table, by hand and against loops (methods.md section 1)."""

import math

import pytest
import torch

from harness.backbones.sit import SiT, position_table


def slow_table(width: int, side: int) -> list[list[float]]:
    """First half of the channels: column; second half: row; in each half sines before cosines."""
    table = []
    for row in range(side):
        for column in range(side):
            halves = []
            for position in (column, row):
                angles = [position * 10000 ** (-k / (width / 4)) for k in range(width // 4)]
                halves += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
            table.append(halves)
    return table


@pytest.mark.parametrize(("width", "side"), [(4, 2), (8, 3), (16, 1), (64, 4), (384, 16), (1152, 16)])
def test_table_equals_the_loops(width: int, side: int) -> None:
    found = position_table(width, side)
    assert found.shape == (side * side, width)
    assert found.dtype == torch.float32
    torch.testing.assert_close(
        found.double(), torch.tensor(slow_table(width, side), dtype=torch.float64), rtol=0, atol=1e-6
    )


def test_table_by_hand() -> None:
    """Width 8, token (row 1, column 2) of a 3 x 3 grid: frequencies 1 and 10000^(-1/2) = 0.01."""
    expected = [
        *(0.9092974, 0.0199987, -0.4161468, 0.9998000),  # sin 2, sin 0.02, cos 2, cos 0.02
        *(0.8414710, 0.0099998, 0.5403023, 0.9999500),  # sin 1, sin 0.01, cos 1, cos 0.01
    ]
    assert position_table(8, 3)[1 * 3 + 2].tolist() == pytest.approx(expected, abs=1e-6)


def test_the_backbone_holds_the_table_and_does_not_train_it() -> None:
    with torch.device("meta"):
        model = SiT.from_name("SiT-S/2", num_classes=10)
    assert model.pos_embed.shape == (1, 256, 384)
    assert not model.pos_embed.requires_grad
    torch.testing.assert_close(model.pos_embed[0].cpu(), torch.tensor(slow_table(384, 16)), rtol=0, atol=1e-6)
