"""Contrast of the palettes, and how far apart their colours look with each common form of colour blindness."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from fedlp.report.palette import DARK, DARK_PAPER, LIGHT, LIGHT_PAPER

# Machado, Oliveira and Fernandes (2009), severity 1: what linear RGB looks like to a protanope, to a deuteranope
SIGHT = {
    "all cones": np.eye(3),
    "protanopia": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
    "deuteranopia": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    ),
}
XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])


def linear(colour: str) -> np.ndarray:
    """Return linear RGB, (3,) in [0, 1], of ``#RRGGBB``."""
    values = np.array([int(colour[start : start + 2], 16) for start in (1, 3, 5)]) / 255
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def contrast(one: str, other: str) -> float:
    """Return the contrast of WCAG 2, in [1, 21]."""
    low, high = sorted(float(XYZ[1] @ linear(colour)) for colour in (one, other))
    return (high + 0.05) / (low + 0.05)


def lab(colour: str, sight: np.ndarray) -> np.ndarray:
    """Return CIELAB, (3,), as a kind of sight sees the colour."""
    x = XYZ @ np.clip(sight @ linear(colour), 0, 1) / np.array([0.9505, 1.0, 1.089])
    f = np.where(x > 0.008856, np.cbrt(x), 7.787 * x + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def test_contrast_is_that_of_the_standard() -> None:
    assert contrast("#000000", "#FFFFFF") == pytest.approx(21)
    assert contrast("#767676", "#FFFFFF") == pytest.approx(4.54, abs=0.01)


@pytest.mark.parametrize(("palette", "paper"), [(LIGHT, LIGHT_PAPER), (DARK, DARK_PAPER)], ids=["light", "dark"])
def test_every_mark_stands_out_from_its_background(palette: tuple[str, ...], paper: str) -> None:
    assert {colour: round(contrast(colour, paper), 2) for colour in palette if contrast(colour, paper) < 3} == {}


@pytest.mark.parametrize("sight", SIGHT)
@pytest.mark.parametrize("palette", [LIGHT, DARK], ids=["light", "dark"])
def test_five_curves_are_told_apart(palette: tuple[str, ...], sight: str) -> None:
    places = [lab(colour, SIGHT[sight]) for colour in palette[:5]]
    assert min(float(np.linalg.norm(a - b)) for a, b in itertools.combinations(places, 2)) > 15
