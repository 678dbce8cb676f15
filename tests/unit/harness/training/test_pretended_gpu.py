"""What a run does on a GPU, as far as a machine without one can tell.

Tensors without numbers are on `cuda` here: every operation says where its result is and of which type, and refuses
tensors of two devices. Not seen are what a GPU computes, how fast, and the backward pass, which torch starts on a real
device alone: gradients are put where the weights are. For one run of this on a real GPU there is no substitute.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import fields, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import methods
from harness import sampler
from harness.data.batches import Batch
from harness.evaluation.evaluate import velocity_errors
from harness.evaluation.generate import generate_latents
from harness.training import step
from harness.training.step import Run, set_up, train_step
from tests.bench_setting import Bench

GPU = torch.device("cuda", 0)
NAMES = (*methods.names(), "repa+vae_repa")
PRODUCTS = {torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.convolution}
"""Linear layers and patches. Without a device torch takes attention apart, and not as it would on one."""
ACCELERATOR: Any = SimpleNamespace(
    device=GPU, process_index=0, num_processes=1, prepare_model=lambda module: module, no_sync=contextlib.nullcontext
)


def moved(module: nn.Module, device: torch.device) -> nn.Module:
    """As `Module.to`, which cannot move parameters without numbers."""
    for part in module.modules():
        for name, value in part._parameters.items():
            if value is not None:
                part._parameters[name] = nn.Parameter(value.detach().to(device), requires_grad=value.requires_grad)
        for name, buffer in part._buffers.items():
            part._buffers[name] = None if buffer is None else buffer.to(device)
    return module


@contextlib.contextmanager
def pretended_gpu(real: Run) -> Iterator[FakeTensorMode]:
    """`real` is the run on the CPU: what needs numbers, its digest and its cost, is taken from it."""
    with pytest.MonkeyPatch.context() as patched, FakeTensorMode() as mode:
        patched.setattr(torch.cuda, "is_available", lambda: True)  # autocast asks
        patched.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
        patched.setattr(step, "weights_digest", lambda backbone: real.initial_weights)
        patched.setattr(step, "step_cost", lambda passes, method: real.cost)
        patched.setattr(nn.Module, "to", moved)
        patched.setattr(torch.cuda, "synchronize", lambda device: None)
        patched.setattr(FakeTensorMode, "__deepcopy__", lambda mode, memo: mode, raising=False)  # for the EMA
        yield mode


def without_numbers(batch: Batch, mode: FakeTensorMode) -> Batch:
    """A batch in the memory of the CPU."""
    known: dict[str, Any] = {each.name: getattr(batch, each.name) for each in fields(batch)}
    plain = {name: mode.from_tensor(value) for name, value in known.items() if isinstance(value, Tensor)}
    return replace(batch, tokens={name: mode.from_tensor(value) for name, value in batch.tokens.items()}, **plain)


def backward(run: Run) -> None:
    """Gradients of every weight that is trained, where the weight is."""
    for weight in run.module.parameters():
        if weight.requires_grad:
            weight.grad = torch.empty_like(weight)


class Products(TorchDispatchMode):
    """Types of the factors of products."""

    def __init__(self) -> None:
        super().__init__()
        self.types: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in PRODUCTS:
            self.types |= {factor.dtype for factor in args[:3] if isinstance(factor, Tensor)}
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("micro_batch", [0, 8])
@pytest.mark.parametrize("name", NAMES)
def test_a_training_step(bench: Bench, monkeypatch: pytest.MonkeyPatch, name: str, micro_batch: int) -> None:
    """It stays on the GPU, multiplies in bf16, updates by the fused AdamW, and never asks for a number: that raises."""
    config = bench.config(name, "--optimizer.micro_batch", str(micro_batch), precision="bf16")
    real = bench.start(config)
    batch = bench.batch(real)
    with pretended_gpu(real) as mode, Products() as products:
        run = set_up(config, methods.build(config, bench.lab.shape, bench.lab.data), bench.lab.prepared, ACCELERATOR)
        monkeypatch.setattr(Tensor, "backward", lambda loss: backward(run))
        train_step(run, without_numbers(batch, mode))
    trained = [weight for weight in run.module.parameters() if weight.requires_grad]
    moments = [value for state in run.optimizer.state.values() for value in state.values()]
    losses = list(run.window._sums.values())
    everything = [*run.module.parameters(), *run.ema.backbone.parameters(), *moments, *losses, run.guard.stopped]
    assert {tensor.device for tensor in everything} == {GPU}
    assert products.types == {torch.bfloat16}
    assert {tensor.dtype for tensor in everything} == {torch.float32}, "weights, moments and losses keep their digits"
    assert run.optimizer.defaults["fused"] and len(moments) == 3 * len(trained)
    assert run.optimizer.found_inf is run.guard.stopped  # type: ignore[attr-defined]


def test_what_a_step_may_not_do_is_found(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the test above relies on: asking for a number, which waits for a GPU, and tensors of two devices."""
    config = bench.config("sit", precision="bf16")
    real = bench.start(config)
    batch = bench.batch(real)
    with pretended_gpu(real) as mode:
        run = set_up(config, methods.build(config, bench.lab.shape, bench.lab.data), bench.lab.prepared, ACCELERATOR)
        monkeypatch.setattr(Tensor, "backward", lambda loss: loss.item())
        with pytest.raises(DataDependentOutputException):
            train_step(run, without_numbers(batch, mode))
        with pytest.raises(RuntimeError, match="two devices"):
            torch.zeros(2) + torch.zeros(2, device=GPU)


def test_samples_and_velocities(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    config = bench.config("sit", precision="bf16")
    evaluation = replace(bench.lab.config.evaluation, precision="bf16")
    steps = sampler.times(evaluation.sampler)
    monkeypatch.setattr(sampler, "times", lambda config: steps)
    with pretended_gpu(bench.start(config)), Products() as products:
        run = set_up(config, methods.build(config, bench.lab.shape, bench.lab.data), bench.lab.prepared, ACCELERATOR)
        [(_, latents)] = generate_latents(run.ema.backbone, evaluation, 5, GPU, [0])
        assert latents.device == GPU and latents.dtype == torch.float64
        num, bins, shape = 3, 4, latents.shape[1:]
        x0, noise, t = torch.empty(num, *shape), torch.empty(num, bins, *shape), torch.empty(num, bins)
        labels = torch.empty(num, dtype=torch.int64)
        errors = velocity_errors(run.ema.backbone, x0, labels, t, noise, precision="bf16", device=GPU)
    assert errors.shape == (num, bins) and errors.device.type == "cpu"
    assert products.types == {torch.bfloat16}
