"""The memory of a run: counts against real models and against what autograd really keeps, and refusals in words."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import methods
from harness.backbones.sit import SIZES, SiT
from harness.config import (
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    RuntimeConfig,
    SamplerConfig,
)
from harness.cost import memory
from harness.data.batches import AHEAD, THREADS
from harness.errors import UserError
from harness.evaluation.fidelity import BATCH
from harness.machine import ram
from harness.method import BackboneShape, DataShape, Method
from harness.rng import global_state_kept

CPU = torch.device("cpu")
GB = 10**9


def shape_of(name: str, input_size: int = 8) -> BackboneShape:
    """Latents of the digits: 4 channels, 10 classes."""
    return BackboneShape.of(name, input_size=input_size, in_channels=4, num_classes=10)


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
    return lambda num_bytes: monkeypatch.setattr(ram, "free_ram", lambda: num_bytes)


# -- what is counted ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [f"SiT-{size}/2" for size in SIZES])
def test_parameters_of_every_size(name: str) -> None:
    shape = shape_of(name)
    with torch.device("meta"), global_state_kept():
        model = SiT.of(shape)
    assert memory.backbone_parameters(shape) == sum(p.numel() for p in model.parameters() if p.requires_grad)


def kept_bytes(module: nn.Module, precision: str, run: Callable[[], Any]) -> int:
    """Bytes of all storages that autograd really keeps of what is run on the CPU, weights apart."""
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    saved = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with saved, torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        output = run()
    assert output.requires_grad
    weights = {p.untyped_storage().data_ptr() for p in module.parameters()}
    return sum(tensor.untyped_storage().nbytes() for key, tensor in kept.items() if key not in weights)


def backbone_of(shape: BackboneShape) -> SiT:
    with global_state_kept():
        return SiT.of(shape)


def inputs_of(shape: BackboneShape, images: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    latents = torch.ones(images, shape.in_channels, shape.input_size, shape.input_size)
    return latents, torch.ones(images), torch.zeros(images, dtype=torch.int64)


CASES = pytest.mark.parametrize(("name", "side", "images"), [("SiT-pico/2", 8, 5), ("SiT-nano/2", 32, 3)])
"""With short sequences, which may be attended to in another way, and with those of the papers."""


@CASES
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_activations_are_what_autograd_keeps(name: str, side: int, images: int, precision: str) -> None:
    """Worked out from one and two images and blocks, to the byte those of 3 and 5 images and of 4 and 6 blocks."""
    shape = shape_of(name, side)
    model = backbone_of(shape)
    config = run_of(name, precision)
    kept = kept_bytes(model, precision, lambda: model(*inputs_of(shape, images))[0])
    assert memory.backbone_activations(config, shape, images, shape.depth) == kept


@CASES
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_checkpointed_activations_are_the_blocks_inputs_and_one_inside(
    name: str, side: int, images: int, precision: str
) -> None:
    shape = shape_of(name, side)
    model = backbone_of(shape)
    config = run_of(name, precision)
    whole = kept_bytes(model, precision, lambda: model(*inputs_of(shape, images))[0])
    one_less = replace(shape, depth=shape.depth - 1)
    shorter = backbone_of(one_less)
    inside = whole - kept_bytes(shorter, precision, lambda: shorter(*inputs_of(one_less, images))[0])
    model.checkpoint_activations = True
    kept = kept_bytes(model, precision, lambda: model(*inputs_of(shape, images))[0])
    config = replace(config, runtime=replace(config.runtime, checkpoint_activations=True))
    assert memory.backbone_activations(config, shape, images, shape.depth) == kept + inside < whole


def test_counting_needs_no_device() -> None:
    """Tensors without numbers may lie on a GPU that is not there; blocks' inputs take as much on any device."""
    here = run_of().runtime
    there = replace(here, device="cuda")
    found = [memory.kept_bytes(shape_of("SiT-pico/2"), False, runtime, 2, True) for runtime in (here, there)]
    assert found[0] == found[1] > 0


