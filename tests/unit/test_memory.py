"""The memory estimate: counts against real models, a lower end of what autograd keeps, and what is refused in words."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import methods
from harness import memory
from harness.config import (
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    RuntimeConfig,
    SamplerConfig,
)
from harness.errors import UserError
from harness.fidelity import BATCH
from harness.method import BackboneShape, DataShape, Method
from harness.rng import global_state_kept
from harness.sit import SIZES, SiT, parse_name

CPU = torch.device("cpu")
GB = 10**9


def shape_of(name: str, input_size: int = 8) -> BackboneShape:
    """Latents of the digits: 4 channels, 10 classes."""
    size = name.removeprefix("SiT-").split("/")[0]
    return BackboneShape(size=size, input_size=input_size, in_channels=4, num_classes=10, **parse_name(name))


def run_of(name: str = "SiT-nano/2", precision: str = "fp32", **sections: Any) -> RunConfig:
    """A config as it is resolved before a run."""
    config = RunConfig(
        model=ModelConfig(name=name),
        data=DataConfig(name="digits", image_size=32),
        optimizer=OptimizerConfig(batch_size=32),
        evaluation=EvaluationConfig(num_samples=898, precision="fp32"),
        runtime=RuntimeConfig(device="cpu", precision=precision, threads=1),  # type: ignore[arg-type]
    )
    return replace(config, **sections)


def method_of(shape: BackboneShape, name: str = "sit", **fields: Any) -> Method:
    cls = methods.load(name)
    data = DataShape(image_size=32, num_classes=10, encoder_width=lambda encoder: 1408)
    config = cls.resolve(cls.Config(**fields), shape)
    with global_state_kept():
        return memory.outline(name, lambda: cls(config, shape, data))


def bytes_of(parts: Any) -> dict[str, int]:
    return {part.name: part.num_bytes for part in parts}


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """`free(n)`: from here on, n bytes of RAM are free."""
    return lambda num_bytes: monkeypatch.setattr(memory, "free_ram", lambda: num_bytes)


# -- what is counted ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [f"SiT-{size}/2" for size in SIZES])
def test_parameters_of_every_size(name: str) -> None:
    shape = shape_of(name)
    with torch.device("meta"), global_state_kept():
        fields = {key: value for key, value in vars(shape).items() if key != "size"}
        model = SiT(**fields)
    assert memory.backbone_parameters(shape) == sum(p.numel() for p in model.parameters() if p.requires_grad)


def kept_bytes(model: SiT, images: int, precision: str) -> int:
    """Bytes of all storages that autograd keeps for the backward pass of one forward pass, weights apart."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(images, 4, model.input_size, model.input_size, generator=generator)
    saved = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with saved, torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        output = model(x, torch.rand(images, generator=generator), torch.zeros(images, dtype=torch.int64))
    assert output[0].requires_grad
    return sum(kept.values())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("name", "side", "images"), [("SiT-pico/2", 8, 64), ("SiT-nano/2", 32, 2), ("SiT-S/2", 16, 2)])
def test_activations_are_a_close_lower_end(name: str, side: int, images: int, precision: str) -> None:
    shape = shape_of(name, side)
    with global_state_kept():
        model = SiT(**{key: value for key, value in vars(shape).items() if key != "size"})
    config = run_of(name, precision, optimizer=OptimizerConfig(batch_size=images))
    parts = bytes_of(memory.training_parts(config, method_of(shape), 1))
    copies = 2 * memory.backbone_parameters(shape) if precision == "bf16" else 0  # autocast's; counted with the weights
    estimate, kept = parts["activations of a forward pass"], kept_bytes(model, images, precision) - copies
    assert 0.85 * kept <= estimate <= kept


def test_weights_of_a_run_by_hand() -> None:
    shape = shape_of("SiT-nano/2")
    method = method_of(shape, "vae_repa", head_layers=2, head_width=64)
    heads = (128 + 1) * 64 + (64 + 1) * 16
    config = run_of(method="vae_repa")
    parts = bytes_of(memory.weight_parts(config, method))
    assert parts == {"weights and moments": 20 * memory.backbone_parameters(shape), "the method's heads": 16 * heads}
    half = bytes_of(memory.weight_parts(run_of(precision="bf16"), method))
    assert half["weights and moments"] == 22 * memory.backbone_parameters(shape)


