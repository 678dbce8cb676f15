"""A synthetic study on disk: smooth curves with seeded noise, every file that a run leaves behind."""

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from harness.records.files import canonical, digest, write_json
from harness.records.run_folder import RunFolder, run_path
from harness.records.schema import FORMAT

STEPS = tuple(range(100, 801, 100))
POINTS = len(STEPS)
BATCH_SIZE = 64
MAIN = "fd_efficientnet_lite0_898"
TILE = 32
IMAGENET_CLASSES = 1000

METHODS: dict[str, dict[str, Any]] = {
    "sit": {"gain": 0.0, "terms": {}, "taps": [], "encoders": [], "ema": False, "head_parameters": 0},
    "repa": {
        "gain": 0.25,
        "terms": {"repa": 0.5},
        "taps": [2],
        "encoders": ["efficientnet_lite2"],
        "ema": False,
        "head_parameters": 506_240,
    },
    "sra": {"gain": 0.1, "terms": {"sra": 0.2}, "taps": [2], "encoders": [], "ema": True, "head_parameters": 65_920},
    "vae_repa": {
        "gain": 0.15,
        "terms": {"vae_repa": 1.0},
        "taps": [1],
        "encoders": [],
        "ema": False,
        "head_parameters": 234_512,
    },
    "repa+vae_repa": {
        "gain": 0.32,
        "terms": {"repa": 0.5, "vae_repa": 1.0},
        "taps": [1, 2],
        "encoders": ["efficientnet_lite2"],
        "ema": False,
        "head_parameters": 740_752,
    },
}
SECTIONS = {
    "repa": {"block": 2, "weight": 0.5, "encoders": "efficientnet_lite2", "head_width": 512},
    "sra": {"student_block": 2, "teacher_block": 4, "weight": 0.2},
    "vae_repa": {"block": 1, "weight": 1.0, "loss": "smooth_l1", "head_layers": 5},
}
SUMMARIES = {
    "sit": "Vanilla training: the velocity loss alone.",
    "repa": "Aligns block k with the patch tokens of a frozen image encoder, through an MLP.",
    "sra": "Aligns an early block with a later block of the EMA teacher, which sees less noise.",
    "vae_repa": "Predicts the clean latent of each token from block k, through a deep MLP.",
}


def write_study(
    runs: Path,
    cells: Mapping[str, str] | None = None,
    seeds: Sequence[int] = (0, 1),
    study: str = "digits",
    baseline: str = "sit",
    unit: str = "steps",
    amount: float = STEPS[-1],
) -> Path:
    """Write finished runs of `cells` (label: method; the four methods and one sum by default); returns the study."""
    for cell, method in (cells or {name: name for name in METHODS}).items():
        for seed in seeds:
            write_run(runs, study, cell, method, seed, baseline, unit, amount)
    return Path(runs) / study


def write_run(
    runs: Path,
    study: str,
    cell: str,
    method: str,
    seed: int,
    baseline: str,
    unit: str = "steps",
    amount: float = STEPS[-1],
    section: Mapping[str, Any] | None = None,
    shift: float = 0.0,
) -> RunFolder:
    """Write one finished run. Numbers depend on (cell, seed, budget) alone.

    `section` changes settings of the method's own section, and `shift` is added to the main metric.
    """
    folder = RunFolder(run_path(runs, study, cell, seed))
    folder.create()
    whole = manifest(study, cell, method, seed, baseline)
    if section:
        whole["config"]["sections"] = {method: {**SECTIONS[method], **section}}
    whole["config"]["budget"] = {"unit": unit, "amount": amount}
    whole["digests"]["training"] = training(whole["config"])
    folder.write_manifest(whole)
    cost = counted_cost(method)
    write_json(folder.path / "cost.json", cost)
    generator = np.random.default_rng([seed, *hashlib.sha256(cell.encode()).digest()[:4]])
    gflops = cost["train_gflops_per_image"]
    steps = evaluated_steps(method, unit, amount, gflops)
    trained = [
        _train_line(method, seed, step, gflops, generator) for step in sorted({*range(20, steps[-1] + 1, 20), *steps})
    ]
    evaluated = [
        {**_eval_line(method, seed, step, gflops, generator), "point": point}
        for point, step in enumerate(steps, start=1)
    ]
    for line in evaluated:
        line["metrics"][MAIN] += shift
        _samples(seed, line["step"], METHODS[method]["gain"]).save(folder.path / line["samples"])
    write_lines(folder, "train", trained)
    write_lines(folder, "eval", evaluated)
    return folder


