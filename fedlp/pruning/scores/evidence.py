"""Evidence for pruning scores: measurements of a model and of its readers' inputs, and the precision of scores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from fedlp.pruning.calibration import Calibration
from fedlp.pruning.tracing.widths import WidthSpec


class InputStatistics(Protocol):
    """Statistics of the input vectors of one reader; n is the number of columns of its weight matrix."""

    @property
    def count(self) -> int:
        """Number of input vectors."""

    @property
    def mean(self) -> Tensor:
        """Mean of each input, (n,), float64."""

    @property
    def square_mean(self) -> Tensor:
        """Mean square of each input, (n,), float64."""

    @property
    def variance(self) -> Tensor:
        """Variance of each input, (n,), float64, >= 0."""

    def hessian(self, centred: bool) -> Tensor:
        """Return twice the second moments of the inputs, or of the inputs less their means; (n, n), float64."""


@dataclass(frozen=True, slots=True)
class Precision:
    """Granularity of an elimination.

    Attributes
    ----------
    parts : int or None
        Denominator of the fraction of remaining units removed per step, at least one unit; None for the exact greedy
        order.
    block : int
        Columns after which lazy updates are applied; affects speed only.
    outputs : int or None
        Random projections that stand for the outputs of a reader that has more; None for all outputs.
    vectors : int
        Input vectors of a layer at most, where they are sampled; with few, what is inverted is small.
    is_quick : bool
        Whether large steps have a kernel of their own, and inputs are sampled in the pass of the Fisher information.
    """

    parts: int | None = None
    block: int = 64
    outputs: int | None = None
    vectors: int = 512
    is_quick: bool = False

    def schedule(self, total: int) -> list[int]:
        """Return the number of units that each step removes, summing to ``total``."""
        if self.parts is None:
            return [1] * total
        steps: list[int] = []
        while total:
            steps.append(max(1, total // self.parts))
            total -= steps[-1]
        return steps


EXACT = Precision()
FINE = Precision(parts=32, block=256)
COARSE = Precision(parts=16, block=128, outputs=64, vectors=256, is_quick=True)
"""Precisions of scores in a round; ``experiments/bench/scoring.py`` measures what they cost, in time and choice."""


@dataclass(frozen=True)
class Evidence:
    """Evidence for scores of all layers of one model.

    Attributes
    ----------
    model : nn.Module
        Model of the forward passes.
    spec : WidthSpec
        Its width axes.
    data : Calibration
        The calibration examples.
    generator : torch.Generator
        Source of random numbers.
    gradients : mapping from parameter name to Tensor, or None
        Gradient of the loss with respect to every parameter, if a score needs it.
    scored : nn.Module or None
        Model with the scored weights, of the same architecture, such as the change of the weights in a round;
        None for ``model``.
    precision : Precision
        Granularity of eliminations.
    """

    model: nn.Module
    spec: WidthSpec
    data: Calibration
    generator: torch.Generator
    gradients: Mapping[str, Tensor] | None = None
    scored: nn.Module | None = None
    precision: Precision = EXACT
