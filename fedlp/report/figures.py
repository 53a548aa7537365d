"""Common parts of plots: palette, style, and rendering to PNG without a display."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Annotation, Text
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter
from matplotlib.transforms import BboxBase
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
_APART = 0.06  # of the width: curves that end farther apart have their names there
_PLACES = [  # of a name beside the end of its curve, the best first: points to the right, points up, alignment
    *((0, 8, "right", "bottom"), (0, 8, "center", "bottom"), (8, 0, "left", "center"), (0, -8, "right", "top")),
    *((0, -8, "center", "top"), (8, 8, "left", "bottom"), (8, -8, "left", "top"), (-8, 14, "right", "bottom")),
]
_SIDES = {"left": 0.0, "bottom": 0.0, "center": 0.5, "right": 1.0, "top": 1.0}
_LINE = {"arrowstyle": "-", "lw": 1.2, "shrinkA": 0, "shrinkB": 2}  # from a name to the end of its curve
_ROOM = 0.1  # of the height, above and below, for names
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


def label_ends(axes: Axes, ends: Sequence[tuple[float, float, str, str]], gap: float = 0.06) -> bool:
    """Write names of curves at their ends; return whether there was room, else nothing is written.

    Names stand in a column on the right; where the ends lie apart each beside its end, on no curve and no other name.

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
    if min(place[0] for place in places) < right - _APART:
        return _label_apart(axes, ends)
    for (x, y, words, colour), spot in zip(ends, _beside(places, right + 0.06, gap), strict=True):
        line = {**_LINE, "color": colour, "relpos": (0.0, 0.5)}
        how: dict[str, Any] = {"textcoords": "axes fraction", "ha": "left", "va": "center", "arrowprops": line}
        axes.annotate(words, (x, y), xytext=spot, fontsize=9, annotation_clip=False, **how)
    return True


def _label_apart(axes: Axes, ends: Sequence[tuple[float, float, str, str]]) -> bool:
    """Write each name at the first of some places beside its end that is free; nothing if one has none."""
    figure, limits = axes.get_figure(root=True), axes.get_ylim()
    assert figure is not None
    heights = axes.transAxes.transform([(0.0, -_ROOM), (0.0, 1 + _ROOM)])
    axes.set_ylim(*axes.transData.inverted().transform(heights)[:, 1])
    figure.draw_without_rendering()  # the layout is known from here on
    taken = [_points(line) for line in axes.lines]
    notes: list[Annotation] = []
    for x, y, words, colour in sorted(ends):
        for right, up, ha, va in _PLACES:
            line = {**_LINE, "color": colour, "relpos": (_SIDES[ha], _SIDES[va])}
            how: dict[str, Any] = {"textcoords": "offset points", "ha": ha, "va": va, "arrowprops": line}
            note = axes.annotate(words, (x, y), xytext=(right, up), fontsize=9, annotation_clip=False, **how)
            note.set_in_layout(False)
            note.get_window_extent()  # places the text
            box = Text.get_window_extent(note).padded(3)  # without the line
            inside = figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1
            inside &= axes.bbox.y0 < box.y0 and box.y1 <= figure.bbox.y1
            if inside and not any(_cover(box, points) for points in taken):
                taken.append(box.corners())
                notes.append(note)
                break
            note.remove()
        else:
            for note in notes:
                note.remove()
            axes.set_ylim(limits)
            return False
    return True


def _points(line: Line2D) -> NDArray[np.float64]:
    """Return points of a curve, close to each other, in pixels."""
    places = line.get_transform().transform(np.asarray(line.get_xydata()))
    steps = np.linspace(0.0, len(places) - 1.0, 40 * len(places))
    return np.stack([np.interp(steps, np.arange(len(places)), places[:, axis]) for axis in (0, 1)], axis=1)


def _cover(box: BboxBase, points: NDArray[np.float64]) -> bool:
    """Return whether a box has one of some points, or overlaps the box whose corners they are."""
    x, y = points[:, 0], points[:, 1]
    if len(points) == 4:
        return bool(x.min() < box.x1 and x.max() > box.x0 and y.min() < box.y1 and y.max() > box.y0)
    return bool(((x > box.x0) & (x < box.x1) & (y > box.y0) & (y < box.y1)).any())


def _beside(places: Sequence[Sequence[float]], left: float, gap: float) -> list[tuple[float, float]]:
    """Return places of names in one column, pushed apart where they are close; fractions of the axes."""
    order = sorted(range(len(places)), key=lambda index: places[index][1])
    heights = [places[index][1] for index in order]
    for index in range(1, len(heights)):
        heights[index] = max(heights[index], heights[index - 1] + gap)
    down = max(0.0, heights[-1] - 0.98)
    found = {index: (left, height - down) for index, height in zip(order, heights, strict=True)}
    return [found[index] for index in range(len(places))]


def to_png(figure: Figure) -> bytes:
    """Draw the figure, as PNG or in the format of :data:`FORMAT`; equal figures give equal bytes."""
    kind, buffer = FORMAT.get(), io.BytesIO()
    unset = {"png": {"Software": None}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}[kind]
    with rc_context({"svg.hashsalt": "fedlp", "pdf.fonttype": 42}):
        figure.savefig(buffer, format=kind, metadata=unset)
    return buffer.getvalue()
