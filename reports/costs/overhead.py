"""The overhead table: what methods cost, from the record `overhead.json`, beside published values.

Text for the terminal, Markdown and LaTeX; numbers for CSV; one figure. All are drawn from the record.
"""

import csv
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from harness.records.files import storing, write_atomic, write_json
from harness.records.run_folder import UserError
from harness.records.schema import (
    CountedRecord,
    MeasuredRecord,
    OverheadRecord,
    ShapesRecord,
    SpreadRecord,
    read_record,
)
from reports.figures.files import png
from reports.figures.style import LIGHT, rc
from reports.study.endings import one_line
from reports.study.units import rounded_text
from reports.tables.cells import Row
from reports.tables.formats import latex_table, markdown_table, markdown_text
from reports.tables.results import MINUS, MISSING

PUBLISHED = Path(__file__).parents[1] / "published" / "published_costs.csv"


@dataclass(frozen=True, kw_only=True)
class Overhead:
    """What `overhead.json` holds."""

    control: str
    """Name of the method that all are compared with."""
    shapes: ShapesRecord
    """Latents' side and channels, classes, and pixels along an image's side."""
    counted: Sequence[CountedRecord]
    measured: Sequence[MeasuredRecord] = ()


@dataclass(frozen=True)
class OverheadTable:
    """A table with its title and what one needs to read it."""

    title: str
    rows: list[dict[str, str]]
    notes: tuple[str, ...]
    is_text: bool = False
    """Whether columns hold words and not numbers."""
    wide: tuple[str, ...] = ()
    """Columns that a printed page has no room for."""


def sections(overhead: Overhead) -> list[OverheadTable]:
    """All tables that there is something for."""
    found = [
        OverheadTable(f"Counted cost, {_shapes_text(overhead)}", counted_table(overhead), _counted_notes(overhead)),
        OverheadTable(
            "Published values beside these",
            published_table(overhead),
            PUBLISHED_NOTES,
            is_text=True,
            wide=("provenance", "note"),
        ),
        OverheadTable("Measured cost", measured_table(overhead), _measured_notes(overhead)),
    ]
    return [section for section in found if section.rows]


def _shapes_text(overhead: Overhead) -> str:
    shapes = overhead.shapes
    side, channels = shapes["input_size"], shapes["in_channels"]
    return f"latents {side} × {side} × {channels} of {shapes['image_size']} pixels"


# -- counted ----------------------------------------------------------------------------------------------------------

GFLOPS_NOTE = (
    "GFLOPs = 2 × GMACs, as a multiply-accumulate is two FLOPs. Papers call GMACs “GFLOPs”: 119 for SiT-XL/2 (SiT) and "
    "114.46 (REG) are GMACs of the forward pass, with and without the products of attention."
)
NOTES = (
    GFLOPS_NOTE,
    "Training = 2 × (3 × (forward + heads) + what runs without gradient), with parameters in millions. In brackets: "
    "runs once an image when caches are made, not in the step. With online targets the encoder runs in every step; "
    "latents are cached in all rows.",
)


def counted_table(overhead: Overhead) -> list[dict[str, str]]:
    """The counted cost as text, a row a record."""
    return [_counted(row, overhead.control) for row in overhead.counted]


def _counted_notes(overhead: Overhead) -> tuple[str, ...]:
    """What is counted, how to read it, and what has to stand beside a method."""
    most = max(overhead.counted, key=lambda row: row["norm_forward_gmacs"])
    counted = (
        "One image: matrix products, convolutions and attention, counted by fvcore. Element-wise operations and "
        f"normalisations are left out; for LayerNorm fvcore would add {_number(most['norm_forward_gmacs'])} GMACs to "
        f"the forward pass of {most['model']}."
    )
    told = dict.fromkeys(f"{row['method']}: {row['note']}." for row in overhead.counted if row["note"])
    return counted, *NOTES, *told


