"""How much memory a run takes, worked out before anything big is allocated, and whether it is there.

Between steps there are the weights, their EMA and both moments. A step adds most at one of three points of its backward
pass, as activations go and gradients come, block after block:

    before the last block      activations of all blocks, and bf16 copies of their weights
    before the first block     activations of one block, and gradients of all others
    at the end                 all gradients

With accumulated gradients, those of the first pass lie beside all activations of the next. With checkpointed ones a
block's input is kept, and the inside of the one block that is run again. The activations are no formula of ours: the
backbone's own forward pass runs on tensors without numbers, for one and two images and one and two blocks, and what
autograd keeps is added up; further images and blocks take as much again.

What allocators and libraries add is left out, and so are gradients inside a block and a teacher's passes, of which
nothing is kept: `docs/performance.md` holds the result against measured peaks. With `compile` less is kept. Sizes are
Python's integers, so no product overflows.

Shapes: N images, C channels, H W latent height and width, T tokens, D backbone width.
"""

import functools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from harness.config import RunConfig, RuntimeConfig
from harness.errors import UserError
from harness.method import BackboneShape, Method
from harness.rng import global_state_kept
from harness.sit import SelfAttention, SiT

FLOAT = 4
"""Bytes of a float32."""
EXTRACTED = 32
"""Images that an extractor sees together, as in harness.fidelity; importing that takes a second."""
BATCHES, DRAWN = 5, 2
"""Batches in memory at once, and those of them in preparation, as in harness.batches."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """Something that must lie in memory."""

    name: str
    num_bytes: int
    way_out: str
    """Which setting makes it smaller."""
    on_device: bool = False
    """On the accelerator where there is one, else in RAM."""


def outline(name: str, build: Callable[[], Method]) -> Method:
    """What `build` builds, its heads with shapes but no numbers; `UserError` where the sizes have no 64-bit index."""
    try:
        with torch.device("meta"):
            return build()
    except (RuntimeError, TypeError, OverflowError) as error:
        # torch has no type of its own for it; any other error is a fault of the method, and must show its trace.
        if "overflow" not in str(error).lower():
            raise
        reason = str(error).splitlines()[0]
        raise UserError(f"heads of {name} cannot be built ({reason}): lower the sizes in section {name}") from None


def check_run(config: RunConfig, method: Method, num_processes: int, device: torch.device) -> None:
    """Refuse a run that does not fit: `UserError` names the largest part and the setting to lower.

    Args:
        config: resolved.
        method: of the config, built or in outline.
        num_processes: they share the batch.
        device: of the backbone.
    """
    weights = list(weight_parts(config, method))
    phases = [training_parts(config, method, num_processes)]
    phases += [evaluation_parts(config, method.backbone, num_processes, section) for section in config.protocols]
    for phase in phases:
        check([*weights, *phase], device)


def check_images(num_images: int, image_size: int) -> None:
    """Refuse images that do not fit into RAM, as uint8: one channel of each, and the three made of it."""
    images = Part(name="the images", num_bytes=4 * num_images * image_size**2, way_out="lower data.image_size")
    check([images], torch.device("cpu"))


def check(parts: Sequence[Part], device: torch.device) -> None:
    """Raise `UserError` when parts that lie in memory together need more than is free."""
    has_own = device.type == "cuda"
    places = {"RAM": ([p for p in parts if not (p.on_device and has_own)], free_ram())}
    if has_own:
        places[str(device)] = ([p for p in parts if p.on_device], free_on_device(device))
    for place, (inside, free) in places.items():
        needed = sum(part.num_bytes for part in inside)
        if needed > free:
            most = max(inside, key=lambda part: part.num_bytes)
            raise UserError(
                f"not enough memory: at least {in_words(needed)} of {place} are needed and {in_words(free)} are free; "
                f"{most.name} take {in_words(most.num_bytes)}: {most.way_out}"
            )


def in_words(num_bytes: int) -> str:
    """Bytes as MB, GB or, where no machine has as much, more than 1000 TB."""
    if num_bytes > 10**15:
        return "more than 1000 TB"
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 10**9 else f"{num_bytes / 1e6:.0f} MB"


# -- parts ----------------------------------------------------------------------------------------------------------


def backbone_parameters(shape: BackboneShape) -> int:
    """Trained weights of SiT, LayerNorms on queries and keys left out."""
    width, numbers = shape.hidden_size, shape.patch_numbers
    embedders = (256 * width + width**2 + 2 * width) + (shape.num_classes + 1) * width + (numbers + 1) * width
    final = (width + 1) * numbers + 2 * (width**2 + width)
    return shape.depth * block_parameters(shape) + embedders + final


def block_parameters(shape: BackboneShape) -> int:
    """Of one block: qkv 3 D^2, proj 1, MLP 8, adaLN 6, with biases."""
    return 18 * shape.hidden_size**2 + 15 * shape.hidden_size


def weight_parts(config: RunConfig, method: Method) -> Iterator[Part]:
    """What lies in memory between two steps: weights and two moments, and of the backbone also the EMA."""
    backbone, heads = backbone_parameters(method.backbone), head_parameters(method)
    smaller = "choose a smaller model.name"
    yield Part(name="weights, moments and EMA", num_bytes=4 * FLOAT * backbone, way_out=smaller, on_device=True)
    smaller = f"lower the sizes in section {config.method}"
    yield Part(name="the method's heads", num_bytes=3 * FLOAT * heads, way_out=smaller, on_device=True)


def training_parts(config: RunConfig, method: Method, num_processes: int) -> Iterator[Part]:
    """What one step needs beside the weights, and the batches that are made ahead."""
    shape, batch = method.backbone, config.optimizer.batch_size
    share = batch // num_processes
    images = min(share, config.optimizer.micro_batch or share)
    heads = images * head_activations(config, method)
    activations = backbone_activations(config, shape, images, shape.depth) + heads
    yield Part(
        name="activations of a forward pass",
        num_bytes=activations,
        way_out="lower optimizer.micro_batch (0 is the whole share of the batch) or data.image_size, "
        "or set runtime.checkpoint_activations",
        on_device=True,
    )
    gradients = FLOAT * (backbone_parameters(shape) + head_parameters(method))
    at_first_block = backbone_activations(config, shape, images, 1) + gradients - FLOAT * block_parameters(shape)
    more = gradients if images < share else max(0, at_first_block - activations, gradients - activations)
    # Several processes reduce them in buckets that take as much again.
    more += gradients if num_processes > 1 else 0
    yield Part(name="gradients", num_bytes=more, way_out="choose a smaller model.name", on_device=True)
    numbers = latent_numbers(shape)
    # Noise of the global batch, this process's latents and their means; the posterior's noise while one is prepared.
    drawn = FLOAT * (BATCHES * (batch + 2 * share) + DRAWN * batch) * numbers
    widths = sum(method.data.encoder_width(name) for name in method.needs().encoders)
    tokens = BATCHES * share * shape.num_tokens * widths * 2  # float16
    yield Part(name="batches made ahead", num_bytes=drawn + tokens, way_out="lower optimizer.batch_size")


def backbone_activations(config: RunConfig, shape: BackboneShape, images: int, depth: int) -> int:
    """Bytes that autograd keeps of the first `depth` blocks, with what lies before and after all blocks."""
    shape = replace(shape, depth=depth)
    if not config.runtime.checkpoint_activations:
        return _kept(config, shape, images, False)
    one, two = (_kept(config, replace(shape, depth=blocks), images, False) for blocks in (1, 2))
    return _kept(config, shape, images, True) + two - one


def _kept(config: RunConfig, shape: BackboneShape, images: int, is_checkpointed: bool) -> int:
    """`kept_bytes` of any number of images and blocks: each adds as much as the one before."""

    def small(num: int, depth: int) -> int:
        few = replace(shape, depth=depth)
        return kept_bytes(few, config.model.qk_norm, config.runtime, num, is_checkpointed)

    image, block = small(2, 1) - small(1, 1), small(1, 2) - small(1, 1)
    block_of_image = small(2, 2) - small(1, 1) - image - block
    return small(1, 1) + (images - 1) * image + (shape.depth - 1) * (block + (images - 1) * block_of_image)


@functools.lru_cache(maxsize=64)
def kept_bytes(shape: BackboneShape, qk_norm: bool, runtime: RuntimeConfig, images: int, is_checkpointed: bool) -> int:
    """Bytes that autograd keeps of one forward pass, weights apart; of tensors that have a shape and no numbers.

    For a GPU that is not here the CPU stands in, with the fused attention that GPUs have. Kept, because the cells of a
    study share it.
    """
    is_elsewhere = runtime.device == "cuda" and not torch.cuda.is_available()
    device = "cpu" if is_elsewhere else runtime.device
    arguments = {key: value for key, value in vars(shape).items() if key != "size"}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage
        return tensor

    with global_state_kept(), FakeTensorMode(), torch.device(device):
        backbone = SiT(**arguments, qk_norm=qk_norm)
        backbone.checkpoint_activations = is_checkpointed
        for module in backbone.modules():
            if is_elsewhere and isinstance(module, SelfAttention):
                module.plain_tokens = 0
        # Positions are made by numpy, so on the CPU, and without numbers nothing can be moved.
        backbone.pos_embed = nn.Parameter(torch.empty(backbone.pos_embed.shape), requires_grad=False)
        x_NCHW = torch.zeros(images, shape.in_channels, shape.input_size, shape.input_size)
        saved = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
        with saved, torch.autocast(device, torch.bfloat16, enabled=runtime.precision == "bf16"):
            backbone(x_NCHW, torch.zeros(images), torch.zeros(images, dtype=torch.int64))
        weights = {p.untyped_storage()._cdata for p in backbone.parameters()}
        return sum(storage.nbytes() for key, storage in kept.items() if key not in weights)


def head_parameters(method: Method) -> int:
    """Numbers in the heads' weights."""
    return sum(p.numel() for p in method.heads.parameters())


