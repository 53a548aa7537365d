"""Central differential privacy of a round: Poisson sampling, expected holders, clipping and noise.

Nothing here looks at who took part: denominators come from the assignments that all clients would have, and the noise
is drawn whether or not anybody answered. A clipping norm that adapts follows Andrew et al. (NeurIPS 2021): it moves
towards a quantile of the norms by a noised count of the updates that were not clipped.
"""

from __future__ import annotations

import math
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedlp.federation.aggregation.coverage import Keeps
from fedlp.federation.aggregation.noised_sum import Holders, NoisedSum, Normal
from fedlp.federation.strategies.policy import Policy, holdings_of
from fedlp.federation.submodels import SubModels
from fedlp.rng import Stream, generator

_CLIP = "privacy.clipping_norm"  # among what the server remembers
_CLIP_RATE = 0.2  # of the clipping norm's logarithm towards the quantile, per round
_COUNT_SHARE = 1 / 20  # standard deviation of the noise on the count, of the expected cohort


@dataclass(frozen=True)
class CentralPrivacy:
    """Settings of central differential privacy, and its steps in a round.

    Attributes
    ----------
    noise_multiplier : float
        Standard deviation of the noise in units of the sensitivity of all that a round measures, > 0.
    sampling_rate : float
        Probability that a client takes part in a round, in (0, 1].
    num_clients : int
        Clients of the federation, whether or not they are there.
    clipping_norm : float
        Largest norm of an update, > 0; of the first round where it adapts.
    clipping_quantile : float or None
        Quantile of the norms that the clipping norm adapts to, in (0, 1); fixed where None.
    seed : int
        Seed of cohorts and noise; not read where ``is_secure``.
    is_secure : bool
        Whether cohorts and noise come from the operating system's random numbers; such a run cannot be repeated.
    """

    noise_multiplier: float
    sampling_rate: float
    num_clients: int
    clipping_norm: float = 1.0
    clipping_quantile: float | None = None
    seed: int = 0
    is_secure: bool = False

    def cohort(self, server_round: int, client_ids: Iterable[int]) -> tuple[int, ...]:
        """Return the clients that take part, each with the sampling rate and for itself, sorted."""
        ordered = sorted(client_ids)
        if self.is_secure:
            draws = secure_uniform(len(ordered))
        else:
            draws = generator(self.seed, Stream.COHORT, server_round).random(len(ordered))
        return tuple(client_id for client_id, draw in zip(ordered, draws, strict=True) if draw < self.sampling_rate)

    def begin(
        self,
        server_round: int,
        params: Mapping[str, Tensor],
        holders: Holders,
        memory: Mapping[str, Tensor],
    ) -> NoisedSum:
        """Return the accumulator of a round; see :class:`NoisedSum` for ``params`` and ``holders``."""
        return NoisedSum(params, holders, self.clip(memory), self._sum_noise, self._normal(server_round, 0))

    def remember(self, memory: Mapping[str, Tensor], server_round: int, total: NoisedSum) -> Mapping[str, Tensor]:
        """Return the memory with the next round's clipping norm; unchanged where it is fixed."""
        if self.clipping_quantile is None:
            return memory
        noise = float(self._normal(server_round, 1)(1)) * self._count_noise
        share = 0.5 + (total.num_within - 0.5 * total.num_added + noise) / self._cohort_size
        step = _CLIP_RATE * (min(max(share, 0.0), 1.0) - self.clipping_quantile)
        return {**memory, _CLIP: torch.tensor(self.clip(memory) * math.exp(-step), dtype=torch.float64)}

    def clip(self, memory: Mapping[str, Tensor]) -> float:
        """Return the clipping norm of the round that a memory comes before."""
        return float(memory.get(_CLIP, self.clipping_norm))

    @property
    def _cohort_size(self) -> float:
        return max(self.sampling_rate * self.num_clients, 1.0)

    @property
    def _count_noise(self) -> float:
        """Standard deviation of the noise on the count, whose sensitivity is 1/2."""
        return max(_COUNT_SHARE * self._cohort_size, self.noise_multiplier)

    @property
    def _sum_noise(self) -> float:
        """Noise multiplier of the sum, such that sum and count together have ``noise_multiplier``."""
        if self.clipping_quantile is None:
            return self.noise_multiplier
        return float((self.noise_multiplier**-2 - (2.0 * self._count_noise) ** -2) ** -0.5)

    def _normal(self, server_round: int, number: int) -> Normal:
        if self.is_secure:
            return secure_normal
        rng = generator(self.seed, Stream.CENTRAL_NOISE, server_round, number)
        return lambda count: torch.from_numpy(rng.standard_normal(count))


def expected_holders(
    policy: Policy,
    submodels: SubModels,
    server_round: int,
    client_ids: Sequence[int],
    sampling_rate: float,
    memory: Mapping[str, Tensor],
    params: Mapping[str, Tensor],
) -> dict[str, dict[Keeps | None, float]]:
    """Return the expected number of clients that return each part of each tensor, from all clients' assignments.

    ``client_ids`` are all that could be sampled at some time, whether or not they are there.
    """
    found: dict[str, dict[Keeps | None, float]] = defaultdict(lambda: defaultdict(float))
    for holding in holdings_of(policy, server_round, client_ids, memory, params):
        layout = submodels.layout(holding.submodel)
        for name in (holding.uploads & layout.name_set) - submodels.spec.frozen:
            found[name][layout.keeps.get(name)] += sampling_rate * holding.count
    return {name: dict(parts) for name, parts in found.items()}


def secure_uniform(count: int) -> NDArray[np.float64]:
    """Return numbers in [0, 1) from the operating system, of 53 bits each."""
    return (np.frombuffer(os.urandom(8 * count), np.uint64) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def secure_normal(count: int) -> Tensor:
    """Return standard normal numbers from the operating system (Box and Muller, 1958), float64."""
    half = (count + 1) // 2
    radius = np.sqrt(-2.0 * np.log1p(-secure_uniform(half)))
    angle = 2.0 * np.pi * secure_uniform(half)
    return torch.from_numpy(np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count])
