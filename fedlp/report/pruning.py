"""Plot of a one-shot pruning's sparsity over layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fedlp.report.figures import COLOURS, blank, to_png
from fedlp.report.palette import PALE


def draw_layers(layers: Sequence[Mapping[str, Any]], title: str) -> bytes:
    """Return a PNG of bars: the fraction of units removed from each layer, as in ``prune.json``."""
    figure = blank(1.2 + 0.2 * len(layers))
    axes = figure.subplots()
    removed = [1.0 - layer["kept_units"] / layer["num_units"] for layer in layers]
    places = np.arange(len(layers))
    axes.barh(places, removed, color=PALE, edgecolor=COLOURS[0])
    for place, layer in zip(places, layers, strict=True):
        axes.text(
            0.995, float(place), f"{layer['kept_units']} / {layer['num_units']}", ha="right", va="center", fontsize=7
        )
    axes.set_yticks(places, [layer["name"] for layer in layers], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlim(0.0, 1.0)
    axes.set_xlabel("fraction of units removed")
    axes.set_title(title)
    return to_png(figure)
