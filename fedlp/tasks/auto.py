"""The task that a data set's targets are for."""

from __future__ import annotations

from dataclasses import dataclass

from fedlp.registry import register


@register("task", "auto")
@dataclass(frozen=True)
class Auto:
    """Task that the data set's targets are for, with its default options."""