def _counted(row: CountedRecord, control: str) -> dict[str, str]:
    forward, encoder = row["backbone_forward_gmacs"], row["encoder_forward_gmacs"]
    in_step = row["targets"] == "online"
    return {
        "model": row["model"],
        "method": row["label"],
        "backbone, M": _millions(row["backbone_parameters"]),
        "heads, M": _millions(row["head_parameters"]),
        "external, M": _millions(row["external_parameters"]),
        "forward, GMACs": _number(forward),
        "forward, GFLOPs": _number(2 * forward),
        "heads, GMACs": _number(row["head_forward_gmacs"]),
        "teacher, GMACs": _number(row["teacher_forward_gmacs"]),
        "encoder, GMACs": _number(encoder) if in_step or not encoder else f"({_number(encoder)})",
        "VAE encoding, GMACs": f"({_number(row['vae_encode_gmacs'])})",
        "training, GFLOPs": _number(row["train_gflops_per_image"]),
        f"against {control}": MISSING if row["is_control"] else _percent(row["change_percent"]),
    }


def _millions(number: int) -> str:
    return f"{number / 1e6:,.2f}" if number else "0"


def _number(value: float) -> str:
    """Two decimals, or three digits of what is smaller than 1."""
    return f"{value:,.2f}" if value >= 1 else f"{value:.3g}"


def _percent(value: float) -> str:
    """`+8.2%`; without decimals from 100 on, without a sign where nothing is left of it."""
    text = f"{value:+,.{0 if abs(value) >= 100 else 1}f}%"
    return "0.0%" if text[1:] == "0.0%" else text.replace("-", MINUS)


# -- published --------------------------------------------------------------------------------------------------------

PUBLISHED_NOTES = ("Units as printed, or as the note reads them. Each source and its provenance: published_costs.csv.",)

QUANTITIES: dict[str, Callable[[CountedRecord], float]] = {
    "inference_compute": lambda row: row["backbone_forward_gmacs"],
    "parameters": lambda row: row["backbone_parameters"] / 1e6,
    "head_parameters": lambda row: row["head_parameters"] / 1e6,
    "external_encoder_parameters": lambda row: row["external_parameters"] / 1e6,
    "extra_compute": lambda row: row["change_percent"],
    "extra_forward_passes": lambda row: row["teacher_forward_gmacs"] / row["backbone_forward_gmacs"],
}
"""Published quantities that are counted here, in the units of the file."""


def published_rows(overhead: Overhead) -> list[dict[str, Any]]:
    """Published values with ours of the same method, model and quantity; a row for each that differs."""
    with PUBLISHED.open(newline="") as file:
        lines = [line for line in csv.DictReader(file) if line["quantity"] in QUANTITIES and line["value"]]
    found = []
    for line in lines:
        same = [row for row in overhead.counted if (row["method"], row["model"]) == (line["method"], line["model"])]
        ours = {QUANTITIES[line["quantity"]](row): row["label"] for row in reversed(same)}
        for value, label in reversed(ours.items()):
            found.append({**line, "value": float(line["value"]), "label": label, "ours": value})
    return found


def published_table(overhead: Overhead) -> list[dict[str, str]]:
    """Published values as text."""
    return [_published(row) for row in published_rows(overhead)]


def _published(row: Mapping[str, Any]) -> dict[str, str]:
    published, ours = row["value"], row["ours"]
    change = _percent(100 * (ours / published - 1)) if published else ("0" if ours == 0 else rounded_text(ours))
    return {
        "source": row["source"],
        "method": row["label"],
        "model": row["model"],
        "quantity": row["quantity"].replace("_", " "),
        "unit": row["unit"],
        "published": f"{published:g}",
        "ours": rounded_text(ours),
        "difference": change,
        "provenance": row["provenance"],
        "note": row["note"] or MISSING,
    }


# -- measured ---------------------------------------------------------------------------------------------------------


def measured_table(overhead: Overhead) -> list[dict[str, str]]:
    """The measured cost as text: medians with [least, most], the ratio with its interval."""
    return [_measured(row, overhead.control) for row in overhead.measured]


