"""One training step: draw, forward, losses, backward, clip, check, update, EMA. No method changes any of it.

Shapes: N images, C channels, H W latent height and width.
"""

import contextlib
import hashlib
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from harness import flow
from harness.backbones.sit import SiT
from harness.config import RunConfig, require
from harness.cost.operations import Passes, StepCost, step_cost
from harness.data.batches import Batch, BatchSource, Shard
from harness.data.prepare import PreparedData
from harness.machine.processes import means
from harness.method import BackboneShape, Method, MethodDraws, Progress, StepView, Term
from harness.rng import global_state_kept, stream
from harness.training.checkpoint import Counters
from harness.training.compilation import compile_blocks, eager
from harness.training.divergence import Guard
from harness.training.ema import Ema
from harness.training.schedule import Schedule, make_schedule


class Handed(torch.autograd.Function):
    """Hands a hidden state to a method; the gradient that comes back is laid out row by row, as the backbone's own are.

    Gradients of one tensor are added up in the layout of whichever comes first. One in another layout, as a convolution
    gives, would have the backward pass multiply in another order and change the backbone's bits, even if it were zero.
    """

    @staticmethod
    def forward(ctx: Any, hidden_NTD: Tensor) -> Tensor:
        return hidden_NTD.view_as(hidden_NTD)

    @staticmethod
    def backward(ctx: Any, gradient_NTD: Tensor) -> Tensor:
        return gradient_NTD.contiguous()


class StepModule(nn.Module):
    """Backbone and heads as one module, so that both share one gradient reduction over processes."""

    def __init__(self, backbone: SiT, method: Method) -> None:
        super().__init__()
        self.backbone, self.heads = backbone, method.heads
        self._method = method

    def forward(self, view: StepView, taps: tuple[int, ...]) -> tuple[Tensor, dict[str, Term], dict[int, Tensor]]:
        velocity_NCHW, hidden = self.backbone(view.xt_NCHW, view.t_N, view.labels_N, taps=taps)
        hidden = {block: Handed.apply(hidden_NTD) for block, hidden_NTD in hidden.items()}
        return velocity_NCHW.float(), self._method.terms(view, hidden), hidden


class Stopwatch:
    """Books time to training, evaluation or I/O, each time after a sync of the device, so that it is finished work."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.start()

    def start(self) -> None:
        """Begin here; what lies before is not booked."""
        synchronize(self._device)
        self._since = time.perf_counter()

    def book(self, counters: Counters, kind: Literal["train", "evaluation", "io"]) -> Counters:
        """The counters with the time since the last call booked to `kind`."""
        before = self._since
        self.start()
        name = f"{kind}_seconds"
        booked: Any = {name: getattr(counters, name) + self._since - before}
        return replace(counters, **booked)


class Window:
    """Sums of a step's losses and norms on the device, read as means at logged steps."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, parts: Mapping[str, Tensor]) -> None:
        for name, value in parts.items():
            self._sums[name] = self._sums.get(name, torch.zeros_like(value)) + value
            self._counts[name] = self._counts.get(name, 0) + 1

    def take(self) -> dict[str, float]:
        """Means since the last call."""
        means = {name: float(total) / self._counts[name] for name, total in self._sums.items()}
        self._sums, self._counts = {}, {}
        return means


@dataclass
class Run:
    """One run's fixed parts and where it stands."""

    config: RunConfig
    method: Method
    backbone: SiT
    module: StepModule
    model: nn.Module
    """`module` as accelerate prepared it."""
    ema: Ema
    optimizer: torch.optim.Optimizer
    accelerator: Accelerator
    batches: BatchSource
    guard: Guard
    cost: StepCost
    schedule: Schedule
    initial_weights: str
    """SHA-256 of the backbone before training."""
    counters: Counters = field(default_factory=Counters)
    """As of the last update; on record as of the last logged step."""
    watch: Stopwatch = field(init=False)
    window: Window = field(default_factory=Window)
    weights: dict[str, float] = field(default_factory=dict)
    """Weight of each term at the last step that had it."""
    notices: tuple[str, ...] = ()
    """What was wrong with the checkpoints that the run continues from, a line each."""

    def __post_init__(self) -> None:
        self.watch = Stopwatch(self.device)

    @property
    def spent(self) -> float:
        """The part of the budget that is spent, in the budget's unit."""
        return self.schedule.spent(self.counters.step, self.counters.train_seconds)

    @property
    def share(self) -> float:
        """The share of the budget that is spent, 0 to 1."""
        return min(1.0, self.spent / self.schedule.amount)

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    def autocast(self) -> torch.autocast:
        """Autocast of the run's precision, for backbone, heads and teacher alike."""
        enabled = self.config.runtime.precision == "bf16"
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=enabled)

    def teacher(
        self, x: Tensor, t: Tensor, y: Tensor, block: int, full_pass: bool = False, fp32: bool = False
    ) -> Tensor:
        """The EMA backbone's hidden states, without gradient, in the run's precision or fp32."""
        precision = torch.autocast(self.device.type, enabled=False) if fp32 else contextlib.nullcontext()
        with torch.no_grad(), precision:
            if full_pass:
                return self.ema.backbone(x, t, y, taps=(block,))[1][block]
            return self.ema.backbone.hidden(x, t, y, block)


