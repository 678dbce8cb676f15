"""The rule book of `harness/method.py`, held against every discovered method and a sum."""

import random
import subprocess
import sys
from dataclasses import fields, is_dataclass

import numpy as np
import pytest
import torch

import methods
from harness.training.step import Run, forward_losses, gradient_norms, step_views
from tests.bench_setting import Bench
from tests.contract.conftest import CONTROL, SUM

STEPS = 4


def assert_same_weights(run: Run, control: Run) -> None:
    for name, value in control.backbone.state_dict().items():
        assert torch.equal(value, run.backbone.state_dict()[name]), name
    for name, value in control.ema.backbone.state_dict().items():
        assert torch.equal(value, run.ema.backbone.state_dict()[name]), f"ema {name}"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_weight_zero_leaves_the_backbone_bitwise_equal_to_vanilla(
    bench: Bench, method_name: str, precision: str
) -> None:
    control, run = bench.run(CONTROL, precision=precision), bench.run(method_name, zeroed=True, precision=precision)
    start = {name: value.clone() for name, value in run.backbone.state_dict().items()}

    bench.train(control, STEPS)
    bench.train(run, STEPS)

    assert any(not torch.equal(value, run.backbone.state_dict()[name]) for name, value in start.items())
    norm = control.window.take()["grad_norm"]
    assert norm > control.config.optimizer.clip_norm, "clipping was not active, so the contract was not tested"
    assert_same_weights(run, control)


def test_a_weight_that_is_not_zero_changes_the_backbone(bench: Bench, method_name: str) -> None:
    """The contract above could not fail if terms never reached the backbone."""
    if method_name == CONTROL:
        return
    control, run = bench.run(CONTROL), bench.run(method_name)
    bench.train(control, STEPS)
    bench.train(run, STEPS)
    values = control.backbone.state_dict()
    assert any(not torch.equal(values[name], value) for name, value in run.backbone.state_dict().items())


@pytest.mark.slow
def test_weight_zero_holds_once_compiled(bench: Bench) -> None:
    """Also where activations are checkpointed, which changes no bit either way."""
    control = bench.run(CONTROL, compile=True)
    run = bench.run("vae_repa", zeroed=True, compile=True, checkpoint_activations=True)
    bench.train(control, 2)
    bench.train(run, 2)
    assert_same_weights(run, control)
    # Several backward passes through one graph, as at an evaluation; the weights being equal, so is this gradient.
    norms = gradient_norms(run, bench.batch(run))
    assert norms["velocity"] == gradient_norms(control, bench.batch(control))["velocity"] > 0
    assert len(norms) > 1


def test_initial_weights_and_batch_trace_are_equal_across_methods(bench: Bench, method_name: str) -> None:
    control, run = bench.run(CONTROL), bench.run(method_name)
    assert run.initial_weights == control.initial_weights
    assert bench.train(run, STEPS) == bench.train(control, STEPS)


def test_global_random_state_is_untouched(bench: Bench, method_name: str) -> None:
    torch.manual_seed(5)
    np.random.seed(5)
    random.seed(5)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()

    run = bench.run(method_name)
    bench.train(run, 2)
    view = step_views(run, bench.batch(run))[0]
    _, _, hidden = forward_losses(run.module, run, view)
    run.method.diagnostics(view, hidden)

    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]
    assert random.getstate() == before[2]


def test_the_methods_taps_do_not_change_the_output(bench: Bench, method_name: str) -> None:
    run = bench.run(method_name)
    bench.train(run, 2)
    view = step_views(run, bench.batch(run))[0]
    taps = run.method.taps(view.progress)
    with torch.no_grad():
        plain, nothing = run.backbone(view.xt_NCHW, view.t_N, view.labels_N)
        tapped, hidden = run.backbone(view.xt_NCHW, view.t_N, view.labels_N, taps=taps)
        assert torch.equal(plain, tapped)
        assert not nothing
        for block in taps:
            assert torch.equal(hidden[block], run.backbone.hidden(view.xt_NCHW, view.t_N, view.labels_N, block))


def test_terms_are_float32_means_over_images(bench: Bench, method_name: str) -> None:
    """Splitting a batch must not change a term: the mean of two halves' terms is the whole batch's term."""
    run = bench.run(method_name)
    bench.train(run, 2)
    batch = bench.batch(run)
    halves_run = bench.run(method_name)
    halves_run.module.load_state_dict(run.module.state_dict())
    halves_run.ema.backbone.load_state_dict(run.ema.backbone.state_dict())
    object.__setattr__(halves_run.config.optimizer, "micro_batch", len(batch) // 2)

    whole = forward_losses(run.module, run, step_views(run, batch)[0])[1]
    halves = [forward_losses(halves_run.module, halves_run, view)[1] for view in step_views(halves_run, batch)]

    assert len(halves) == 2
    for name, term in whole.items():
        assert term.value.dtype == torch.float32
        assert term.value.ndim == 0
        mean = sum(half[name].value for half in halves) / 2
        torch.testing.assert_close(mean, term.value, rtol=1e-5, atol=1e-6)


def test_the_teacher_and_the_targets_get_no_gradient(bench: Bench, method_name: str) -> None:
    run = bench.run(method_name)
    bench.train(run, 1)
    assert all(p.grad is None and not p.requires_grad for p in run.ema.backbone.parameters())


def test_declarations_are_complete(bench: Bench, method_name: str) -> None:
    run = bench.run(method_name)
    disclosure = run.method.disclosure
    assert disclosure.summary
    assert disclosure.paper
    if "+" in method_name:
        return
    config = methods.load(method_name).Config
    assert is_dataclass(config)
    assert set(run.method.search_space()) <= {field.name for field in fields(config)}
    needs = run.method.needs()
    assert bool(needs.encoders) <= bool(disclosure.pretrained), "a frozen encoder must be disclosed"


def test_a_sum_equals_the_sum_of_its_parts(bench: Bench) -> None:
    """Union of terms, the parts' own values and weights, and heads with the weights they have alone."""
    whole = bench.run(SUM)
    batch = bench.batch(whole)
    terms = forward_losses(whole.module, whole, step_views(whole, batch)[0])[1]
    total = sum(term.weight * term.value for term in terms.values())
    parts = {}
    for name in SUM.split("+"):
        part = bench.run(name)
        own = forward_losses(part.module, part, step_views(part, batch)[0])[1]
        parts |= own
        for key, value in part.method.heads.state_dict().items():
            assert torch.equal(value, whole.method.heads.state_dict()[f"{name}.{key}"]), key
    assert terms.keys() == parts.keys()
    for key, term in parts.items():
        assert torch.equal(term.value, terms[key].value)
        assert term.weight == terms[key].weight
    torch.testing.assert_close(total, sum(term.weight * term.value for term in parts.values()), rtol=0, atol=0)


def test_evaluation_imports_no_method() -> None:
    code = (
        "import sys, harness.evaluation.evaluate, harness.evaluation.generate\n"
        "assert not [name for name in sys.modules if name.split('.')[0] == 'methods'], 'a method was imported'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
