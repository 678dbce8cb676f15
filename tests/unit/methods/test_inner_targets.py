"""iREPA, LayerSync and deep supervision against float64 references, in value and gradient.

Shapes: N images, C channels, H W latent height and width, T tokens, D backbone width, P numbers of a token's patch,
Z encoder width.
"""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from harness.errors import UserError
from harness.method import BackboneShape, Method, Progress, StepView
from methods import load

START = Progress(step=0, images=0)


def hidden_states(shape: BackboneShape, num: int = 4) -> dict[int, Tensor]:
    """Random hidden states of every block, with gradient."""
    generator = torch.Generator().manual_seed(5)
    size = (num, shape.num_tokens, shape.hidden_size)
    return {k: torch.randn(size, generator=generator).requires_grad_() for k in range(1, shape.depth + 1)}


def check(method: Method, view: StepView, hidden: dict[int, Tensor], reference: Callable[[], Tensor]) -> None:
    """The term, and its gradients with respect to every hidden state and head weight, equal the reference's."""
    (term,) = method.terms(view, hidden).values()
    assert term.value.dtype == torch.float32 and term.value.ndim == 0
    expected = reference()
    assert expected.dtype == torch.float64
    assert float(term.value.detach()) == pytest.approx(float(expected.detach()), rel=1e-5, abs=1e-6)
    leaves = [*hidden.values(), *method.heads.parameters()]
    ours = torch.autograd.grad(term.value, leaves, allow_unused=True)
    theirs = torch.autograd.grad(expected, leaves, allow_unused=True)
    for own, other in zip(ours, theirs, strict=True):
        own, other = (torch.zeros(()) if g is None else g for g in (own, other))
        torch.testing.assert_close(own, other.float(), rtol=1e-4, atol=1e-6)


def cosine_by_hand(a: Tensor, b: Tensor) -> Tensor:
    """The cosine of two vectors."""
    return (a * b).sum() / ((a * a).sum() * (b * b).sum()).sqrt()


# -- iREPA ----------------------------------------------------------------------------------------------------------


def convolved(map_HWD: Tensor, weight_ZDkk: Tensor, bias_Z: Tensor) -> Tensor:
    """A convolution with zeros around the map, written as loops: [H, W, Z]."""
    side, reach = map_HWD.shape[0], weight_ZDkk.shape[-1] // 2
    rows = []
    for i in range(side):
        for j in range(side):
            total = bias_Z
            for a in range(-reach, reach + 1):
                for b in range(-reach, reach + 1):
                    if 0 <= i + a < side and 0 <= j + b < side:
                        total = total + weight_ZDkk[:, :, a + reach, b + reach] @ map_HWD[i + a, j + b]
            rows.append(total)
    return torch.stack(rows).unflatten(0, (side, side))


@pytest.mark.parametrize(("kernel", "gamma"), [(3, 0.6), (1, 0.6), (3, 0.0), (5, 1.0)])
def test_irepa_against_loops(
    shape: BackboneShape,
    make_method: Callable[..., Method],
    make_view: Callable[..., StepView],
    kernel: int,
    gamma: float,
) -> None:
    method = make_method(load("irepa"), block=3, encoders="a,b", kernel=kernel, gamma=gamma)
    view, hidden = make_view(encoders=("a", "b")), hidden_states(shape)

    def reference() -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for name in ("a", "b"):
            head = {key: value.double() for key, value in method.heads[name].named_parameters()}
            for n in range(4):
                map_HWD = hidden[3][n].double().unflatten(0, (2, 2))
                ours_TZ = convolved(map_HWD, head["weight"], head["bias"]).flatten(0, 1)
                tokens_TZ = view.tokens[name][n].double()
                mean_Z = tokens_TZ.mean(0)
                std_Z = ((tokens_TZ - mean_Z).square().sum(0) / (len(tokens_TZ) - 1)).sqrt()
                target_TZ = (tokens_TZ - gamma * mean_Z) / (std_Z + 1e-6)
                total = total - sum(cosine_by_hand(x, y) for x, y in zip(ours_TZ, target_TZ, strict=True))
        return total / (2 * 4 * 4)

    check(method, view, hidden, reference)
    assert (method.taps(START), method.needs().encoders) == ((3,), ("a", "b"))


def test_irepa_normalises_a_channel_by_hand() -> None:
    """Tokens 1, 2, 3 have mean 2 and unbiased deviation 1; a constant channel is divided by the small number alone."""
    from methods.irepa import normalise_over_tokens

    tokens_NTZ = torch.tensor([[[1.0, 7.0], [2.0, 7.0], [3.0, 7.0]]])
    found = normalise_over_tokens(tokens_NTZ.half(), 0.5)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found[0, :, 0], [0.0, 1.0, 2.0], atol=1e-5)
    np.testing.assert_allclose(found[0, :, 1], 3.5e6, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "parameters"), [("SiT-S/2", 2.65), ("SiT-B/2", 5.31), ("SiT-L/2", 7.08), ("SiT-XL/2", 7.96)]
)
def test_irepa_head_has_its_published_size(
    shape_of: Callable[[str], BackboneShape], data_shape: object, name: str, parameters: float
) -> None:
    method_type, shape = load("irepa"), shape_of(name)
    config = method_type.resolve(method_type.Config(), shape)
    data = type("Data", (), {"encoder_width": staticmethod(lambda encoder: 768)})()
    with torch.device("meta"):
        method = method_type(config, shape, data)
    assert sum(p.numel() for p in method.heads.parameters()) / 1e6 == pytest.approx(parameters, abs=0.005)