def write_lines(folder: RunFolder, name: str, lines: Sequence[Mapping[str, Any]]) -> None:
    """Write a whole `<name>.jsonl` at once: appending syncs the disk at every line."""
    (folder.path / f"{name}.jsonl").write_text("".join(canonical(line) + "\n" for line in lines))


def counted_cost(method: str) -> dict[str, Any]:
    """Forward passes in GMACs: 0.0206 the backbone, 0.002 a head, 0.011 a teacher, 0.3 an encoder, 0.5 the VAE."""
    facts = METHODS[method]
    head, teacher = 0.002 * len(facts["terms"]), 0.011 if facts["ema"] else 0.0
    encoder, train = 0.3 * len(facts["encoders"]), 2 * (3 * (0.0206 + head) + teacher)
    return {
        "backbone_forward_gmacs": 0.0206,
        "head_forward_gmacs": head,
        "teacher_forward_gmacs": teacher,
        "encoder_forward_gmacs": encoder,
        "vae_encode_gmacs": 0.5,
        "backbone_parameters": 1_930_000,
        "head_parameters": facts["head_parameters"],
        "external_parameters": 4_870_000 * len(facts["encoders"]),
        "train_gflops_per_image": train,
        "train_gflops_per_image_online": train + 2 * encoder,
        "cache_images": 1797,
        "cache_gflops_per_image": 2 * (0.5 + encoder),
        "cache_gflops": 1797 * 2 * (0.5 + encoder),
    }


def evaluated_steps(method: str, unit: str, amount: float, gflops: float) -> list[int]:
    """Steps at which a run whose images cost `gflops` has spent 1 to POINTS equal shares of its budget."""
    per_step = {
        "steps": 1,
        "images": BATCH_SIZE,
        "train_gflops": BATCH_SIZE * gflops,
        "seconds": step_seconds(method),
    }
    return [math.ceil(amount * point / POINTS / per_step[unit] - 1e-9) for point in range(1, POINTS + 1)]


def step_seconds(method: str) -> float:
    return 0.05 * (1 + 0.5 * len(METHODS[method]["terms"]))


