"""Coverage average of updates whose norms are bounded by a multiple of the round's medians.

The average streams, as without a bound, and is the result where no update is beyond it, bit for bit. For the other case
the updates are kept as well (:class:`StoredUpdates`), and averaged once more with the differences of some scaled down.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from fedlp.federation.aggregation.coverage import Keeps
from fedlp.federation.aggregation.coverage_average import CoverageAverage
from fedlp.federation.aggregation.norm_bounds import (
    Squares,
    StackSquares,
    are_surely_within,
    clipping_scales,
    estimate_squares,
    squared_norm,
)
from fedlp.federation.aggregation.stored_updates import StoredUpdates
from fedlp.pruning.tracing.widths import slice_tensor


class ClippedAverage:
    """Accumulator of one round.

    Parameters
    ----------
    params : mapping from tensor name to Tensor
        Current global values, or zeros where updates are differences. Not modified.
    multiple : float
        Largest norm where clients are alike, as a multiple of a typical update's, >= 1.
    trainable : collection of str, optional
        Tensors that clients train. Others, such as running statistics, have a bound of their own: their changes are of
        another size. All if absent.
    stored : StoredUpdates, optional
        Store of the updates.

    Attributes
    ----------
    scales : list of float
        Smallest factor of each update's differences, in the order of their arrival; known after :meth:`result`.
    """

    def __init__(
        self,
        params: Mapping[str, Tensor],
        multiple: float,
        trainable: Collection[str] | None = None,
        stored: StoredUpdates | None = None,
    ) -> None:
        self._params, self._multiple = params, multiple
        self._trainable = frozenset(params if trainable is None else trainable)
        self._average = CoverageAverage(params)
        self._stored = stored or StoredUpdates()
        self._squares: list[Squares] = []
        self._estimates: list[StackSquares] = []  # of the updates that came in stacks
        self._count = 0
        self.scales: list[float] = []

    @torch.no_grad()
    def add(self, params: Mapping[str, Tensor], keeps: Mapping[str, Keeps], weight: float) -> None:
        """Count in one client's update; as :meth:`CoverageAverage.add`."""
        self._average.add(params, keeps, weight)
        self._squares.append(self._squares_of(params, keeps))
        self._count += 1
        self._stored.add(params, keeps, weight)

    @torch.no_grad()
    def add_stack(self, stacks: Mapping[str, Tensor], keeps: Mapping[str, Keeps], weights: Sequence[float]) -> None:
        """Count in updates of several clients; as :meth:`CoverageAverage.add_stack`."""
        self._average.add_stack(stacks, keeps, weights)
        self._estimates.append(
            {
                name: (estimate_squares(stack, self._before(name, keeps)), stack[0].numel())
                for name, stack in stacks.items()
                if stack.is_floating_point() and stack[0].numel()
            }
        )
        self._count += len(weights)
        self._stored.add_stack(stacks, keeps, weights)

    @torch.no_grad()
    def result(self) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Return the average of the bounded updates, and its coverage; as :meth:`CoverageAverage.result`."""
        if self._are_all_within():
            self.scales = [1.0] * self._count
            return self._average.result()
        if self._estimates:
            self._squares = [self._squares_of(params, keeps) for params, keeps, _ in self._stored]
            self._estimates = []
        trained = self._scales_of(self._trainable)
        others = self._scales_of(self._params.keys() - self._trainable)
        self.scales = [min(pair) for pair in zip(trained, others, strict=True)]
        if any(scale < 1.0 for scale in self.scales):
            del self._average  # its sums, before there are others
            self._average = CoverageAverage(self._params)
            for (params, keeps, weight), *scales in zip(self._stored, trained, others, strict=True):
                self._average.add(self._scaled(params, keeps, *scales), keeps, weight)
        return self._average.result()

    def covered(self, name: str) -> bool | Tensor:
        """Return whether each entry has an update; as :meth:`CoverageAverage.covered`."""
        return self._average.covered(name)

    def _are_all_within(self) -> bool:
        """Return whether estimates alone show that no update is beyond its bound; only where all came in stacks."""
        if self._squares:
            return False
        kinds = self._trainable, self._params.keys() - self._trainable
        return all(are_surely_within(self._estimates, names, self._multiple) for names in kinds)

    def _squares_of(self, params: Mapping[str, Tensor], keeps: Mapping[str, Keeps]) -> Squares:
        """Return the squared norms of an update's differences."""
        return {
            name: (squared_norm(values, self._before(name, keeps)), values.numel())
            for name, values in params.items()
            if values.is_floating_point() and values.numel()
        }

    def _scales_of(self, names: Collection[str]) -> list[float]:
        """Return the scale of each update, by the norms over some of the tensors."""
        measured = set[str]().union(*self._squares)
        if measured.isdisjoint(names):
            return [1.0] * len(self._squares)
        if measured <= set(names):
            return clipping_scales(self._squares, self._multiple)
        found = [{name: value for name, value in update.items() if name in names} for update in self._squares]
        return clipping_scales(found, self._multiple)

    def _scaled(
        self, params: Mapping[str, Tensor], keeps: Mapping[str, Keeps], trained: float, others: float
    ) -> dict[str, Tensor]:
        """Return an update with the differences of its floating-point tensors scaled; float64 where they are."""
        found = dict(params)
        for name, values in params.items():
            scale = trained if name in self._trainable else others
            if scale < 1.0 and values.is_floating_point():
                before = self._before(name, keeps).to(torch.float64)
                found[name] = before + scale * (values.to(torch.float64) - before)
        return found

    def _before(self, name: str, keeps: Mapping[str, Keeps]) -> Tensor:
        """Return the values before the round of the entries that an update covers."""
        return slice_tensor(self._params[name], keeps[name]) if name in keeps else self._params[name]