def set_up(config: RunConfig, method: Method, prepared: PreparedData, accelerator: Accelerator) -> Run:
    """Build a run at step 0. `config` is resolved; the backbone's weights depend on the seed alone."""
    check_split(config, accelerator.num_processes)
    backbone = build_backbone(config, method.backbone)
    backbone.checkpoint_activations = config.runtime.checkpoint_activations
    method.initialize(config.seed)
    method.heads.to(accelerator.device)
    backbone.to(accelerator.device)
    cost = step_cost(Passes(backbone), method)
    module = StepModule(backbone, method)
    ema = Ema(backbone, config.ema)
    if config.runtime.compile:
        compile_blocks(backbone)
    shard = Shard(rank=accelerator.process_index, num_processes=accelerator.num_processes)
    drawn = (config.seed, config.optimizer.batch_size, config.optimizer.label_drop)
    return Run(
        config=config,
        method=method,
        backbone=backbone,
        module=module,
        model=accelerator.prepare_model(module),
        ema=ema,
        optimizer=build_optimizer(config, module),
        accelerator=accelerator,
        batches=BatchSource(prepared, *drawn, method.needs(), shard, accelerator.device),
        guard=Guard(accelerator.device),
        cost=cost,
        schedule=make_schedule(config, cost.train_gflops_per_image),
        initial_weights=weights_digest(backbone),
    )


def check_split(config: RunConfig, num_processes: int) -> None:
    """Refuse a global batch that the processes cannot share evenly."""
    size = config.optimizer.batch_size
    require(
        size % num_processes == 0, f"optimizer.batch_size is {size}: give a multiple of the {num_processes} processes"
    )


def build_backbone(config: RunConfig, shape: BackboneShape) -> SiT:
    """The backbone with the initial weights of the run's seed."""
    with global_state_kept():
        backbone = SiT.of(shape, config.model.qk_norm)
    backbone.initialize(stream(config.seed, "init"))
    return backbone


def build_optimizer(config: RunConfig, module: StepModule) -> torch.optim.AdamW:
    """AdamW over the backbone, and over the heads with the same settings."""
    groups = [[p for p in part.parameters() if p.requires_grad] for part in (module.backbone, module.heads)]
    settings = config.optimizer
    return torch.optim.AdamW(
        [{"params": group} for group in groups if group],
        lr=settings.lr,
        betas=(settings.beta1, settings.beta2),
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        fused=True,
    )


def weights_digest(backbone: nn.Module) -> str:
    """SHA-256 over names and values of a module's state."""
    digest = hashlib.sha256()
    for name, value in sorted(backbone.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().float().cpu().contiguous().numpy().data)
    return digest.hexdigest()


def train_step(run: Run, batch: Batch) -> None:
    """One update: forward, losses, backward, clip, check, update, EMA. No wait for the device."""
    losses: dict[str, Tensor] = {}
    views = step_views(run, batch)
    for number, view in enumerate(views, start=1):
        share = len(view.t_N) / len(batch)
        with gradients_reduced(run, number == len(views)):
            base, terms, _ = forward_losses(run.model, run, view)
            loss = base + sum(term.weight * term.value for term in terms.values())  # also when a weight is 0
            cast(Tensor, loss * share).backward()
        parts = {"loss": loss, "base": base, **{f"terms/{name}": term.value for name, term in terms.items()}}
        for name, value in parts.items():
            losses[name] = losses.get(name, 0) + value.detach() * share
        run.weights |= {name: term.weight for name, term in terms.items()}

    norm = clip_gradients(run.module, run.config.optimizer.clip_norm)
    parts = {**means(run.accelerator, losses), "grad_norm": norm}
    stopped = run.guard.check(batch.step, parts)
    update_weights(run.optimizer, stopped)
    run.ema.update(batch.step + 1, stopped)
    run.window.add(parts)


