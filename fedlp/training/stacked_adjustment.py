"""Adjustment of stacked gradients before a step: masks, FedProx's term, clipping of each client's norm."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fedlp.config import LocalConfig


@torch.no_grad()
def adjust_gradients(
    trained: Mapping[str, Tensor], anchors: Sequence[Tensor], masks: Mapping[str, Tensor], config: LocalConfig
) -> None:
    """Mask gradients, add FedProx's, and clip each client's norm; gradients are changed in place.

    Parameters
    ----------
    trained : mapping from name to (clients, ...)
        Tensors with their gradients.
    anchors : sequence of (clients, ...)
        Values that the trained tensors started from; empty without FedProx.
    masks : mapping from name to (clients, ...)
        Factors of gradients, 0 or 1; may be empty.
    """
    for name, mask in masks.items():
        if name in trained and (gradient := trained[name].grad) is not None:
            gradient.mul_(mask)
    moved = [x for x in trained.values() if x.grad is not None]
    for x, anchor in zip(trained.values(), anchors, strict=False):
        if x.grad is not None:
            x.grad.add_(x.detach() - anchor, alpha=config.proximal)
    if config.max_grad_norm is None:
        return
    gradients = [x.grad for x in moved if x.grad is not None]
    norms = torch.stack([torch.linalg.vector_norm(g.flatten(1), dim=1) for g in gradients])
    scale = (config.max_grad_norm / (torch.linalg.vector_norm(norms, dim=0) + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        gradient.mul_(scale.reshape(-1, *[1] * (gradient.ndim - 1)))
