"""The metrics that records may hold: their names, their directions and their order."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from harness.errors import UserError

if TYPE_CHECKING:
    pass


@dataclass(frozen=True)
class Metric:
    """How a metric is read. `direction` is the better one: `lower` or `higher`.

    `on_features` says whether it is computed on an extractor's features, and so may favour a method that was trained
    towards features of the same family.
    """

    prefix: str
    title: str
    direction: Literal["lower", "higher"]
    on_features: bool = True


METRICS = (
    Metric("fid", "FID", "lower"),
    Metric("kid", "KID", "lower"),
    Metric("sfid", "sFID", "lower"),
    Metric("is", "Inception score", "higher"),
    Metric("fd_pixels", "FD on pixels", "lower", on_features=False),
    Metric("fd", "Fréchet distance", "lower"),
    Metric("kd", "Kernel distance", "lower"),
    Metric("sfd", "Spatial Fréchet distance", "lower"),
    Metric("precision", "Precision", "higher"),
    Metric("recall", "Recall", "higher"),
    Metric("class_accuracy", "Asked class named", "higher", on_features=False),
    Metric("velocity_loss", "Held-out velocity loss", "lower", on_features=False),
)
"""Every metric family, its direction declared here and nowhere else. The longest matching prefix counts."""


def metric(name: str) -> Metric:
    """The family of a metric name such as `fd_efficientnet_lite0_898` or `fid50k`."""
    found = [m for m in METRICS if name.startswith(m.prefix)]
    if not found:
        raise UserError(f"metric {name!r} is not known: metrics begin with {', '.join(m.prefix for m in METRICS)}")
    return max(found, key=lambda m: len(m.prefix))


METRIC_ORDER = (
    *("fid", "fd", "sfid", "sfd", "kid", "kd", "is"),
    *("class_accuracy", "velocity_loss", "fd_pixels", "precision", "recall"),
)
"""Families of metrics in the order in which they are shown; the first one recorded is the main metric."""


def metric_rank(name: str) -> tuple[int, str]:
    """Sorts metric names in the order in which they are shown."""
    family = metric(name).prefix
    return (METRIC_ORDER.index(family) if family in METRIC_ORDER else len(METRIC_ORDER)), name


def main_metric(names: Iterable[str]) -> str:
    """The metric that stands for a result: the first in the order, of at least one."""
    return min(names, key=metric_rank)


def count_name(num: int) -> str:
    """N as it stands in metric names: 50000 -> 50k, 898 -> 898."""
    return f"{num // 1000}k" if num >= 1000 and num % 1000 == 0 else str(num)
