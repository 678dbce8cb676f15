"""Every check of the config names its field and the way out; evaluation points by hand; what the digest covers."""

import dataclasses
import math
from typing import Any

import pytest

from harness.config import (
    AutoencoderConfig,
    BudgetConfig,
    DataConfig,
    EmaConfig,
    EvaluationConfig,
    ModelConfig,
    OptimizerConfig,
    OutputConfig,
    RunConfig,
    RuntimeConfig,
    SamplerConfig,
    require,
    training_digest,
)
from harness.errors import UserError

DIGITS = DataConfig(name="digits")

REFUSED: list[tuple[type, dict[str, Any], str]] = [
    (DataConfig, {"name": "digits", "image_size": 7}, "data.image_size is 7: give 8 to 2048"),
    (DataConfig, {"name": "digits", "image_size": 2049}, "data.image_size is 2049: give 8 to 2048"),
    (DataConfig, {"name": "digits", "holdout": 0.0}, "data.holdout is 0.0: give a share above 0"),
    (DataConfig, {"name": "digits", "holdout": 1.0}, "data.holdout is 1.0"),
    (DataConfig, {"name": "digits", "holdout": math.nan}, "data.holdout is nan: give a finite number"),
    (DataConfig, {"name": "digits", "split_seed": -1}, "data.split_seed is -1: give 0 or more"),
    (DataConfig, {"name": "digits", "path": "images"}, "data.path has no meaning for digits"),
    (DataConfig, {"name": "imagefolder"}, "data.path is empty: name a folder"),
    (DataConfig, {"name": "preprocessed"}, "data.path is empty: name a folder that holds images and dataset.json"),
    (DataConfig, {"path": "a", "latents": "b"}, "data.latents has no meaning for imagefolder"),
    (DataConfig, {"name": "preprocessed", "path": "a", "latents": "a\nb"}, "data.latents is 'a\\nb'"),
    (
        DataConfig,
        {"name": "digits", "split_seed": 2**63},
        "data.split_seed is a number of 64 bits: give one of at most",
    ),
    (DataConfig, {"path": "a\nb"}, "data.path is 'a\\nb': a path holds no control characters"),
    (DataConfig, {"path": "a\x00b"}, "data.path is 'a\\x00b': a path holds no control characters"),
    (DataConfig, {"path": "x" * 256}, "data.path is 256 letters long: give a path of at most 4000 bytes"),
    (DataConfig, {"path": "é/" * 2000}, "data.path is 4000 letters long: give a path of at most 4000 bytes"),
    (AutoencoderConfig, {"path": "a\x1bb"}, "autoencoder.path is 'a\\x1bb'"),
    (
        OptimizerConfig,
        {"micro_batch": 10**400},
        "optimizer.micro_batch is a number of 1329 bits: give one of at most 63",
    ),
    (OptimizerConfig, {"lr": 0.0}, "optimizer.lr is 0.0: give a rate above 0"),
    (OptimizerConfig, {"lr": math.inf}, "optimizer.lr is inf: give a finite number"),
    (OptimizerConfig, {"beta1": 1.0}, "optimizer.beta1 is 1.0"),
    (OptimizerConfig, {"beta1": -0.1}, "optimizer.beta1 is -0.1"),
    (OptimizerConfig, {"beta2": 1.0}, "optimizer.beta2 is 1.0"),
    (OptimizerConfig, {"eps": -1e-9}, "optimizer.eps is -1e-09"),
    (OptimizerConfig, {"weight_decay": -0.1}, "optimizer.weight_decay is -0.1"),
    (OptimizerConfig, {"clip_norm": -1.0}, "optimizer.clip_norm is -1.0"),
    (OptimizerConfig, {"batch_size": 0}, "optimizer.batch_size is 0: give 1 or more images"),
    (OptimizerConfig, {"micro_batch": -1}, "optimizer.micro_batch is -1"),
    (OptimizerConfig, {"label_drop": 1.0}, "optimizer.label_drop is 1.0"),
    (OptimizerConfig, {"label_drop": -0.1}, "optimizer.label_drop is -0.1"),
    (EmaConfig, {"decay": 1.0}, "ema.decay is 1.0"),
    (EmaConfig, {"decay": math.nan}, "ema.decay is nan"),
    (EmaConfig, {"warmup": -1}, "ema.warmup is -1"),
    (BudgetConfig, {"unit": "train_gflops", "amount": 1e30}, "budget.amount is 1e+30: give at most 1e15 train_gflops"),
    (BudgetConfig, {"amount": 0}, "budget.amount is 0: give 1 or more steps"),
    (
        SamplerConfig,
        {"kind": "ode-rk4"},
        "sampler.kind is 'ode-rk4': give one of ode-euler, ode-heun, sde-eu",
    ),
    (SamplerConfig, {"kind": "ode-euler", "num_steps": 0}, "sampler.num_steps is 0: ode-euler needs 1"),
    (SamplerConfig, {"num_steps": 1}, "sampler.num_steps is 1: sde-euler-maruyama needs 2"),
    (SamplerConfig, {"cfg_scale": -1.0}, "sampler.cfg_scale is -1.0"),
    (SamplerConfig, {"cfg_scale": math.inf}, "sampler.cfg_scale is inf"),
    (SamplerConfig, {"guidance_low": 0.6, "guidance_high": 0.5}, "sampler.guidance_low 0.6"),
    (SamplerConfig, {"guidance_low": -0.1}, "sampler.guidance_low -0.1"),
    (SamplerConfig, {"guidance_high": 1.1}, "guidance_high 1.1"),
    *[
        (EvaluationConfig, {name: 0}, f"evaluation.{name} is 0: give 1 or more")
        for name in ("points", "chunk", "extractor_size", "kid_subset", "velocity_images", "grid_images")
    ],
    (EvaluationConfig, {"num_samples": -1}, "evaluation.num_samples is -1"),
    (EvaluationConfig, {"seed": -1}, "evaluation.seed is -1"),
    (EvaluationConfig, {"seed": 2**64}, "evaluation.seed is a number of 65 bits"),
    (EvaluationConfig, {"points": 10_001}, "evaluation.points is 10001: give 1 to 10000"),
    (RuntimeConfig, {"threads": -1}, "runtime.threads is -1: give 0 to 1024"),
    (RuntimeConfig, {"threads": 1025}, "runtime.threads is 1025"),
    (OutputConfig, {"cache": "\x7f"}, "output.cache is '\\x7f': a path holds no control characters"),
    (OutputConfig, {"mlflow_uri": "a\nb"}, "output.mlflow_uri holds control characters"),
    (OutputConfig, {"log_every": 2**63}, "output.log_every is a number of 64 bits"),
    (OutputConfig, {"runs": ""}, "output.runs is empty"),
    (OutputConfig, {"log_every": 0}, "output.log_every is 0"),
    (OutputConfig, {"checkpoint_every": -1}, "output.checkpoint_every is -1"),
    (OutputConfig, {"keep_checkpoints": 0}, "output.keep_checkpoints is 0"),
    (RunConfig, {"data": DIGITS, "study": ""}, "study is empty"),
    (RunConfig, {"data": DIGITS, "study": "a/b"}, "study is 'a/b'"),
    (RunConfig, {"data": DIGITS, "cell": "..\\up"}, "cell is "),
    (RunConfig, {"data": DIGITS, "cell": ".hidden"}, "cell is '.hidden'"),
    (RunConfig, {"data": DIGITS, "seed": -1}, "seed is -1"),
    (RunConfig, {"data": DIGITS, "seed": 2**63}, "seed is a number of 64 bits: give one of at most 63"),
]

