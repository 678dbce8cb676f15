"""A small real setting for the rule book: digits, their latents and encoder tokens, and the smallest SiT."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

import methods
from harness.batches import Batch
from harness.config import OutputConfig, RunConfig
from harness.method import Method, Term
from harness.prepare import prepare
from harness.trainer import Run, extend_chain, set_up, train_step
from studies.run import Lab, build_method, open_lab, resolve_run
from studies.settings import build_parser, parse, run_config

CONTROL = methods.control()
SUM = "repa+vae_repa"
METHODS = [*methods.names(), SUM]
"""Every method there is, and a sum: a new file in methods/ is held to the rule book the moment it exists."""


@dataclass(frozen=True)
class Bench:
    """Builds runs of any method in the small setting, and trains them step by step."""

    lab: Lab

    def config(self, name: str, **runtime: Any) -> RunConfig:
        """The embedded preset for a method, with the smallest model."""
        parser = build_parser("train", "")
        words = ["--config", "digits", "--model.name", "SiT-pico/2", "--optimizer.batch_size", "16", "--method", name]
        asked = replace(run_config(parser, parse(parser, words)), output=self.lab.config.output)
        # clipping must be active from the first step, or the contract would not test it
        optimizer = replace(asked.optimizer, clip_norm=0.01)
        lab = replace(self.lab, config=replace(self.lab.config, runtime=replace(self.lab.config.runtime, **runtime)))
        return replace(resolve_run(lab, asked), optimizer=optimizer)

    def run(self, name: str, zeroed: bool = False, **runtime: Any) -> Run:
        """A run at step 0; `zeroed` gives every term the weight 0."""
        config = self.config(name, **runtime)
        method = build_method(self.lab, config)
        if zeroed:
            weight_zero(method)
        prepared = prepare(config, method.needs(), self.lab.accelerator.device)
        return set_up(config, method, prepared, self.lab.accelerator)

    def train(self, run: Run, steps: int) -> str:
        """Train some steps; returns the batch trace."""
        trace = ""
        for batch in run.batches.batches(0, steps):
            train_step(run, batch)
            trace = extend_chain(trace, batch.digest)
        return trace

    def batch(self, run: Run, step: int = 0) -> Batch:
        return run.batches.batch(step)


def weight_zero(method: Method) -> None:
    """Give every term of a method the weight 0, whatever its config calls its weights."""
    terms = method.terms

    def zeroed(*arguments: Any) -> dict[str, Term]:
        return {name: Term(term.value, 0.0) for name, term in terms(*arguments).items()}

    method.terms = zeroed  # type: ignore[method-assign]


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    root: Path = tmp_path_factory.mktemp("contract")
    parser = build_parser("train", "")
    words = ["--config", "digits", "--model.name", "SiT-pico/2", "--optimizer.batch_size", "16"]
    output = OutputConfig(runs=str(root / "runs"), cache=str(root / "cache"), mlflow=False)
    config = replace(run_config(parser, parse(parser, words)), output=output)
    threads = torch.get_num_threads()
    config = replace(config, runtime=replace(config.runtime, device="cpu", threads=threads))
    return Bench(open_lab(config, lambda what, done, total: None))


@pytest.fixture(params=METHODS)
def method_name(request: pytest.FixtureRequest) -> str:
    return request.param
