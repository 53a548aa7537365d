"""Axes of amounts."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from matplotlib.text import Text

from fedlp.report.figures import blank, label_ends, scale_amounts


@pytest.mark.parametrize(
    ("curves", "scale"),
    [
        ([[1, 2], [5, 10]], "linear"),
        ([[1, 2], [5, 11]], "log"),  # on a linear axis the first would have less than a fifth of the width
        ([[0, 2], [5, 11]], "linear"),  # has no logarithm
        ([[1, 2]], "linear"),
    ],
)
def test_curves_that_end_far_apart_get_a_logarithmic_axis(curves: list[list[float]], scale: str) -> None:
    axes = blank(3).subplots()
    scale_amounts(axes, [np.array(curve, dtype=np.float64) for curve in curves])
    assert axes.get_xscale() == scale
    assert scale == "log" or axes.get_xlim()[0] == 0


def test_names_stand_at_ends_that_lie_together_and_apart_from_each_other() -> None:
    axes = blank(3).subplots()
    axes.plot([0, 1], [0, 1])
    label_ends(axes, [(1.0, 1.0, f"curve {index}", "#000000") for index in range(2)])
    low, high = sorted(text.xyann[1] for text in axes.texts)
    assert high - low >= 0.06 - 1e-9
    assert high <= 1.0
    assert {text.xyann[0] > 1 for text in axes.texts} == {True}


def test_names_of_curves_that_end_apart_stand_at_their_ends_on_no_curve_and_no_name() -> None:
    figure = blank(3)
    axes = figure.subplots()
    ends = [(x, y, f"a curve {x}", "#000000") for x, y in ((1.0, 0.9), (0.85, 0.7), (0.4, 0.9))]
    for x, y, *_ in ends:
        axes.plot([0, x], [0, y])
    assert label_ends(axes, ends)
    figure.canvas.draw()
    boxes = [Text.get_window_extent(text) for text in axes.texts]  # without the lines to the ends
    assert len(boxes) == 3
    assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))
    assert all(box.x0 > 0 and box.x1 < figure.bbox.width and box.y1 < figure.bbox.height for box in boxes)
    for line in axes.lines:
        x, y = line.get_transform().transform([line.get_xydata()[0], line.get_xydata()[1]]).T
        track = np.stack([np.linspace(*x, 500), np.linspace(*y, 500)], axis=1)
        assert not any(box.contains(*point) for box in boxes for point in track)


def test_names_without_room_are_not_written() -> None:
    axes = blank(3).subplots()
    ends = [(x, y / 20, "a curve with a long name", "#000000") for y in range(20) for x in (0.5, 1.0)]
    for x, y, *_ in ends:
        axes.plot([0, x], [y, y])
    limits = axes.get_ylim()
    assert not label_ends(axes, ends)
    assert not axes.texts
    assert axes.get_ylim() == limits
