"""The server's memory of units in FedLP-Plan: scores, last rounds, and the units that each client returned last."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedlp.federation.strategies.policy import Answer, Memory
from fedlp.types import Keep, PrunableLayer

_SCORE, _SEEN, _HELD = "score", "seen", "held"  # first part of the names of remembered tensors


def own_units(memory: Memory, client_id: int, layers: Sequence[PrunableLayer]) -> dict[str, Tensor]:
    """Return the units that a client returned last, as booleans by axis."""
    prefix = f"{_HELD}.{client_id}."
    return {x.name: memory[prefix + x.name] for x in layers if prefix + x.name in memory}


def rank_units(
    memory: Memory, layer: PrunableLayer, own: Tensor | None, by_score: bool, num_stale: int, rng: np.random.Generator
) -> NDArray[np.int64]:
    """Return the units of a layer in order of preference for a client.

    First come the ``num_stale`` least recently updated units; then the client's own, then all others by their scores.
    Units without scores come in their order, or at random unless ``by_score``.
    """
    axis, size = layer.name, layer.num_units
    if not by_score:
        ranked = rng.permutation(size)
    else:
        scores = memory.get(f"{_SCORE}.{axis}")
        keys = np.zeros(size) if scores is None else -scores.numpy()
        mine = np.zeros(size, dtype=bool) if own is None else own.numpy()
        ranked = np.lexsort((np.arange(size), keys, ~mine))
    seen = memory.get(f"{_SEEN}.{axis}")
    if not num_stale or seen is None:
        return ranked
    stale = np.lexsort((rng.permutation(size), seen.numpy()))[:num_stale]
    return np.concatenate([stale, ranked[~np.isin(ranked, stale)]])


def remember_units(
    memory: Memory, server_round: int, layers: Sequence[PrunableLayer], answers: Sequence[Answer], keeps_own: bool
) -> dict[str, Tensor]:
    """Return the memory with pooled scores, each unit's last round, and, if asked for, each client's last units.

    A unit's score is the mean over the clients that scored it, weighted by their examples; a unit without a score
    in this round keeps its old one.
    """
    found = dict(memory)
    for layer in layers:
        axis, size = layer.name, layer.num_units
        total, weight = torch.zeros(size, dtype=torch.float64), torch.zeros(size, dtype=torch.float64)
        seen = found.get(f"{_SEEN}.{axis}", torch.zeros(size, dtype=torch.int64)).clone()
        for assigned, answer in answers:
            sent = torch.from_numpy(answer.widths.get(axis, Keep.full(size)).indices())
            seen[sent] = server_round
            if axis in answer.scores:
                held = torch.from_numpy(assigned.submodel.widths.get(axis, Keep.full(size)).indices())
                total[held] += answer.num_examples * answer.scores[axis]
                weight[held] += answer.num_examples
            if keeps_own:
                mine = torch.zeros(size, dtype=torch.bool)
                mine[sent] = True
                found[f"{_HELD}.{answer.client_id}.{axis}"] = mine
        old = found.get(f"{_SCORE}.{axis}", torch.zeros(size, dtype=torch.float64))
        found[f"{_SCORE}.{axis}"] = torch.where(weight > 0, total / weight.clamp(min=1.0), old)
        found[f"{_SEEN}.{axis}"] = seen
    return found
