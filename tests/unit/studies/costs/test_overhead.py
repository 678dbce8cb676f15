"""The overhead table: which rows there are, what they hold, and how they are rendered and saved."""

import csv
import dataclasses
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import methods
from harness.errors import UserError
from harness.method import Disclosure, Method, StepView, Term
from reports.costs import overhead as rendering
from reports.costs.overhead import Overhead, figure, published_rows, sections, write
from studies.costs import overhead as studies_overhead
from studies.costs.overhead import Request, counted_rows, variants

SMALL = {"input_size": 8, "num_classes": 10}


def request_of(*names: str, models: tuple[str, ...] = ("SiT-pico/2",), **fields: Any) -> Request:
    given = {name: methods.load(name).Config() for name in methods.names()}
    return Request(models=models, methods=names, **{"sections": given, **SMALL, **fields})


def with_section(name: str, **fields: Any) -> dict[str, Any]:
    """Every method's section, all as by default but one."""
    return {part: methods.load(part).Config(**(fields if part == name else {})) for part in methods.names()}


LITE = with_section("repa", encoders="efficientnet_lite0")
"""Sections with an encoder that is counted in a blink."""


# -- rows -----------------------------------------------------------------------------------------------------------


def test_rows_are_model_by_method_by_variant_by_targets() -> None:
    asked = request_of("vae_repa", "sra", "repa", models=("SiT-pico/2", "SiT-pico/4"), sections=LITE)
    rows = counted_rows(asked)
    own = ["sit", "vae_repa", "sra", "sra, full teacher", "repa, cached targets", "repa, online targets"]
    assert [(row["model"], row["label"]) for row in rows] == [(model, label) for model in asked.models for label in own]
    assert [row["targets"] for row in rows[:6]] == ["cached"] * 5 + ["online"]
    assert [row["is_control"] for row in rows] == ([True] + [False] * 5) * 2


def test_a_variant_that_is_configured_is_one_row() -> None:
    sections = with_section("sra", teacher_full_pass=True)
    assert [variant.label for variant in variants(request_of("sra", sections=sections))] == ["sit", "sra"]


def test_a_sum_has_the_variants_of_its_parts() -> None:
    found = list(variants(request_of("sra+vae_repa")))
    assert [variant.label for variant in found] == ["sit", "sra+vae_repa", "sra+vae_repa, full teacher"]
    assert [variant.sections["sra"].teacher_full_pass for variant in found[1:]] == [False, True]
    assert found[2].sections["vae_repa"] == found[1].sections["vae_repa"]


def test_change_against_the_control_of_the_same_model() -> None:
    """SRA's full teacher is one forward pass f more, its head 4 T D^2: (3 f + 3 h + f) / 3 f."""
    rows = counted_rows(request_of("sra", models=("SiT-pico/2", "SiT-pico/1")))
    for model, tokens in (("SiT-pico/2", 16), ("SiT-pico/1", 64)):
        control, _, full = (row for row in rows if row["model"] == model)
        forward, head = control["backbone_forward_gmacs"], tokens * 4 * 64 * 64 / 1e9
        assert control["change_percent"] == 0
        assert full["change_percent"] == pytest.approx(100 * (forward + 3 * head) / (3 * forward), rel=1e-9)


def test_online_targets_cost_the_encoder_in_every_step() -> None:
    _, cached, online = counted_rows(request_of("repa", sections=LITE))
    encoder = cached["encoder_forward_gmacs"]
    assert encoder > 0
    assert online["train_gflops_per_image"] - cached["train_gflops_per_image"] == pytest.approx(2 * encoder)
    assert {name for name in cached if cached[name] != online[name]} == (
        {"label", "targets", "train_gflops_per_image", "change_percent"}
    )


def test_settings_of_a_method_reach_its_count() -> None:
    """VAE-REPA with a head of two layers, D 2D and 2D P, and settings by size on record."""
    _, row = counted_rows(request_of("vae_repa", sections=with_section("vae_repa", head_layers=2, block=3)))
    assert row["head_forward_gmacs"] * 1e9 == pytest.approx(16 * (64 * 128 + 128 * 16))
    assert (row["settings"]["vae_repa"]["block"], row["settings"]["vae_repa"]["head_width"]) == (3, 128)


class Heavy(Method):
    """A third party's method: uses what cannot be counted."""

    Config = dataclasses.make_dataclass("HeavyConfig", [], frozen=True)
    disclosure = Disclosure(summary="Uncountable.", paper="none")

    def taps(self, progress: Any) -> tuple[int, ...]:
        return (1,)

    def terms(self, view: StepView, hidden: Mapping[int, Any]) -> dict[str, Term]:
        product = hidden[1].new_zeros(1).baddbmm(hidden[1], hidden[1].transpose(1, 2))
        return {"heavy": Term(product.mean(), 1.0)}


