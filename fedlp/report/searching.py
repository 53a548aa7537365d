"""Plot of a search for an allocation function."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedlp.report.figures import COLOURS, blank, to_png

_LOOKS = {"evolution": (COLOURS[0], "-"), "random": (COLOURS[4], "--"), "vector": (COLOURS[3], "-.")}


def draw_search(report: Mapping[str, Any]) -> bytes:
    """Return a PNG: the best fitness so far of every mode over evaluations, and the hand rules as lines."""
    figure = blank(4.2)
    axes = figure.subplots()
    for mode, found in report["modes"].items():
        points = [(index + 1, value) for index, value in enumerate(found["best_so_far"]) if value is not None]
        colour, dash = _LOOKS.get(mode, (COLOURS[6], ":"))
        axes.step(*zip(*points, strict=True), where="post", label=mode, color=colour, linestyle=dash, linewidth=2)
    longest = max(found["evaluations"] for found in report["modes"].values())
    rules = sorted(report["hand_rules"].items(), key=lambda item: item[1])
    for name, value in rules:
        if value <= 1.5:
            axes.axhline(value, color="#444444", linewidth=0.7, linestyle=":")
            axes.annotate(name, (longest, value), fontsize=7, ha="right", va="bottom")
    axes.set_xlabel("candidates evaluated")
    axes.set_ylabel("divergence from the dense model / uniform's")
    axes.set_title("best so far")
    axes.legend()
    return to_png(figure)
