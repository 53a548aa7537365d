"""Where training clients together pays: a rule from measurements, not a clock, so that a run stays reproducible."""

from __future__ import annotations

from torch import nn

from fedlp.training.stacked_adapters import find_adapters

MOST_PARAMS = 130_000
"""Trained numbers of a network whose stack pays on a CPU.

Where a model is a chain of linear layers, stacks pay beyond it; others go by ``vmap``, whose processor time over that
of a client alone was 0.6 to 0.7 at 126,000 numbers, 0.75 to 0.9 at 159,000, nearly 1 at 398,000, in single runs on a
busy machine. ``experiments/bench/cohorts.py`` measures it again.
"""

MOST_PLACES, MOST_WORK = 1 << 8, 1 << 28
"""Tokens of a batch, and tokens times parameters, of a model whose adapters' stack pays on a CPU.

What a pass costs beside arithmetic is shared. Processor time over that of a client alone was 0.3 to 0.5 at 64 tokens,
0.5 at 128, 0.64 at 256, 0.7 to 0.8 at 512 (260 thousand parameters), and 0.35 at 32, 0.5 at 64 (3.3 million).
"""

_STACK_BYTES = 1 << 24  # of the parameters of one stack
_MOST_CLIENTS = 64
_PASS_PLACES = 1 << 11  # tokens of a pass of a base: beyond it activations leave the cache
_BASE_BYTES = 1 << 28
_LEAST_STACKS = 4  # of a round, so that workers share them


def pays(model: nn.Module, places: int) -> bool:
    """Return whether clients of an architecture train faster together than one by one.

    Parameters
    ----------
    places : int
        Tokens of a batch, of a model that reads tokens.
    """
    if find_adapters(model):
        return places <= MOST_PLACES and sum(x.numel() for x in model.parameters()) * places <= MOST_WORK
    count = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return count <= MOST_PARAMS


def stack_size(num_bytes: int, num_clients: int) -> int:
    """Return how many clients train together at most.

    Parameters
    ----------
    num_bytes : int
        Of one client's parameters.
    num_clients : int
        Clients of a round.
    """
    return max(1, min(_MOST_CLIENTS, _STACK_BYTES // max(num_bytes, 1), -(-num_clients // _LEAST_STACKS)))


def adapter_stack_size(num_bytes: int, num_clients: int, places: int, base_bytes: int) -> int:
    """Return how many clients train adapters of one base together at most.

    Parameters
    ----------
    num_bytes : int
        Of one client's adapters.
    num_clients : int
        Clients of a round.
    places : int
        Tokens of a client's batch: activations of all clients of a stack are in memory at once.
    base_bytes : int
        Of the base, for which the messages of a stack have room each.
    """
    most = min(_PASS_PLACES // max(places, 1), _BASE_BYTES // max(base_bytes, 1))
    return max(1, min(stack_size(num_bytes, num_clients), most))