def test_a_method_that_cannot_be_counted_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    own = methods.load
    Heavy.name = "heavy"
    monkeypatch.setattr(methods, "load", lambda name: Heavy if name == "heavy" else own(name))
    sections = {**LITE, "heavy": Heavy.Config()}
    with pytest.raises(UserError, match=r"^method heavy: no count for the operator aten::baddbmm"):
        counted_rows(request_of("heavy", sections=sections))


def test_progress_is_told() -> None:
    told: list[tuple[str, int, int]] = []
    counted_rows(request_of("sra", models=("SiT-pico/2", "SiT-pico/4")), lambda *line: told.append(line))
    assert [(done, total) for _, done, total in told] == [(done, 6) for done in range(1, 7)]
    assert told[-1][0] == "counted SiT-pico/4 sra, full teacher"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"models": ()}, "models is empty"),
        ({"models": ("SiT-pico/2", "SiT-pico/2")}, "name one twice"),
        ({"models": ("SiT-Q/2",)}, "SiT-<size>/<patch>"),
        ({"models": ("SiT-pico/3",)}, "input_size is 8: SiT-pico/3 .* multiple of 3"),
        ({"input_size": 0}, "input_size is 0: give latents of 1 to 256"),
        ({"input_size": 512}, "input_size is 512"),
        ({"in_channels": 0}, "in_channels is 0"),
        ({"num_classes": -1}, "num_classes is -1"),
    ],
)
def test_wrong_requests(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        request_of("sit", **fields)


def test_measured_rows_are_the_counted_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    from harness.config import RuntimeConfig
    from studies.costs import measure

    seen: list[Any] = []
    monkeypatch.setattr(measure, "measure", lambda *given: seen.append(given) or [])
    asked, runtime = request_of("repa", "sra", sections=LITE), RuntimeConfig(threads=3)
    assert studies_overhead.measured_rows(asked, runtime, lambda *line: None) == []
    cases, given_runtime, _, setting = seen[0]
    assert [(c.model, c.label, c.targets) for c in cases] == [
        (row["model"], row["label"], row["targets"]) for row in counted_rows(asked)
    ]
    assert cases[-1].sections["sra"].teacher_full_pass
    assert given_runtime == runtime
    assert (setting.input_size, setting.in_channels, setting.num_classes, setting.image_size) == (8, 4, 10, 64)


# -- rendering ------------------------------------------------------------------------------------------------------


def counted(label: str, **fields: Any) -> dict[str, Any]:
    """A record with round numbers: forward 10 GMACs, 60 GFLOPs a training image."""
    method = label.split(",")[0]
    return {
        "model": "SiT-XL/2", "method": method, "label": label, "targets": "cached", "is_control": method == "sit",
        "note": "", "backbone_forward_gmacs": 10.0, "head_forward_gmacs": 0.0, "teacher_forward_gmacs": 0.0,
        "norm_forward_gmacs": 0.05, "backbone_parameters": 5_000_000, "head_parameters": 0, "external_parameters": 0,
        "encoder_forward_gmacs": 0.0, "encoders": {}, "vae_encode_gmacs": 4.0, "train_gflops_per_image": 60.0,
        "change_percent": 0.0, "settings": {}, "term_weights": {}, **fields,
    }  # fmt: skip


MEASURED = {
    "model": "SiT-XL/2", "label": "repa, online targets", "method": "repa", "images_per_s": 16.0, "batch": 8,
    "step_ms": {"median": 500.0, "least": 490.0, "most": 530.0}, "precision": "bf16", "device": "cpu",
    "forward_ms": {"median": 100.0, "least": 99.0, "most": 101.5}, "threads": 2, "rounds": 12,
    "ratio": {"median": 1.25, "low": 1.2, "high": 1.375}, "peak_memory_gb": 3.456,
}  # fmt: skip


@pytest.fixture
def made() -> Overhead:
    repa = {"head_forward_gmacs": 1.0, "head_parameters": 2_500_000, "external_parameters": 86_000_000}
    repa |= {"encoder_forward_gmacs": 20.0}
    rows = [
        counted("sit"),
        counted("repa, cached targets", **repa, train_gflops_per_image=66.0, change_percent=10.0),
        counted("repa, online targets", **repa, targets="online", train_gflops_per_image=106.0, change_percent=76.7),
        counted("sra", teacher_forward_gmacs=5.0, train_gflops_per_image=70.0, change_percent=16.7, note="beware_"),
        counted("sra, full teacher", teacher_forward_gmacs=10.0, train_gflops_per_image=80.0, change_percent=133.3),
    ]
    shapes = {"input_size": 32, "in_channels": 4, "num_classes": 1000, "image_size": 256}
    control = {**MEASURED, "label": "sit", "method": "sit"}
    return Overhead(control="sit", shapes=shapes, counted=rows, measured=[control, MEASURED])


def test_the_counted_table(made: Overhead) -> None:
    table = sections(made)[0]
    assert table.title == "Counted cost, latents 32 × 32 × 4 of 256 pixels"
    sit, cached, online, sra, full = table.rows
    assert list(sit.values()) == (
        ["SiT-XL/2", "sit", "5.00", "0", "0", "10.00", "20.00", "0", "0", "0", "(4.00)", "60.00", "–"]
    )
    assert (cached["heads, M"], cached["external, M"], cached["heads, GMACs"]) == ("2.50", "86.00", "1.00")
    assert (cached["encoder, GMACs"], online["encoder, GMACs"]) == ("(20.00)", "20.00"), "in brackets: not in the step"
    assert [row["against sit"] for row in (cached, online, sra, full)] == ["+10.0%", "+76.7%", "+16.7%", "+133%"]
    notes = " ".join(table.notes)
    assert "GFLOPs = 2 × GMACs" in notes and "Papers call GMACs “GFLOPs”" in notes
    assert "for LayerNorm fvcore would add 0.05 GMACs to the forward pass of SiT-XL/2" in notes
    assert table.notes[-1] == "sra: beware_."


def test_published_values_stand_beside_ours(made: Overhead) -> None:
    """From published_costs.csv: 119 GMACs and 675 M for XL/2, REPA's 114.46 GMACs, SRA's one pass of the EMA."""
    rows = {(row["method"], row["quantity"], row["label"]): row for row in published_rows(made)}
    assert rows["sit", "inference_compute", "sit"]["value"] == 119
    assert rows["sit", "inference_compute", "sit"]["ours"] == 10
    assert rows["sit", "parameters", "sit"]["ours"] == 5
    assert rows["repa", "inference_compute", "repa, cached targets"]["value"] == 114.46
    assert ("repa", "inference_compute", "repa, online targets") not in rows, "equal values stand once"
    assert [rows["sra", "extra_forward_passes", label]["ours"] for label in ("sra", "sra, full teacher")] == [0.5, 1.0]
    assert all(row["model"] == "SiT-XL/2" for row in rows.values())
    assert not any(row["quantity"] in ("latency", "training_time", "training_speed") for row in rows.values())
    shown = {(row["method"], row["quantity"]): row for row in sections(made)[1].rows}
    assert shown["sit", "inference compute"]["difference"] == "−91.6%"  # 10 / 119
    assert shown["sra", "extra forward passes"]["difference"] == "−50.0%"
    assert shown["sra, full teacher", "extra forward passes"]["difference"] == "0.0%"
    assert shown["sit", "inference compute"]["provenance"] == "primary"


def test_a_published_zero_has_no_percent(made: Overhead) -> None:
    row = counted("vae_repa", external_parameters=0)
    (zero,) = [
        line
        for line in sections(dataclasses.replace(made, counted=[counted("sit"), row]))[1].rows
        if line["quantity"] == "external encoder parameters"
    ]
    assert (zero["published"], zero["ours"], zero["difference"]) == ("0", "0", "0")


def test_the_measured_table(made: Overhead) -> None:
    sit, repa = sections(made)[2].rows
    assert sit["against sit"] == "–"
    assert list(repa.values()) == [
        *("SiT-XL/2", "repa, online targets", "500 [490, 530]", "1.250 [1.200, 1.375]", "16"),
        *("100 [99, 101.5]", "3.46"),
    ]
    assert sections(made)[2].notes[0].startswith("Batches of 8, bf16, cpu, 2 threads: 12 rounds")


def test_what_was_not_measured_or_published_has_no_table(made: Overhead) -> None:
    rows = [{**counted("sit"), "model": "SiT-pico/2"}]
    found = sections(dataclasses.replace(made, counted=rows, measured=[]))
    assert [section.title.split(",")[0] for section in found] == ["Counted cost"]


def test_bars_are_the_parts_of_training(made: Overhead) -> None:
    (ax,) = figure(made).axes
    widths = [[bar.get_width() for bar in part] for part in ax.containers]
    # backbone and heads three times, teacher and encoder once, two FLOPs a MAC; an encoder only where it runs.
    assert widths == [[60] * 5, [0, 6, 6, 0, 0], [0, 0, 0, 10, 20], [0, 0, 40, 0, 0]]
    assert [text.get_text() for text in ax.texts] == ["60", "+10.0%", "+76.7%", "+16.7%", "+133%"]
    assert [label.get_text() for label in ax.get_yticklabels()] == [row["label"] for row in made.counted]


def test_every_model_has_a_panel_inside_the_figure(made: Overhead) -> None:
    rows = [{**row, "model": model} for model in ("SiT-S/2", "SiT-B/2", "SiT-L/2") for row in made.counted]
    drawn = figure(dataclasses.replace(made, counted=rows))
    assert [ax.get_title(loc="left") for ax in drawn.axes] == ["SiT-S/2", "SiT-B/2", "SiT-L/2"]
    drawn.draw_without_rendering()
    for ax in drawn.axes:
        box = ax.get_tightbbox().transformed(drawn.transFigure.inverted())
        assert box.x0 >= 0 and box.x1 <= 1 and box.y0 >= 0 and box.y1 <= 1


def test_files_are_drawn_from_the_record(made: Overhead, tmp_path: Path) -> None:
    paths = write(made, tmp_path)
    names = {
        "overhead.json",
        "overhead.md",
        "overhead.tex",
        "overhead.csv",
        "published.csv",
        "measured.csv",
        "overhead.png",
    }
    assert {path.name for path in paths} == names == {path.name for path in tmp_path.iterdir()}
    saved = json.loads((tmp_path / "overhead.json").read_text())
    assert saved["counted"] == made.counted and saved["control"] == "sit"
    numbers = list(csv.DictReader(io.StringIO((tmp_path / "overhead.csv").read_text())))
    assert [row["label"] for row in numbers] == [row["label"] for row in made.counted]
    assert float(numbers[2]["train_encoder_gflops"]) == 40 and float(numbers[1]["train_encoder_gflops"]) == 0
    for row in numbers:
        parts = sum(float(row[f"train_{part}_gflops"]) for part in rendering.PARTS)
        assert parts == pytest.approx(float(row["train_gflops_per_image"]))
    measured = list(csv.DictReader(io.StringIO((tmp_path / "measured.csv").read_text())))
    assert [float(row["ratio_low"]) for row in measured] == [1.2, 1.2]
    assert Image.open(tmp_path / "overhead.png").format == "PNG"


def test_a_table_that_is_there_no_more_leaves_no_file(made: Overhead, tmp_path: Path) -> None:
    write(made, tmp_path)
    paths = write(dataclasses.replace(made, measured=[]), tmp_path)
    assert {path.name for path in paths} == {path.name for path in tmp_path.iterdir()}
    assert not (tmp_path / "measured.csv").exists()


def test_markdown_and_latex_hold_every_table_escaped(made: Overhead, tmp_path: Path) -> None:
    rows = [*made.counted, counted("a_b|c&$%#{x}", change_percent=1.0)]
    write(dataclasses.replace(made, counted=rows), tmp_path)
    markdown, latex = ((tmp_path / name).read_text() for name in ("overhead.md", "overhead.tex"))
    assert [line for line in markdown.splitlines() if line.startswith("# ")] == [
        "# Counted cost, latents 32 × 32 × 4 of 256 pixels",
        "# Published values beside these",
        "# Measured cost",
    ]
    assert r"a_b\|c&#38;\$%#{x}" in markdown
    assert r"a\_b\textbar{}c\&\$\%\#\{x\}" in latex
    assert latex.count(r"\begin{tabular}") == latex.count(r"\end{tabular}") == latex.count(r"\toprule") == 3
    for table in latex.split(r"\begin{tabular}")[1:]:
        columns = table[: table.index("\n")].count("r") + 1
        body = [line for line in table.splitlines() if line.endswith(r"\\")]
        assert {line.replace(r"\&", "").count("&") + 1 for line in body} == {columns}


def test_a_folder_that_cannot_be_written_to_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"^--out: cannot write to .*file.* name a folder you may write to$"):
        rendering.check_folder(tmp_path / "file")
    rendering.check_folder(tmp_path / "new" / "folder")
    assert list((tmp_path / "new" / "folder").iterdir()) == []


def test_numbers_keep_three_digits() -> None:
    shown = [rendering._number(value) for value in (0.0, 0.000123456, 0.5, 12.347, 12345.6)]
    assert shown == ["0", "0.000123", "0.5", "12.35", "12,345.60"]
