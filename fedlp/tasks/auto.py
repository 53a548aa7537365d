"""Automatic choice of the task by the data set's targets."""

from __future__ import annotations

from dataclasses import dataclass

from fedlp.registry import register


@register("task", "auto")
@dataclass(frozen=True)
class Auto:
    """Task of the data set's targets, with default options."""