def manifest(study: str, cell: str, method: str, seed: int, baseline: str) -> dict[str, Any]:
    facts = METHODS[method]
    parts = method.split("+")
    config = {
        "study": study,
        "cell": cell,
        "method": method,
        "seed": seed,
        "model": {"name": "SiT-nano/2", "qk_norm": False},
        "data": {"name": "digits", "path": "", "image_size": TILE, "holdout": 0.5, "split_seed": 0},
        "autoencoder": {"path": "digits"},
        "optimizer": {"lr": 0.0015, "batch_size": BATCH_SIZE, "micro_batch": 0, "clip_norm": 1.0, "label_drop": 0.1},
        "ema": {"decay": 0.999, "warmup": 50},
        "budget": {"unit": "steps", "amount": STEPS[-1]},
        "evaluation": {"points": POINTS, "num_samples": 898, "extractor": "efficientnet_lite0", "grid_images": 30},
        "runtime": {"device": "cpu", "precision": "bf16", "compile": False, "tf32": False, "threads": 2},
        "output": {"runs": "runs", "log_every": 20},
        "sections": {part: SECTIONS[part] for part in parts if part in SECTIONS},
    }
    return {
        "format": FORMAT,
        "study": study,
        "cell": cell,
        "method": method,
        "seed": seed,
        "status": "finished",
        "status_detail": {},
        "baseline": baseline,
        "command": ["ditbench", "compare", "--config", "digits"],
        "config": config,
        "digests": {
            "training": training(config),
            "evaluation": digest(protocol()),
            "data": digest("digits"),
            "autoencoder": digest("autoencoder"),
            "initial_weights": digest(["weights", seed]),
            **{f"encoder/{name}": digest(name) for name in facts["encoders"]},
        },
        "protocol": protocol(),
        "lines": {
            "floor": {MAIN: 3.1, "kd_efficientnet_lite0_898": 0.0002, "class_accuracy": 0.97},
            "reconstruction": {MAIN: 6.4, "kd_efficientnet_lite0_898": 0.0031, "class_accuracy": 0.96},
        },
        "method_facts": {
            "summary": " ".join(SUMMARIES[part] for part in parts),
            "paper": f"{method}, arXiv 0000.00000" if method != "sit" else "SiT, arXiv 2401.08740",
            "note": "re-implementation from the paper" if "vae_repa" in parts else "",
            "pretrained": [f"{name} (Apache-2.0)" for name in facts["encoders"]],
            "outside_data": ["ImageNet-1k with labels" for _ in facts["encoders"]],
            "heads": {
                part: {"parameters": facts["head_parameters"] // len(facts["terms"]), "shapes": [[512, 128], [512]]}
                for part in facts["terms"]
            },
            "head_parameters": facts["head_parameters"],
            "taps": facts["taps"],
            "terms": facts["terms"],
            "needs": {"images": False, "encoders": facts["encoders"], "ema": facts["ema"]},
            "encoder_families": ["efficientnet" for _ in facts["encoders"]],
        },
        "model": {"name": "SiT-nano/2", "parameters": 1_930_000, "num_classes": 10},
        "environment": {
            "git_commit": "0123456789abcdef0123456789abcdef01234567",
            "git_dirty": False,
            "device": "cpu x86_64",
            "precision": "bf16",
            "threads": 2,
            "platform": "Linux-6.1-x86_64",
            "packages": {"torch": "2.14.1", "torch-fidelity": "0.4.0"},
        },
        "extractor_family": "efficientnet",
        "warnings": ["N = 898 lies below the 1,280 dimensions of the features: compare at equal N only"],
    }


def training(config: Mapping[str, Any]) -> str:
    return digest({k: config[k] for k in ("model", "optimizer", "ema", "budget")})


def protocol() -> dict[str, Any]:
    return {
        "sampler": {"kind": "sde-euler-maruyama", "num_steps": 50, "cfg_scale": 1.0},
        "num_samples": 898,
        "seed": 0,
        "extractor": {"name": "efficientnet_lite0", "weights": "5f0d9a", "size": 64},
        "kid_subset": 500,
    }


def _clocks(method: str, step: int, gflops: float) -> dict[str, Any]:
    images = BATCH_SIZE * step
    return {
        "step": step,
        "images": images,
        "train_gflops": gflops * images,
        "train_seconds": step_seconds(method) * step,
        "evaluation_seconds": 0.03 * step,
        "io_seconds": 0.001 * step,
    }


def _train_line(method: str, seed: int, step: int, gflops: float, generator: np.random.Generator) -> dict[str, Any]:
    fall = float(np.exp(-step / 200))
    base = 0.62 + 0.9 * fall + 0.01 * generator.standard_normal()
    terms = {
        name: {"value": -0.8 + 0.7 * fall + 0.005 * generator.standard_normal(), "weight": weight}
        for name, weight in METHODS[method]["terms"].items()
    }
    return {
        **_clocks(method, step, gflops),
        "loss": base + sum(term["weight"] * term["value"] for term in terms.values()),
        "base": base,
        "terms": terms,
        "grad_norm": 0.4 + fall + 0.02 * generator.standard_normal(),
        "images_per_s": 1280.0,
        "trace": digest(["trace", seed, step]),
        "diagnostics": {},
    }


def _eval_line(method: str, seed: int, step: int, gflops: float, generator: np.random.Generator) -> dict[str, Any]:
    fall = float(np.exp(-step / 170)) * (1 - METHODS[method]["gain"])
    noise = generator.standard_normal(8)
    metrics = {
        MAIN: 14 + 260 * fall - 10 * METHODS[method]["gain"] + 1.2 * noise[0] + 0.8 * seed,
        "kd_efficientnet_lite0_898": 0.012 + 0.4 * fall + 0.0006 * noise[1],
        "class_accuracy": 0.95 - 0.8 * fall + 0.004 * noise[2],
        "fd_pixels_898": 5 + 60 * fall + 0.3 * noise[3],
        "precision_efficientnet_lite0_898": 0.8 - 0.5 * fall + 0.01 * noise[4],
        "recall_efficientnet_lite0_898": 0.6 - 0.4 * fall + 0.01 * noise[5],
        "velocity_loss": 0.7 + 0.5 * fall - 0.02 * METHODS[method]["gain"] + 0.0005 * noise[6],
        "velocity_loss_t0": 1.2 + 0.5 * fall + 0.0005 * noise[7],
    }
    return {
        **_clocks(method, step, gflops),
        "protocol": digest(protocol()),
        "metrics": {name: float(value) for name, value in metrics.items()},
        "bad_images": 0,
        "gradient_norms": {"velocity": 0.5 + fall, **{name: 0.2 * w for name, w in METHODS[method]["terms"].items()}},
        "samples": f"samples/step_{step:08d}.png",
    }


def _samples(seed: int, step: int, gain: float) -> Image.Image:
    """30 tiles, 10 a row; tile i holds the grey level `tile_level(i)`, with a disc that sharpens with training."""
    canvas = np.zeros((3 * TILE, 10 * TILE, 3), dtype=np.uint8)
    rows, columns = np.mgrid[:TILE, :TILE] - (TILE - 1) / 2
    for i in range(30):
        radius = np.hypot(rows * (1 + 0.06 * (i % 10)), columns)
        edge = 1 / (1 + np.exp((radius - 9 - seed) * step / STEPS[-1] * (1 + gain)))
        tile = tile_level(i) + (255 - tile_level(i)) * edge
        top, left = TILE * (i // 10), TILE * (i % 10)
        canvas[top : top + TILE, left : left + TILE] = np.round(tile).astype(np.uint8)[..., None]
        canvas[top, left] = (i, 0, 0)
    return Image.fromarray(canvas)


def tile_level(i: int) -> int:
    """Background of tile i; its top left pixel is (i, 0, 0)."""
    return 6 * (i % 10)


# -- final evaluations ----------------------------------------------------------------------------------------------


def final_protocol(**fields: Any) -> dict[str, Any]:
    """The protocol of a final evaluation; `fields` replace the plain ones."""
    sampler = {"kind": "sde-euler-maruyama", "num_steps": 250, "cfg_scale": 1.0}
    return {**protocol(), "sampler": sampler, "num_samples": 50_000, **fields}


def evaluate_finally(folder: RunFolder, metrics: Mapping[str, float], **fields: Any) -> None:
    """Give a finished run a final evaluation with these metrics; `fields` of its protocol replace the plain ones."""
    named = final_protocol(**fields)
    lines = {"floor": {"fid50k": 1.8}, "reconstruction": {"fid50k": 2.3}}
    config = {name: named[name] for name in ("num_samples", "sampler", "seed")}
    edit_manifest(folder, final={"protocol": named, "lines": lines}, digests={"final": digest(named)})
    edit_manifest(folder, config={"final": config})
    last = folder.lines("eval")[-1]
    clocks = {name: value for name, value in last.items() if name not in ("gradient_norms", "samples")}
    write_lines(folder, "final", [{**clocks, "protocol": digest(named), "metrics": metrics}])


FINAL = {
    "sit": {"fid50k": (33.1, 33.4, 32.8), "is50k": (43.9, 43.6, 44.1), "precision50k": (0.53, 0.528, 0.532)},
    "repa": {"fid50k": (24.5, 24.1, 24.9), "is50k": (59.8, 60.1, 59.2), "precision50k": (0.59, 0.593, 0.588)},
    "vae_repa": {"fid50k": (29.0, 28.7, 32.9), "is50k": (49.7, 50.2, 49.9), "precision50k": (0.56, 0.561, 0.555)},
}
"""Metrics of final evaluations of the size that papers print for SiT-B/2 after 400,000 steps, by cell, seeds 0 to 2."""


def write_final_study(runs: Path, seeds: Sequence[int] = (0, 1, 2), **fields: Any) -> Path:
    """A study that looks like ImageNet's at 256 pixels, SiT-B/2 and 400,000 steps of 256, finally evaluated.

    `fields` of the final protocol replace the plain ones.
    """
    study = write_study(runs, {cell: cell for cell in FINAL}, seeds, study="imagenet")
    for cell, metrics in FINAL.items():
        for seed in seeds:
            folder = run_folder(study, cell, seed)
            enlarge(folder)
            evaluate_finally(folder, {name: values[seed] for name, values in metrics.items()}, **fields)
    return study


def enlarge(folder: RunFolder, name: str = "SiT-B/2", num_classes: int = IMAGENET_CLASSES, side: int = 256) -> None:
    """Let a run be of another size and other images, with 500 times as many steps of 256 images and no pictures."""
    config = folder.manifest()["config"]
    changes = {
        "model": {**config["model"], "name": name},
        "data": {**config["data"], "name": "preprocessed", "image_size": side},
        "optimizer": {**config["optimizer"], "batch_size": 256},
        "budget": {"unit": "steps", "amount": 500 * STEPS[-1]},
    }
    edit_manifest(
        folder, config=changes, model={"name": name, "num_classes": num_classes}, extractor_family="inception"
    )
    for record in ("train", "eval"):
        lines = folder.lines(record)  # type: ignore[arg-type]
        clocks = [{"step": 500 * line["step"], "images": 500 * 256 * line["step"]} for line in lines]
        write_lines(folder, record, [line | {"samples": ""} | clock for line, clock in zip(lines, clocks, strict=True)])


# -- ablations ------------------------------------------------------------------------------------------------------

Level = int | float | str | bool


def write_ablation(
    runs: Path,
    settings: Sequence[Mapping[str, Level]],
    defaults: Mapping[str, Level],
    shift: Callable[[Mapping[str, Level], int], float] = lambda setting, seed: 0.0,
    *,
    kind: str = "grid",
    method: str = "vae_repa",
    seeds: Sequence[int] = (0, 1),
    depth: int = 6,
    study: str = "blocks",
    **fields: Any,
) -> Path:
    """Write the runs of every setting and of the control at every seed, and `ablation.json`; returns the study.

    Args:
        runs: the folder of studies.
        settings: each gives every axis a value; the first is the default's.
        defaults: axis name -> default.
        shift: added to the main metric of a setting at a seed.
        kind: of the ablation.
        method: whose settings they are.
        seeds: of all runs.
        depth: blocks of the backbone.
        study: its name.
        fields: of the record, in place of the plain ones.
    """
    for seed in seeds:
        write_run(runs, study, "sit", "sit", seed, "sit")
        for setting in {cell_label(method, each, defaults): each for each in settings}.values():
            label = cell_label(method, setting, defaults)
            write_run(runs, study, label, method, seed, "sit", section=setting, shift=shift(setting, seed))
    record = {
        "format": FORMAT,
        "id": "0123abcd",
        "study": study,
        "kind": kind,
        "objective": MAIN,
        "direction": "lower",
        "seeds": list(seeds),
        "control": "sit",
        "trials": len(settings) if kind == "search" else 0,
        "sampler": {"name": "tpe", "seed": 0} if kind == "search" else {},
        "pruner": "none",
        "storage": "journal",
        "workers": 1,
        "commands": [["ditbench", "ablate"]],
        "budget": {"unit": "steps", "amount": STEPS[-1]},
        "points": POINTS,
        "model": {"name": "SiT-nano/2", "depth": depth},
        "base": {},
        "methods": {method: _method_record(method, settings, defaults)},
        "trial_list": [_trial_record(method, i, setting, defaults) for i, setting in enumerate(settings)],
    }
    write_json(Path(runs) / study / "ablation.json", {**record, **fields})
    return Path(runs) / study


def cell_label(method: str, setting: Mapping[str, Level], defaults: Mapping[str, Level]) -> str:
    return ",".join([method, *(f"{name}={value}" for name, value in setting.items() if value != defaults[name])])


def _method_record(
    method: str, settings: Sequence[Mapping[str, Level]], defaults: Mapping[str, Level]
) -> dict[str, Any]:
    kinds = {bool: "bool", int: "int", float: "float", str: "choice"}
    axes = [
        {
            "name": name,
            "kind": kinds[type(default)],
            "default": default,
            "levels": list(dict.fromkeys(setting[name] for setting in settings)),
        }
        for name, default in defaults.items()
    ]
    return {"default_cell": method, "section": dict(SECTIONS.get(method, {})), "space": {}, "axes": axes}


def _trial_record(
    method: str, number: int, setting: Mapping[str, Level], defaults: Mapping[str, Level]
) -> dict[str, Any]:
    return {
        "method": method,
        "number": number,
        "cell": cell_label(method, setting, defaults),
        "setting": dict(setting),
        "state": "complete",
        "value": 1e9,
        "intermediate": {},
        "started": "2026-01-01T00:00:00",
        "ended": "2026-01-01T01:00:00",
        "workers": ["host:1"],
        "spent": {"budget": 1.0},
    }


def set_values(study: Path, cell: str, *values: float, name: str = MAIN) -> None:
    """Set a metric of a cell at its last evaluation, for seeds 0, 1, ..."""
    for seed, value in enumerate(values):
        folder = run_folder(study, cell, seed)
        edit_lines(folder, "eval", metrics={**folder.lines("eval")[-1]["metrics"], name: value})


def edit_trial(study: Path, number: int, **fields: Any) -> None:
    """Change fields of a trial in the record."""
    path = study / "ablation.json"
    record = json.loads(path.read_text())
    record["trial_list"][number] |= fields
    write_json(path, record)


def prune(folder: RunFolder, kept: int) -> None:
    """Make a finished run one that was pruned after `kept` evaluations."""
    edit_manifest(folder, status="pruned")
    edit_lines(folder, "eval", keep=kept)
    last = folder.lines("eval")[-1]["step"]
    edit_lines(folder, "train", keep=sum(line["step"] <= last for line in folder.lines("train")))


def edit_manifest(folder: RunFolder, **fields: Any) -> None:
    """Change top-level fields, or with a mapping some fields inside one."""
    whole = folder.manifest()
    for name, value in fields.items():
        whole[name] = {**whole[name], **value} if isinstance(value, Mapping) and name in whole else value
    folder.write_manifest({k: v for k, v in whole.items() if k != "format"})


def edit_lines(folder: RunFolder, name: str, keep: int | None = None, **last: Any) -> None:
    """Keep the first `keep` lines of `<name>.jsonl` and change fields of the last of them."""
    lines = folder.lines(name)[:keep]  # type: ignore[arg-type]
    if lines:
        lines[-1] |= last
    write_lines(folder, name, lines)


def diverge(folder: RunFolder, step: int, *parts: str, kept: int) -> None:
    """Make a finished run one that diverged after `step` updates, with `kept` evaluations."""
    edit_manifest(
        folder,
        status="diverged",
        status_detail={"step": step, "parts": list(parts), "checkpoint": f"checkpoints/diverged_{step:08d}"},
    )
    edit_lines(folder, "eval", keep=kept)
    (folder.checkpoints / f"diverged_{step:08d}").mkdir()
    edit_lines(folder, "train", keep=sum(line["step"] <= step for line in folder.lines("train")))


def fail(folder: RunFolder, error: str) -> None:
    """Make a finished run one that failed before it had recorded anything but its settings."""
    whole = folder.manifest()
    manifest = {name: whole[name] for name in ("cell", "method", "seed", "config")}
    detail = {"error": error, "trace": f"Traceback:\n  {error}\n", "log": "log.txt", "ended": "2026-01-01T00:00:00"}
    folder.write_manifest({**manifest, "status": "failed", "status_detail": detail})
    (folder.path / "log.txt").write_text(detail["trace"])
    for name in ("train.jsonl", "eval.jsonl", "cost.json"):
        (folder.path / name).unlink()


def run_folder(study: Path, cell: str, seed: int) -> RunFolder:
    return RunFolder(study / cell / f"seed{seed}")
