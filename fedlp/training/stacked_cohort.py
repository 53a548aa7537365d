"""Clients that train in one stack: their values, examples and generators, how they train, and the result."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from fedlp.data.examples import Examples
from fedlp.models import state_tensors
from fedlp.training.loop import TrainResult
from fedlp.training.stacked_adapters import Adapters
from fedlp.training.stacked_chain import Chain

Trained = tuple[TrainResult, dict[str, Tensor]]
"""Report of a training, and the trained tensors by name."""


@dataclass(frozen=True, slots=True)
class Trainee:
    """One client's part in a stack.

    Attributes
    ----------
    values : mapping from name to Tensor
        Tensors that the model starts from; absent ones are the model's own.
    examples : Examples
        At least one.
    rng : numpy Generator
        As of :func:`fedlp.training.loop.train_locally`.
    masks : mapping from name to Tensor
        Factors of gradients, 0 or 1; may be empty.
    """

    values: Mapping[str, Tensor]
    examples: Examples
    rng: np.random.Generator
    masks: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Cohort:
    """Clients of one architecture that train together.

    Attributes
    ----------
    shared : mapping from name to Tensor
        Values that all start from; tensors that are neither here nor in ``own`` are the model's.
    own : mapping from name to (clients, ...)
        Values that clients start from where theirs differ.
    examples : Examples
        Of all clients, one after another.
    lengths : sequence of int
        Examples of each client, >= 1.
    rngs : iterable of numpy Generator
        As of :func:`fedlp.training.loop.train_locally`. With augmentation one object per client; else one may be set
        anew for each.
    masks : mapping from name to (clients, ...)
        Factors of gradients, 0 or 1; may be empty.
    """

    shared: Mapping[str, Tensor]
    own: Mapping[str, Tensor]
    examples: Examples
    lengths: Sequence[int]
    rngs: Iterable[np.random.Generator]
    masks: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class StackedResult:
    """Result of a cohort.

    Attributes
    ----------
    tensors : mapping from name to Tensor
        Of all clients, (clients, ...), for every name of ``state_tensors(model)``, in its order; expanded where
        clients share one.
    losses : list of float
        Mean training loss of each client.
    """

    tensors: Mapping[str, Tensor]
    losses: Sequence[float]


@dataclass(frozen=True, slots=True)
class Way:
    """How clients of an architecture train together.

    Attributes
    ----------
    stacks : bool
        Whether they do.
    pads : bool
        Whether smaller batches may be padded; see ``stacked_pass``.
    chain : Chain
        The layers of a fully connected network; else empty.
    adapters : Adapters
        The adapted layers where nothing but adapters is trained; else empty.
    """

    stacks: bool = True
    pads: bool = False
    chain: Chain = ()
    adapters: Adapters = ()


def as_cohort(model: nn.Module, trainees: Sequence[Trainee]) -> Cohort:
    """Return clients as a cohort; values are shared where those of all clients are equal."""
    shared: dict[str, Tensor] = {}
    own: dict[str, Tensor] = {}
    for name, x in state_tensors(model).items():
        values = [trainee.values.get(name, x) for trainee in trainees]
        if all(_are_equal(value, values[0]) for value in values):
            shared[name] = values[0]
        else:
            own[name] = torch.stack([value.to(x) for value in values])
    examples = [trainee.examples for trainee in trainees]
    joined = examples[0] if len(examples) == 1 else _join(examples)
    masks = {name: torch.stack([trainee.masks[name] for trainee in trainees]) for name in trainees[0].masks}
    rngs = [trainee.rng for trainee in trainees]
    return Cohort(shared, own, joined, [len(one) for one in examples], rngs, masks)


def _are_equal(one: Tensor, other: Tensor) -> bool:
    if one is other:
        return True
    return (one.dtype, one.device) == (other.dtype, other.device) and torch.equal(one, other)


def _join(examples: Sequence[Examples]) -> Examples:
    inputs = [one.inputs if isinstance(one.inputs, Tensor) else one.inputs[: len(one)] for one in examples]
    return Examples(torch.cat(inputs), torch.cat([one.targets for one in examples]), None)