@pytest.mark.parametrize(
    ("precision", "device", "numbers", "by_head"),
    [
        ("fp32", "cpu", 20 * 4, 4),
        ("bf16", "cpu", 6 * 4 + 14 * 2, 256 * (4 + 2)),
        ("fp32", "cuda", 20 * 4, 4),
        ("bf16", "cuda", 4 * 4 + 16 * 2, 4),
    ],
)
def test_activations_by_hand(precision: str, device: str, numbers: int, by_head: int) -> None:
    """A token in one block, in widths D:

    input and output of norm1                                        2, float32 under autocast as well
    input of qkv; q, k, v; output of attention; output of proj       6, q and k float32 in bf16 on a CPU
    input and output of norm2                                        2, float32 under autocast as well
    input of fc1; its output, before and after GELU; output of fc2  10

    and 4 bytes for each statistic of two norms; for each attention head the logarithm of its sum, in bf16 on a CPU its
    weights of all 256 tokens, in float32 and bf16; for each image the six parts of its modulation, two of them with 1
    added, and the input of its layer.
    """
    shape = shape_of("SiT-B/2", 32)
    config, size = run_of("SiT-B/2", precision), 4 if precision == "fp32" else 2
    config = replace(config, runtime=replace(config.runtime, device=device))
    depths = [memory.backbone_activations(config, shape, images, depth) for images in (2, 3) for depth in (7, 8)]
    block_of_image = depths[3] - depths[2] - depths[1] + depths[0]
    tokens, width, heads = 256, 768, 12
    by_token = numbers * width + by_head * heads + 4 * 2 * 2
    assert block_of_image == pytest.approx(tokens * by_token + 9 * width * size, rel=1e-3)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["repa", "sra", "vae_repa"])
def test_heads_keep_what_their_linear_layers_read_and_give(name: str, precision: str) -> None:
    """The last layer's output is kept by the loss."""
    shape = shape_of("SiT-nano/2")
    cls = methods.load(name)
    data = DataShape(image_size=32, num_classes=10, encoder_width=lambda encoder: 64)
    with global_state_kept():
        method = cls(cls.resolve(cls.Config(), shape), shape, data)
    (head,) = method.heads.values()
    hidden = torch.ones(4, shape.num_tokens, shape.hidden_size, requires_grad=True)
    kept, output = kept_bytes(head, precision, lambda: head(hidden)), head(hidden)
    copies = 2 * sum(p.numel() for p in head.parameters() if p.ndim > 1) if precision == "bf16" else 0
    by_loss = output.numel() * (2 if precision == "bf16" else 4)
    assert 4 * memory.head_activations(run_of(precision=precision), method) == kept - copies + by_loss


def test_weights_of_a_run_by_hand() -> None:
    """Weights, EMA and two moments; heads have no EMA."""
    shape = shape_of("SiT-nano/2")
    method = method_of(shape, "vae_repa", head_layers=2, head_width=64)
    heads = (128 + 1) * 64 + (64 + 1) * 16
    parts = bytes_of(memory.weight_parts(run_of(method="vae_repa"), method))
    backbone = memory.backbone_parameters(shape)
    assert parts == {"weights, moments and EMA": 16 * backbone, "the method's heads": 12 * heads}
    assert memory.head_parameters(method) == heads


