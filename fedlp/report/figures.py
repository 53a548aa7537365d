"""Common parts of plots: palette, style, and rendering to PNG without a display."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter
from numpy.typing import NDArray

from fedlp.report.groups import clean
from fedlp.report.palette import LIGHT

COLOURS = LIGHT
DASHES = ("-", "--", ":", "-.")
MARKERS = ("o", "s", "D", "^", "X", "P", "v", "*", "p")
FORMAT: ContextVar[str] = ContextVar("format", default="png")
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
_APART = 0.06  # of the width: curves that end farther apart have their names above them
_CHARACTER = 0.0145  # of the width: a character of a name
_WIDEST = 5  # between the ends of curves on a linear axis; beyond it the short ones are squeezed


@dataclass(frozen=True, slots=True)
class Plot:
    """One drawn figure: its file name, a title, a one-sentence description, and the PNG."""

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


def scale_amounts(axes: Axes, amounts: Sequence[NDArray[np.float64]]) -> None:
    """Draw amounts, (points,) and rising for each curve, from 0, or by their logarithms where curves end far apart."""
    ends = [one[-1] for one in amounts]
    if max(ends) > _WIDEST * min(ends) and min(one[0] for one in amounts) > 0:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_minor_formatter(NullFormatter())
    else:
        axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))


def label_ends(axes: Axes, ends: Sequence[tuple[float, float, str, str]], gap: float = 0.06) -> None:
    """Write names of curves at their ends: in a column on the right, or in rows above where the ends lie apart.

    Parameters
    ----------
    ends : sequence of (x, y, text, colour)
        Last point of each curve.
    gap : float
        Least distance of two names above each other, as a fraction of the height.
    """
    axes.set(xlim=axes.get_xlim(), ylim=axes.get_ylim())  # what automatic limits come to
    places = [axes.transAxes.inverted().transform(axes.transData.transform((x, y))).tolist() for x, y, *_ in ends]
    right = max(place[0] for place in places)
    apart = min(place[0] for place in places) < right - _APART
    spots = _above(places, [words for *_, words, _ in ends], gap) if apart else _beside(places, right + 0.06, gap)
    for (x, y, words, colour), spot in zip(ends, spots, strict=True):
        axes.annotate(
            words,
            (x, y),
            xytext=spot,
            textcoords="axes fraction",
            ha="right" if apart else "left",
            va="bottom" if apart else "center",
            fontsize=9,
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "color": colour,
                "lw": 1.2,
                "relpos": (1.0, 0.0) if apart else (0.0, 0.5),
                "shrinkB": 2,
            },
        )


def _beside(places: Sequence[Sequence[float]], left: float, gap: float) -> list[tuple[float, float]]:
    """Return places of names in one column, pushed apart where they are close; fractions of the axes."""
    order = sorted(range(len(places)), key=lambda index: places[index][1])
    heights = [places[index][1] for index in order]
    for index in range(1, len(heights)):
        heights[index] = max(heights[index], heights[index - 1] + gap)
    down = max(0.0, heights[-1] - 0.98)
    found = {index: (left, height - down) for index, height in zip(order, heights, strict=True)}
    return [found[index] for index in range(len(places))]


def _above(places: Sequence[Sequence[float]], names: Sequence[str], gap: float) -> list[tuple[float, float]]:
    """Return places of names over the ends, each above those that it would reach over; fractions of the axes."""
    rows: dict[int, int] = {}
    gap *= max(len(name.splitlines()) for name in names)
    for index in sorted(range(len(places)), key=lambda index: places[index][0]):
        start = places[index][0] - _CHARACTER * (2 + max(map(len, names[index].splitlines())))
        rows[index] = max((rows[left] + 1 for left in rows if places[left][0] > start), default=0)
    return [(places[index][0], 1.02 + gap * rows[index]) for index in range(len(places))]


def to_png(figure: Figure) -> bytes:
    """Draw the figure, as PNG or in the format of :data:`FORMAT`; equal figures give equal bytes."""
    kind, buffer = FORMAT.get(), io.BytesIO()
    unset = {"png": {"Software": None}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}[kind]
    with rc_context({"svg.hashsalt": "fedlp", "pdf.fonttype": 42}):
        figure.savefig(buffer, format=kind, metadata=unset)
    return buffer.getvalue()
