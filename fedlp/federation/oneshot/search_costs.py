"""Expected costs of a federated search, from the shapes of the model alone."""

from __future__ import annotations

import math

from fedlp.federation.oneshot import costs
from fedlp.federation.oneshot.settings import OneShotSettings
from fedlp.federation.submodels import SubModels
from fedlp.pruning.layer_statistics import make_readers
from fedlp.pruning.refitted_model import refit_signature


def largest_message(settings: OneShotSettings, submodels: SubModels) -> int:
    """Return an upper bound of the bytes of one message's arrays."""
    return max(costs.largest_message(settings, submodels), _refits(settings, submodels)[1])


def expected_costs(settings: OneShotSettings, submodels: SubModels, num_plans: int, lines: int) -> dict[str, float]:
    """Return the mean cost of one client in one line of ``rounds.jsonl``; keys as of :func:`costs.expected_costs`.

    Parameters
    ----------
    num_plans : int
        Plans that are judged: a byte per layer down each, and a number up.
    """
    model, layers = costs.skeleton(settings, submodels)
    readers = [reader for layer in layers for reader in make_readers(model, layer, {}, False)]
    asked = 2 if settings.method.shrinks and settings.clients_per_round == 1 else 1  # a single client, about halves
    references = asked * sum(len(reader.moments.total) for reader in readers)
    refits, refit_bytes = _refits(settings, submodels)
    up = asked * sum(costs.answer_sizes(settings, submodels)) + num_plans
    return {
        "params_down_per_client": (references + refits) / lines,
        "params_up_per_client": up / lines,
        "bytes_down_per_client": (4 * references + refit_bytes + num_plans * len(layers)) / lines,
        "bytes_up_per_client": up * costs.itemsize(settings) / lines,
        "macs_per_example": costs.forward_macs(model, submodels),
        "training_macs_per_example": 0.0,
    }


def _refits(settings: OneShotSettings, submodels: SubModels) -> tuple[int, int]:
    """Return the numbers and bytes of the refits of all layers."""
    model, layers = costs.skeleton(settings, submodels)
    signature = refit_signature(model, layers, settings.dtype)
    sizes = [(math.prod(shape), dtype.itemsize) for _, shape, dtype in signature]
    return sum(size for size, _ in sizes), sum(size * item for size, item in sizes)
