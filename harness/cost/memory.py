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
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from harness.backbones.sit import SelfAttention, SiT
from harness.config import RunConfig, RuntimeConfig
from harness.errors import UserError
from harness.machine.ram import MemoryPart, check
from harness.method import BackboneShape, Method
from harness.rng import global_state_kept

FLOAT = 4
"""Bytes of a float32."""
EXTRACTED = 32
"""Images that an extractor sees together, as in harness.evaluation.fidelity; importing that takes a second."""
BATCHES, DRAWN = 5, 2
"""Batches in memory at once, and those of them in preparation, as in harness.data.batches."""


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


# -- parts ----------------------------------------------------------------------------------------------------------


def backbone_parameters(shape: BackboneShape) -> int:
    """Trained weights of SiT, LayerNorms on queries and keys left out."""
    width, numbers = shape.hidden_size, shape.patch_numbers
    embedders = (256 * width + width**2 + 2 * width) + (shape.num_classes + 1) * width + (numbers + 1) * width
    final = (width + 1) * numbers + 2 * (width**2 + width)
    return shape.depth * block_parameters(shape) + embedders + final


def block_parameters(shape: BackboneShape) -> int:
    """Parameters of one block: qkv has 3 D^2, proj 1 D^2, the MLP 8 D^2, adaLN 6 D^2, and each has biases."""
    return 18 * shape.hidden_size**2 + 15 * shape.hidden_size


def weight_parts(config: RunConfig, method: Method) -> Iterator[MemoryPart]:
    """The parts that lie in memory between two steps: weights, two moments, and the EMA of the backbone."""
    backbone, heads = backbone_parameters(method.backbone), head_parameters(method)
    smaller = "choose a smaller model.name"
    yield MemoryPart(name="weights, moments and EMA", num_bytes=4 * FLOAT * backbone, way_out=smaller, on_device=True)
    smaller = f"lower the sizes in section {config.method}"
    yield MemoryPart(name="the method's heads", num_bytes=3 * FLOAT * heads, way_out=smaller, on_device=True)


def training_parts(config: RunConfig, method: Method, num_processes: int) -> Iterator[MemoryPart]:
    """The parts that a step needs beside the weights, and the batches that are made ahead."""
    shape, batch = method.backbone, config.optimizer.batch_size
    share = batch // num_processes
    images = min(share, config.optimizer.micro_batch or share)
    heads = images * head_activations(config, method)
    activations = backbone_activations(config, shape, images, shape.depth) + heads
    yield MemoryPart(
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
    yield MemoryPart(name="gradients", num_bytes=more, way_out="choose a smaller model.name", on_device=True)
    numbers = latent_numbers(shape)
    # Noise of the global batch, this process's latents and their means; the posterior's noise while one is prepared.
    drawn = FLOAT * (BATCHES * (batch + 2 * share) + DRAWN * batch) * numbers
    widths = sum(method.data.encoder_width(name) for name in method.needs().encoders)
    tokens = BATCHES * share * shape.num_tokens * widths * 2  # float16
    yield MemoryPart(name="batches made ahead", num_bytes=drawn + tokens, way_out="lower optimizer.batch_size")


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
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage
        return tensor

    with global_state_kept(), FakeTensorMode(), torch.device(device):
        backbone = SiT.of(shape, qk_norm)
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
) -> Iterator[MemoryPart]:
    """The parts that one evaluation under the protocol of a section needs. `num_samples` is resolved."""
    from harness.evaluation.extractors import (  # here, because importing torch-fidelity takes a second
        PIXEL_SIDE,
        compared_width,
    )

    protocol = config.protocols[section]
    # Part by part as they come, and put together; of the extractor and of pixels.
    features = 2 * protocol.num_samples * (compared_width(protocol.extractor) + PIXEL_SIDE**2) * FLOAT
    yield MemoryPart(name="features of the samples", num_bytes=features, way_out=f"lower {section}.num_samples")
    # While one round's go through the extractor, the next one's come.
    together = 2 * min(protocol.chunk * num_processes, protocol.num_samples)
    samples = together * 3 * config.data.image_size**2
    yield MemoryPart(
        name="samples of two rounds", num_bytes=samples, way_out="lower evaluation.chunk or data.image_size"
    )
    images = min(protocol.chunk, protocol.num_samples) * (1 if protocol.sampler.cfg_scale == 1 else 2)
    half = 2 if protocol.precision == "bf16" else FLOAT
    # In the MLP: the residual stream, and the hidden layer before and after GELU. The sampler's state is float64.
    chunk = images * (shape.num_tokens * shape.hidden_size * (FLOAT + 8 * half) + 8 * latent_numbers(shape))
    yield MemoryPart(name="passes of a chunk", num_bytes=chunk, way_out="lower evaluation.chunk", on_device=True)
    resized = EXTRACTED * 3 * protocol.extractor_size**2 * FLOAT
    yield MemoryPart(
        name="resized images", num_bytes=2 * resized, way_out="lower evaluation.extractor_size", on_device=True
    )
    times = protocol.sampler.num_steps * 32  # a list of Python's floats
    yield MemoryPart(name="the sampler's times", num_bytes=times, way_out=f"lower {section}.sampler.num_steps")


def latent_numbers(shape: BackboneShape) -> int:
    """C * H * W."""
    return shape.in_channels * shape.input_size**2
