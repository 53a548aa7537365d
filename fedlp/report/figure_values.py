"""Values of figures as JSON, and boxes in words."""

from __future__ import annotations

from typing import Any

import numpy as np

from fedlp.report.groups import clean
from fedlp.report.summary import FloatArray

BOX = "Box: quartiles; whiskers: values within one and a half boxes; points: values beyond."


def numbers(values: FloatArray, digits: int = 6) -> list[float | None]:
    """Return JSON numbers of so many significant digits; None for what is not finite."""
    return [float(f"{value:.{digits}g}") if np.isfinite(value) else None for value in values.tolist()]


def number(value: float | None, scale: float) -> float | None:
    """Return a JSON number in units of ``scale``; None for what is not finite."""
    return None if value is None or not np.isfinite(value) else value / scale


def spoken_box(one: dict[str, Any]) -> str:
    """Return a series' median and the mean of its lowest tenth in words."""
    values = np.array([value for value in one["y"] if value is not None])
    worst = np.sort(values)[: max(1, len(values) // 10)].mean()
    return f"{clean(one['label'])} has a median of {np.median(values):.3g} and {worst:.3g} in its lowest tenth"
