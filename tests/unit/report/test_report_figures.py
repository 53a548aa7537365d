"""Axes of amounts."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

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


@pytest.mark.parametrize(("ends", "written"), [([1.0, 1.0], True), ([1.0, 0.5], False)])
def test_names_stand_at_ends_that_lie_together_and_apart_from_each_other(ends: list[float], written: bool) -> None:
    axes = blank(3).subplots()
    for x in ends:
        axes.plot([0, x], [0, 1])
    assert label_ends(axes, [(x, 1.0, f"curve {index}", "#000000") for index, x in enumerate(ends)]) == written
    heights = sorted(text.xyann[1] for text in axes.texts)
    assert len(heights) == (2 if written else 0)
    assert all(high - low >= 0.06 - 1e-9 for low, high in itertools.pairwise(heights))
    assert all(height <= 1.0 for height in heights)
