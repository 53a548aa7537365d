"""Shrinkage by two halves of the data, entry by entry in float64: slow, and easy to check against the formulas."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def hessian(x: Tensor) -> Tensor:
    """Return 2/N of the sum of squares of inputs (N, n) less their means."""
    centred = x - x.mean(dim=0)
    return 2.0 / len(x) * centred.T @ centred


def hessian_weight(first: Tensor, second: Tensor, whole: Tensor) -> float:
    agreed = norm = 0.0
    for i in range(len(whole)):
        for j in range(len(whole)):
            if i != j and whole[i, i] > 0 and whole[j, j] > 0:
                scale = math.sqrt(float(whole[i, i] * whole[j, j]))
                agreed += float(first[i, j]) / scale * float(second[i, j]) / scale
                norm += (float(whole[i, j]) / scale) ** 2
    return min(max(agreed / norm, 0.0), 1.0 - 1e-6) if norm else 0.0


def shrink_hessian(matrix: Tensor, weight: float) -> Tensor:
    return weight * matrix + (1.0 - weight) * torch.diag(matrix.diagonal())


def shrink_fisher(first: Tensor, second: Tensor, whole: Tensor) -> Tensor:
    identity = torch.eye(len(whole), dtype=whole.dtype)
    a, b, f = (m - m.trace() / len(m) * identity for m in (first, second, whole))
    weight = min(max(float((a * b).sum() / (f * f).sum()), 0.0), 1.0)
    return weight * whole + (1.0 - weight) * whole.trace() / len(whole) * identity


def solve(weight: Tensor, halves: list[tuple[Tensor, Tensor]], correction: float) -> tuple[Tensor, Tensor]:
    """Return weights and inverse Hessian of two halves of (N, n) inputs and (N, out) targets."""
    x, t = torch.cat([x for x, _ in halves]), torch.cat([t for _, t in halves])
    whole, parts = hessian(x), [hessian(x) for x, _ in halves]
    alpha = hessian_weight(parts[0], parts[1], whole)

    def inverse(matrix: Tensor) -> Tensor:
        shrunk = shrink_hessian(matrix, alpha)
        return torch.linalg.inv(shrunk + 1e-9 * shrunk.diagonal().mean() * torch.eye(len(shrunk), dtype=shrunk.dtype))

    def missed(x: Tensor, t: Tensor) -> Tensor:
        centred = x - x.mean(dim=0)
        return 2.0 / len(x) * (t - t.mean(dim=0)).T @ centred - weight @ hessian(x)

    gain = cost = 0.0
    for one, other in ((0, 1), (1, 0)):
        step = missed(*halves[one]) @ inverse(parts[one])
        gain += float((step * missed(*halves[other])).sum())
        cost += float(torch.trace(step @ parts[other] @ step.T))
    strength = min(max(gain / cost, 0.0), 1.0)
    return weight + correction * strength * missed(x, t) @ inverse(whole), inverse(whole)
