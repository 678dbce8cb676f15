"""Where the time of a REPA step goes, by operator: the naive loop's, and the trainer's from cached tokens.

SiT-B/2, batch 8, 256 tokens, as in `training_step.py`. Seconds of an operator are those of its own in one step, mean of
two, by torch's profiler; what runs forward and backward is added up.
"""

import tempfile
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile, record_function

from harness.machine import environment
from tests.benchmarks.naive_loop import NaiveLoop
from tests.benchmarks.trainer_loops import BATCH, seconds, trainer_run, trainer_steps
from tests.benchmarks.training_step import MODEL, SIZE

TITLE = "a REPA step of SiT-B/2 by operator: the naive loop, and the trainer from cached tokens"
METHOD, ENCODER = "repa", "of all, in the encoder"
WARM_UP, STEPS = 1, 2
NAMES = {
    "mm": "linear layers",
    "addmm": "linear layers",
    "gelu": "GELU",
    "gelu_backward": "GELU",
    "copy_": "copies and casts",
    "_fused_adamw_": "AdamW, fused",
    "_foreach_lerp_": "EMA, all tensors at once",
    "native_layer_norm": "layer norm",
    "native_layer_norm_backward": "layer norm",
}
"""What operators are called in the table; others keep their names."""
SHOWN = 0.01
"""Share of a step from which an operator has a row."""


def profiled(step: Callable[[], object]) -> Counter[str]:
    """Seconds of one step by operator, and inside of the encoder."""
    for _ in range(WARM_UP):
        step()
    with profile(activities=[ProfilerActivity.CPU]) as found:
        for _ in range(STEPS):
            step()
    spent: Counter[str] = Counter()
    for event in found.key_averages():
        name = event.key.removeprefix("aten::")
        if name == ENCODER:
            spent[ENCODER] += event.cpu_time_total / STEPS / 1e6
        elif "scaled_dot_product" in name:
            spent["attention"] += event.self_cpu_time_total / STEPS / 1e6
        else:
            spent[NAMES.get(name, f"`{name}`")] += event.self_cpu_time_total / STEPS / 1e6
    return spent


def naive_step() -> Counter[str]:
    loop = NaiveLoop(MODEL, SIZE, BATCH, environment.resolve_device("auto"))
    encode = loop.encoder.forward_features

    def recorded(*arguments: Any) -> Any:
        with record_function(ENCODER):
            return encode(*arguments)

    loop.encoder.forward_features = recorded
    return profiled(loop.repa)


def trainer_step() -> Counter[str]:
    with tempfile.TemporaryDirectory() as runs:
        run = trainer_run(MODEL, SIZE, Path(runs), METHOD)
        with closing(trainer_steps(run, Path(runs))) as steps:  # type: ignore[type-var]
            return profiled(lambda: seconds(steps, 1, run.device))


def measure() -> list[dict[str, Any]]:
    naive, trainer = naive_step(), trainer_step()
    whole = [sum(spent.values()) - spent[ENCODER] for spent in (naive, trainer)]
    is_large = {name for name in (naive | trainer) if max(naive[name] / whole[0], trainer[name] / whole[1]) >= SHOWN}
    rows = [(name, naive[name], trainer[name]) for name in is_large - {ENCODER}]
    rows.sort(key=lambda row: -row[1] - row[2])
    others = [total - sum(row[place] for row in rows) for place, total in enumerate(whole, start=1)]
    rows += [("all else", *others), ("all", *whole), (ENCODER, naive[ENCODER], trainer[ENCODER])]
    return [
        {
            "operator": name,
            "naive, s": before,
            "trainer, s": after,
            "naive, share": f"{before / whole[0]:.1%}",
            "trainer, share": f"{after / whole[1]:.1%}",
        }
        for name, before, after in rows
    ]
