"""One pass of several clients' models at once, and whether an architecture can take it."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from fedlp.config import LocalConfig
from fedlp.data.examples import DataInfo, Examples
from fedlp.models import forward_logits, state_tensors
from fedlp.models.adapters import LoraLinear
from fedlp.models.dropout import ByteDropout, draw_from
from fedlp.models.forward import first_line
from fedlp.models.layers import held_still
from fedlp.rng import Stream, generator
from fedlp.tasks import Task, task_of
from fedlp.tasks.causal_lm import CausalLM
from fedlp.training.loop import seed_torch
from fedlp.training.stacked_adapters import adapted_outputs, find_adapters, shares_base
from fedlp.training.stacked_chain import Chain, ChainPass, descend, find_chain, gradient_of
from fedlp.training.stacked_cohort import Way
from fedlp.training.stacked_linear import StackedLinears

Still = tuple[Tensor, int | None]
"""A tensor that is not trained: (clients, ...) and 0, or one for all clients and None."""

_OPTIMIZERS = ("sgd", "adam", "adamw")  # those that move every entry by itself
_PREPARED = (Task.prepare, CausalLM.prepare)  # those that treat every example by itself
_ROWS = (3, 4)  # examples of two clients that an architecture is tried on
_TOLERANCE = 1e-4  # of a gradient's largest entry


@dataclass(frozen=True, slots=True)
class StackedBatch:
    """One batch of each client.

    Attributes
    ----------
    raw, targets : Tensor
        As the data set holds them, (clients, rows, ...).
    weights : Tensor or None
        Weight of each row in its client's loss, (clients, rows), summing to 1; None for the task's own mean.
    offsets : Tensor or None
        Added to each client's logits, (clients, classes).
    """

    raw: Tensor
    targets: Tensor
    weights: Tensor | None = None
    offsets: Tensor | None = None


def stacked_gradients(
    model: nn.Module,
    way: Way,
    info: DataInfo,
    trained: Mapping[str, Tensor],
    moving: Mapping[str, Tensor],
    still: Mapping[str, Still],
    batch: StackedBatch,
) -> tuple[Tensor, list[Tensor | None]]:
    """Return each client's loss, (clients,), and its gradients, (clients, ...), None where it has none.

    Parameters
    ----------
    model : nn.Module
        Architecture, in training mode; its own values serve where no tensor is given.
    way : Way
        How clients of the model train together.
    trained, moving : mapping from name to Tensor
        Parameters and buffers of all clients, (clients, ...); a pass writes into the latter, as batch norms do.
    """
    if way.chain:
        losses, links = _chain_losses(way.chain, info, trained, still, batch)
        found = {name: gradient_of(first, second) for name, first, second in links}
        return losses, [found.get(name) for name in trained]
    leaves = {name: x.detach().requires_grad_() for name, x in trained.items()}
    if way.adapters and shares_base(way.adapters, still):
        outputs = adapted_outputs(model, way.adapters, info, leaves, still, batch.raw)
    else:
        outputs = _vmapped_outputs(model, info, leaves, moving, still, batch)
    losses = _losses(info, outputs, batch)
    return losses.detach(), list(torch.autograd.grad(losses.sum(), list(leaves.values()), allow_unused=True))


def descend_chain(
    chain: Chain,
    info: DataInfo,
    trained: Mapping[str, Tensor],
    still: Mapping[str, Still],
    batch: StackedBatch,
    lr: float,
) -> Tensor:
    """Move the parameters of all clients by a step of plain SGD, in place; return their losses, (clients,)."""
    losses, links = _chain_losses(chain, info, trained, still, batch)
    for name, first, second in links:
        descend(trained[name], first, second, lr)
    return losses


def _chain_losses(
    chain: Chain, info: DataInfo, trained: Mapping[str, Tensor], still: Mapping[str, Still], batch: StackedBatch
) -> tuple[Tensor, Iterator[tuple[str, Tensor, Tensor | None]]]:
    """Return each client's loss, and the factors of all gradients; see ``ChainPass.backward``."""
    values = {**{name: x.detach() for name, x in trained.items()}, **{name: x for name, (x, _) in still.items()}}
    steps = ChainPass(chain, values, trained)
    outputs = steps.forward(_prepared(info, batch, next(iter(trained.values())).device)).requires_grad_()
    losses = _losses(info, outputs, batch)
    (gradient,) = torch.autograd.grad(losses.sum(), outputs)
    return losses.detach(), steps.backward(gradient)


