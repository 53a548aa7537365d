"""Draws of the server from named streams: cohorts and upload sets.

Cohorts are drawn over partition ids, which are stable, never over node ids, which are random in every run.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Sequence
from typing import overload

from fedlp.models import Layer
from fedlp.rng import Stream, generator


def sample_cohort(
    seed: int,
    server_round: int,
    client_ids: Sequence[int],
    count: int,
    stream: Stream = Stream.COHORT,
    draw: int = 0,
    is_sorted: bool = False,
) -> tuple[int, ...]:
    """Return ``count`` distinct clients, uniformly, sorted.

    Parameters
    ----------
    draw : int
        Number of the draw among those of one round.
    is_sorted : bool
        Whether ``client_ids`` are: then a small cohort takes no pass over them.
    """
    ordered = client_ids if is_sorted else sorted(client_ids)
    if count >= len(ordered):
        return tuple(ordered)
    key = (server_round, draw) if draw else (server_round,)
    chosen = generator(seed, stream, *key).choice(len(ordered), size=count, replace=False)
    return tuple(sorted(ordered[i] for i in chosen))


class Without(Sequence[int]):
    """Sorted ids but for a few, in no memory of their own.

    Parameters
    ----------
    client_ids : sequence of int
        Sorted and distinct; not to be modified.
    left_out : collection of int
        Ids that are left out; others than of ``client_ids`` have no effect.
    """

    def __init__(self, client_ids: Sequence[int], left_out: Collection[int]) -> None:
        self._ids = client_ids
        found = ((bisect_left(client_ids, one), one) for one in sorted(left_out))
        self._gaps = [at for at, one in found if at < len(client_ids) and client_ids[at] == one]  # their positions

    def __len__(self) -> int:
        return len(self._ids) - len(self._gaps)

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[int]: ...
    def __getitem__(self, index: int | slice) -> int | Sequence[int]:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        at = range(len(self))[index]
        for gap in self._gaps:
            at += gap <= at
        return self._ids[at]


def sample_uploads(
    seed: int, server_round: int, client_id: int, layers: Sequence[Layer], rate: float, mask_unit: str
) -> frozenset[str]:
    """Return the tensors a client uploads: each unit independently with probability ``rate`` (FedLP-Homo's LPR).

    Parameters
    ----------
    rate : float
        Layer-preserving rate in [0, 1].
    mask_unit : str
        ``layer``: one draw for all tensors of a layer. ``tensor``: one draw for each tensor, BatchNorm buffers
        included, as in FedLP's official code.
    """
    units = [layer.tensors for layer in layers]
    if mask_unit == "tensor":
        units = [(tensor,) for layer in layers for tensor in layer.tensors]
    draws = generator(seed, Stream.UPLOADS, server_round, client_id).random(len(units))
    return frozenset(name for unit, draw in zip(units, draws, strict=True) if draw < rate for name in unit)


def sample_level(seed: int, stream: Stream, client_id: int, probabilities: Sequence[float]) -> int:
    """Return the index of a client's level (depth or width), drawn once for the whole run."""
    return int(generator(seed, stream, client_id).choice(len(probabilities), p=probabilities))


def depth_probabilities(depths: object, num_depths: int) -> list[float]:
    """Return P(depth = 1..num_depths) of FedLP-Hetero.

    Parameters
    ----------
    depths : "u" or int
        "u": uniform. A depth d: 0.6 at d and 0.4 shared by the others (0.1 each for five depths, as in FedLP's
        official code); 1 where there is but one depth.
    """
    if depths == "u" or num_depths == 1:
        return [1.0 / num_depths] * num_depths
    preferred = int(depths)  # type: ignore[call-overload]
    return [0.6 if depth == preferred else 0.4 / (num_depths - 1) for depth in range(1, num_depths + 1)]
