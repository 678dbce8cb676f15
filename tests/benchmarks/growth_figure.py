"""The figure of `growth`: step time against counted GFLOPs with the fit, and its residuals below.

python -m tests.benchmarks.growth_figure [build/bench.json] [docs/figures/growth.svg]
"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from reports.figures.style import LIGHT, MARKERS, rc
from tests.benchmarks.growth import fit

Row = Mapping[str, Any]


def by_tokens(rows: Sequence[Row]) -> dict[int, list[Row]]:
    """Rows by their number of tokens."""
    return {tokens: [row for row in rows if row["tokens"] == tokens] for tokens in sorted({r["tokens"] for r in rows})}


def draw_times(ax: Axes, rows: Sequence[Row]) -> Axes:
    """Both axes logarithmic; every size is named, and the fit is a line."""
    gflops, seconds = [row["GFLOPs a step"] for row in rows], [row["step, ms"] / 1000 for row in rows]
    a, b = fit([gflops], seconds)
    counted = np.geomspace(0.8 * min(gflops), 1.25 * max(gflops))
    label = f"{1000 * a:.2g} ms + GFLOPs / ({1 / b:.0f} GFLOP/s)"
    ax.plot(counted, 1000 * (a + b * counted), color=LIGHT.baseline, linewidth=1, label=label)
    for index, (tokens, group) in enumerate(by_tokens(rows).items()):
        x, y = [row["GFLOPs a step"] for row in group], [row["step, ms"] for row in group]
        ax.scatter(x, y, color=LIGHT.cells[index], marker=MARKERS[index], s=24, zorder=4, label=f"{tokens} tokens")
        for row in group:
            name = f"{row['model'].removeprefix('SiT-')}, batch {row['batch']}"
            place = (row["GFLOPs a step"], row["step, ms"])
            above = index % 2 == 1
            box = {"facecolor": LIGHT.background, "edgecolor": "none", "pad": 0.5}
            ax.annotate(
                name, place, xytext=(-5, 3) if above else (8, -5), textcoords="offset points", fontsize=7,
                ha="right" if above else "left", va="bottom" if above else "top", color=LIGHT.cells[index], bbox=box,
            )  # fmt: skip
    ax.set(xscale="log", yscale="log", ylabel="step, ms")
    ax.margins(y=0.1)  # room for the lowest point's name
    ax.legend(frameon=False, loc="upper left")
    return ax


def draw_residuals(ax: Axes, rows: Sequence[Row]) -> Axes:
    """How far the fit lies off each measured time: the line's, and hollow that with activations as well."""
    ax.axhline(0, color=LIGHT.baseline, linewidth=1)
    for index, group in enumerate(by_tokens(rows).values()):
        x, colour, marker = [row["GFLOPs a step"] for row in group], LIGHT.cells[index], MARKERS[index]
        ax.scatter(x, [row["fit by GFLOPs, %"] for row in group], color=colour, marker=marker, s=24, zorder=3)
        both = [row["fit by GFLOPs and activations, %"] for row in group]
        ax.scatter(x, both, facecolors="none", edgecolors=colour, marker=marker, s=24, zorder=3)
    ax.set(xscale="log", xlabel="counted GFLOPs a step", ylabel="fit / step - 1, %")
    ax.set_title("filled: the line; hollow: activations as well", fontsize=8, fontweight="normal")
    return ax


def main(source: Path, target: Path) -> None:
    found = json.loads(source.read_text())
    rows = found["benchmarks"]["growth"]["rows"]
    with plt.rc_context({**rc(LIGHT), "svg.hashsalt": "growth"}):
        figure, (top, bottom) = plt.subplots(2, 1, figsize=(6.4, 5.6), sharex=True, height_ratios=(3, 1))
        draw_times(top, rows)
        draw_residuals(bottom, rows)
        figure.tight_layout()
        target.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(target, metadata={"Date": None} if target.suffix == ".svg" else None, dpi=150)


if __name__ == "__main__":
    given = [Path(word) for word in sys.argv[1:]]
    main(*given, *(Path("build/bench.json"), Path("docs/figures/growth.svg"))[len(given) :])