def forward_losses(model: nn.Module, run: Run, view: StepView) -> tuple[Tensor, dict[str, Term], dict[int, Tensor]]:
    """The velocity loss, mean (v - (noise - x0))^2, the method's terms, and the tapped hidden states."""
    with run.autocast():
        velocity_NCHW, terms, hidden = model(view, run.method.taps(view.progress))
    base = (velocity_NCHW - flow.velocity(view.x0_NCHW, view.noise_NCHW)).square().mean()
    return base, terms, hidden


def step_views(run: Run, batch: Batch) -> list[StepView]:
    """The batch on the device, one view for each forward pass."""
    device, size = run.device, run.config.optimizer.micro_batch or len(batch)
    global_batch = run.config.optimizer.batch_size
    draws = MethodDraws(seed=run.config.seed, step=batch.step, batch_size=global_batch)
    views = []
    for start in range(0, len(batch), size):
        rows = slice(start, min(start + size, len(batch)))

        def moved(value: Tensor, rows: slice = rows) -> Tensor:
            return value[rows].to(device, non_blocking=True)

        x0_NCHW, noise_NCHW, t_N = moved(batch.x0_NCHW), moved(batch.noise_NCHW), moved(batch.t_N)
        views.append(
            StepView(
                x0_NCHW=x0_NCHW,
                x0_mean_NCHW=moved(batch.x0_mean_NCHW),
                noise_NCHW=noise_NCHW,
                t_N=t_N,
                xt_NCHW=flow.interpolate(x0_NCHW, noise_NCHW, t_N),
                labels_N=moved(batch.labels_N),
                tokens={name: moved(tokens) for name, tokens in batch.tokens.items()},
                images_NCHW=None if batch.images_NCHW is None else moved(batch.images_NCHW),
                progress=Progress(step=batch.step, images=batch.step * global_batch),
                teacher=run.teacher,
                rows=slice(batch.first_row + rows.start, batch.first_row + rows.stop),
                draws=draws,
                method=run.method.name,
            )
        )
    return views


def gradients_reduced(run: Run, last: bool) -> contextlib.AbstractContextManager[None]:
    """Reduce gradients over processes in the last backward pass of a step only."""
    return contextlib.nullcontext() if last else run.accelerator.no_sync(run.model)


def clip_gradients(module: StepModule, clip_norm: float) -> Tensor:
    """Clip backbone and heads jointly; returns the norm before clipping.

    The joint norm is hypot(backbone, heads): one reduction over all tensors would change the summation order, and
    with it the backbone's bits, even when the heads' gradients are zero (`methods.md` section 1).
    """
    gradients = [[p.grad for p in part.parameters() if p.grad is not None] for part in (module.backbone, module.heads)]
    backbone_norm = get_total_norm(gradients[0])
    norm = torch.hypot(backbone_norm, get_total_norm(gradients[1]) if gradients[1] else torch.zeros_like(backbone_norm))
    if clip_norm:
        clip_grads_with_norm_(module.parameters(), clip_norm, norm)
    return norm


def update_weights(optimizer: torch.optim.Optimizer, stopped: Tensor) -> None:
    """AdamW's update, unless the 0-dim flag `stopped` is 1: then weights and moments stay as they are."""
    if stopped.device.type == "cpu":
        if not stopped:
            optimizer.step()
    else:
        # The fused optimiser reads this flag on the device: no sync, no bad update.
        optimizer.found_inf = stopped  # type: ignore[attr-defined]
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def diagnostics(run: Run, batch: Batch) -> dict[str, float]:
    """The method's own numbers on the first forward pass of the batch, at the updated weights."""
    view = step_views(run, batch)[0]
    with torch.no_grad(), eager(), run.autocast():
        taps = run.method.taps(view.progress)
        hidden = run.backbone(view.xt_NCHW, view.t_N, view.labels_N, taps=taps)[1] if taps else {}
        return run.method.diagnostics(view, hidden)


def gradient_norms(run: Run, batch: Batch) -> dict[str, float]:
    """Norm of the backbone's gradient from the velocity loss and from each weighted term, first forward pass."""
    weights = [p for p in run.backbone.parameters() if p.requires_grad]
    norms = {}
    with eager():  # backwards as well: checkpointed blocks run again there
        base, terms, _ = forward_losses(run.module, run, step_views(run, batch)[0])
        losses = {"velocity": base, **{name: term.weight * term.value for name, term in terms.items()}}
        for name, loss in losses.items():
            gradients = torch.autograd.grad(loss, weights, retain_graph=True, allow_unused=True)
            norms[name] = float(get_total_norm([g for g in gradients if g is not None]))
    return norms


def synchronize(device: torch.device) -> None:
    """Wait for the device, so that a clock reads finished work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
