"""Naive float64 twins of the OBS kernels: everything is inverted anew at every step."""

from __future__ import annotations

import torch
from torch import Tensor


def damped(hessian: Tensor, damping: float) -> Tensor:
    h = hessian.to(torch.float64)
    return h + damping * h.diagonal().mean() * torch.eye(len(h), dtype=torch.float64)


def columns_of(units: list[int], unit_size: int) -> list[int]:
    return [unit * unit_size + entry for unit in units for entry in range(unit_size)]


def refit(weight: Tensor, hessian: Tensor, kept: list[int]) -> Tensor:
    """W_S = W H[:, S] inv(H[S, S])."""
    w, h = weight.to(torch.float64), hessian.to(torch.float64)
    return w @ h[:, kept] @ torch.linalg.inv(h[kept][:, kept])


def removal_loss(weight: Tensor, hessian: Tensor, kept: list[int], output_gram: Tensor | None = None) -> float:
    """Half of tr(F dW H dW^T), with the refitted weights."""
    w, h = weight.to(torch.float64), hessian.to(torch.float64)
    delta = -w.clone()
    delta[:, kept] += refit(w, h, kept)
    f = torch.eye(len(w), dtype=torch.float64) if output_gram is None else output_gram.to(torch.float64)
    return 0.5 * float(torch.trace(f @ delta @ h @ delta.T))


def greedy_order(weights: list[Tensor], hessians: list[Tensor], unit_sizes: list[int], count: int) -> list[int]:
    """Remove one unit at a time, each time the one after whose removal the refitted loss is least."""
    num_units = weights[0].shape[1] // unit_sizes[0]
    order: list[int] = []
    for _ in range(count):
        losses = {}
        for unit in set(range(num_units)) - set(order):
            rest = [other for other in range(num_units) if other not in (*order, unit)]
            losses[unit] = sum(
                removal_loss(w, h, columns_of(rest, size))
                for w, h, size in zip(weights, hessians, unit_sizes, strict=True)
            )
        order.append(min(losses, key=lambda unit: losses[unit]))
    return order


def released_slimgpt(weight: Tensor, hessian: Tensor, unit_size: int, schedule: list[int]) -> tuple[Tensor, list[int]]:
    """SlimGPT's Algorithm 1 with the outer loop of its released code: invert, score, order, prune, refill H.

    Returns the weights, pruned columns zero, and the units in the order of their removal.
    """
    w, h = weight.to(torch.float64).clone(), hessian.to(torch.float64).clone()
    n = w.shape[1]
    num_units, gone = n // unit_size, []
    for count in schedule:
        inv = torch.linalg.inv(h)
        errors = torch.full((num_units,), torch.inf, dtype=torch.float64)
        for unit in set(range(num_units)) - set(gone):
            cols = columns_of([unit], unit_size)
            factor = torch.linalg.cholesky(inv[cols][:, cols])
            errors[unit] = (w[:, cols] ** 2 / torch.diag(factor) ** 2).sum()
        ranked = torch.sort(errors, stable=True).indices.tolist()
        order = columns_of(ranked, unit_size)
        w, inv = w[:, order], inv[order][:, order]
        upper = torch.linalg.cholesky(inv).T
        width = count * unit_size
        pruned_errors = torch.zeros(len(w), width, dtype=torch.float64)
        for i in range(width):
            pruned_errors[:, i] = w[:, i] / upper[i, i]
            w[:, i:width] -= torch.outer(pruned_errors[:, i], upper[i, i:width])
        w[:, width:] -= pruned_errors @ upper[:width, width:]
        w = w[:, torch.argsort(torch.tensor(order))]
        gone += ranked[:count]
        cols = columns_of(ranked[:count], unit_size)
        h[cols], h[:, cols] = 0.0, 0.0
        h[cols, cols] = 1.0
    w[:, columns_of(gone, unit_size)] = 0.0
    return w, gone
