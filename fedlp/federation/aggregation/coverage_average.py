r"""Coverage average: every entry of the model is averaged over the clients that returned it.

.. math:: x_e \leftarrow \frac{\sum_{k \in C_e} w_k x_{k,e}}{\sum_{k \in C_e} w_k},
   \qquad C_e = \{k : k \text{ returned } e\}

With full updates from all clients this is FedAvg (McMahan et al., AISTATS 2017), with missing layers FedLP (Zhu et
al., ICC 2023), with width slices the overlap average of HeteroFL (Diao et al., ICLR 2021).

Products and sums are float64, in the order of the calls. A few updates are held back and added together, block by
block, so that the sums pass through the cache once per group and not once per update: purely a memory optimization,
which does not affect results. Denominators are one number per distinct region, never one per entry.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from fedlp.federation.aggregation.blocks import BLOCK, add_weighted, empty, write_average
from fedlp.federation.aggregation.coverage import WHOLE, Denominator, Keeps, Region, region
from fedlp.federation.aggregation.pending_updates import Entry, HeldUpdate, Part, Segment

GROUP = 64  # updates held back at most
GROUP_BYTES = 1 << 25  # bytes of updates held back, but for the last one

WeightedUpdate = tuple[Mapping[str, Tensor], Mapping[str, Keeps], float]
"""Arguments of :meth:`CoverageAverage.add`: params, keeps, weight."""


class CoverageAverage:
    """Streaming, entry-wise weighted average over the clients that returned an entry.

    For full updates and whole-number weights, this is ``numpy.average`` of the float64 stack, bit for bit. (From 8
    updates on, numpy adds fractional weights, and tensors of one entry, pairwise: there the last bits may differ.)

    Parameters
    ----------
    params : mapping from tensor name to Tensor
        Current global values, on the CPU. Not modified.
    block : int
        Numbers summed at a time, >= 1.
    group, group_bytes : int
        Updates, and bytes of updates, held back before they are added, >= 1. Memory is bounded by ``group_bytes``, one
        more update and a float64 copy of the model, for any number of updates.
    """

    def __init__(
        self, params: Mapping[str, Tensor], *, block: int = BLOCK, group: int = GROUP, group_bytes: int = GROUP_BYTES
    ) -> None:
        self._params = dict(params)
        self._block, self._group, self._group_bytes = block, group, group_bytes
        self._names = sorted(params, key=lambda name: str(params[name].dtype))  # as in a message: by dtype, in order
        ends = np.cumsum([0, *(params[name].numel() for name in self._names)]).tolist()
        self._starts = dict(zip(self._names, ends, strict=False))
        self._numel = ends[-1]
        neighbours = zip(self._names, self._names[1:], strict=False)
        self._before = {name: before for before, name in neighbours if params[name].dtype == params[before].dtype}
        self._weights: dict[str, dict[Region, float]] = {name: {} for name in params}
        self._pending: list[HeldUpdate] = []
        self._pending_bytes = 0
        self._sums: Tensor | None = None
        self._summed: set[str] = set()  # whose sums are initialised
        self._total, self._wide = torch.empty(0, dtype=torch.float64), torch.empty(0, dtype=torch.float64)

    def add(self, params: Mapping[str, Tensor], keeps: Mapping[str, Keeps], weight: float) -> None:
        """Count in one client's update.

        Parameters
        ----------
        params : mapping from tensor name to Tensor
            Returned values: any subset of the global names. Not modified, held until the group is
            complete: the caller must not write into this memory, or must pass a copy.
        keeps : mapping from tensor name to one Keep per dimension
            Global indices that a returned tensor covers, whole if absent; may have names that were not returned.
        weight : float
            Weight of the client, finite and > 0; usually its number of examples.

        Raises
        ------
        ValueError
            For an invalid weight, an unknown name or a wrong shape. The update is then not counted.
        """
        if not 0.0 < weight < math.inf:
            raise ValueError(f"an update's weight is {weight}; it must be finite and > 0")
        update = HeldUpdate({}, set(), float(weight))
        for name, values in params.items():
            entry = self._entry(name, values, keeps.get(name))
            update.entries[name] = entry
            if name in self._before and entry.follows(update.entries.get(self._before[name])):
                update.joined.add(name)
        for name, entry in update.entries.items():
            weights = self._weights[name]
            weights[entry.region] = weights.get(entry.region, 0.0) + update.weight
            self._pending_bytes += entry.values.nbytes
        self._pending.append(update)
        if len(self._pending) >= self._group or self._pending_bytes >= self._group_bytes:
            self._flush()

    def add_stack(self, stacks: Mapping[str, Tensor], keeps: Mapping[str, Keeps], weights: Sequence[float]) -> None:
        """Count in updates of several clients that cover the same entries: :meth:`add` of each in turn, bit for bit.

        Parameters
        ----------
        stacks : mapping from tensor name to (clients, ...)
            Returned values of each client. Not modified, nor held.
        keeps : mapping from tensor name to one Keep per dimension
            As of :meth:`add`, for all of them.
        weights : sequence of float
            Weight of each client.
        """
        whole = all(region(keeps.get(name)) is WHOLE for name in stacks)
        if not whole or not stacks or not all(weight.is_integer() and weight < 1 << 29 for weight in weights):
            for k, weight in enumerate(weights):
                self.add({name: stack[k] for name, stack in stacks.items()}, keeps, weight)
            return
        if not all(weight > 0.0 for weight in weights):
            raise ValueError(f"an update's weight is {min(weights)}; it must be finite and > 0")
        self._flush()
        assert self._sums is not None
        for name, stack in stacks.items():
            self._entry(name, stack[0], None)
        for name, stack in stacks.items():
            start, total = self._starts[name], sum(weights)
            self._weights[name][WHOLE] = self._weights[name].get(WHOLE, 0.0) + total
            if numel := self._params[name].numel():
                sums = self._sums[start : start + numel]
                add_weighted(sums, stack.reshape(len(stack), -1), weights, name in self._summed)
            self._summed.add(name)

    @torch.no_grad()
    def result(self) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Return the average so far, and its coverage.

        Returns
        -------
        params : dict from tensor name to Tensor
            Shapes and dtypes of the global values; new memory, in which several tensors may be parts of one buffer.
            Entries without an update keep their old bits. Integers are rounded, halves to even.
        coverage : dict from tensor name to float
            Fraction of the tensor's entries that at least one client returned, in [0, 1].
        """
        params, coverage = self._allocate(), dict.fromkeys(self._params, 0.0)
        make_denominator = lru_cache(Denominator)  # many tensors have that of another
        covered_names = [name for name in self._names if self._weights[name]]
        for name in self._params.keys() - covered_names:
            params[name].copy_(self._params[name])
        for segment in self._segments(covered_names, finish=True):
            first, numel = segment.names[0], segment.shape.numel()
            weights = self._weights[first]
            denominator: float | Denominator = sum(weights.values())
            if numel and not self._is_dense(first):
                denominator = make_denominator(tuple(weights.items()), segment.shape)
            out = params[first].as_strided((numel,), (1,))
            covered = sum(self._finish(segment, denominator, lo, hi, out) for lo, hi in segment.blocks(self._block))
            coverage.update(dict.fromkeys(segment.names, covered / numel if numel else 1.0))
        return params, coverage

    def covered(self, name: str) -> bool | Tensor:
        """Return whether each entry has an update: True or False for all, else booleans of the tensor's shape."""
        weights, shape = self._weights[name], self._params[name].shape
        if WHOLE in weights or not weights or not shape.numel():
            return bool(weights)
        found, kinds = Denominator(tuple(weights.items()), shape).rows(0, shape[0])
        mask = found > 0.0
        if bool(mask.all()) or not bool(mask.any()):
            return bool(mask.any())
        return (mask if kinds is None else mask[kinds]).expand(shape[0], shape[1:].numel()).reshape(shape)

    def _entry(self, name: str, values: Tensor, keeps: Keeps | None) -> Entry:
        if name not in self._params:
            raise ValueError(f"an update holds {name!r}, which the model does not have")
        entry = Entry(values, region(keeps))
        expected = entry.region.shape or self._params[name].shape
        if values.shape != expected:
            raise ValueError(f"an update's {name!r} has shape {tuple(values.shape)}, not {tuple(expected)}")
        return entry

    def _allocate(self) -> dict[str, Tensor]:
        """Return uninitialised tensors like the global ones, those of a dtype in one buffer."""
        found = {}
        for dtype, group in groupby(self._names, key=lambda name: self._params[name].dtype):
            shapes = {name: self._params[name].shape for name in group}
            sizes = [shape.numel() for shape in shapes.values()]
            flats = torch.split(empty(sum(sizes), dtype), sizes)
            found.update({name: flat.view(shapes[name]) for name, flat in zip(shapes, flats, strict=True)})
        return {name: found[name] for name in self._params}

    # --------------------------------------------------------------------------------------------------------- the sums
    @torch.no_grad()
    def _flush(self) -> None:
        """Add the updates held back to the sums."""
        if self._sums is None:
            self._sums = empty(self._numel, torch.float64)
        returned = {name for update in self._pending for name in update.entries}
        for segment in self._segments([name for name in self._names if name in returned], finish=False):
            for lo, hi in segment.blocks(self._block):
                self._accumulate(segment, lo, segment.rows(self._sums[segment.start :], lo, hi))
        self._summed |= returned
        self._pending, self._pending_bytes = [], 0

    def _finish(self, segment: Segment, denominator: float | Denominator, lo: int, hi: int, out: Tensor) -> int:
        """Write the average of the rows ``[lo, hi)`` into ``out``; return the number of covered entries."""
        out = segment.rows(out, lo, hi)
        if isinstance(denominator, float):
            write_average(self._sum(segment, lo, hi, denominator), out)
            return out.numel()
        weights, kinds = denominator.rows(lo, hi)
        mask = weights > 0.0 if kinds is None else (weights > 0.0)[kinds]
        old = self._params[segment.names[0]][lo:hi]
        covered = int(mask.count_nonzero())
        if covered == 0:
            out.copy_(old)
            return 0
        total = self._sum(segment, lo, hi).view(hi - lo, -1)
        if kinds is not None:
            weights = torch.index_select(weights, 0, kinds, out=self._wide.resize_(hi - lo, weights.shape[1]))
        out = out.view(hi - lo, -1)
        write_average(total.div_(weights), out)
        if covered < mask.numel():
            torch.where(mask, out, old.reshape(hi - lo, -1), out=out)
        return covered * (out.numel() // mask.numel())

    def _sum(self, segment: Segment, lo: int, hi: int, over: float = 1.0) -> Tensor:
        """Return the sums of some rows, with the updates held back, over a number; in scratch."""
        total = self._total.resize_(hi - lo, *segment.shape[1:])
        if self._sums is not None and segment.is_summed:
            sums = segment.rows(self._sums[segment.start :], lo, hi)
            if not segment.parts:
                return torch.div(sums, over, out=total)
            total.copy_(sums)
        self._accumulate(segment, lo, total)
        return total if over == 1.0 else total.div_(over)

    def _accumulate(self, segment: Segment, lo: int, total: Tensor) -> None:
        """Add the updates held back to ``total``, the sums of rows from ``lo`` on."""
        parts = segment.parts
        if not segment.is_summed:
            if parts and parts[0].region is WHOLE:
                total.copy_(parts[0].values[lo : lo + total.shape[0]]).mul_(parts[0].weight)
                parts = parts[1:]
            else:
                total.fill_(-0.0)  # -0.0 + x is x, bit for bit
        for part in parts:
            for into, values in part.region.pieces(part.values, total, lo):
                wide = self._wide.resize_(into.shape).copy_(values)
                if part.is_exact:  # then a fused multiply-add rounds as the two operations do
                    into.add_(wide, alpha=part.weight)
                else:
                    into.add_(wide.mul_(part.weight))

    # ----------------------------------------------------------------------------------------------------- the segments
    def _segments(self, names: Sequence[str], finish: bool) -> Iterator[Segment]:
        """Yield the tensors, joined where every update held back (and the average) treats neighbours as one run."""
        run: list[str] = []
        for name in names:
            if run and not (self._before.get(name) == run[-1] and self._is_joined(run[-1], name, finish)):
                yield self._segment(run, finish)
                run = []
            run.append(name)
        if run:
            yield self._segment(run, finish)

    def _is_joined(self, before: str, name: str, finish: bool) -> bool:
        if finish and not (self._is_dense(name) and self._weights[name] == self._weights[before]):
            return False
        if (name in self._summed) != (before in self._summed):
            return False
        return all(update.joins(before, name) for update in self._pending)

    def _is_dense(self, name: str) -> bool:
        return self._weights[name].keys() == {WHOLE}

    def _segment(self, names: list[str], finish: bool) -> Segment:
        first, shape = names[0], self._params[names[0]].shape
        updates = [update for update in self._pending if first in update.entries]
        entries = [update.entries[first] for update in updates]
        if all(entry.is_flat for entry in entries) and (self._is_dense(first) or not finish):
            shape = torch.Size((sum(self._params[name].numel() for name in names),))
            entries = [Entry(entry.values.as_strided(shape, (1,)), WHOLE) for entry in entries]
        parts = [
            Part(entry.values, entry.region, update.weight, update.is_exact(entry.values.dtype))
            for entry, update in zip(entries, updates, strict=True)
        ]
        return Segment(names, self._starts[first], shape, parts, first in self._summed)


def coverage_average(
    params: Mapping[str, Tensor], updates: Iterable[WeightedUpdate]
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Return :meth:`CoverageAverage.result` after all updates, added in their order."""
    average = CoverageAverage(params)
    for update in updates:
        average.add(*update)
    return average.result()
