r"""Clipped, noised sum of updates over denominators that are known before the round (central differential privacy).

.. math:: x_e \leftarrow x_e + \frac{1}{\max(d_e, 1)} \Big(\sum_k \Delta_{k,e} \min(1, C / \lVert\Delta_k\rVert)
   + \mathcal N(0, z^2 C^2)\Big)

:math:`\Delta_k` is client k's update, zero where it returns nothing, its norm that over all its entries;
:math:`d_e` is the number of clients that are expected to return entry e (McMahan et al., ICLR 2018, for equal
coverage). The sum lies in the space of the whole model, so one client moves it by at most C, for any part of the model
it holds. Every entry with :math:`d_e > 0` is noised, whether or not a client returned it; who did is not looked at.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from fedlp.federation.aggregation.coverage import Keeps, region
from fedlp.pruning.tracing.widths import slice_tensor

Holders = Mapping[str, Mapping[Keeps | None, float]]
"""Expected number of clients that return a part of a tensor, by tensor name; None is the whole tensor."""

Normal = Callable[[int], Tensor]
"""Returns so many standard normal numbers, float64."""


class NoisedSum:
    """Accumulator of one round; streaming, with two float64 copies of the model.

    Parameters
    ----------
    params : mapping from tensor name to Tensor
        Current global values, or zeros where updates are differences; all floating-point. Not modified.
    holders : Holders
        From facts known before the round. Tensors without expected holders stay as they are.
    clipping_norm : float
        Largest L2 norm of an update over all its entries, > 0.
    noise_multiplier : float
        Standard deviation of the noise on the sum, in clipping norms, >= 0.
    normal : Normal
        Source of the noise.

    Attributes
    ----------
    num_within : int
        Updates whose norm was at most ``clipping_norm``. Not noised.
    num_added : int
        Updates. Not noised.
    """

    def __init__(
        self,
        params: Mapping[str, Tensor],
        holders: Holders,
        clipping_norm: float,
        noise_multiplier: float,
        normal: Normal,
    ) -> None:
        self._params, self._clipping_norm = params, clipping_norm
        self._deviation, self._normal = noise_multiplier * clipping_norm, normal
        self._expected = {name: _expected(params[name], parts) for name, parts in holders.items()}
        self._sums = {name: torch.zeros(params[name].shape, dtype=torch.float64) for name in holders}
        self.num_within = self.num_added = 0

    @torch.no_grad()
    def add(self, params: Mapping[str, Tensor], keeps: Mapping[str, Keeps], weight: float) -> None:
        """Count in one client's clipped update; its weight is not looked at, so that each client counts once.

        Parameters
        ----------
        params : mapping from tensor name to Tensor
            Returned values; finite, of parts that ``holders`` names.
        keeps : mapping from tensor name to one Keep per dimension
            Global indices that a returned tensor covers; the whole tensor where the name is absent.
        """
        deltas = {name: values.to(torch.float64) - self._received(name, keeps) for name, values in params.items()}
        norm = math.sqrt(sum(float(delta.square().sum()) for delta in deltas.values()))
        scale = min(1.0, self._clipping_norm / norm) if norm else 1.0
        for name, delta in deltas.items():
            for total, part in _pieces(delta, self._sums[name], keeps.get(name)):
                total.add_(part, alpha=scale)
        self.num_added += 1
        self.num_within += norm <= self._clipping_norm

    def _received(self, name: str, keeps: Mapping[str, Keeps]) -> Tensor:
        values = self._params[name]
        return (slice_tensor(values, keeps[name]) if name in keeps else values).to(torch.float64)

    @torch.no_grad()
    def result(self) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Return the new global values, and the fraction of each tensor's entries that somebody could have returned.

        To be called once: it draws the noise, tensor by tensor in the order of their names, since a state that comes
        from a checkpoint has another order.
        """
        found, coverage = dict(self._params), {}
        for name in sorted(found):
            old = self._params[name]
            expected = self._expected.get(name)
            if expected is None or not bool(expected.any()):
                found[name], coverage[name] = old.clone(), 0.0
                continue
            noise = self._normal(old.numel()).view(old.shape) * self._deviation
            new = old.to(torch.float64) + (self._sums[name] + noise) / expected.clamp(min=1.0)
            found[name] = torch.where(expected > 0, new.to(old.dtype), old)
            coverage[name] = float((expected > 0).to(torch.float64).mean())
        return found, coverage

    def covered(self, name: str) -> bool | Tensor:
        """Return which entries of a tensor somebody could have returned: True or False for all, else booleans."""
        expected = self._expected.get(name)
        mask = torch.zeros(()) if expected is None else expected > 0
        if bool(mask.all()) or not bool(mask.any()):
            return bool(mask.any())
        return mask.expand(self._params[name].shape)


def _expected(values: Tensor, parts: Mapping[Keeps | None, float]) -> Tensor:
    """Return the expected number of clients that return each entry; a single number where all are alike."""
    if all(keeps is None or all(keep.is_full for keep in keeps) for keeps in parts):
        return torch.tensor(math.fsum(parts.values()), dtype=torch.float64)
    total = torch.zeros(values.shape, dtype=torch.float64)
    for keeps, count in parts.items():
        shape = values.shape if keeps is None else tuple(keep.count for keep in keeps)
        for into, ones in _pieces(torch.ones(shape, dtype=torch.float64), total, keeps):
            into.add_(ones, alpha=count)
    return total


def _pieces(values: Tensor, total: Tensor, keeps: Keeps | None) -> list[tuple[Tensor, Tensor]]:
    """Return disjoint views of ``total`` and what belongs to each."""
    return [(total, values)] if keeps is None else list(region(keeps).pieces(values, total, 0))
