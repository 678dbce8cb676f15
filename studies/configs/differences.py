"""Which values two recorded configs differ in, and which of them may."""

from collections.abc import Mapping
from typing import Any

from harness.records.files import digest

MAY_CHANGE = (
    *("output.", "runtime.threads", "runtime.device", "runtime.checkpoint_activations", "optimizer.micro_batch"),
)
"""Settings that a continued run may change: they decide where things go and how fast, not what is trained. Another
number of threads or another device may still change the last bits of what is computed."""


def differing(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any, Any]]:
    """Dotted keys whose values differ, with both values; those that may change are left out."""
    found = []
    for key in {**before, **now}:
        name, a, b = f"{prefix}{key}", before.get(key), now.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found += differing(a, b, f"{name}.")
        elif digest(a) != digest(b) and not name.startswith(MAY_CHANGE):
            found.append((name, a, b))
    return found