def test_a_step_by_hand() -> None:
    """Batch 64 in two processes: an image has 256 latent numbers. Accumulated gradients lie beside all activations."""
    shape = shape_of("SiT-nano/2")
    gradients = 4 * memory.backbone_parameters(shape)
    config = run_of(optimizer=OptimizerConfig(batch_size=64, micro_batch=8))
    parts = bytes_of(memory.training_parts(config, method_of(shape), 2))
    assert parts == {
        "activations of a forward pass": memory.backbone_activations(config, shape, 8, 6),
        "gradients": 2 * gradients,  # theirs, and the buckets in which two processes add them up
        "batches made ahead": 4 * (5 * (64 + 2 * 32) + 2 * 64) * 256,
    }
    assert (memory.BATCHES, memory.DRAWN) == (AHEAD + 1, THREADS)
    whole = replace(config, optimizer=OptimizerConfig(batch_size=64))
    alone = bytes_of(memory.training_parts(whole, method_of(shape), 1))
    assert alone["activations of a forward pass"] == memory.backbone_activations(config, shape, 64, 6)
    assert alone["gradients"] == 0, "they come as activations go, of which there are more"


def test_gradients_that_outgrow_activations() -> None:
    """Of a wide backbone and one image: all of them at the end, or all but the first block's, and its inside."""
    shape = shape_of("SiT-S/2")
    gradients = 4 * memory.backbone_parameters(shape)
    one = run_of("SiT-S/2", optimizer=OptimizerConfig(batch_size=1))
    parts = bytes_of(memory.training_parts(one, method_of(shape), 1))
    assert parts["activations of a forward pass"] + parts["gradients"] == gradients
    many = run_of("SiT-S/2", optimizer=OptimizerConfig(batch_size=64))
    many = replace(many, runtime=replace(many.runtime, checkpoint_activations=True))
    parts = bytes_of(memory.training_parts(many, method_of(shape), 1))
    block = 4 * (18 * 384**2 + 15 * 384)
    first = memory.backbone_activations(many, shape, 64, 1) + gradients - block
    assert parts["activations of a forward pass"] + parts["gradients"] == first > gradients


def test_heads_and_tokens_of_a_step_by_hand() -> None:
    """REPA keeps what its three layers read and give (128 + 64 + 64, 64 + 64 + 1408) and reads 1408 float16 a token."""
    shape = shape_of("SiT-nano/2")
    bare = bytes_of(memory.training_parts(run_of(), method_of(shape), 1))
    repa = bytes_of(memory.training_parts(run_of(), method_of(shape, "repa", head_width=64), 1))
    more = {name: repa[name] - bare[name] for name in repa}
    assert more == {
        "activations of a forward pass": 32 * 16 * (256 + 128 + 1408) * 4,
        "gradients": 0,
        "batches made ahead": 5 * 32 * 16 * 1408 * 2,
    }


def test_an_evaluation_by_hand() -> None:
    shape = shape_of("SiT-nano/2")
    sampler = SamplerConfig(num_steps=50, cfg_scale=1.5)
    evaluation = EvaluationConfig(num_samples=100, chunk=64, precision="fp32", extractor_size=64, sampler=sampler)
    assert bytes_of(memory.evaluation_parts(run_of(evaluation=evaluation), shape, 1)) == {
        "features of the samples": 2 * 100 * (1280 + 64) * 4,  # efficientnet_lite0's, and 8 x 8 pixels
        "samples of two rounds": 2 * 64 * 3 * 32 * 32,
        "passes of a chunk": 2 * 64 * (16 * 128 * 36 + 8 * 256),  # guidance doubles the chunk
        "resized images": 2 * 32 * 3 * 64 * 64 * 4,
        "the sampler's times": 50 * 32,
    }
    three = bytes_of(memory.evaluation_parts(run_of(evaluation=evaluation), shape, 3))
    assert three["samples of two rounds"] == 2 * 100 * 3 * 32 * 32
    assert memory.EXTRACTED == BATCH


# -- what is refused ------------------------------------------------------------------------------------------------


def test_what_fits_is_not_refused(free: Callable[[int], None]) -> None:
    """The embedded preset runs in 1.4 GB, libraries included."""
    free(GB)
    memory.check_run(run_of(), method_of(shape_of("SiT-nano/2")), 1, CPU)
    ram.check_images(1797, 32)


