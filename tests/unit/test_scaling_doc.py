"""The tables of docs/scaling.md against the presets, and against costs worked out by hand."""

import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
RATES = (109e12, 346e12)
"""FLOPs a second that the page takes an A100 and an H100 to sustain."""
TRAINING_GMACS = {
    "SiT-B/2": {"sit": 69.01, "repa": 74.64, "sra": 86.15, "vae_repa": 75.37},
    "SiT-L/2": {"sit": 242.08, "repa": 248.12, "sra": 299.09, "vae_repa": 253.38},
    "SiT-XL/2": {"sit": 355.85, "repa": 362.09, "sra": 444.65, "vae_repa": 370.15},
}
"""Of one image: 3 x (forward + head), and SRA's teacher up to its block (15.33, 53.79, 84.72)."""
FORWARD_GMACS = {"SiT-B/2": 23.00, "SiT-L/2": 80.69, "SiT-XL/2": 118.62}
DECODER_GMACS = 311.7
GUIDED_STEPS = 172
"""Of 250: starting times 1 - 0.96 i / 249 of at most 0.7 have i from 78 to 249."""
HELD_OUT_PASSES = 4 * 256
"""Of the velocity loss, at each evaluation."""


def rows() -> list[list[str]]:
    """Cells of the table of hours, with the preset's name in every row."""
    text = (ROOT / "docs" / "scaling.md").read_text()
    body = text[text.index("| preset | cell |") :].split("\n\n")[0].splitlines()[2:]
    found, preset = [], ""
    for line in body:
        cells = [cell.strip(" `") for cell in line.strip("|").split("|")]
        preset = cells[0] or preset
        found.append([preset, *cells[1:]])
    return found


def number(text: str) -> float:
    return float(text.replace(",", ""))


def settings(preset: str) -> dict:
    return yaml.safe_load((ROOT / "studies" / "presets" / f"{preset}.yaml").read_text())


def protocol_flops(model: str, protocol: dict) -> float:
    """Of one evaluation."""
    calls = protocol["sampler"]["num_steps"]
    if protocol["sampler"].get("cfg_scale", 1) != 1:
        calls += GUIDED_STEPS
    of_sample = calls * FORWARD_GMACS[model] + DECODER_GMACS
    return 2e9 * (protocol["num_samples"] * of_sample + HELD_OUT_PASSES * FORWARD_GMACS[model])


def half(text: str) -> float:
    """Half of the last digit that is printed, and a little for the GMACs' own digits."""
    decimals = len(text.partition(".")[2])
    return 0.5 * 10**-decimals + 5e-4 * number(text)


def test_every_preset_has_its_methods() -> None:
    found = [(preset, cell) for preset, cell, *_ in rows()]
    presets = ("imagenet256-b2", "imagenet256-l2", "imagenet256-xl2", "imagenet256-xl2-cfg")
    assert found == [(preset, cell) for preset in presets for cell in (*settings(preset)["methods"], "all")]


def test_compute_and_hours() -> None:
    sums: dict[str, list[float]] = {}
    for preset, cell, *printed in rows():
        config = settings(preset)
        model = config["model"]["name"]
        if cell == "all":
            expected = sums[preset]
        else:
            images = config["budget"]["amount"] * config["optimizer"]["batch_size"]
            training = 2e9 * TRAINING_GMACS[model][cell] * images
            points = config["evaluation"]["points"] * protocol_flops(model, config["evaluation"])
            evaluations = points + protocol_flops(model, config["final"])
            hours = [flops / rate / 3600 for flops in (training, evaluations) for rate in RATES]
            expected = [training / 1e18, *hours]
            so_far = sums.setdefault(preset, [0.0] * len(expected))
            sums[preset] = [a + b for a, b in zip(so_far, expected, strict=True)]
        for text, value in zip(printed, expected, strict=True):
            assert number(text) == pytest.approx(value, abs=half(text)), (preset, cell, printed)


def test_the_price_of_checkpointing() -> None:
    """One forward pass of the backbone more, for a run of the control."""
    text = (ROOT / "docs" / "scaling.md").read_text()
    body = text[text.index("| preset | A100, h | checkpointed |") :].split("\n\n")[0].splitlines()[2:]
    found = [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in body]
    assert [preset for preset, *_ in found] == list(dict.fromkeys(preset for preset, *_ in rows()))
    for preset, *printed in found:
        config = settings(preset)
        model, images = config["model"]["name"], config["budget"]["amount"] * config["optimizer"]["batch_size"]
        training = 2e9 * TRAINING_GMACS[model]["sit"] * images
        more = 2e9 * FORWARD_GMACS[model] * images
        expected = [flops / rate / 3600 for rate in RATES for flops in (training, training + more)]
        for text, value in zip(printed, expected, strict=True):
            assert number(text) == pytest.approx(value, abs=half(text)), (preset, printed)


def test_disk() -> None:
    """The caches' bytes are written as products."""
    text = (ROOT / "docs" / "scaling.md").read_text()
    products = re.findall(r"\| ([\d,]+(?: x \d+)+) \| ([\d.]+) \|", text)
    assert len(products) == 3
    for product, printed in products:
        num_bytes = 1
        for factor in product.split(" x "):
            num_bytes *= int(factor.replace(",", ""))
        assert float(printed) == pytest.approx(num_bytes / 1e9, abs=0.05)
