"""A small real setting that tests train in: digits, their latents and encoder tokens, and the smallest SiT."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser

import methods
from harness.config import OutputConfig, RunConfig
from harness.data.batches import Batch
from harness.method import Method, Term
from harness.training.step import Run, set_up, train_step
from harness.training.trainer import extend_chain
from studies.configs.cells import run_config
from studies.configs.settings import build_parser, parse
from studies.runs.lab import Lab, open_lab, resolve_run

WORDS = ("--config", "digits", "--model.name", "SiT-pico/2", "--optimizer.batch_size", "16")
CLIP_NORM = 0.01
"""Clipping must be active from the first step, or the contract would not test it."""


@dataclass(frozen=True)
class Bench:
    """Builds runs of any method in the small setting, and trains them step by step."""

    lab: Lab

    def config(self, name: str, *words: str, **runtime: Any) -> RunConfig:
        """The embedded preset for a method, with the smallest model; `words` are overrides as on the command line."""
        asked = replace(parsed(*words, "--method", name), output=self.lab.config.output)
        lab = replace(self.lab, config=replace(self.lab.config, runtime=replace(self.lab.config.runtime, **runtime)))
        resolved = resolve_run(lab, asked)
        # resolve_run takes these sections from the lab, which was opened without the overrides
        return replace(resolved, optimizer=asked.optimizer, ema=asked.ema, budget=asked.budget)

    def start(self, config: RunConfig, zeroed: bool = False) -> Run:
        """A run of a resolved config at step 0; `zeroed` gives every term the weight 0."""
        method = methods.build(config, self.lab.shape, self.lab.data)
        if zeroed:
            weight_zero(method)
        return set_up(config, method, self.lab.prepared.with_tokens(method.needs()), self.lab.accelerator)

    def run(self, name: str, zeroed: bool = False, **runtime: Any) -> Run:
        """A run at step 0 whose clipping is active from the first step."""
        return self.start(self.config(name, "--optimizer.clip_norm", str(CLIP_NORM), **runtime), zeroed)

    def train(self, run: Run, steps: int) -> str:
        """Train the first steps; returns the batch trace."""
        trace = ""
        for batch in run.batches.batches(0, steps):
            train_step(run, batch)
            trace = extend_chain(trace, batch.digest)
        return trace

    def batch(self, run: Run, step: int = 0) -> Batch:
        return run.batches.batch(step)


def parsed(*words: str) -> RunConfig:
    """The small setting's config with overrides, as `ditbench train` reads it."""
    return run_config(_parser(), parse(_parser(), [*WORDS, *words]))


@functools.cache
def _parser() -> ArgumentParser:
    """Built once: it takes as long as two training steps here, and parsing leaves it as it is."""
    return build_parser("train", "")


def open_bench(root: Path, cache: Path) -> Bench:
    """Open the lab on the CPU, with its runs under `root`."""
    output: Mapping[str, Any] = {"runs": str(root / "runs"), "cache": str(cache), "mlflow": False}
    config = replace(parsed(), output=OutputConfig(**output))
    config = replace(config, runtime=replace(config.runtime, device="cpu", threads=torch.get_num_threads()))
    return Bench(open_lab(config, lambda what, done, total: None))


def weight_zero(method: Method) -> None:
    """Give every term of a method the weight 0, whatever its config calls its weights."""
    terms = method.terms

    def zeroed(*arguments: Any) -> dict[str, Term]:
        return {name: Term(term.value, 0.0) for name, term in terms(*arguments).items()}

    method.terms = zeroed  # type: ignore[method-assign, assignment]