# -- LayerSync ------------------------------------------------------------------------------------------------------


def test_layersync_against_loops(
    shape: BackboneShape, make_method: Callable[..., Method], make_view: Callable[..., StepView]
) -> None:
    method, hidden = make_method(load("layersync"), block=2, target_block=5), hidden_states(shape)

    def reference() -> Tensor:
        early, late = hidden[2].double(), hidden[5].detach().double()
        pairs = [cosine_by_hand(early[n, token], late[n, token]) for n in range(4) for token in range(4)]
        return -torch.stack(pairs).mean()

    check(method, make_view(), hidden, reference)
    assert (method.taps(START), len(method.heads)) == ((2, 5), 0)


def test_layersync_of_equal_blocks_is_minus_one_without_gradient(
    shape: BackboneShape, make_method: Callable[..., Method], make_view: Callable[..., StepView]
) -> None:
    """So it is at initialisation, when every gate is closed."""
    method, hidden = make_method(load("layersync"), block=2, target_block=5), hidden_states(shape)
    hidden[5] = hidden[2].detach().clone()
    value = method.terms(make_view(), hidden)["layersync"].value
    (gradient,) = torch.autograd.grad(value, [hidden[2]])
    assert float(value.detach()) == pytest.approx(-1, abs=1e-6)
    assert float(gradient.abs().max()) < 1e-7


@pytest.mark.parametrize(
    ("name", "pair"), [("SiT-S/2", (3, 7)), ("SiT-B/2", (3, 7)), ("SiT-L/2", (8, 18)), ("SiT-XL/2", (8, 16))]
)
def test_layersync_blocks_by_size(shape_of: Callable[[str], BackboneShape], name: str, pair: tuple[int, int]) -> None:
    resolved = load("layersync").resolve(load("layersync").Config(), shape_of(name))
    assert (resolved.block, resolved.target_block) == pair


@pytest.mark.parametrize(("block", "target_block"), [(8, 8), (9, 8)])
def test_layersync_refuses_a_target_that_is_not_later(
    shape_of: Callable[[str], BackboneShape], block: int, target_block: int
) -> None:
    config = load("layersync").Config(block=block, target_block=target_block)
    with pytest.raises(UserError, match=rf"layersync\.target_block is {target_block}.*which is {block}"):
        load("layersync").resolve(config, shape_of("SiT-XL/2"))


# -- deep supervision -----------------------------------------------------------------------------------------------


def test_deep_supervision_against_loops(
    shape: BackboneShape, make_method: Callable[..., Method], make_view: Callable[..., StepView]
) -> None:
    """Images 1 and 2 lie in the window, its border included; the mean is over all four."""
    method, hidden = make_method(load("deep_supervision"), block=2, head_width=20), hidden_states(shape)
    view = make_view(t_N=torch.tensor([0.39, 0.4, 0.65, 0.71]))
    layers = [value.double() for value in method.heads["velocity"].parameters()]

    def reference() -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for n in (1, 2):
            x_TD = hidden[2][n].double()
            for number in (0, 2, 4):
                x_TD = x_TD @ layers[number].T + layers[number + 1]
                x_TD = x_TD / (1 + torch.exp(-x_TD)) if number < 4 else x_TD
            mean, variance = x_TD.mean(1, keepdim=True), x_TD.var(1, keepdim=True, unbiased=False)
            predicted_TP = (x_TD - mean) / (variance + 1e-6).sqrt() @ layers[6].T + layers[7]
            velocity_CHW = (view.noise_NCHW[n] - view.x0_NCHW[n]).double()
            target_TP = torch.stack(
                [
                    torch.stack([velocity_CHW[c, i + a, j + b] for a in (0, 1) for b in (0, 1) for c in range(3)])
                    for i in (0, 2)
                    for j in (0, 2)
                ]
            )
            total = total + (predicted_TP - target_TP).square().mean()
        return total / 4

    check(method, view, hidden, reference)
    assert method.taps(START) == (2,)


@pytest.mark.parametrize(("t_min", "t_max"), [(0.7, 0.4), (-0.1, 0.5), (0.5, 1.1)])
def test_deep_supervision_refuses_a_window_that_is_none(t_min: float, t_max: float) -> None:
    with pytest.raises(UserError, match=r"deep_supervision\.t_min"):
        load("deep_supervision").Config(t_min=t_min, t_max=t_max)