@pytest.mark.parametrize(
    ("sections", "model", "message"),
    [
        ({"optimizer": OptimizerConfig(batch_size=2**63 - 1)}, "SiT-nano/2", "lower optimizer.micro_batch"),
        (
            {"optimizer": OptimizerConfig(batch_size=2**63 - 1, micro_batch=1)},
            "SiT-nano/2",
            "lower optimizer.batch_size",
        ),
        ({}, "SiT-XL/2", "weights, moments and EMA take 10.8 GB: choose a smaller model.name"),
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
    monkeypatch.setattr(ram, "free_on_device", lambda device: 3 * GB)
    here = ram.MemoryPart(name="samples", num_bytes=2 * GB, way_out="lower a")
    there = ram.MemoryPart(name="weights", num_bytes=3 * GB, way_out="lower b", on_device=True)
    device = torch.device("cuda")
    ram.check([here, there], device)
    with pytest.raises(
        UserError, match=r"4\.0 GB of RAM are needed and 2\.0 GB are free; samples take 2\.0 GB: lower a$"
    ):
        ram.check([here, here, there], device)
    with pytest.raises(
        UserError, match=r"6\.0 GB of cuda are needed and 3\.0 GB are free; weights take 3\.0 GB: lower b$"
    ):
        ram.check([here, there, there], device)
    with pytest.raises(UserError, match=r"5\.0 GB of RAM are needed"):
        ram.check([here, there], CPU)


def test_heads_are_part_of_the_run(free: Callable[[int], None]) -> None:
    free(2 * GB)
    method = method_of(shape_of("SiT-nano/2"), "vae_repa", head_width=2**14)
    with pytest.raises(UserError, match=r"the method's heads take 9\.7 GB: lower the sizes in section vae_repa"):
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
        ram.check_images(1797, 2048)


# -- what there is --------------------------------------------------------------------------------------------------


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_without_a_limit_the_system_has_the_word(tmp_path: Path) -> None:
    write(tmp_path / "proc/meminfo", "MemTotal: 900 kB\nMemAvailable:   700 kB\n")
    assert ram.free_ram(tmp_path) == 700 * 1024
    write(tmp_path / "proc/self/cgroup", "0::/a\n")
    write(tmp_path / "sys/fs/cgroup/a/memory.max", "max\n")
    write(tmp_path / "sys/fs/cgroup/a/memory.current", "100\n")
    assert ram.free_ram(tmp_path) == 700 * 1024


def test_the_tightest_group_counts_without_its_page_cache(tmp_path: Path) -> None:
    write(tmp_path / "proc/meminfo", "MemAvailable: 700 kB\n")
    write(tmp_path / "proc/self/cgroup", "0::/a/b\n")
    for group, limit in (("a", 9000), ("a/b", 20000)):
        write(tmp_path / f"sys/fs/cgroup/{group}/memory.max", f"{limit}\n")
        write(tmp_path / f"sys/fs/cgroup/{group}/memory.current", "5000\n")
        write(tmp_path / f"sys/fs/cgroup/{group}/memory.stat", "anon 3000\nfile 2000\n")
    assert ram.free_ram(tmp_path) == 9000 - 5000 + 2000


def test_the_first_version_of_groups_mounted_in_a_container(tmp_path: Path) -> None:
    write(tmp_path / "proc/meminfo", "MemAvailable: 700 kB\n")
    write(tmp_path / "proc/self/cgroup", "5:cpu:/c\n4:memory:/outside/name\n0::/\n")
    write(tmp_path / "sys/fs/cgroup/memory/memory.limit_in_bytes", "8000\n")
    write(tmp_path / "sys/fs/cgroup/memory/memory.usage_in_bytes", "5000\n")
    write(tmp_path / "sys/fs/cgroup/memory/memory.stat", "cache 1\ntotal_cache 1000\n")
    assert ram.free_ram(tmp_path) == 4000


def test_this_machine_has_memory() -> None:
    assert 2**27 < ram.free_ram() < 2**50