def _prepared(info: DataInfo, batch: StackedBatch, device: torch.device) -> Tensor:
    """Return the model's inputs of all clients, (clients, rows, ...)."""
    inputs = task_of(info).prepare(batch.raw.flatten(0, 1), info, device)
    assert isinstance(inputs, Tensor)
    return inputs.reshape(*batch.raw.shape[:2], *inputs.shape[1:])


def _vmapped_outputs(
    model: nn.Module,
    info: DataInfo,
    trained: Mapping[str, Tensor],
    moving: Mapping[str, Tensor],
    still: Mapping[str, Still],
    batch: StackedBatch,
) -> Tensor:
    """Return the outputs of all clients, (clients, rows, ...)."""

    def forward(
        own: Mapping[str, Tensor], buffers: Mapping[str, Tensor], rest: Mapping[str, Tensor], x: Tensor
    ) -> Tensor:
        found = functional_call(model, {**own, **buffers, **rest}, (x,))
        return found if isinstance(found, Tensor) else found.logits

    axes = {name: axis for name, (_, axis) in still.items()}
    values = {name: x for name, (x, _) in still.items()}
    stacked = _prepared(info, batch, next(iter(trained.values())).device)
    with StackedLinears():
        outputs: Tensor = vmap(forward, in_dims=(0, 0, axes, 0))(dict(trained), dict(moving), values, stacked)
    return outputs


def _losses(info: DataInfo, outputs: Tensor, batch: StackedBatch) -> Tensor:
    """Return each client's loss, (clients,)."""
    task = task_of(info)
    if batch.offsets is not None:
        outputs = outputs + batch.offsets[:, None]
    losses: Tensor
    if task.averages_rows:
        by_row = task.row_losses(outputs.flatten(0, 1), batch.raw.flatten(0, 1), batch.targets.flatten(0, 1))
        losses = by_row.reshape(batch.raw.shape[:2])
        return losses.mean(dim=1) if batch.weights is None else (losses * batch.weights).sum(dim=1)
    if batch.raw.dtype == torch.int64:  # of tokens, a client's outputs are many
        return torch.stack([task.loss(*one) for one in zip(outputs.unbind(), batch.raw, batch.targets, strict=True)])
    losses = vmap(task.loss)(outputs, batch.raw, batch.targets)
    return losses


def draws(model: nn.Module) -> bool:
    """Return whether a model has dropout of ours; that of others cannot be drawn from each client's own stream."""
    return any(
        isinstance(module, ByteDropout) or (isinstance(module, LoraLinear) and module.dropout > 0)
        for module in model.modules()
    )


def find_obstacle(model: nn.Module, info: DataInfo, config: LocalConfig, frozen: frozenset[str], pads: bool) -> str:
    """Return why clients of an architecture must train one by one; empty where they can train together.

    A fresh stack of two clients, with random weights on random examples, is compared with passes one by one. The answer
    depends on the architecture, the task and the options alone.

    Parameters
    ----------
    pads : bool
        Whether the smaller of two batches is padded.
    """
    task = task_of(info)
    for holds, reason in (
        (config.optimizer in _OPTIMIZERS, f"local.optimizer={config.optimizer} may mix entries"),
        (config.precision == "float32", f"local.precision={config.precision}"),
        (config.accumulation == 1, f"local.accumulation={config.accumulation}"),
        (type(task).prepare in _PREPARED, f"task {type(task).__name__} prepares whole batches"),
        (not pads or task.averages_rows, f"task {type(task).__name__} is no mean over examples"),
        (not _convolves_on_cpu(model), "its convolutions are slower in a stack on a CPU, and other ties win in pools"),
    ):
        if not holds:
            return reason
    trial = copy.deepcopy(model).train()
    with held_still(trial, frozen) as trained:
        if not trained:
            return "nothing is trained"
        try:
            return _compare(trial, {id(parameter) for parameter in trained}, info, pads)
        except Exception as error:  # whatever operators raise that vmap cannot take
            return first_line(error)


