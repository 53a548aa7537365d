"""Combinations of clients' adapters as their papers write them: dense, float64, one client after another."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Client = tuple[Array, Array, float]
"""A (r_k, in), B (out, r_k), and weight of a client that holds the first r_k ranks."""


def dense_average(clients: Sequence[Client]) -> Array:
    """Return the weighted average of the products B A."""
    total = sum(weight for _, _, weight in clients)
    return sum((weight / total * (b @ a) for a, b, weight in clients), np.zeros(()))


def best_of_rank(matrix: Array, rank: int) -> Array:
    """Return the best approximation of a rank in the Frobenius norm (Eckart and Young)."""
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    return (left[:, :rank] * values[:rank]) @ right[:rank]


def hetlora(clients: Sequence[Client], rank: int) -> tuple[Array, Array]:
    """Return A and B of HETLoRA: zero-padded, weighted by the norm of each client's product."""
    shares = [weight * np.sqrt(np.square(b @ a).sum()) for a, b, weight in clients]
    a_sum = np.zeros((rank, clients[0][0].shape[1]))
    b_sum = np.zeros((clients[0][1].shape[0], rank))
    for share, (a, b, _) in zip(shares, clients, strict=True):
        for k in range(len(a)):
            a_sum[k] += share / sum(shares) * a[k]
            b_sum[:, k] += share / sum(shares) * b[:, k]
    return a_sum, b_sum