ACCEPTED: list[tuple[type, dict[str, Any]]] = [
    (DataConfig, {"name": "digits", "image_size": 8}),
    (DataConfig, {"path": "images", "image_size": 2048}),
    (DataConfig, {"path": "/home/é/" + "x" * 255, "split_seed": 2**63 - 1}),
    (OptimizerConfig, {"beta1": 0.0, "clip_norm": 0.0, "label_drop": 0.0, "batch_size": 1}),
    (EmaConfig, {"decay": 0.0}),
    (SamplerConfig, {"kind": "ode-euler", "num_steps": 1, "cfg_scale": 0.0}),
    (SamplerConfig, {"num_steps": 2, "guidance_low": 0.5, "guidance_high": 0.5}),
]


@pytest.mark.parametrize(("section", "fields", "message"), REFUSED)
def test_bad_values_are_refused_in_one_line(section: type, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        section(**fields)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("section", "fields"), ACCEPTED)
def test_the_ends_of_each_range_are_accepted(section: type, fields: dict[str, Any]) -> None:
    built = section(**fields)
    assert all(getattr(built, name) == value for name, value in fields.items())


def test_user_errors_are_value_errors() -> None:
    with pytest.raises(ValueError, match="out of range"):
        require(False, "out of range")
    require(True, "not raised")


