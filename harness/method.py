"""The interface of a training method, and the rule book that makes the comparison fair.

| a method may | a method may not | kept by |
|---|---|---|
| add named loss terms, each with a weight that may depend on progress | change the velocity loss, path, time draw or weighting | the trainer sums `base + weight * term` and logs each part |
| read hidden states of chosen blocks, with gradient | edit the backbone or its initialisation | `taps`; the hash of the initial weights is recorded and equal across methods at a seed |
| own trainable heads, initialised from their own stream after the backbone | choose optimizer, learning rate, EMA, clipping, precision | heads are one more parameter group with the same settings |
| own targets: frozen encoders, the EMA teacher, cached features | reorder, filter or augment data; draw t, noise or label drop | the batch-trace hash is recorded and equal across methods at a seed |
| draw through `view` | touch the global random state | contract test on every method |
| save non-parameter state of its own | be present at sampling or evaluation | evaluation loads the backbone only |
| declare a search space and a disclosure | choose its number of trials, or tune on reported seeds | `studies/`; reports refuse overlapping seeds |

The key contract: **at weight 0, N steps leave the backbone bitwise equal to vanilla's.** Every term is computed and
multiplied by its weight, also when that is 0.

Shapes: N images, C channels, H W latent height and width, T tokens, D backbone width, Z encoder width.
"""  # noqa: E501

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from harness.backbones.sit import NetworkShape, parse_name
from harness.errors import UserError
from harness.rng import stream


@dataclass(frozen=True)
class Term:
    """A method's loss before its weight: `value` is a 0-dim float32 mean over images, `weight` a plain number."""

    value: Tensor
    weight: float


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What a method must be given, known before anything is prepared or trained."""

    images: bool = False
    """uint8 images of the batch, as `view.images_NCHW`."""
    encoders: tuple[str, ...] = ()
    """Frozen encoders whose tokens it reads, as `view.tokens[name]` [N, T, Z]."""
    ema: bool = False
    """Forward passes of the EMA backbone, through `view.teacher`."""


@dataclass(frozen=True, kw_only=True)
class Disclosure:
    """What a reader of a comparison must know about a method."""

    summary: str
    """One sentence: what the method adds to vanilla training."""
    paper: str
    """Title or name, and arXiv number."""
    pretrained: tuple[str, ...] = ()
    """Pretrained models beyond the autoencoder that every method uses, with their licences."""
    outside_data: tuple[str, ...] = ()
    """Data beyond the training set that those models have seen."""
    note: str = ""
    """What else stands beside every result, such as `re-implementation from the paper`."""


@dataclass(frozen=True, kw_only=True)
class BackboneShape(NetworkShape):
    """The shape of the backbone that a method builds its heads for: `depth`, `hidden_size`, `num_heads`, `input_size`,
    `patch_size`, `in_channels` and `num_classes` of the network, and what follows from them."""

    size: str
    """Size letter of the name (S, B, L, XL, ...), for defaults by size."""

    @classmethod
    def of(cls, name: str, *, input_size: int, in_channels: int, num_classes: int) -> "BackboneShape":
        """The shape of a named backbone, such as `SiT-B/2`, on latents of `in_channels` x `input_size` x `input_size`.

        Raises:
            UserError: for a name that is not known.
        """
        parts = parse_name(name)
        size = name.removeprefix("SiT-").split("/")[0]
        return cls(size=size, input_size=input_size, in_channels=in_channels, num_classes=num_classes, **parts)

    @property
    def grid(self) -> int:
        """Tokens along one side."""
        return self.input_size // self.patch_size

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.grid**2

    @property
    def patch_numbers(self) -> int:
        """P = p*p*C, the numbers of one token's patch."""
        return self.patch_size**2 * self.in_channels

    def check_block(self, field_name: str, block: int) -> int:
        """Return `block`, or raise `UserError` when it is outside 1..depth."""
        if not 1 <= block <= self.depth:
            raise UserError(f"{field_name} is {block}: the backbone has blocks 1 to {self.depth}")
        return block


@dataclass(frozen=True, kw_only=True)
class DataShape:
    """Shapes of the data that a method builds its heads for."""

    image_size: int
    num_classes: int
    encoder_width: Callable[[str], int]
    """Width Z of a named encoder's tokens; `UserError` for an unknown name."""


@dataclass(frozen=True)
class Progress:
    """Where training stands before the update: schedules are stated in images, never in epochs."""

    step: int
    images: int


class Teacher(Protocol):
    """A forward pass of the EMA backbone without gradient, up to `block`."""

    def __call__(
        self, x: Tensor, t: Tensor, y: Tensor, block: int, full_pass: bool = False, fp32: bool = False
    ) -> Tensor: ...


@dataclass(frozen=True)
class MethodDraws:
    """Draws of a method for one step: made for the global batch from the method's own streams, then sliced."""

    seed: int
    step: int
    batch_size: int
    made: dict[tuple[str, str, str], Tensor] = field(default_factory=dict)

    def get(self, method: str, name: str, kind: str, shape: tuple[int, ...]) -> Tensor:
        """Draw once a step and name, [batch_size, *shape], float32, on the CPU."""
        key = (method, name, kind)
        if key not in self.made:
            generator = stream(self.seed, f"method/{method}/{name}", self.step)
            draw = torch.rand if kind == "uniform" else torch.randn
            self.made[key] = draw((self.batch_size, *shape), generator=generator)
        assert self.made[key].shape[1:] == shape, f"{method} drew {name!r} with another shape in this step"
        return self.made[key]


