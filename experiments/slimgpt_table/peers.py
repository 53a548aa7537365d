"""torch-pruning's importance criteria on the channels that fedlp prunes, at the same number of channels per layer."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
import torch_pruning as tp
from torch import nn

from fedlp.pruning.batch_norms import reestimate_batch_norms
from fedlp.pruning.pruner import Calibration

PEERS: dict[str, Callable[[], Any]] = {
    "torch-pruning, L1": lambda: tp.importance.GroupMagnitudeImportance(p=1),
    "torch-pruning, L2": lambda: tp.importance.GroupMagnitudeImportance(p=2),
    "torch-pruning, BN scale": tp.importance.BNScaleImportance,
    "torch-pruning, LAMP": tp.importance.LAMPImportance,
    "torch-pruning, FPGM": tp.importance.FPGMImportance,
    "torch-pruning, Taylor": tp.importance.GroupTaylorImportance,
    "torch-pruning, Hessian": tp.importance.GroupHessianImportance,
}


def prune_with_peer(method: str, model: nn.Module, kept: Mapping[str, int], data: Calibration) -> nn.Module:
    """Return a copy of a ResNet whose layers keep the channels that the peer thinks most of; batch norms anew."""
    pruned = copy.deepcopy(model)
    importance = PEERS[method]()
    if method.endswith(("Taylor", "Hessian")):
        _collect_gradients(pruned, importance, data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        graph = tp.DependencyGraph().build_dependency(pruned, example_inputs=data.batches[0][:1])
        for path, count in kept.items():
            conv = pruned.get_submodule(path)
            group = graph.get_pruning_group(conv, tp.prune_conv_out_channels, list(range(conv.out_channels)))
            scores = importance(group)
            removed = torch.argsort(scores, stable=True)[: conv.out_channels - count].tolist()
            if removed:
                graph.get_pruning_group(conv, tp.prune_conv_out_channels, removed).prune()
    pruned.zero_grad(set_to_none=True)
    reestimate_batch_norms(pruned, data.batches)
    return pruned.eval()


def _collect_gradients(model: nn.Module, importance: Any, data: Calibration) -> None:
    """Give parameters the gradients of the mean loss, or the criterion the squared ones of single examples."""
    by_example = isinstance(importance, tp.importance.GroupHessianImportance)
    if by_example:
        importance.zero_grad()
    for batch, labels in zip(data.batches[:1] if by_example else data.batches, data.labels, strict=False):
        losses = F.cross_entropy(model(batch), labels, reduction="none")
        if not by_example:
            losses.mean().backward()
            continue
        for loss in losses:
            model.zero_grad()
            loss.backward(retain_graph=True)
            importance.accumulate_grad(model)
