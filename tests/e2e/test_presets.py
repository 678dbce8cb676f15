"""The ImageNet presets run as they are but for size: every file that they name, in its real format and small."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import save_file

from harness.records.run_folder import RunFolder
from harness.rng import global_state_kept
from tests.unit.harness.evaluation.inception_factory import save_inception

Ditbench = Callable[..., tuple[int, str, str]]

CLASSES, IMAGES = ("n01440764", "n01443537"), 12
METHODS = {
    "imagenet256-b2": "sit",
    "imagenet256-l2": "repa",
    "imagenet256-xl2": "sra",
    "imagenet256-xl2-cfg": "vae_repa",
}
"""Each preset trains another of its methods here."""
SMALL = (
    *("--model.name", "SiT-pico/2", "--optimizer.batch_size", "4", "--optimizer.micro_batch", "2"),
    *("--data.holdout", "0.5", "--budget.amount", "2", "--output.log_every", "1", "--evaluation.points", "1"),
    *("--evaluation.num_samples", "10", "--evaluation.sampler.num_steps", "2", "--evaluation.kid_subset", "4"),
    *("--evaluation.chunk", "4", "--evaluation.velocity_images", "2", "--evaluation.grid_images", "2"),
    *("--final.num_samples", "12", "--final.sampler.num_steps", "4", "--output.mlflow", "false"),
)


@dataclass(frozen=True)
class Lab:
    """A folder with `imagenet/`, an autoencoder, and weights."""

    folder: Path

    def words(self) -> tuple[str, ...]:
        places = {"autoencoder.path": "vae", "output.runs": "runs", "output.cache": "cache"}
        given = [word for key, name in places.items() for word in (f"--{key}", str(self.folder / name))]
        return (*SMALL, *given, "--runtime.threads", str(torch.get_num_threads()))


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    folder = tmp_path_factory.mktemp("lab")
    generator = np.random.default_rng(0)
    for name in CLASSES:
        (folder / "imagenet/train" / name).mkdir(parents=True)
        for index in range(IMAGES):
            pixels = generator.integers(0, 256, (270, 300, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "imagenet/train" / name / f"{name}_{index}.JPEG")
    save_reference(folder / "imagenet/VIRTUAL_imagenet256_labeled.npz", generator)
    (folder / "weights").mkdir()
    save_inception(folder / "weights")
    with global_state_kept():
        torch.manual_seed(0)
        encoder = timm.create_model("vit_base_patch14_dinov2.lvd142m", pretrained=False, num_classes=0)
        levels = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
        autoencoder = AutoencoderKL(block_out_channels=(8,) * 4, norm_num_groups=4, layers_per_block=1, **levels)
    save_file(encoder.state_dict(), folder / "weights/vit_base_patch14_dinov2.lvd142m.safetensors")
    autoencoder.save_pretrained(folder / "vae")
    return Lab(folder)


def save_reference(path: Path, generator: np.random.Generator) -> None:
    """As ADM's reference batches: some images, and statistics of Inception's two layers over a whole data set."""
    statistics = {
        f"{kind}{end}": values
        for end, width in (("", 2048), ("_s", 2023))
        for kind, values in (("mu", np.zeros(width)), ("sigma", np.eye(width)))
    }
    np.savez(path, arr_0=generator.integers(0, 256, (10, 256, 256, 3), dtype=np.uint8), **statistics)


@pytest.mark.full
@pytest.mark.parametrize("name", METHODS)
def test_a_preset_runs_as_it_is_but_small(
    name: str, lab: Lab, ditbench: Ditbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(lab.folder)  # the preset's paths are relative
    monkeypatch.setenv("DITBENCH_WEIGHTS", str(lab.folder / "weights"))
    method = METHODS[name]
    status, _, err = ditbench("train", "--config", name, "--method", method, *lab.words())
    assert (status, err) == (0, "")
    run = RunFolder(lab.folder / "runs" / name / method / "seed0")
    manifest, (point,), (final,) = run.manifest(), run.lines("eval"), run.lines("final")
    assert manifest["status"] == "finished" and [line["step"] for line in run.lines("train")] == [1, 2]
    assert all(np.isfinite([line["loss"], line["grad_norm"]]).all() for line in run.lines("train"))
    assert measured(point["metrics"]) == {f"{kind}_inception_unverified_10" for kind in KINDS}
    assert measured(final["metrics"]) == {f"{kind}_inception_unverified_12" for kind in KINDS}
    sampler = manifest["final"]["protocol"]["sampler"]
    scale, high = (1.8, 0.7) if name.endswith("cfg") else (1.0, 1.0)
    assert (sampler["kind"], sampler["cfg_scale"], sampler["guidance_high"]) == ("sde-euler-maruyama", scale, high)
    assert manifest["protocol"]["sampler"]["kind"] == "ode-euler"
    assert manifest["config"]["runtime"]["precision"] == manifest["protocol"]["precision"] == "bf16"


KINDS = ("fd", "sfd", "kd", "is", "precision", "recall")
"""All that the standard evaluator gives; random weights make no FID of it."""


def measured(metrics: Mapping[str, float]) -> set[str]:
    """Names of the finite metrics on Inception's features."""
    return {name for name, value in metrics.items() if "_inception_" in name and np.isfinite(value)}