def head_activations(config: RunConfig, method: Method) -> int:
    """Bytes that autograd keeps of the heads for each image: of their linear layers, input and output."""
    widths = sum(m.in_features + m.out_features for m in method.heads.modules() if isinstance(m, nn.Linear))
    return method.backbone.num_tokens * widths * (2 if config.runtime.precision == "bf16" else FLOAT)


def evaluation_parts(
    config: RunConfig, shape: BackboneShape, num_processes: int, section: str = "evaluation"
) -> Iterator[Part]:
    """What one evaluation under the protocol of a section needs. `num_samples` is resolved."""
    from harness.extractors import PIXEL_SIDE, compared_width  # here, because importing torch-fidelity takes a second

    protocol = config.protocols[section]
    # Part by part as they come, and put together; of the extractor and of pixels.
    features = 2 * protocol.num_samples * (compared_width(protocol.extractor) + PIXEL_SIDE**2) * FLOAT
    yield Part(name="features of the samples", num_bytes=features, way_out=f"lower {section}.num_samples")
    # While one round's go through the extractor, the next one's come.
    together = 2 * min(protocol.chunk * num_processes, protocol.num_samples)
    samples = together * 3 * config.data.image_size**2
    yield Part(name="samples of two rounds", num_bytes=samples, way_out="lower evaluation.chunk or data.image_size")
    images = min(protocol.chunk, protocol.num_samples) * (1 if protocol.sampler.cfg_scale == 1 else 2)
    half = 2 if protocol.precision == "bf16" else FLOAT
    # In the MLP: the residual stream, and the hidden layer before and after GELU. The sampler's state is float64.
    chunk = images * (shape.num_tokens * shape.hidden_size * (FLOAT + 8 * half) + 8 * latent_numbers(shape))
    yield Part(name="passes of a chunk", num_bytes=chunk, way_out="lower evaluation.chunk", on_device=True)
    resized = EXTRACTED * 3 * protocol.extractor_size**2 * FLOAT
    yield Part(name="resized images", num_bytes=2 * resized, way_out="lower evaluation.extractor_size", on_device=True)
    times = protocol.sampler.num_steps * 32  # a list of Python's floats
    yield Part(name="the sampler's times", num_bytes=times, way_out=f"lower {section}.sampler.num_steps")


