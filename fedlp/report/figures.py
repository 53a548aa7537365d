"""What all plots share: palette, style, and a figure that becomes a PNG without a display."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from fedlp.report.groups import clean

# Okabe and Ito's palette, which every common form of colour blindness can tell apart, without its yellow.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", "--", ":", "-.")
STYLE = {
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888888",
    "axes.axisbelow": True,
    "axes.titlelocation": "left",
    "grid.color": "#e4e4e4",
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "text.color": "#222222",
    "axes.labelcolor": "#222222",
}
_WIDTH_IN = 7.2
_DPI = 160


@dataclass(frozen=True, slots=True)
class Plot:
    """One drawn figure: its file name, a title, one sentence on what it shows, and the PNG."""

    file: str
    title: str
    caption: str
    png: bytes


def plain(text: str, width: int = 80) -> str:
    """Return text that matplotlib neither reads as mathematics nor hides, in lines of ``width``."""
    return textwrap.fill(clean(text).replace("$", r"\$").lstrip("_"), width)


def blank(height: float) -> Figure:
    """Return an empty figure, ``height`` inches high."""
    figure = Figure(figsize=(_WIDTH_IN, height), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def unit_for(largest: float, units: Sequence[tuple[float, str]]) -> tuple[float, str]:
    """Return the first ``(size, name)`` of ``units``, or the last one that still leaves two digits to ``largest``."""
    return next((unit for unit in reversed(units) if largest >= 10 * unit[0]), units[0])


def to_png(figure: Figure) -> bytes:
    """Draw the figure; equal figures give equal bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
