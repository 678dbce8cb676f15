"""Vanilla SiT: the velocity loss alone. The control of every comparison."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from harness.method import Disclosure, Method, StepView, Term


@dataclass(frozen=True, kw_only=True)
class SitConfig:
    """Vanilla SiT has nothing to set."""


class Sit(Method):
    """L = L_v. No head, target, schedule or extra pass."""

    Config = SitConfig
    is_control = True
    disclosure = Disclosure(summary="Velocity loss alone.", paper="SiT, arXiv 2401.08740")

    def terms(self, view: StepView, hidden: Mapping[int, Tensor]) -> dict[str, Term]:
        return {}
