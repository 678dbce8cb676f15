"""At what scale a claim was tried: the data, the backbone, and whatever else is not as in the paper."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reports.claims.statements import Claim, PaperScale
from reports.study.load import RecordedRun, Study

LATENT_SIDE = 32
"""Side of the papers' latents, which are those of 256 pixels."""


@dataclass(frozen=True)
class ClaimScale:
    """Where a claim was tried."""

    data: str
    """"" for counts that no data were needed for."""
    model: str
    after: str
    """Where runs were compared, in words; "" for counts without runs."""
    differences: tuple[str, ...]
    """What is not as in the paper, the most telling first, such as `not ImageNet`."""

    @property
    def is_papers(self) -> bool:
        """Whether nothing differs from the paper's scale."""
        return not self.differences

    @property
    def short(self) -> str:
        """Data and size, as `digits, SiT-nano/2`."""
        return ", ".join(filter(None, (self.data, self.model)))

    @property
    def text(self) -> str:
        """The scale in words, such as `SiT-nano/2 on digits after 420 steps, not ImageNet`."""
        where = f"{self.model} on {self.data}" if self.data else self.model
        first = self.differences[0] if self.differences else ""
        return ", ".join(filter(None, (f"{where} {self.after}".strip(), first)))


def place_of_runs(scale: PaperScale, claim: Claim, study: Study, cells: Sequence[str], name: str = "") -> ClaimScale:
    """The scale of a pair of cells.

    Args:
        scale: what the papers share.
        claim: whose published rows name the backbones and steps.
        study: with the cells.
        cells: labels of the pair.
        name: the metric that was measured; "" for costs.
    """
    runs = study.only(cells).runs
    run = next((run for run in runs if run.manifest.get("protocol")), runs[0])
    model = run.config["model"]["name"]
    is_same_data = _is_papers_data(scale, run)
    data = scale.data if is_same_data else _data_name(run)
    found = [] if is_same_data else [f"not {scale.data}"]
    found += _of_model(claim, model)
    if claim.kind in ("quality", "speed-up"):
        steps = [line["step"] for run in runs if (line := run.evaluation(study.point))]
        found += _of_budget(claim, model, max(steps, default=0))
        found += _of_training(scale, runs)
        found += _of_evaluation(scale, claim, run, name)
    if claim.kind == "seconds":
        found += _of_device(scale, run)
    return ClaimScale(data, model, "" if claim.kind == "count" else study.after, tuple(found))


def place_of_count(scale: PaperScale, claim: Claim, model: str, shapes: Mapping[str, int]) -> ClaimScale:
    """The scale of a row of `overhead.json`: counts depend on the backbone and on the size of the latents."""
    found = _of_model(claim, model)
    if shapes["input_size"] != LATENT_SIDE:
        found.append(f"not latents of {scale.image_size} pixels")
    return ClaimScale("", model, "", tuple(found))


def _is_papers_data(scale: PaperScale, run: RecordedRun) -> bool:
    """Whether as many images of the same size went into the caches, which may hold each image and its mirror."""
    num = run.cost.get("cache_images", 0)
    return run.config["data"]["image_size"] == scale.image_size and num in (scale.images, 2 * scale.images)


def _data_name(run: RecordedRun) -> str:
    """The data set's own name, or that of its folder."""
    data = run.config["data"]
    return Path(data["path"]).name if data.get("path") else data["name"]


def _of_model(claim: Claim, model: str) -> list[str]:
    models = list(dict.fromkeys(row.model for row in claim.published))
    return [f"not {' or '.join(models)}"] if models and model not in models else []


def _of_budget(claim: Claim, model: str, steps: int) -> list[str]:
    budgets = sorted({row.budget for row in claim.published if row.model == model})
    is_papers = not budgets or steps in budgets
    return [] if is_papers else [f"{steps:,} steps, not {' or '.join(f'{budget:,}' for budget in budgets)}"]


def _of_training(scale: PaperScale, runs: Sequence[RecordedRun]) -> list[str]:
    """Batch and frozen encoders that are not the paper's."""
    batch = runs[0].config["optimizer"]["batch_size"]
    found = [] if batch == scale.batch_size else [f"{batch} images a step, not {scale.batch_size}"]
    encoders = sorted({name for run in runs for name in run.facts.get("needs", {}).get("encoders", [])})
    if set(encoders) - set(scale.encoders):
        found.append(f"encoder {', '.join(encoders)}, not {', '.join(scale.encoders)}")
    return found


def _of_evaluation(scale: PaperScale, claim: Claim, run: RecordedRun, name: str) -> list[str]:
    found = [] if name == claim.metric else [f"{name}, not {claim.metric}"]
    sampler: Mapping[str, Any] = run.manifest.get("protocol", {}).get("sampler", {})
    wanted = {"kind": scale.sampler, "num_steps": scale.num_steps, "cfg_scale": scale.cfg_scale}
    differing = [field for field, value in wanted.items() if sampler.get(field) != value]
    return found + [f"sampler.{field} {sampler.get(field)}, not {wanted[field]}" for field in differing]


def _of_device(scale: PaperScale, run: RecordedRun) -> list[str]:
    device = str(run.manifest.get("environment", {}).get("device", ""))
    return [] if scale.device in device else [f"{device or 'an unknown device'}, not {scale.device}"]
