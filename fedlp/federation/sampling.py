"""Draws of the server from named streams: cohorts and upload sets.

Cohorts are drawn over partition ids, which are stable, never over node ids, which are random in every run.
"""

from __future__ import annotations

from collections.abc import Sequence

from fedlp.models import Layer
from fedlp.rng import Stream, generator


def sample_cohort(
    seed: int, server_round: int, client_ids: Sequence[int], count: int, stream: Stream = Stream.COHORT, draw: int = 0
) -> tuple[int, ...]:
    """Return ``count`` distinct clients, uniformly, sorted; ``draw`` numbers the draws of one round."""
    ordered = sorted(client_ids)
    if count >= len(ordered):
        return tuple(ordered)
    key = (server_round, draw) if draw else (server_round,)
    chosen = generator(seed, stream, *key).choice(len(ordered), size=count, replace=False)
    return tuple(sorted(ordered[i] for i in chosen))


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
