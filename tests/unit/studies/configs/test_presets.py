"""The shipped ImageNet presets: the papers' settings, and blocks and weights as every method's own file gives them."""

import functools
from typing import Any

import pytest
import yaml

from harness.config import RunConfig
from studies import cli
from studies.configs.cells import comparison
from studies.configs.sections import nominal_shape, resolve_sections
from studies.configs.settings import PRESETS, build_parser, parse

NAMES = ("imagenet256-b2", "imagenet256-l2", "imagenet256-xl2", "imagenet256-xl2-cfg")
XL = {"repa": (8, 0.5), "sra": (8, 20, 0.2), "vae_repa": (8, 1.0)}
PUBLISHED = {
    "imagenet256-b2": ("SiT-B/2", {"repa": (4, 0.5), "sra": (3, 8, 0.2), "vae_repa": (2, 1.0)}),
    "imagenet256-l2": ("SiT-L/2", {"repa": (8, 0.5), "sra": (6, 16, 0.2), "vae_repa": (8, 1.0)}),
    "imagenet256-xl2": ("SiT-XL/2", XL),
    "imagenet256-xl2-cfg": ("SiT-XL/2", XL),
}
"""Model, and block (for SRA student's and teacher's) and weight of each method: methods.md section 7."""


@functools.cache
def cells(name: str) -> dict[str, RunConfig]:
    """The cells of a preset by their method, size defaults filled in."""
    parser = build_parser("compare", "")
    found = comparison(parser, parse(parser, ["--config", name]))
    assert found.seeds == (0,) and found.baseline == "sit"
    return {cell.method: resolve_sections(cell, nominal_shape(cell)) for cell in found.cells}


def values(name: str) -> dict[str, Any]:
    return yaml.safe_load((PRESETS / f"{name}.yaml").read_text())


@pytest.mark.parametrize("name", NAMES)
def test_blocks_and_weights_are_the_papers(name: str) -> None:
    model, published = PUBLISHED[name]
    found = cells(name)
    assert list(found) == ["sit", "repa", "sra", "vae_repa"]
    assert {cell.model.name for cell in found.values()} == {model}
    settings = {method: cell.sections[method] for method, cell in found.items()}
    repa, sra, vae_repa = (settings[method] for method in published)
    assert (repa.block, repa.weight) == published["repa"]
    assert (sra.block, sra.teacher_block, sra.weight) == published["sra"]
    assert (vae_repa.block, vae_repa.weight) == published["vae_repa"]
    assert (repa.encoders, repa.head_width) == ("dinov2_vitb14", 2048)


@pytest.mark.parametrize("name", NAMES)
def test_methods_are_named_and_not_set(name: str) -> None:
    sections = {key: value for key, value in values(name).items() if key in ("sit", "repa", "sra", "vae_repa")}
    assert sections == {"repa": {"encoders": "dinov2_vitb14"}}


@pytest.mark.parametrize("name", NAMES)
def test_shared_settings_are_the_papers(name: str) -> None:
    """methods.md sections 1 and 8."""
    config = cells(name)["sit"]
    optimizer = config.optimizer
    assert (optimizer.lr, optimizer.beta1, optimizer.beta2, optimizer.eps) == (1e-4, 0.9, 0.999, 1e-8)
    assert (optimizer.weight_decay, optimizer.clip_norm, optimizer.batch_size) == (0, 1.0, 256)
    assert optimizer.label_drop == 0.1
    assert (config.ema.decay, config.ema.warmup) == (0.9999, 0)
    assert (config.runtime.precision, config.evaluation.precision) == ("bf16", "bf16")
    assert (config.data.image_size, config.data.flip, config.model.qk_norm) == (256, False, False)
    assert config.autoencoder.path == "stabilityai/sd-vae-ft-ema"
    steps = 4_000_000 if name.endswith("cfg") else 400_000
    assert (config.budget.unit, config.budget.amount) == ("steps", steps)


@pytest.mark.parametrize("name", NAMES)
def test_the_two_protocols(name: str) -> None:
    protocols = cells(name)["sit"].protocols
    curve, final = protocols["evaluation"], protocols["final"]
    assert (curve.num_samples, curve.sampler.kind, curve.sampler.num_steps) == (5_000, "ode-euler", 50)
    assert (final.num_samples, final.sampler.kind, final.sampler.num_steps) == (50_000, "sde-euler-maruyama", 250)
    assert curve.sampler.cfg_scale == 1
    guided = (final.sampler.cfg_scale, final.sampler.guidance_low, final.sampler.guidance_high)
    # REPA and SRA: scale 1.8 in [0, 0.7] (methods.md section 1).
    assert guided == (1.8, 0.0, 0.7) if name.endswith("cfg") else final.sampler.cfg_scale == 1
    assert curve.extractor == final.extractor == "inception"
    assert curve.reference == "imagenet/VIRTUAL_imagenet256_labeled.npz"
    # Held-out images are scored in the subsets of the kernel distance too.
    assert curve.kid_subset <= int(1_281_167 * cells(name)["sit"].data.holdout) == 5_124


def test_presets_differ_in_size_and_guidance_alone() -> None:
    """Four whole files: what they share must not drift apart."""
    first = values(NAMES[0])
    for name in NAMES[1:]:
        other = values(name)
        assert other.keys() == first.keys()
        changed = {key for key in first if other[key] != first[key]}
        assert changed <= {"study", "model", "optimizer", "budget", "final"}
        assert {**other["optimizer"], "micro_batch": 0} == {**first["optimizer"], "micro_batch": 0}
        assert other["study"] == name
    plain, guided = values("imagenet256-xl2"), values("imagenet256-xl2-cfg")
    assert {key for key in plain if plain[key] != guided[key]} == {"study", "budget", "final"}
    added = {"cfg_scale": 1.8, "guidance_low": 0.0, "guidance_high": 0.7}
    assert guided["final"]["sampler"] == {**plain["final"]["sampler"], **added}


def test_a_printed_preset_names_its_blocks(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["compare", "--config", "imagenet256-l2", "--print_config"]) == 0
    printed = {cell["method"]: cell for cell in yaml.safe_load_all(capsys.readouterr().out)}
    assert printed["sra"]["sra"]["block"] == 6 and printed["sra"]["sra"]["teacher_block"] == 16
    assert printed["repa"]["repa"]["block"] == printed["vae_repa"]["vae_repa"]["block"] == 8
    assert printed["sit"]["final"]["num_samples"] == 50_000
