"""Sums over clients' data that a secure sum carries beside the weights: examples, loss, scores, input norms."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedlp.federation.submodels import SubModels
from fedlp.types import Assignment, ClientReport, InputNorms

_COUNTS = 4  # examples, examples that have a loss, clipped values, MACs of pruning
_RATIO_BITS, _NORM_BITS = 20, 34  # of losses and scores, and of sums of squares, before the point
_MOST_COUNT = 2.0**40


@dataclass(frozen=True, slots=True)
class DataSums:
    """Sums over the data of a group's clients.

    Attributes
    ----------
    examples, clipped : int
        Examples of the clients; values of their updates that were out of range.
    macs : float
        Spent on choosing units.
    train_loss : float or None
        Mean over the examples of the clients that have a loss.
    report : ClientReport
        The answer of one client that has all these examples.
    """

    examples: int
    clipped: int
    macs: float
    train_loss: float | None
    report: ClientReport


@dataclass(frozen=True)
class SumLayout:
    """Layout of the 64-bit sums of a group's clients.

    Attributes
    ----------
    num_clients : int
        Clients whose sum must not wrap.
    most_examples : int
        Most examples of a client, >= 1.
    units : mapping from axis name to int
        Units that each client scores; empty where scores were not asked for.
    columns : mapping from module path to int
        Columns whose input norms are measured; empty where they were not asked for.
    """

    num_clients: int
    most_examples: int
    units: Mapping[str, int] = field(default_factory=dict)
    columns: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, assigned: Assignment, submodels: SubModels, num_clients: int, most_examples: int) -> SumLayout:
        """Return the layout for the measurements that an assignment asks for."""
        units: dict[str, int] = {}
        columns: dict[str, int] = {}
        held = assigned.submodel.widths
        for layer in submodels.layers if assigned.evidence else ():
            count = held[layer.name].count if layer.name in held else layer.num_units
            if "unit_scores" in assigned.evidence:
                units[layer.name] = count
            if "input_norms" in assigned.evidence:
                for path in layer.readers:
                    columns[path] = submodels.reader_columns[path] // layer.num_units * count
        return cls(num_clients, most_examples, units, columns)

    @cached_property
    def size(self) -> int:
        """Integers of the vector."""
        scores = 1 + sum(self.units.values()) if self.units else 0
        return _COUNTS + 1 + scores + len(self.columns) + sum(self.columns.values())

    def _scale(self, bits: int) -> float:
        return 2.0 ** (62 - bits - math.ceil(math.log2(max(self.num_clients, 2))))

    def encode(self, report: ClientReport, clipped: int) -> NDArray[np.uint64]:
        """Return a client's part of the sums, modulo 2^64."""
        loss = report.metrics.get("train-loss", math.nan)
        has_loss, count = math.isfinite(loss), report.num_examples
        share = count / self.most_examples
        macs = min(report.metrics.get("pruning-macs", 0.0), 2.0**50)
        parts = [np.array([count, count * has_loss, min(clipped, _MOST_COUNT), macs])]
        parts.append(self._fixed(np.array([loss if has_loss else 0.0]), share, _RATIO_BITS))
        if self.units:
            is_scored = bool(report.scores)
            parts.append(np.array([float(count * is_scored)]))
            for axis, size in self.units.items():
                scores = report.scores[axis].to(torch.float64).numpy() if is_scored else np.zeros(size)
                parts.append(self._fixed(scores, share, _RATIO_BITS))
        for path, size in self.columns.items():
            norms = report.input_norms.get(path)
            parts.append(np.array([0.0 if norms is None else float(norms.count)]))
            total = np.zeros(size) if norms is None else norms.total.to(torch.float64).numpy()
            parts.append(self._fixed(total, 1.0, _NORM_BITS))
        found: NDArray[np.uint64] = np.rint(np.concatenate(parts)).astype(np.int64).view(np.uint64)
        return found

    def _fixed(self, values: NDArray[np.float64], share: float, bits: int) -> NDArray[np.float64]:
        most = 2.0**bits
        clipped = np.clip(np.nan_to_num(values, nan=0.0, posinf=most, neginf=-most), -most, most)
        fixed: NDArray[np.float64] = clipped * (share * self._scale(bits))
        return fixed

    def decode(self, total: NDArray[np.uint64], server_round: int, client_id: int) -> DataSums:
        """Return the sums that a sum of vectors stands for; ``client_id`` is one of the clients."""
        values = total.view(np.int64).astype(np.float64)
        examples, lossy, clipped, macs = (float(value) for value in values[:_COUNTS])
        loss = float(values[_COUNTS]) / self._scale(_RATIO_BITS) * self.most_examples
        rest = values[_COUNTS + 1 :]
        scores: dict[str, Tensor] = {}
        scored = 0
        if self.units:
            scored = int(rest[0])
            flat = rest[1 : 1 + sum(self.units.values())] / self._scale(_RATIO_BITS) * self.most_examples
            parts = np.split(flat / max(scored, 1), np.cumsum(list(self.units.values()))[:-1])
            scores = {axis: torch.from_numpy(part) for axis, part in zip(self.units, parts, strict=True) if scored > 0}
            rest = rest[1 + len(flat) :]
        norms: dict[str, InputNorms] = {}
        for path, size in self.columns.items():
            count, sums = int(rest[0]), rest[1 : 1 + size] / self._scale(_NORM_BITS)
            if count > 0:
                norms[path] = InputNorms(torch.from_numpy(np.maximum(sums, 0.0)), count)
            rest = rest[1 + size :]
        return DataSums(
            examples=int(examples),
            clipped=int(clipped),
            macs=max(macs, 0.0),
            train_loss=loss / lossy if lossy > 0 else None,
            report=ClientReport(server_round, client_id, scored or int(examples), {}, scores=scores, input_norms=norms),
        )
