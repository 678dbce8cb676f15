"""What a report draws: a figure with the frame that it is drawn from, and the words beside it."""

from collections.abc import Callable
from dataclasses import dataclass

import pandas as pd
from matplotlib.figure import Figure

from reports.figures.style import Look


@dataclass(frozen=True)
class Plan:
    """A figure to be written: the frame that it is drawn from, and how it is drawn."""

    stem: str
    frame: pd.DataFrame
    draw: Callable[[pd.DataFrame, Look], Figure]
    alt: str
    caption: str

    def drawn(self, look: Look) -> Figure:
        return self.draw(self.frame, look)
