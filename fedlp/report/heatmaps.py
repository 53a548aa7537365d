"""Heat maps of coverage: which layers of the global model the clients' updates reach."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from fedlp.report.figures import Plot, blank, plain, to_png
from fedlp.report.groups import Group
from fedlp.report.summary import FloatArray, coverage, mean_coverage

_MOST_MAPS = 8
_MOST_LAYER_NAMES = 24
_UNKNOWN = "#dddddd"
_Found = tuple[str, list[str], NDArray[np.int64], FloatArray]


def coverage_plots(groups: Sequence[Group]) -> list[Plot]:
    """Draw one figure: a map of layers and rounds for each group, or of layers and groups where there are many."""
    found = [(group.label, *coverage(group)) for group in groups]
    found = [one for one in found if one[1]]
    if not found:
        return []
    many = len(found) > _MOST_MAPS
    png = _draw_mean_coverage(found) if many else _draw_coverage_maps(found)
    grey = "; grey is not on record" if any(np.isnan(values).any() for *_, values in found) else ""
    over = "rounds and seeds" if many else "seeds"
    caption = (
        f"Fraction of each layer's entries that at least one client returned, mean over {over}; "
        f"an entry that no one returns keeps its old value{grey}."
    )
    return [Plot("coverage.png", "Coverage of each layer", caption, png)]


def _draw_coverage_maps(found: Sequence[_Found]) -> bytes:
    ncols = min(len(found), 2)
    nrows = -(-len(found) // ncols)
    tallest = min(max(len(layers) for _, layers, _, _ in found), _MOST_LAYER_NAMES)
    figure = blank(0.6 + nrows * (0.75 + 0.19 * tallest))
    grid = figure.subplots(nrows, ncols, squeeze=False).ravel()
    for spare in grid[len(found) :]:
        spare.set_visible(False)
    for index, (axes, (label, layers, rounds, values)) in enumerate(zip(grid, found, strict=False)):
        edges = np.append(rounds - 0.5, rounds[-1] + 0.5)
        image = axes.pcolormesh(edges, np.arange(len(layers) + 1) - 0.5, values, cmap="Blues", vmin=0, vmax=1)
        axes.set_title(plain(label, 70 // ncols - 3))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6, steps=[1, 2, 5, 10]))
        axes.set_xlabel("round")
        _name_layers(axes, layers, hidden=index % ncols > 0 and layers == found[index - 1][1])
    figure.colorbar(image, ax=grid.tolist(), label="fraction of entries updated", shrink=0.8 if nrows == 1 else 0.4)
    return to_png(figure)


def _draw_mean_coverage(found: Sequence[_Found]) -> bytes:
    layers = list(dict.fromkeys(layer for _, names, _, _ in found for layer in names))
    table = np.full((len(layers), len(found)), np.nan)
    for column, (_, names, _, values) in enumerate(found):
        table[[layers.index(name) for name in names], column] = mean_coverage(values)
    figure = blank(1.8 + 0.24 * min(len(layers), _MOST_LAYER_NAMES))
    axes = figure.subplots()
    lines = 0.6 if len(layers) <= _MOST_LAYER_NAMES else 0.0
    image = axes.pcolormesh(table, cmap="Blues", vmin=0, vmax=1, edgecolors="white", linewidth=lines)
    axes.set_xticks(np.arange(len(found)) + 0.5, [plain(label, 30) for label, *_ in found], rotation=40, ha="right")
    _name_layers(axes, layers, offset=0.5)
    figure.colorbar(image, ax=axes, label="fraction of entries updated", shrink=0.8)
    return to_png(figure)


def _name_layers(axes: Any, layers: Sequence[str], *, offset: float = 0.0, hidden: bool = False) -> None:
    step = -(-len(layers) // _MOST_LAYER_NAMES)
    shown = range(0, len(layers), step)
    axes.set_yticks([index + offset for index in shown], [] if hidden else [plain(layers[index]) for index in shown])
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()
    axes.set_facecolor(_UNKNOWN)
    for spine in axes.spines.values():
        spine.set_visible(False)
