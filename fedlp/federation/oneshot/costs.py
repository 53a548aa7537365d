"""Expected costs of federated one-shot pruning, from the shapes of the model alone."""

from __future__ import annotations

import math

from torch import nn

from fedlp.federation.oneshot.model import ModelStates, fisher_parts, moment_parts, norm_parts
from fedlp.federation.oneshot.settings import OneShotSettings
from fedlp.federation.submodels import SubModels
from fedlp.models.cost import count_macs
from fedlp.pruning.batch_norms import following_batch_norms
from fedlp.pruning.layer_statistics import make_readers
from fedlp.pruning.tracing.units import find_layers
from fedlp.types import PrunableLayer


def count_lines(settings: OneShotSettings, submodels: SubModels) -> int:
    """Return the number of lines of ``rounds.jsonl``: one per layer, or one for votes."""
    return 1 if settings.votes else len(skeleton(settings, submodels)[1])


def largest_message(settings: OneShotSettings, submodels: SubModels) -> int:
    """Return an upper bound of the bytes of one answer's arrays."""
    return max(answer_sizes(settings, submodels)) * itemsize(settings)


def expected_costs(settings: OneShotSettings, submodels: SubModels) -> dict[str, float]:
    """Return the mean cost of one client in one line of ``rounds.jsonl``: bytes down and up.

    An upper bound for layers that keep all units; record keys, some hundred bytes a message, are left out. The same
    keys as :func:`fedlp.federation.costs.expected_costs`; there is no training.
    """
    model, layers = skeleton(settings, submodels)
    method, lines = settings.method, count_lines(settings, submodels)
    down = {"params": 0, "bytes": 0}
    asked = 2 if method.shrinks and settings.clients_per_round == 1 else 1  # a single client, about halves
    if not settings.votes:
        norms = following_batch_norms(model, submodels.spec.example_inputs(1))
        states = ModelStates(model, layers, norms, method)
        asks_norms = bool(norm_parts(model)) and not method.keeps_batch_norm
        changes = states.signature(range(len(layers) if asks_norms else len(layers) - 1))
        for _, shape, dtype in changes:
            down["params"] += math.prod(shape)
            down["bytes"] += math.prod(shape) * dtype.itemsize
        if method.needs_inputs:
            readers = [reader for layer in layers for reader in make_readers(model, layer, {}, False)]
            down["params"] += asked * sum(len(reader.moments.total) for reader in readers)
            down["bytes"] += 4 * asked * sum(len(reader.moments.total) for reader in readers)
    up = asked * sum(answer_sizes(settings, submodels))
    return {
        "params_down_per_client": down["params"] / lines,
        "params_up_per_client": up / lines,
        "bytes_down_per_client": down["bytes"] / lines,
        "bytes_up_per_client": up * itemsize(settings) / lines,
        "macs_per_example": forward_macs(model, submodels),
        "training_macs_per_example": 0.0,
    }


def answer_sizes(settings: OneShotSettings, submodels: SubModels) -> list[int]:
    """Return the count of numbers in each of a client's answers."""
    model, layers = skeleton(settings, submodels)
    if settings.votes:
        units = sum(layer.num_units for layer in layers)
        return [units if settings.secagg is not None else -(-units // (8 * itemsize(settings)))]  # counts, or bits
    method = settings.method
    answers = []
    if method.needs_inputs:
        answers += [moment_parts(make_readers(model, layer, {}, method.corrects), method) for layer in layers]
    if method.fisher:
        answers.append(fisher_parts(model, layers))
    if not method.keeps_batch_norm:
        answers.append(norm_parts(model))
    return [sum(part.num_sent for part in parts) for parts in answers] or [0]


def skeleton(settings: OneShotSettings, submodels: SubModels) -> tuple[nn.Module, tuple[PrunableLayer, ...]]:
    """Return a model of the shapes, and its layers."""
    model = submodels.skeleton().eval()
    shared = settings.shared and not submodels.spec.reads_tokens
    return model, find_layers(model, submodels.widths, shared)


def forward_macs(model: nn.Module, submodels: SubModels) -> float:
    """Return the multiply-accumulates of one example's forward pass."""
    return float(count_macs(model, submodels.spec.example_inputs(1)).forward)


def itemsize(settings: OneShotSettings) -> int:
    """Return the bytes of a number of an answer."""
    is_masked = settings.secagg is not None  # sums of 64-bit integers
    return 8 if settings.wide_sums or is_masked else 4
