"""Shared by all tests: one torch thread, deterministic algorithms, no network, and small shapes to test on.

Shapes: N images, C channels, H W latent height and width, T tokens, D backbone width, Z encoder width.
"""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
os.environ["MPLBACKEND"] = "Agg"
# Also for the processes that tests start: two threads each would wait for each other, as two tests run at once.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import functools
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from docstring_parser.attrdoc import AttributeDocstrings
from torch import Tensor

from harness.backbones.sit import SiT
from harness.flow import interpolate
from harness.method import BackboneShape, DataShape, Method, MethodDraws, Progress, StepView
from harness.rng import global_state_kept

if TYPE_CHECKING:
    from tests.bench_setting import Bench

ENCODER_WIDTH = 12
"""Z of every encoder in these tests."""


def pytest_configure() -> None:
    """Thread count and algorithms change the last bits of sums: both are fixed before any test runs."""
    torch.set_num_threads(int(os.environ.get("DITBENCH_TEST_THREADS", "1")))
    torch.use_deterministic_algorithms(True)
    # Half of the time of building a parser, which hundreds of tests do, goes into reading the same docstrings again.
    attribute_docs = functools.cache(partial(AttributeDocstrings.get_attr_docs, AttributeDocstrings()))
    AttributeDocstrings.get_attr_docs = lambda _, component: attribute_docs(component)  # type: ignore[method-assign]


@pytest.fixture(scope="session")
def shared_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of caches that all tests share: latents and tokens of the digits are made once."""
    given = os.environ.get("DITBENCH_TEST_CACHE")
    # With several test processes, one folder above those of each.
    shared = tmp_path_factory.getbasetemp().parent if "PYTEST_XDIST_WORKER" in os.environ else None
    cache = Path(given) if given else shared / "cache" if shared else tmp_path_factory.mktemp("cache")
    cache.mkdir(exist_ok=True)
    return cache


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory, shared_cache: Path) -> "Bench":
    """Runs in a small real setting."""
    from tests.bench_setting import open_bench  # here, because most tests need no data and no autoencoder

    return open_bench(tmp_path_factory.mktemp("bench"), shared_cache)


@pytest.fixture
def shape() -> BackboneShape:
    """A backbone of 6 blocks and 4 tokens that a test can run through in milliseconds."""
    return BackboneShape(
        size="tiny", depth=6, hidden_size=16, num_heads=2, input_size=4, patch_size=2, in_channels=3, num_classes=5
    )


@pytest.fixture
def shape_of() -> Callable[[str], BackboneShape]:
    """The shape of a named backbone on 32 x 32 x 4 latents of 1000 classes, as in the papers."""

    def build(name: str) -> BackboneShape:
        return BackboneShape.of(name, input_size=32, in_channels=4, num_classes=1000)

    return build


@pytest.fixture
def data_shape() -> DataShape:
    return DataShape(image_size=32, num_classes=5, encoder_width=lambda name: ENCODER_WIDTH)


@pytest.fixture
def make_backbone(shape: BackboneShape) -> Callable[..., SiT]:
    """`make_backbone(randomise=std, **fields)`: the small SiT; a std makes all weights random and opens every gate."""

    def build(randomise: float = 0.0, seed: int = 0, **fields: Any) -> SiT:
        generator = torch.Generator().manual_seed(seed)
        with global_state_kept():
            model = SiT(**{**{k: v for k, v in vars(shape).items() if k != "size"}, **fields})
        model.initialize(generator)
        if randomise:
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.requires_grad:
                        parameter.normal_(std=randomise, generator=generator)
        return model

    return build


@pytest.fixture
def make_method(shape: BackboneShape, data_shape: DataShape) -> Callable[..., Method]:
    """`make_method(cls, seed=0, **fields)`: resolved, built and initialised for the small backbone."""

    def build(cls: type[Method], seed: int = 0, **fields: Any) -> Method:
        config = cls.resolve(cls.Config(**fields), shape)
        with global_state_kept():
            method = cls(config, shape, data_shape)
        method.initialize(seed)
        return method

    return build


def no_teacher(*args: Any, **kwargs: Any) -> Tensor:
    raise AssertionError("this view has no teacher")


@pytest.fixture
def make_view(shape: BackboneShape) -> Callable[..., StepView]:
    """`make_view(num=4, encoders=(), **fields)`: a view with random latents, times, labels and tokens."""

    def build(num: int = 4, encoders: tuple[str, ...] = (), **fields: Any) -> StepView:
        generator = torch.Generator().manual_seed(77)
        size = (num, shape.in_channels, shape.input_size, shape.input_size)
        x0, mean, noise = (torch.randn(size, generator=generator) for _ in range(3))
        t = torch.rand(num, generator=generator)
        view = StepView(
            x0_NCHW=x0,
            x0_mean_NCHW=mean,
            noise_NCHW=noise,
            t_N=t,
            xt_NCHW=interpolate(x0, noise, t),
            labels_N=torch.randint(shape.num_classes + 1, (num,), generator=generator),
            tokens={e: torch.randn(num, shape.num_tokens, ENCODER_WIDTH, generator=generator) for e in encoders},
            images_NCHW=None,
            progress=Progress(step=3, images=3 * num),
            teacher=no_teacher,
            rows=slice(0, num),
            draws=MethodDraws(seed=0, step=3, batch_size=num),
        )
        return replace(view, **fields)

    return build
