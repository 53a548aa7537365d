"""Classes in proportions drawn from a Dirichlet distribution."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from fedlp.data.examples import Examples
from fedlp.data.partitioners.dealing import Owners, classes_of, sorted_by_label
from fedlp.errors import ConfigError, DataError
from fedlp.registry import register

_MAX_DRAWS: Final = 1000


@register("partition", "dirichlet")
@dataclass(frozen=True)
class Dirichlet:
    """Each class divided in proportions drawn from a symmetric Dirichlet distribution.

    Attributes
    ----------
    alpha : float
        Concentration, > 0: the smaller, the more skewed.
    min_examples : int
        Smallest number of examples of a client; proportions are drawn again until it is met.
    """

    alpha: float = 1.0
    min_examples: int = 1

    def __post_init__(self) -> None:
        if not 0 < self.alpha < math.inf:
            raise ConfigError(f"partition.alpha is {self.alpha}; it must be positive and finite")

    def __call__(self, train: Examples, num_clients: int, rng: np.random.Generator) -> Owners:
        """Return the client of every example."""
        return dirichlet_owners(classes_of(train, "dirichlet"), num_clients, self.alpha, self.min_examples, rng)


def dirichlet_owners(
    targets: NDArray[np.int64], num_clients: int, alpha: float, min_examples: int, rng: np.random.Generator
) -> Owners:
    """Divide each class among the clients in proportions drawn from a symmetric Dirichlet(alpha).

    The split of Yurochkin et al. 2019 (arXiv 1905.12022) and of FedLP's D-niid: sizes are unequal. All proportions are
    drawn again, at most 1000 times, until every client has ``min_examples``.

    Raises
    ------
    DataError
        If no draw gives every client ``min_examples``.
    """
    totals = np.unique(targets, return_counts=True)[1]
    for _ in range(_MAX_DRAWS):
        shares = rng.dirichlet(np.full(num_clients, alpha), size=len(totals))
        borders = (np.cumsum(shares, axis=1) * totals[:, None]).astype(np.int64)
        borders[:, -1] = totals
        sizes = np.diff(borders, axis=1, prepend=0)
        if sizes.sum(axis=0).min() >= min_examples:
            break
    else:
        raise DataError(
            f"partition=dirichlet: in {_MAX_DRAWS} draws with alpha={alpha} some of {num_clients} clients always had "
            f"fewer than {min_examples} examples; raise partition.alpha, or lower num_clients or "
            "partition.min_examples (0 allows clients without data)"
        )
    owners: Owners = np.empty(len(targets), dtype=np.int64)
    owners[sorted_by_label(targets, rng)] = np.repeat(np.tile(np.arange(num_clients), len(totals)), sizes.ravel())
    return owners