@dataclass(frozen=True, kw_only=True)
class StepView:
    """What a method may read at one step: the rows of one forward pass. Read-only."""

    x0_NCHW: Tensor
    """Scaled clean latents that the step trains on (sampled from the posterior)."""
    x0_mean_NCHW: Tensor
    """Scaled posterior means of the same images."""
    noise_NCHW: Tensor
    t_N: Tensor
    xt_NCHW: Tensor
    labels_N: Tensor
    """Labels after label drop."""
    tokens: Mapping[str, Tensor]
    """Frozen-encoder tokens by encoder name, [N, T, Z]; only what `needs()` named."""
    images_NCHW: Tensor | None
    """uint8 images; only when `needs()` asked for them."""
    progress: Progress
    teacher: Teacher
    """EMA backbone: `teacher(x, t, y, block)` -> [N, T, D], no gradient."""
    rows: slice
    """Rows of the global batch that this view holds."""
    draws: MethodDraws
    method: str = ""
    """Name of the method that reads the view; its draws come from its own streams."""

    def of(self, method: str) -> "StepView":
        """The same view for another part of a sum of methods."""
        return replace(self, method=method)

    def uniform(self, name: str) -> Tensor:
        """This view's rows of a U[0, 1) draw, one number an image, float32 [N]."""
        return self.draws.get(self.method, name, "uniform", ())[self.rows].to(self.t_N.device)

    def normal(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """This view's rows of a N(0, 1) draw, float32 [N, *shape]."""
        return self.draws.get(self.method, name, "normal", shape)[self.rows].to(self.t_N.device)


class Method(ABC):
    """A training method: named loss terms on hidden states of the backbone. See the rule book above."""

    Config: ClassVar[type]
    """Frozen dataclass; becomes the method's section of the config."""
    is_control: ClassVar[bool] = False
    """Whether this is the default baseline of a comparison."""
    cost_variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """Other settings whose cost the overhead table shows beside the configured one: {label: {field: value}}."""
    disclosure: ClassVar[Disclosure]
    name: ClassVar[str] = ""
    """The file's name in `methods/`, set when the method is loaded."""

    def __init__(self, config: Any, backbone: BackboneShape, data: DataShape) -> None:
        """Build the heads for these shapes. `config` has been through `resolve`."""
        self.config = config
        self.backbone = backbone
        self.data = data
        self.heads = nn.ModuleDict()

    @classmethod
    def resolve(cls, config: Any, backbone: BackboneShape) -> Any:
        """The config with size defaults filled in and checked; `UserError` names field, value and range."""
        return config

    def needs(self) -> Needs:
        """What the method must be given."""
        return Needs()

    def taps(self, progress: Progress) -> tuple[int, ...]:
        """Blocks whose outputs `terms` reads, counted from 1."""
        return ()

    @abstractmethod
    def terms(self, view: StepView, hidden: Mapping[int, Tensor]) -> dict[str, Term]:
        """The method's losses: each a mean over the view's images, computed whatever its weight.

        Called more than once a step (cost, gradient norms), so the same view must give the same answer.

        Heads run in the run's precision; their outputs and the targets are cast to float32 before any
        normalisation, cosine or loss.
        """

    @torch.no_grad()
    def diagnostics(self, view: StepView, hidden: Mapping[int, Tensor]) -> dict[str, float]:
        """Numbers logged beside the terms; called at logged steps only."""
        return {}

    def search_space(self) -> dict[str, Any]:
        """Fields of `Config` that may be searched, with their choices."""
        return {}

    def state_dict(self) -> dict[str, Tensor]:
        """State beyond the heads' parameters."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state_dict` gave."""
        assert not state, f"{type(self).__name__} keeps no state, got {sorted(state)}"

    def load_released(self, heads: Mapping[str, Tensor]) -> None:
        """Load heads under the names of the authors' release, as `harness.official.load` gives them.

        Raises:
            UserError: when the method has no release with heads, or the tensors do not fit its heads.
        """
        raise UserError(f"{self.name} knows no released heads: leave them out")

    def initialize(self, seed: int) -> None:
        """Draw the heads' weights from the method's own stream, after and apart from the backbone's."""
        generator = stream(seed, f"method/{self.name}/init")
        for module in self.heads.modules():
            initialize_head(module, generator)


def initialize_head(module: nn.Module, generator: torch.Generator) -> None:
    """Linear as in the backbone (xavier-uniform, zero bias); a convolution keeps PyTorch's default rule."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight, generator=generator)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d):
        nn.init.kaiming_uniform_(module.weight, a=5**0.5, generator=generator)
        if module.bias is not None:
            bound = module.weight[0].numel() ** -0.5
            nn.init.uniform_(module.bias, -bound, bound, generator=generator)
    elif isinstance(module, (nn.LayerNorm, nn.BatchNorm2d)):
        module.reset_parameters()
    else:
        assert not any(True for _ in module.parameters(recurse=False)), (
            f"no rule initialises the parameters of {type(module).__name__}: add one to initialize_head"
        )