def test_a_step_by_hand() -> None:
    """Batch 64 in two processes, micro-batches of 8: a token has 6 blocks x 20 x 128 numbers, a latent 256."""
    shape = shape_of("SiT-nano/2")
    config = run_of(optimizer=OptimizerConfig(batch_size=64, micro_batch=8))
    parts = bytes_of(memory.training_parts(config, method_of(shape), 2))
    assert parts == {
        "activations of a forward pass": 8 * 16 * 6 * 20 * 128 * 4,
        "draws and latents of two batches": 4 * (3 * 64 + 4 * 32) * 256,
    }
    whole = bytes_of(
        memory.training_parts(replace(config, optimizer=OptimizerConfig(batch_size=64)), method_of(shape), 2)
    )
    assert whole["activations of a forward pass"] == 4 * parts["activations of a forward pass"]


def test_heads_and_tokens_of_a_step_by_hand() -> None:
    """REPA keeps the inputs of its three layers (128 + 64 + 64 numbers a token) and reads 1408 float16 a token."""
    shape = shape_of("SiT-nano/2")
    bare = bytes_of(memory.training_parts(run_of(), method_of(shape), 1))
    repa = bytes_of(memory.training_parts(run_of(), method_of(shape, "repa", head_width=64), 1))
    more = {name: repa[name] - bare[name] for name in repa}
    assert more == {
        "activations of a forward pass": 32 * 16 * 256 * 4,
        "draws and latents of two batches": 2 * 32 * 16 * 1408 * 2,
    }


def test_an_evaluation_by_hand() -> None:
    shape = shape_of("SiT-nano/2")
    sampler = SamplerConfig(num_steps=50, cfg_scale=1.5)
    evaluation = EvaluationConfig(num_samples=100, chunk=64, precision="fp32", extractor_size=64, sampler=sampler)
    assert bytes_of(memory.evaluation_parts(run_of(evaluation=evaluation), shape)) == {
        "samples": 100 * 3 * 32 * 32,
        "passes of a chunk": 2 * 64 * (16 * 128 * 36 + 8 * 256),  # guidance doubles the chunk
        "resized images": 2 * 32 * 3 * 64 * 64 * 4,
        "the sampler's times": 50 * 32,
    }
    assert memory.EXTRACTED == BATCH


# -- what is refused ------------------------------------------------------------------------------------------------


def test_what_fits_is_not_refused(free: Callable[[int], None]) -> None:
    """The embedded preset runs in 1.4 GB, libraries included."""
    free(GB)
    memory.check_run(run_of(), method_of(shape_of("SiT-nano/2")), 1, CPU)
    memory.check_images(1797, 32)


@pytest.mark.parametrize(
    ("sections", "model", "message"),
    [
        ({"optimizer": OptimizerConfig(batch_size=2**63 - 1)}, "SiT-nano/2", "lower optimizer.micro_batch"),
        (
            {"optimizer": OptimizerConfig(batch_size=2**63 - 1, micro_batch=1)},
            "SiT-nano/2",
            "lower optimizer.batch_size",
        ),
        ({}, "SiT-XL/2", "weights and moments take 13.5 GB: choose a smaller model.name"),
        ({"evaluation": EvaluationConfig(num_samples=10**7, chunk=1)}, "SiT-nano/2", "lower evaluation.num_samples"),
        ({"evaluation": EvaluationConfig(num_samples=10**5, chunk=10**5)}, "SiT-nano/2", "lower evaluation.chunk"),
        ({"evaluation": EvaluationConfig(extractor_size=2**31)}, "SiT-nano/2", "lower evaluation.extractor_size"),
        (
            {"evaluation": EvaluationConfig(sampler=SamplerConfig(num_steps=2**62))},
            "SiT-nano/2",
            "the sampler's times take more than 1000 TB: lower evaluation.sampler.num_steps",
        ),
    ],
)
def test_what_does_not_fit_names_the_setting(
    free: Callable[[int], None], sections: dict[str, Any], model: str, message: str
) -> None:
    free(2 * GB)
    with pytest.raises(
        UserError, match=r"^not enough memory: at least .* of RAM are needed and 2.0 GB are free; "
    ) as caught:
        memory.check_run(run_of(model, **sections), method_of(shape_of(model)), 1, CPU)
    assert message in str(caught.value)