def test_sections_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        DIGITS.holdout = 0.1  # type: ignore[misc]


def test_label_is_the_cell_or_the_method() -> None:
    assert RunConfig(data=DIGITS, method="a+b").label == "a+b"
    assert RunConfig(data=DIGITS, method="a", cell="a,block=3").label == "a,block=3"


BASE = RunConfig(data=DIGITS)

SAME_DIGEST: list[dict[str, Any]] = [
    {"study": "other"},
    {"cell": "other"},
    {"method": "other"},
    {"seed": 1},
    {"sections": {"a": {"weight": 1}}},
    {"optimizer": OptimizerConfig(micro_batch=8)},
    {"runtime": RuntimeConfig(device="cpu", threads=2, checkpoint_activations=True)},
    {"output": OutputConfig(log_every=7)},
]

OTHER_DIGEST: list[dict[str, Any]] = [
    {"model": ModelConfig(name="SiT-S/2")},
    {"model": ModelConfig(qk_norm=True)},
    {"data": DataConfig(path="images")},
    {"data": DataConfig(name="digits", image_size=32)},
    {"data": DataConfig(name="digits", split_seed=1)},
    {"optimizer": OptimizerConfig(lr=2e-4)},
    {"optimizer": OptimizerConfig(batch_size=128)},
    {"optimizer": OptimizerConfig(clip_norm=0.0)},
    {"optimizer": OptimizerConfig(label_drop=0.2)},
    {"ema": EmaConfig(decay=0.99)},
    {"ema": EmaConfig(warmup=10)},
    {"budget": BudgetConfig(amount=10)},
    {"runtime": RuntimeConfig(precision="bf16")},
    {"runtime": RuntimeConfig(compile=True)},
    {"runtime": RuntimeConfig(tf32=False)},
]


@pytest.mark.parametrize("change", SAME_DIGEST)
def test_training_digest_ignores_what_may_differ(change: dict[str, Any]) -> None:
    assert training_digest(dataclasses.replace(BASE, **change)) == training_digest(BASE)


@pytest.mark.parametrize("change", OTHER_DIGEST)
def test_training_digest_sees_what_must_agree(change: dict[str, Any]) -> None:
    assert training_digest(dataclasses.replace(BASE, **change)) != training_digest(BASE)


def test_training_digest_ignores_where_the_images_lie() -> None:
    here, there = (dataclasses.replace(BASE, data=DataConfig(path=path)) for path in ("here", "there"))
    assert training_digest(here) == training_digest(there)


def test_training_digest_ignores_where_moments_lie_and_flips_that_are_off() -> None:
    """Settings without flips have the digest of a section without that field."""
    digest = training_digest(RunConfig(data=DataConfig(path="p")))
    assert digest == "d5c2112d81bc99ca09a20a4c86c05b288cc713613191b3cb4cc8e55c9ef1efaf"
    given = [DataConfig(name="preprocessed", path="a", latents=latents) for latents in ("b", "c")]
    first, second = (training_digest(RunConfig(data=data)) for data in given)
    assert first == second != training_digest(RunConfig(data=dataclasses.replace(given[0], flip=True)))
