"""Runs on made-up data of real shapes, which go on for as long as a benchmark asks."""

import methods
from harness.config import (
    BudgetConfig,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    OutputConfig,
    RunConfig,
    RuntimeConfig,
)
from harness.frozen.encoders import encoder_width
from harness.machine.processes import open_accelerator
from harness.method import BackboneShape, DataShape
from harness.training.step import Run
from studies.configs.sections import resolve_sections
from studies.costs.synthetic import synthetic_run

CLASSES = 1000


def build_run(
    model: str,
    side: int,
    batch: int,
    runtime: RuntimeConfig,
    *,
    method: str = "",
    micro_batch: int = 0,
    output: OutputConfig | None = None,
) -> Run:
    """A run of the control, or of another method, on latents of 4 x `side` x `side`. `runtime` is resolved."""
    method = method or methods.control()
    config = RunConfig(
        study="bench",
        method=method,
        sections={method: methods.load(method).Config()},
        model=ModelConfig(name=model),
        data=DataConfig(name="digits"),
        optimizer=OptimizerConfig(batch_size=batch, micro_batch=micro_batch),
        budget=BudgetConfig(amount=10**9),
        runtime=runtime,
        output=output or OutputConfig(),
    )
    shape = BackboneShape.of(model, input_size=side, in_channels=4, num_classes=CLASSES)
    data = DataShape(image_size=8 * side, num_classes=CLASSES, encoder_width=encoder_width)
    return synthetic_run(resolve_sections(config, shape), shape, data, open_accelerator(runtime), batch)
