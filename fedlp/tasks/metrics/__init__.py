"""Metrics: sums that add up over batches, ranges of a test set and clients, and the value of such sums.

A metric is a class, registered as ``@register("metric", NAME)``, whose fields are its options; see :class:`Metric`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Protocol, runtime_checkable

from torch import Tensor

from fedlp.errors import ConfigError
from fedlp.registry import lookup


@runtime_checkable
class Metric(Protocol):
    """Quality measure of predictions, one number.

    Attributes
    ----------
    label : str
        Name in records and reports.
    larger_is_better : bool
        Direction of improvement.
    bounds : tuple of float
        Optional: smallest and largest value; a client's sums with a value outside are rejected.
    """

    @property
    def label(self) -> str:
        """Name in records and reports."""

    @property
    def larger_is_better(self) -> bool:
        """Direction of improvement."""

    def sums(self, outputs: Tensor, targets: Tensor) -> Mapping[str, Tensor | float]:
        """Return sums over a batch that add up: numbers, or vectors of equal lengths in every batch.

        Parameters
        ----------
        outputs : (n, outputs)
            Logits of classes or labels, or values.
        targets : (n,) or (n, outputs)
            Classes, indicators or values.
        """

    def value(self, sums: Mapping[str, float | Sequence[float]]) -> float:
        """Return the metric of sums over at least one prediction.

        Parameters
        ----------
        sums : mapping
            The metric's own, and the task's ``loss`` and ``count`` of predictions where it has none of these names.
        """


@lru_cache(maxsize=64)
def make_metrics(names: tuple[str, ...]) -> tuple[Metric, ...]:
    """Return the metrics of these names, or of ``module:object``, each with its default options.

    Raises
    ------
    ConfigError
        If there is no such metric, one does not follow the protocol, or two have one label.
    """
    found: dict[str, Metric] = {}
    for name in names:
        metric = lookup("metric", name)()
        if not isinstance(metric, Metric):
            raise ConfigError(f"metric={name} must have label, larger_is_better, sums and value")
        if metric.label in found or metric.label in ("loss", "count"):
            raise ConfigError(f"metric={name}: there is another metric {metric.label}; give it a label of its own")
        found[metric.label] = metric
    return tuple(found.values())