def _convolves_on_cpu(model: nn.Module) -> bool:
    convolutions = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return any(isinstance(x, convolutions) and x.weight.device.type == "cpu" for x in model.modules())


def _compare(model: nn.Module, trained: set[int], info: DataInfo, pads: bool) -> str:
    """Return how gradients of two stacked clients differ from gradients one by one; empty where they agree."""
    task, rng = task_of(info), generator(0, Stream.DATA)
    examples = task.draw_examples(info, sum(_ROWS), rng)
    counts = _ROWS if pads else (_ROWS[1],) * 2
    parts = [examples.select(rng.permutation(len(examples))[:count]) for count in counts]
    noise = torch.Generator().manual_seed(0)
    state, parameters = state_tensors(model), dict(model.named_parameters(remove_duplicate=False))
    for name, x in state.items():
        if name in parameters and x.is_floating_point():
            x.copy_(torch.randn(x.shape, generator=noise) / max(x.shape[-1], 1) ** 0.5)
    names = [name for name, parameter in parameters.items() if id(parameter) in trained and name in state]
    stacks = {name: torch.stack([state[name]] * 2) for name in names}
    moving = {name: torch.stack([x] * 2) for name, x in state.items() if name not in parameters}
    still: dict[str, Still] = {name: (x, None) for name, x in state.items() if name not in (stacks | moving)}
    device = next(iter(state.values())).device
    rows = max(counts)
    order = [[*range(count), *[0] * (rows - count)] for count in counts]
    raw = torch.stack([part.inputs[index] for part, index in zip(parts, order, strict=True)])
    targets = torch.stack([part.targets[index] for part, index in zip(parts, order, strict=True)])
    weights = torch.tensor([[1 / n] * n + [0.0] * (rows - n) for n in counts], device=device) if pads else None
    generators = [torch.Generator(device).manual_seed(seed) for seed in (1, 2)]
    with draw_from(generators, counts):
        batch, way = StackedBatch(raw, targets, weights), Way(chain=find_chain(model), adapters=find_adapters(model))
        _, found = stacked_gradients(model, way, info, stacks, moving, still, batch)
    for k, part in enumerate(parts):
        seed_torch(k + 1, device)
        wanted = _alone(model, [parameters[name] for name in names], task, info, part)
        if text := _difference(names, [None if x is None else x[k] for x in found], wanted):
            return text
    return ""


def _alone(
    model: nn.Module, trained: list[nn.Parameter], task: Task, info: DataInfo, examples: Examples
) -> tuple[Tensor | None, ...]:
    outputs = forward_logits(model, task.prepare(examples.inputs, info, trained[0].device))
    loss = task.loss(outputs, examples.inputs, examples.targets)
    return torch.autograd.grad(loss, trained, allow_unused=True)


def _difference(names: list[str], found: list[Tensor | None], wanted: tuple[Tensor | None, ...]) -> str:
    largest = max(float(x.abs().max()) for x in wanted if x is not None)
    for name, one, other in zip(names, found, wanted, strict=True):
        if (one is None) != (other is None):
            return f"only one way gives a gradient of {name}"
        if one is None or other is None:
            continue
        scale = max(float(other.abs().max()), 1e-2 * largest)
        if not bool(((one - other).abs() <= _TOLERANCE * scale).all()):
            return f"the gradient of {name} comes out otherwise"
    return ""
