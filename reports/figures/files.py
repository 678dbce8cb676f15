"""Files of figures. Every figure that is saved has beside it the CSV it was drawn from."""

import base64
import io
from collections.abc import Callable
from pathlib import Path

import matplotlib
import pandas as pd
from matplotlib.figure import Figure

from reports.figures.style import Look, rc

DPI = 200

Draw = Callable[[Look], Figure]
"""A figure that can be drawn for any page."""


def png(figure: Figure) -> bytes:
    """The figure as PNG, without a date: equal records give equal bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    return buffer.getvalue()


def data_uri(image: bytes) -> str:
    """A PNG as the source of an image."""
    return f"data:image/png;base64,{base64.b64encode(image).decode()}"


def save(draw: Draw, frame: pd.DataFrame, stem: Path, look: Look) -> list[Path]:
    """Write `<stem>.png`, `<stem>.svg`, `<stem>.pdf` and the `<stem>.csv` that they were drawn from, without dates."""
    figure = draw(look)
    image, vector, printed, data = (stem.with_name(f"{stem.name}.{suffix}") for suffix in ("png", "svg", "pdf", "csv"))
    image.write_bytes(png(figure))
    with matplotlib.rc_context(rc(look.theme)):
        figure.savefig(vector, format="svg", metadata={"Date": None})
        figure.savefig(printed, format="pdf", metadata={"CreationDate": None, "Producer": None, "Creator": None})
    frame.to_csv(data, index=False)
    return [image, vector, printed, data]