def test_an_accelerator_has_a_memory_of_its_own(free: Callable[[int], None], monkeypatch: pytest.MonkeyPatch) -> None:
    free(2 * GB)
    monkeypatch.setattr(memory, "free_on_device", lambda device: 3 * GB)
    here = memory.Part(name="samples", num_bytes=2 * GB, way_out="lower a")
    there = memory.Part(name="weights", num_bytes=3 * GB, way_out="lower b", on_device=True)
    device = torch.device("cuda")
    memory.check([here, there], device)
    with pytest.raises(
        UserError, match=r"4\.0 GB of RAM are needed and 2\.0 GB are free; samples take 2\.0 GB: lower a$"
    ):
        memory.check([here, here, there], device)
    with pytest.raises(
        UserError, match=r"6\.0 GB of cuda are needed and 3\.0 GB are free; weights take 3\.0 GB: lower b$"
    ):
        memory.check([here, there, there], device)
    with pytest.raises(UserError, match=r"5\.0 GB of RAM are needed"):
        memory.check([here, there], CPU)


def test_heads_are_part_of_the_run(free: Callable[[int], None]) -> None:
    free(2 * GB)
    method = method_of(shape_of("SiT-nano/2"), "vae_repa", head_width=2**14)
    with pytest.raises(UserError, match=r"the method's heads take 12\.9 GB: lower the sizes in section vae_repa"):
        memory.check_run(run_of(method="vae_repa"), method, 1, CPU)


def test_sizes_without_an_index_are_refused() -> None:
    with pytest.raises(
        UserError, match=r"^heads of vae_repa cannot be built \(.*\): lower the sizes in section vae_repa$"
    ):
        method_of(shape_of("SiT-nano/2"), "vae_repa", head_width=2**40)


@pytest.mark.parametrize("error", [RuntimeError("no such head"), TypeError("unexpected keyword argument 'width'")])
def test_a_fault_of_a_method_is_no_matter_of_sizes(error: Exception) -> None:
    def build() -> Method:
        raise error

    with pytest.raises(type(error), match=str(error)):
        memory.outline("faulty", build)


def test_an_outline_holds_no_numbers() -> None:
    heads = method_of(shape_of("SiT-nano/2"), "vae_repa", head_width=2**20, head_layers=3).heads
    assert all(p.is_meta for p in heads.parameters())
    assert max(m.in_features for m in heads.modules() if isinstance(m, nn.Linear)) == 2**20


def test_images_that_do_not_fit(free: Callable[[int], None]) -> None:
    free(23 * GB)
    with pytest.raises(
        UserError, match=r"30\.1 GB of RAM are needed and 23\.0 GB are free; .*: lower data\.image_size$"
    ):
        memory.check_images(1797, 2048)


# -- what there is --------------------------------------------------------------------------------------------------


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_without_a_limit_the_system_has_the_word(tmp_path: Path) -> None:
    write(tmp_path / "proc/meminfo", "MemTotal: 900 kB\nMemAvailable:   700 kB\n")
    assert memory.free_ram(tmp_path) == 700 * 1024
    write(tmp_path / "proc/self/cgroup", "0::/a\n")
    write(tmp_path / "sys/fs/cgroup/a/memory.max", "max\n")
    write(tmp_path / "sys/fs/cgroup/a/memory.current", "100\n")
    assert memory.free_ram(tmp_path) == 700 * 1024


def test_the_tightest_group_counts_without_its_page_cache(tmp_path: Path) -> None:
    write(tmp_path / "proc/meminfo", "MemAvailable: 700 kB\n")
    write(tmp_path / "proc/self/cgroup", "0::/a/b\n")
    for group, limit in (("a", 9000), ("a/b", 20000)):
        write(tmp_path / f"sys/fs/cgroup/{group}/memory.max", f"{limit}\n")
        write(tmp_path / f"sys/fs/cgroup/{group}/memory.current", "5000\n")
        write(tmp_path / f"sys/fs/cgroup/{group}/memory.stat", "anon 3000\nfile 2000\n")
    assert memory.free_ram(tmp_path) == 9000 - 5000 + 2000


def test_the_first_version_of_groups_mounted_in_a_container(tmp_path: Path) -> None:
    write(tmp_path / "proc/meminfo", "MemAvailable: 700 kB\n")
    write(tmp_path / "proc/self/cgroup", "5:cpu:/c\n4:memory:/outside/name\n0::/\n")
    write(tmp_path / "sys/fs/cgroup/memory/memory.limit_in_bytes", "8000\n")
    write(tmp_path / "sys/fs/cgroup/memory/memory.usage_in_bytes", "5000\n")
    write(tmp_path / "sys/fs/cgroup/memory/memory.stat", "cache 1\ntotal_cache 1000\n")
    assert memory.free_ram(tmp_path) == 4000


def test_this_machine_has_memory() -> None:
    assert 2**27 < memory.free_ram() < 2**50