def latent_numbers(shape: BackboneShape) -> int:
    """C * H * W."""
    return shape.in_channels * shape.input_size**2


# -- what there is --------------------------------------------------------------------------------------------------


def free_on_device(device: torch.device) -> int:
    """Bytes that torch can still have on a CUDA device: free ones, and those it holds without using them."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def free_ram(root: Path = Path("/")) -> int:
    """Bytes of RAM that can be had: the system's, or less where a control group (v1 or v2) allows less."""
    return min([_system_ram(root), *_cgroup_rooms(root)])


def _system_ram(root: Path) -> int:
    """MemAvailable; where there is no /proc, all the RAM there is."""
    numbers = _numbers(root / "proc/meminfo")
    if "MemAvailable:" in numbers:
        return numbers["MemAvailable:"] * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _cgroup_rooms(root: Path) -> Iterator[int]:
    """Limit less what is in use, page cache apart, of this process's control group and of all above it."""
    lines = (root / "proc/self/cgroup").read_text().splitlines() if (root / "proc/self/cgroup").is_file() else []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        home = root / "sys/fs/cgroup" / ("memory" if controllers else "")
        names = ("limit_in_bytes", "usage_in_bytes", "total_cache") if controllers else ("max", "current", "file")
        group = home / path.strip("/")
        # Inside a container the group itself may be what is mounted at `home`.
        for folder in (group, *group.parents):
            if not folder.is_relative_to(home):
                break
            limit, used = (_number(folder / f"memory.{name}") for name in names[:2])
            if limit is not None and used is not None:
                yield limit - used + _numbers(folder / "memory.stat").get(names[2], 0)


def _number(path: Path) -> int | None:
    """The number in a file; None where there is no file, or no limit ("max")."""
    text = path.read_text().strip() if path.is_file() else ""
    return int(text) if text.isdigit() else None


def _numbers(path: Path) -> dict[str, int]:
    """Lines `name number` of a file; empty where there is no file."""
    lines = [line.split() for line in path.read_text().splitlines()] if path.is_file() else []
    return {line[0]: int(line[1]) for line in lines if len(line) > 1 and line[1].isdigit()}
