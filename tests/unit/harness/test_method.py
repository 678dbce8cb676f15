"""The interface of a method: shapes, draws by rows, and how heads are initialised.

Shapes: N images, C channels, H W latent height and width, T tokens, D backbone width.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from harness.errors import UserError
from harness.method import BackboneShape, DataShape, Disclosure, Method, MethodDraws, StepView, Term, initialize_head
from harness.rng import global_state_kept, stream


@dataclass(frozen=True, kw_only=True)
class ToyConfig:
    """Nothing to set."""


class Toy(Method):
    """One Linear and one convolution on nothing in particular."""

    Config = ToyConfig
    disclosure = Disclosure(summary="A toy.", paper="none")
    name = "toy"

    def __init__(self, config: ToyConfig, backbone: BackboneShape, data: DataShape) -> None:
        super().__init__(config, backbone, data)
        self.heads["linear"] = nn.Sequential(nn.Linear(64, 128), nn.SiLU(), nn.LayerNorm(128))
        self.heads["map"] = nn.Conv2d(32, 64, 3, padding=1)

    def terms(self, view: StepView, hidden: Mapping[int, Tensor]) -> dict[str, Term]:
        return {}


def weights(method: Method) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in method.heads.state_dict().items()}


# -- shapes ---------------------------------------------------------------------------------------------------------


def test_the_shape_of_a_named_backbone() -> None:
    expected = BackboneShape(
        size="XL", depth=28, hidden_size=1152, num_heads=16, patch_size=4, input_size=32, in_channels=3, num_classes=7
    )
    assert BackboneShape.of("SiT-XL/4", input_size=32, in_channels=3, num_classes=7) == expected
    with pytest.raises(UserError, match=r"^model\.name is 'SiT-Z/2'"):
        BackboneShape.of("SiT-Z/2", input_size=32, in_channels=3, num_classes=7)


def test_shape_properties_by_hand(shape: BackboneShape) -> None:
    assert (shape.grid, shape.num_tokens, shape.patch_numbers) == (2, 4, 12)


@pytest.mark.parametrize("block", [0, 7, -1])
def test_blocks_outside_the_depth_are_refused(shape: BackboneShape, block: int) -> None:
    with pytest.raises(UserError, match=rf"^toy\.block is {block}: the backbone has blocks 1 to 6$"):
        shape.check_block("toy.block", block)


def test_blocks_inside_the_depth_pass(shape: BackboneShape) -> None:
    assert [shape.check_block("toy.block", block) for block in (1, 6)] == [1, 6]


# -- draws ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [slice(0, 12), slice(0, 5), slice(5, 8), slice(8, 12)])
def test_a_view_reads_its_rows_of_the_global_draw(make_view: Callable[..., StepView], rows: slice) -> None:
    num = rows.stop - rows.start
    view = make_view(num, rows=rows, draws=MethodDraws(seed=3, step=7, batch_size=12), method="toy")
    uniform = torch.rand(12, generator=stream(3, "method/toy/gap", 7))
    normal = torch.randn(12, 2, 4, generator=stream(3, "method/toy/jitter", 7))
    assert torch.equal(view.uniform("gap"), uniform[rows])
    assert torch.equal(view.normal("jitter", (2, 4)), normal[rows])


def test_splitting_a_batch_changes_no_draw(make_view: Callable[..., StepView]) -> None:
    def read(*cuts: int) -> Tensor:
        draws = MethodDraws(seed=0, step=2, batch_size=10)
        views = [make_view(b - a, rows=slice(a, b), draws=draws, method="toy") for a, b in pairwise(cuts)]
        return torch.cat([view.uniform("gap") for view in views])

    assert torch.equal(read(0, 10), read(0, 3, 6, 9, 10))


def test_draws_differ_by_method_name_and_step(make_view: Callable[..., StepView]) -> None:
    read = [
        make_view(draws=MethodDraws(seed=seed, step=step, batch_size=4), method=method).uniform(name).tolist()
        for seed, step, method, name in [
            (0, 1, "a", "x"),
            (1, 1, "a", "x"),
            (0, 2, "a", "x"),
            (0, 1, "b", "x"),
            (0, 1, "a", "y"),
        ]
    ]
    assert len({tuple(values) for values in read}) == 5


def test_a_name_is_drawn_once_a_step_whatever_is_drawn_between(make_view: Callable[..., StepView]) -> None:
    view = make_view(method="a")
    first = view.uniform("x")
    view.normal("y", (3,))
    view.of("b").uniform("x")
    assert torch.equal(view.uniform("x"), first)


def test_one_name_with_two_shapes_is_our_bug(make_view: Callable[..., StepView]) -> None:
    view = make_view(method="toy")
    view.normal("jitter", (3,))
    with pytest.raises(AssertionError, match="toy drew 'jitter' with another shape"):
        view.normal("jitter", (4,))


def test_a_view_for_a_part_differs_in_its_name_alone(make_view: Callable[..., StepView]) -> None:
    view = make_view()
    part = view.of("toy")
    assert (view.method, part.method) == ("", "toy")
    assert all(getattr(part, f.name) is getattr(view, f.name) for f in dataclasses.fields(view) if f.name != "method")
    with pytest.raises(dataclasses.FrozenInstanceError):
        part.t_N = view.noise_NCHW  # type: ignore[misc]


# -- heads ----------------------------------------------------------------------------------------------------------


def built(shape: BackboneShape, data_shape: DataShape, seed: int, global_seed: int = 0) -> Method:
    with global_state_kept():
        torch.manual_seed(global_seed)
        method = Toy(ToyConfig(), shape, data_shape)
        before = torch.get_rng_state()
        method.initialize(seed)
        assert torch.equal(torch.get_rng_state(), before)
    return method


def test_heads_depend_on_seed_and_name_alone(shape: BackboneShape, data_shape: DataShape) -> None:
    first, again = (weights(built(shape, data_shape, 0, global_seed)) for global_seed in (1, 2))
    other = weights(built(shape, data_shape, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["linear.0.weight"], other["linear.0.weight"])
    assert not torch.equal(first["map.weight"], other["map.weight"])
    renamed = built(shape, data_shape, 0)
    renamed.__class__ = type("Renamed", (Toy,), {"name": "renamed"})
    renamed.initialize(0)
    assert not torch.equal(weights(renamed)["linear.0.weight"], first["linear.0.weight"])


def test_heads_follow_the_rule_of_their_kind(shape: BackboneShape, data_shape: DataShape) -> None:
    head = weights(built(shape, data_shape, 0))
    xavier = (6 / (64 + 128)) ** 0.5
    assert 0.98 * xavier < head["linear.0.weight"].abs().max() <= xavier
    assert not head["linear.0.bias"].any()
    assert (head["linear.2.weight"] == 1).all() and not head["linear.2.bias"].any()
    torch_rule = (32 * 3 * 3) ** -0.5  # PyTorch's convolution: U(-1/sqrt(fan in), 1/sqrt(fan in)), bias too
    assert 0.98 * torch_rule < head["map.weight"].abs().max() <= torch_rule
    assert 0.5 * torch_rule < head["map.bias"].abs().max() <= torch_rule


def test_a_parameter_without_a_rule_is_our_bug() -> None:
    with global_state_kept():
        embedding = nn.Embedding(3, 4)
    with pytest.raises(AssertionError, match="no rule initialises the parameters of Embedding"):
        initialize_head(embedding, torch.Generator())


def test_what_a_method_is_unless_it_says_otherwise(shape: BackboneShape, data_shape: DataShape) -> None:
    method = built(shape, data_shape, 0)
    needs = method.needs()
    assert (needs.images, needs.encoders, needs.ema) == (False, (), False)
    assert method.state_dict() == {}
    method.load_state_dict({})
    with pytest.raises(AssertionError, match="Toy keeps no state, got \\['queue'\\]"):
        method.load_state_dict({"queue": torch.zeros(1)})
