"""The shortest records that have a right shape, for tests that look at something else."""

from collections.abc import Mapping
from typing import Any

CONFIG: Mapping[str, Any] = {
    "model": {"name": "SiT-pico/2"},
    "data": {"name": "digits", "image_size": 32},
    "optimizer": {"batch_size": 16},
    "budget": {"unit": "steps", "amount": 8},
    "evaluation": {"points": 2},
}


def manifest(**fields: Any) -> dict[str, Any]:
    """A manifest; `format` is added when it is written."""
    return {"cell": "sit", "method": "sit", "seed": 0, "status": "running", "config": CONFIG, **fields}


def clocks(step: int) -> dict[str, float]:
    """What every line begins with."""
    seconds = dict.fromkeys(("train_seconds", "evaluation_seconds", "io_seconds"), float(step))
    return {"step": step, "images": 16 * step, "train_gflops": 0.5 * step, **seconds}


def train_line(step: int, **fields: Any) -> dict[str, Any]:
    """A line of `train.jsonl`."""
    return {**clocks(step), "base": 1.5, "terms": {}, "grad_norm": 0.5, "trace": "00", **fields}


def eval_line(step: int, **fields: Any) -> dict[str, Any]:
    """A line of `eval.jsonl` or `final.jsonl`."""
    return {**clocks(step), "point": 1, "protocol": "0", "metrics": {}, **fields}