def _measured(row: MeasuredRecord, control: str) -> dict[str, str]:
    ratio = row["ratio"]
    is_control = row["method"] == control
    return {
        "model": row["model"],
        "method": row["label"],
        "step, ms": _spread(row["step_ms"]),
        f"against {control}": MISSING
        if is_control
        else f"{ratio['median']:.3f} [{ratio['low']:.3f}, {ratio['high']:.3f}]",
        "images/s": rounded_text(row["images_per_s"]),
        "forward, ms": _spread(row["forward_ms"]),
        "peak memory, GB": f"{row['peak_memory_gb']:.2f}",
    }


def _spread(value: SpreadRecord) -> str:
    median, least, most = map(rounded_text, (value["median"], value["least"], value["most"]))
    return f"{median} [{least}, {most}]"


def _measured_notes(overhead: Overhead) -> tuple[str, ...]:
    if not overhead.measured:
        return ()
    places = {
        f"Batches of {row['batch']}, {row['precision']}, {row['device']}, {row['threads']} threads: "
        f"{row['rounds']} rounds, in which every row has its turn"
        for row in overhead.measured
    }
    return (
        "; ".join(sorted(places)) + ". Medians with [least, most]; the ratio to "
        f"{overhead.control} is taken in each round, with an interval of at least 95% for its median.",
        "Forward is one pass of the backbone without gradient. Peak memory is what training adds to the process: "
        "weights, moments, EMA, heads, activations, and the encoder where it runs in the step.",
    )


# -- figure -----------------------------------------------------------------------------------------------------------

PARTS: dict[str, tuple[str, Callable[[CountedRecord], float]]] = {
    "backbone": (LIGHT.muted, lambda row: 6 * row["backbone_forward_gmacs"]),
    "heads": (LIGHT.cells[0], lambda row: 6 * row["head_forward_gmacs"]),
    "teacher": (LIGHT.cells[1], lambda row: 2 * row["teacher_forward_gmacs"]),
    "encoder": (
        LIGHT.cells[2],
        lambda row: 2 * row["encoder_forward_gmacs"] if row["targets"] == "online" else 0.0,
    ),
}
"""What a training image's GFLOPs consist of, bottom up: forward and backward of what is trained, and passes without
gradient."""

BARS, LEAST_WIDTH = 2.9, 5.0
"""Inches: width of the longest bar, and of a figure with room for its key."""


def figure(overhead: Overhead) -> Figure:
    """Training GFLOPs an image as stacked bars, a panel for each model, named with the change against the control."""
    panels = {row["model"]: [r for r in overhead.counted if r["model"] == row["model"]] for row in overhead.counted}
    names = 0.3 + 0.07 * max(len(one_line(row["label"])) for row in overhead.counted)
    width, panel = names + BARS + 0.75, 0.29 * max(map(len, panels.values())) + 0.12
    num_columns = min(2, len(panels))
    top, gap = 0.88, 0.6
    height = top + math.ceil(len(panels) / num_columns) * (panel + gap) - 0.3
    with matplotlib.rc_context(rc(LIGHT)):
        total = max(width * num_columns, LEAST_WIDTH)
        drawn = Figure(figsize=(total, height))
        for index, rows in enumerate(panels.values()):
            row, column = divmod(index, num_columns)
            bottom = height - top - panel - row * (panel + gap)
            box = ((width * column + names) / total, bottom / height, BARS / total, panel / height)
            plot_costs(drawn.add_axes(box), rows)
        title = f"Training GFLOPs an image, against {overhead.control}"
        drawn.text(0.1 / total, 1 - 0.2 / height, title, fontweight="bold", fontsize=10, va="center", parse_math=False)
        handles = [Patch(color=colour, label=name) for name, (colour, _) in PARTS.items()]
        place = (0, 1 - 0.42 / height)
        drawn.legend(handles=handles, loc="center left", bbox_to_anchor=place, ncols=len(handles), handlelength=1)
    return drawn


