"""SiT against a slow re-implementation in plain numpy, and its names, initialisation, taps and refusals.

Shapes: N images, C channels, H W latent height and width, T tokens, D width, A heads.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from harness.backbones.sit import PLAIN_TOKENS, SIZES, SiT, TimestepEmbedder, attend, parse_name, patchify, unpatchify
from harness.errors import UserError
from harness.method import BackboneShape
from harness.rng import global_state_kept, stream

Array = NDArray[np.float64]


# -- the slow reference: float64, loops over images, tokens and heads -----------------------------------------------


def linear(weights: dict[str, Array], name: str, x: Array) -> Array:
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def silu(x: Array) -> Array:
    return x / (1 + np.exp(-x))


def gelu_tanh(x: Array) -> Array:
    """0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))."""
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def layer_norm(x: Array, eps: float) -> Array:
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps)


def embed_time(weights: dict[str, Array], t: float) -> Array:
    cosines = [math.cos(t * 10000 ** (-i / 128)) for i in range(128)]
    sines = [math.sin(t * 10000 ** (-i / 128)) for i in range(128)]
    hidden = silu(linear(weights, "t_embedder.mlp.0", np.array(cosines + sines)))
    return linear(weights, "t_embedder.mlp.2", hidden)


def embed_patches(weights: dict[str, Array], x_CHW: Array, p: int) -> Array:
    """Each p x p patch against each filter, tokens row by row, plus the stored positions: [T, D]."""
    side = x_CHW.shape[1] // p
    tokens = []
    for row in range(side):
        for column in range(side):
            patch = x_CHW[:, row * p : (row + 1) * p, column * p : (column + 1) * p]
            filters = weights["x_embedder.proj.weight"]
            tokens.append([(filters[d] * patch).sum() for d in range(len(filters))])
    return np.array(tokens) + weights["x_embedder.proj.bias"] + weights["pos_embed"][0]


def attention(weights: dict[str, Array], name: str, x_TD: Array, num_heads: int) -> Array:
    width = x_TD.shape[1]
    size = width // num_heads
    qkv = linear(weights, f"{name}.qkv", x_TD)
    outputs = []
    for head in range(num_heads):
        part = slice(head * size, (head + 1) * size)
        q, k, v = (qkv[:, i * width : (i + 1) * width][:, part] for i in range(3))
        if f"{name}.q_norm.weight" in weights:
            q = layer_norm(q, 1e-5) * weights[f"{name}.q_norm.weight"] + weights[f"{name}.q_norm.bias"]
            k = layer_norm(k, 1e-5) * weights[f"{name}.k_norm.weight"] + weights[f"{name}.k_norm.bias"]
        scores = np.exp(q @ k.T / math.sqrt(size))
        outputs.append(scores / scores.sum(1, keepdims=True) @ v)
    return linear(weights, f"{name}.proj", np.concatenate(outputs, axis=1))


def reference_block(weights: dict[str, Array], name: str, x_TD: Array, c_D: Array, num_heads: int) -> Array:
    condition = linear(weights, f"{name}.adaLN_modulation.1", silu(c_D))
    shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = condition.reshape(6, -1)
    x_TD = x_TD + gate_a * attention(
        weights, f"{name}.attn", layer_norm(x_TD, 1e-6) * (1 + scale_a) + shift_a, num_heads
    )
    inner = gelu_tanh(linear(weights, f"{name}.mlp.fc1", layer_norm(x_TD, 1e-6) * (1 + scale_m) + shift_m))
    return x_TD + gate_m * linear(weights, f"{name}.mlp.fc2", inner)


def reference_sit(model: SiT, x_CHW: Array, t: float, y: int) -> tuple[Array, list[Array]]:
    """Velocity [C, H, W] and the output [T, D] of every block, for one image (methods.md section 1)."""
    weights = {name: value.double().numpy() for name, value in model.state_dict().items()}
    p = model.patch_size
    c_D = embed_time(weights, t) + weights["y_embedder.embedding_table.weight"][y]
    h_TD = embed_patches(weights, x_CHW, p)
    hidden = []
    for index in range(model.depth):
        h_TD = reference_block(weights, f"blocks.{index}", h_TD, c_D, model.num_heads)
        hidden.append(h_TD)
    shift, scale = linear(weights, "final_layer.adaLN_modulation.1", silu(c_D)).reshape(2, -1)
    out_TP = linear(weights, "final_layer.linear", layer_norm(h_TD, 1e-6) * (1 + scale) + shift)
    velocity = np.zeros_like(x_CHW)
    channels, side = x_CHW.shape[0], x_CHW.shape[1] // p
    for token, numbers in enumerate(out_TP):
        for position, value in enumerate(numbers):  # (row in the patch, column in the patch, channel)
            row, column, channel = position // (p * channels), position // channels % p, position % channels
            velocity[channel, token // side * p + row, token % side * p + column] = value
    return velocity, hidden


# -- the forward pass -----------------------------------------------------------------------------------------------


def inputs(model: SiT, num: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(9)
    x = torch.randn(num, model.in_channels, model.input_size, model.input_size, generator=generator)
    t = torch.rand(num, generator=generator)
    y = torch.randint(model.num_classes + 1, (num,), generator=generator)
    y[0] = model.num_classes  # the null class is among them
    return x, t, y


SHAPES: list[dict[str, Any]] = [
    {"input_size": 6, "patch_size": 2, "in_channels": 3, "hidden_size": 24, "depth": 3, "num_heads": 3},
    {"input_size": 4, "patch_size": 1, "in_channels": 4, "hidden_size": 16, "depth": 2, "num_heads": 1},
    {"input_size": 9, "patch_size": 3, "in_channels": 2, "hidden_size": 32, "depth": 2, "num_heads": 8},
    {
        "input_size": 4,
        "patch_size": 2,
        "in_channels": 4,
        "hidden_size": 24,
        "depth": 2,
        "num_heads": 2,
        "qk_norm": True,
    },
    {
        "input_size": 4,
        "patch_size": 4,
        "in_channels": 1,
        "hidden_size": 8,
        "depth": 1,
        "num_heads": 2,
        "mlp_ratio": 1.5,
    },
]


@torch.no_grad()
@pytest.mark.parametrize("fields", SHAPES)
def test_forward_equals_the_slow_reference(make_backbone: Callable[..., SiT], fields: dict[str, Any]) -> None:
    model = make_backbone(randomise=0.2, **fields)
    x, t, y = inputs(model)
    velocity, hidden = model(x, t, y, taps=range(1, model.depth + 1))
    assert velocity.abs().mean() > 0.1  # nothing is gated away
    for n in range(len(x)):
        expected, expected_hidden = reference_sit(model, x[n].double().numpy(), float(t[n]), int(y[n]))
        # float32 against float64: relative to the size of the values
        np.testing.assert_allclose(velocity[n].numpy(), expected, rtol=0, atol=1e-5 * np.abs(expected).max())
        for block, states in enumerate(expected_hidden, start=1):
            np.testing.assert_allclose(hidden[block][n].numpy(), states, rtol=0, atol=1e-5 * np.abs(states).max())


def queries_keys_values_gradient(tokens: int, dtype: torch.dtype, scale: float = 1.0) -> list[Tensor]:
    return [(scale * torch.randn(2, 3, tokens, 8, generator=stream(i, "data"))).to(dtype) for i in range(4)]


def attended(attention: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, into: Tensor) -> list[Tensor]:
    """The result, under autocast where it is bf16, and its gradients to q, k and v."""
    leaves = [value.clone().requires_grad_() for value in (q, k, v)]
    with torch.autocast("cpu", torch.bfloat16, enabled=q.dtype == torch.bfloat16):
        out = attention(*leaves)
    out.backward(into)
    return [out.detach(), *(cast(Tensor, leaf.grad) for leaf in leaves)]


def attention_formula(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.exp(torch.einsum("natd,nasd->nats", q, k) / math.sqrt(8))
    return torch.einsum("nats,nasd->natd", scores / scores.sum(-1, keepdim=True), v)


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-5), (torch.bfloat16, 2.0**-5)])
@pytest.mark.parametrize("tokens", [16, PLAIN_TOKENS, PLAIN_TOKENS + 1])
def test_attention_and_its_gradient_equal_the_formula(tokens: int, dtype: torch.dtype, error: float) -> None:
    """Against softmax(q k^T / sqrt(d)) v in float64."""
    inputs = queries_keys_values_gradient(tokens, dtype)
    exact = attended(attention_formula, *(value.double() for value in inputs))
    for found, wanted in zip(attended(attend, *inputs), exact, strict=True):
        assert found.dtype == dtype
        assert ((found.double() - wanted).abs() <= error * wanted.abs().clamp(min=0.1 * wanted.abs().max())).all()


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_plain_attention_is_about_as_exact_as_the_fused_kernel(scale: float) -> None:
    """In bf16, by the norm of the error. With logits rounded to bf16 it would be 2 to 12 times as large."""
    inputs = queries_keys_values_gradient(PLAIN_TOKENS, torch.bfloat16, scale)
    exact = attended(attention_formula, *(value.double() for value in inputs))

    def errors(attention: Callable[..., Tensor]) -> list[float]:
        pairs = zip(attended(attention, *inputs), exact, strict=True)
        return [float((found.double() - wanted).norm() / wanted.norm()) for found, wanted in pairs]

    ratios = [
        mine / theirs for mine, theirs in zip(errors(attend), errors(F.scaled_dot_product_attention), strict=True)
    ]
    assert max(ratios) < 1.3, ratios


@torch.no_grad()
def test_time_numbers_are_cosines_then_sines_of_the_unscaled_time() -> None:
    with global_state_kept():
        found = TimestepEmbedder(8).frequencies(torch.tensor([0.0, 1.0]))
    assert torch.equal(found[0], torch.cat([torch.ones(128), torch.zeros(128)]))
    # t = 1: cos(1), then cos(10000^(-1/128)) = cos(0.9305720...), ..., sin(1) at 128
    expected = {0: 0.5403023, 1: math.cos(0.930572041), 64: math.cos(0.01), 128: 0.8414710, 192: math.sin(0.01)}
    for position, value in expected.items():
        assert float(found[1, position]) == pytest.approx(value, abs=1e-6)


@torch.no_grad()
def test_times_keep_float32_under_autocast() -> None:
    """In bf16 the times 0.5 ... 0.5001 would be one number."""
    t_N = 0.5 + torch.arange(100) * 1e-6
    with global_state_kept():
        embedder = TimestepEmbedder(8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = embedder.frequencies(t_N)
    assert found.dtype == torch.float32
    assert len(found[:, 128].unique()) > 90
    assert len(t_N.bfloat16().unique()) == 1


# -- patches --------------------------------------------------------------------------------------------------------


def test_patchify_order_by_hand() -> None:
    """A 4 x 2 x 2 latent is one token: every channel of (0, 0), then of (0, 1), (1, 0) and (1, 1)."""
    x = torch.arange(16.0).reshape(4, 2, 2)  # x[c, row, column] = 4 c + 2 row + column
    tokens = patchify(x[None], 2)
    assert tokens.shape == (1, 1, 16)
    assert tokens.flatten().tolist() == [0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15]


def test_tokens_go_row_by_row() -> None:
    x = torch.arange(8.0).reshape(1, 1, 2, 4)
    assert patchify(x, 1).flatten().tolist() == list(range(8))
    assert patchify(x, 2).tolist() == [[[0, 1, 4, 5], [2, 3, 6, 7]]]


@pytest.mark.parametrize(("channels", "size", "p"), [(4, 2, 2), (4, 8, 2), (3, 6, 3), (1, 4, 4), (5, 4, 1)])
def test_unpatchify_undoes_patchify(channels: int, size: int, p: int) -> None:
    x = torch.randn(3, channels, size, size, generator=torch.Generator().manual_seed(0))
    tokens = patchify(x, p)
    assert tokens.shape == (3, (size // p) ** 2, p * p * channels)
    assert torch.equal(unpatchify(tokens, p), x)


# -- names and initialisation ---------------------------------------------------------------------------------------


def official_names(depth: int) -> set[str]:
    """The names of willisma/SiT and sihyun-yu/REPA, written by rule."""
    layers = ["x_embedder.proj", "t_embedder.mlp.0", "t_embedder.mlp.2"]
    layers += ["final_layer.linear", "final_layer.adaLN_modulation.1"]
    for i in range(depth):
        layers += [f"blocks.{i}.attn.qkv", f"blocks.{i}.attn.proj", f"blocks.{i}.mlp.fc1", f"blocks.{i}.mlp.fc2"]
        layers += [f"blocks.{i}.adaLN_modulation.1"]
    pairs = {f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}
    return pairs | {"pos_embed", "y_embedder.embedding_table.weight"}


def test_parameter_names_equal_the_official_ones(make_backbone: Callable[..., SiT]) -> None:
    model = make_backbone(depth=3)
    assert set(dict(model.named_parameters())) == official_names(3)
    assert set(model.state_dict()) == official_names(3)
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["pos_embed"]


@torch.no_grad()
def test_untrained_output_is_zero_and_every_block_passes_its_input_on(make_backbone: Callable[..., SiT]) -> None:
    model = make_backbone(depth=4, hidden_size=32, input_size=8)
    x, t, y = inputs(model)
    velocity, hidden = model(x, t, y, taps=(1, 2, 3, 4))
    assert torch.equal(velocity, torch.zeros_like(x))
    embedded = model.x_embedder(x) + model.pos_embed
    assert all(torch.equal(states, embedded) for states in hidden.values())
    assert len(hidden) == 4


def fans(weight: Tensor) -> int:
    """Inputs plus outputs of a layer; the patch convolution counts as a Linear over its patch."""
    return weight.shape[0] + weight[0].numel()


def test_initialisation_statistics(make_backbone: Callable[..., SiT]) -> None:
    model = make_backbone(depth=2, hidden_size=128, num_classes=99)
    for name, value in model.state_dict().items():
        if name == "pos_embed":
            continue
        if name.endswith("bias") or "adaLN" in name or name.startswith("final_layer"):
            assert not value.any(), name
        elif "embedding_table" in name or name.startswith("t_embedder"):
            # 5 standard errors of a standard deviation: s / sqrt(2 n)
            assert abs(value.std() - 0.02) < 5 * 0.02 / (2 * value.numel()) ** 0.5, name
            assert abs(value.mean()) < 5 * 0.02 / value.numel() ** 0.5, name
        else:
            bound = (6 / fans(value)) ** 0.5  # xavier: U(-bound, bound), whose deviation is bound / sqrt(3)
            assert 0.99 * bound < value.abs().max() <= bound, name
            assert float(value.std()) == pytest.approx(bound / 3**0.5, rel=0.03), name


def weights_of(seed: int, global_seed: int) -> dict[str, Tensor]:
    with global_state_kept():
        torch.manual_seed(global_seed)
        model = SiT(input_size=4, hidden_size=16, depth=2, num_heads=2, num_classes=3)
        before = torch.get_rng_state()
        model.initialize(stream(seed, "init"))
        assert torch.equal(torch.get_rng_state(), before)
    return model.state_dict()


def test_initial_weights_depend_on_the_generator_alone() -> None:
    first, again, other = weights_of(0, global_seed=1), weights_of(0, global_seed=2), weights_of(1, global_seed=1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    drawn = [name for name in first if name != "pos_embed" and first[name].any()]
    assert len(drawn) == 2 * 4 + 1 + 2 + 1  # four layers a block, patches, time MLP, labels
    assert all(not torch.equal(first[name], other[name]) for name in drawn)


def test_without_a_generator_weights_come_from_the_global_state() -> None:
    with global_state_kept():
        torch.manual_seed(3)
        first = SiT(input_size=4, hidden_size=16, depth=1, num_heads=2).blocks[0].attn.qkv.weight  # type: ignore[union-attr]
        torch.manual_seed(3)
        again = SiT(input_size=4, hidden_size=16, depth=1, num_heads=2).blocks[0].attn.qkv.weight  # type: ignore[union-attr]
    assert isinstance(first, Tensor) and isinstance(again, Tensor)
    assert torch.equal(first, again)


# -- taps -----------------------------------------------------------------------------------------------------------

PRECISIONS = pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])


@torch.no_grad()
@PRECISIONS
def test_taps_do_not_change_the_output(make_backbone: Callable[..., SiT], precision: torch.dtype) -> None:
    model = make_backbone(randomise=0.2)
    x, t, y = inputs(model)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == torch.bfloat16):
        plain, nothing = model(x, t, y)
        tapped, hidden = model(x, t, y, taps=(2, 5))
    assert torch.equal(plain, tapped)
    assert nothing == {}
    assert set(hidden) == {2, 5}
    assert hidden[2].shape == (3, 4, 16)


@torch.no_grad()
@PRECISIONS
def test_hidden_equals_the_tap(make_backbone: Callable[..., SiT], precision: torch.dtype) -> None:
    model = make_backbone(randomise=0.2)
    x, t, y = inputs(model)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == torch.bfloat16):
        _, taps = model(x, t, y, taps=range(1, 7))
        for block in range(1, 7):
            assert torch.equal(model.hidden(x, t, y, block), taps[block])
    assert not torch.equal(taps[1], taps[2])


def test_hidden_runs_nothing_after_its_block(make_backbone: Callable[..., SiT]) -> None:
    model = make_backbone(randomise=0.2)
    x, t, y = inputs(model)
    ran: list[int] = []
    for number, block in enumerate(model.blocks, start=1):
        block.register_forward_hook(lambda *args, number=number: ran.append(number))
    model.final_layer.register_forward_hook(lambda *args: ran.append(0))
    model.hidden(x, t, y, 3)
    assert ran == [1, 2, 3]


def test_gradients_reach_blocks_up_to_the_tap_only(make_backbone: Callable[..., SiT]) -> None:
    model = make_backbone(randomise=0.2)
    x, t, y = inputs(model)
    _, hidden = model(x, t, y, taps=(2,))
    hidden[2].square().mean().backward()
    reached = {i for i, block in enumerate(model.blocks, 1) if any(p.grad is not None for p in block.parameters())}
    assert reached == {1, 2}
    assert all(p.grad is None for p in model.final_layer.parameters())


@pytest.mark.parametrize("block", [0, 7, -1])
def test_blocks_outside_the_depth_are_our_bug(make_backbone: Callable[..., SiT], block: int) -> None:
    model = make_backbone()
    x, t, y = inputs(model)
    with pytest.raises(AssertionError, match=r"outside 1\.\.6"):
        model(x, t, y, taps=(block,))
    with pytest.raises(AssertionError, match=r"outside 1\.\.6"):
        model.hidden(x, t, y, block)


# -- checkpointed activations ---------------------------------------------------------------------------------------


def backward(model: SiT, precision: torch.dtype) -> tuple[list[Tensor], list[Tensor], int]:
    """Output and taps, gradients, and how many tensors were kept for the backward pass, of a loss with taps."""
    x, t, y = inputs(model)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    saved = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with saved, torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == torch.bfloat16):
        velocity, hidden = model(x, t, y, taps=(2, 5))
        loss = velocity.float().square().mean() + sum(value.float().abs().mean() for value in hidden.values())
    weights = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(loss, weights, retain_graph=True)
    for first, again in zip(gradients, torch.autograd.grad(loss, weights), strict=True):
        assert torch.equal(first, again), "a graph can be walked twice, as for the norms of a method's terms"
    return [velocity, *hidden.values()], list(gradients), len(kept)


@PRECISIONS
def test_checkpointed_activations_change_no_bit(make_backbone: Callable[..., SiT], precision: torch.dtype) -> None:
    """Outputs, taps and gradients; few tensors are kept, and without gradients nothing runs twice."""
    model = make_backbone(randomise=0.2)
    plain, wanted, num_kept = backward(model, precision)
    model.checkpoint_activations = True
    ran: list[int] = []
    model.blocks[0].register_forward_pre_hook(lambda *args: ran.append(1))
    found, gradients, num_fewer = backward(model, precision)
    assert ran == [1, 1, 1], "forward, and once for each of two backward passes"
    assert num_fewer < num_kept / 3
    for ours, theirs in zip([*found, *gradients], [*plain, *wanted], strict=True):
        assert torch.equal(ours, theirs)
    with torch.no_grad():
        model(*inputs(model))
    assert len(ran) == 4


# -- names of sizes -------------------------------------------------------------------------------------------------


def test_sizes_of_the_papers() -> None:
    assert {k: SIZES[k] for k in ("S", "B", "L", "XL")} == {
        "S": (12, 384, 6),
        "B": (12, 768, 12),
        "L": (24, 1024, 16),
        "XL": (28, 1152, 16),
    }


def test_from_name_and_its_overrides() -> None:
    assert parse_name("SiT-nano/4") == {"depth": 6, "hidden_size": 128, "num_heads": 4, "patch_size": 4}
    with torch.device("meta"):
        model = SiT.from_name("SiT-pico/2", input_size=8, num_classes=10, depth=2)
    assert (model.depth, model.hidden_size, model.num_heads, model.patch_size) == (2, 64, 2, 2)
    assert (model.input_size, model.in_channels, model.num_classes) == (8, 4, 10)


@pytest.mark.parametrize("qk_norm", [False, True])
def test_a_shape_says_all_numbers_of_the_network(shape: BackboneShape, qk_norm: bool) -> None:
    model = SiT.of(shape, qk_norm)
    names = [item.name for item in dataclasses.fields(shape) if item.name != "size"]
    assert {name: getattr(model, name) for name in names} == {name: getattr(shape, name) for name in names}
    assert any("q_norm" in name for name in model.state_dict()) == qk_norm


@pytest.mark.parametrize("name", ["SiT-XXL/2", "SiT-B", "SiT-B/0", "DiT-B/2", "SiT-B/2 ", "sit-B/2", ""])
def test_unknown_names_list_the_sizes(name: str) -> None:
    with pytest.raises(
        UserError, match=r"model\.name is .*: give SiT-<size>/<patch> .* pico, nano, micro, S, B, L, XL"
    ):
        SiT.from_name(name)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"input_size": 7, "patch_size": 2}, "patch size 2 does not divide the latent size 7"),
        ({"hidden_size": 20, "num_heads": 3}, "hidden_size 20 must be a multiple"),
        ({"hidden_size": 6, "num_heads": 3}, "hidden_size 6 must be a multiple of 4"),
    ],
)
def test_shapes_that_cannot_be(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        SiT(**fields)


def test_the_backbone_draws_nothing_in_training_mode(make_backbone: Callable[..., SiT]) -> None:
    """No label dropout and no other dropout lives inside: training and evaluation mode agree bitwise."""
    model = make_backbone(randomise=0.2)
    x, t, y = inputs(model)
    assert not [m for m in model.modules() if isinstance(m, nn.Dropout) and m.p > 0]
    assert torch.equal(model.train()(x, t, y)[0], model.eval()(x, t, y)[0])
