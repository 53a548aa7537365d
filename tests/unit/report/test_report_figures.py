"""Axes of amounts."""

from __future__ import annotations

import numpy as np
import pytest

from fedlp.report.figures import blank, scale_amounts


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