def plot_costs(ax: Axes, rows: Sequence[CountedRecord]) -> Axes:
    """The rows of one model from top to bottom."""
    places = range(len(rows) - 1, -1, -1)
    starts = [0.0] * len(rows)
    for colour, value in PARTS.values():
        widths = [value(row) for row in rows]
        ax.barh(places, widths, left=starts, color=colour, height=0.66, edgecolor=LIGHT.background, linewidth=0.6)
        starts = [start + width for start, width in zip(starts, widths, strict=True)]
    for row, place, end in zip(rows, places, starts, strict=True):
        text = rounded_text(end) if row["is_control"] else _percent(row["change_percent"])
        ax.annotate(text, (end, place), (4, 0), textcoords="offset points", va="center", fontsize=8.5)
    ax.set_yticks(list(places))
    names = ax.set_yticklabels([one_line(row["label"]) for row in rows])
    for name in names:
        name.set(color=LIGHT.text, parse_math=False)
    ax.set_title(rows[0]["model"], color=LIGHT.text)
    ax.grid(False)
    return ax


# -- files ------------------------------------------------------------------------------------------------------------


def check_folder(folder: Path) -> None:
    """Make the folder; `UserError` when it cannot be written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / ".writable", b"")
        (folder / ".writable").unlink()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"--out: cannot write to {folder} ({reason}): name a folder you may write to") from None


def record(overhead: Overhead) -> OverheadRecord:
    """As it stands in `overhead.json`."""
    return {
        "control": overhead.control,
        "shapes": overhead.shapes,
        "counted": list(overhead.counted),
        "measured": list(overhead.measured),
    }


def write(overhead: Overhead, folder: Path) -> list[Path]:
    """Save the record, then everything that is drawn from it; returns the paths."""
    source = folder / "overhead.json"
    write_json(source, record(overhead))
    saved = Overhead(**read_record(source, OverheadRecord, "give the same command again"))
    texts = {"overhead.md": markdown(saved), "overhead.tex": latex(saved)}
    tables = {"overhead": counted_frame(saved), "published": pd.DataFrame(published_rows(saved))}
    tables["measured"] = pd.json_normalize(list(saved.measured), sep="_")  # type: ignore[arg-type]
    texts |= {f"{name}.csv": table.to_csv(index=False) for name, table in tables.items() if len(table)}
    for name in ("published.csv", "measured.csv"):
        if name not in texts:  # of a table that was saved here before
            (folder / name).unlink(missing_ok=True)
    contents = {**{name: text.encode() for name, text in texts.items()}, "overhead.png": png(figure(saved))}
    with storing(folder):
        for name, content in contents.items():
            write_atomic(folder / name, content)
    return [source, *(folder / name for name in contents)]


def counted_frame(overhead: Overhead) -> pd.DataFrame:
    """The counted cost as numbers, with the parts of the figure's bars in GFLOPs."""
    return pd.DataFrame([_numbers(row) for row in overhead.counted])


def _numbers(row: CountedRecord) -> dict[str, Any]:
    plain: dict[str, Any] = {name: value for name, value in row.items() if not isinstance(value, Mapping)}
    forward = {"forward_gflops": 2 * row["backbone_forward_gmacs"]}
    parts = {f"train_{name}_gflops": value(row) for name, (_, value) in PARTS.items()}
    first = ("model", "method", "label", "targets")
    return {**{name: plain.pop(name) for name in first}, **plain, **forward, **parts}


def markdown(overhead: Overhead) -> str:
    """All tables in Markdown."""
    parts = []
    for section in sections(overhead):
        notes = "".join(f"\n{markdown_text(note)}\n" for note in section.notes)
        parts.append(f"# {markdown_text(section.title)}\n\n{markdown_table(section.rows)}\n{notes}")
    return "\n".join(parts)


def latex(overhead: Overhead) -> str:
    """All tables in LaTeX, a `tabular` each."""
    return "\n".join(latex_table(_printed(section), section.notes) for section in sections(overhead))


def _printed(section: OverheadTable) -> list[Row]:
    return [{name: text for name, text in row.items() if name not in section.wide} for row in section.rows]
