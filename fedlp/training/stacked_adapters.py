"""Adapters of several clients on one frozen base: one pass of the base serves the examples of all of them.

The base reads the batches of all clients one after another, as one batch; adapted layers multiply each client's part
by its own A and B. Products of the base may be rounded otherwise than those of a client alone.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import Tensor, nn
from torch.func import functional_call

from fedlp.data.examples import DataInfo
from fedlp.models import state_tensors
from fedlp.models.adapter_stacks import Pair, stacked_adapters
from fedlp.models.adapters import PARTS, adapted_layers
from fedlp.tasks import task_of

Adapters = tuple[str, ...]
"""Paths of adapted layers."""


def find_adapters(model: nn.Module, frozen: Collection[str] = ()) -> Adapters:
    """Return the adapted layers of a model that trains nothing else; empty for any other model.

    Parameters
    ----------
    frozen : collection of str
        Parameters that are not trained, beside those without gradients.
    """
    paths = tuple(adapted_layers(model))
    parts = {f"{path}.{part}" for path in paths for part in PARTS}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    trained = {name for name, x in parameters.items() if x.requires_grad and name not in frozen}
    return paths if trained <= parts and state_tensors(model).keys() <= parameters.keys() else ()


def adapted_outputs(
    model: nn.Module,
    adapters: Adapters,
    info: DataInfo,
    trained: Mapping[str, Tensor],
    still: Mapping[str, tuple[Tensor, int | None]],
    raw: Tensor,
) -> Tensor:
    """Return the outputs of all clients, (clients, rows, ...).

    Parameters
    ----------
    trained : mapping from name to (clients, ...)
        Adapters' matrices that move.
    still : mapping from name to (Tensor, axis)
        All other tensors; of the base, one for all clients.
    raw : Tensor
        Examples of all clients, (clients, rows, ...).
    """
    clients, device = len(raw), next(iter(trained.values())).device
    layers = adapted_layers(model)
    stacks: dict[nn.Module, Pair] = {
        layers[path]: (
            _stack_of(f"{path}.{PARTS[0]}", trained, still, clients),
            _stack_of(f"{path}.{PARTS[1]}", trained, still, clients),
        )
        for path in adapters
    }
    parts = {f"{path}.{part}" for path in adapters for part in PARTS}
    base = {name: x for name, (x, _) in still.items() if name not in parts}
    inputs = task_of(info).prepare(raw.flatten(0, 1), info, device)
    with stacked_adapters(stacks):
        found = functional_call(model, base, (inputs,))
    outputs: Tensor = found if isinstance(found, Tensor) else found.logits
    return outputs.reshape(*raw.shape[:2], *outputs.shape[1:])


def shares_base(adapters: Adapters, still: Mapping[str, tuple[Tensor, int | None]]) -> bool:
    """Return whether all clients have the same base."""
    parts = {f"{path}.{part}" for path in adapters for part in PARTS}
    return all(axis is None for name, (_, axis) in still.items() if name not in parts)


def _stack_of(
    name: str, trained: Mapping[str, Tensor], still: Mapping[str, tuple[Tensor, int | None]], clients: int
) -> Tensor:
    if name in trained:
        return trained[name]
    value, axis = still[name]
    return value if axis == 0 else value.expand(clients, *value.shape)
