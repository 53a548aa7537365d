"""Local training of several clients at once: their parameters are stacked, and one pass serves all of them.

Clients of one architecture and one set of options train together by ``torch.func.vmap``: each has its own weights, its
own batches in its own order, its own optimizer state, gradient norm, dropout and running statistics. A client that has
fewer steps than others leaves the stack when it is done; a batch that is smaller than others' is padded with rows of
weight 0 where the task's loss is a mean over examples, and computed apart where it is not.

A client's result does not depend on the other clients, not in a bit (but for the last bits of batch norms), and agrees
with that of training alone up to rounding: 1e-5 of a tensor's largest entry after a few steps.
``stacked_pass.find_obstacle`` compares both for each architecture before its first use.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedlp.config import LocalConfig
from fedlp.data.examples import DataInfo, Examples
from fedlp.models import state_tensors
from fedlp.models.dropout import draw_from
from fedlp.models.layers import held_still
from fedlp.training.batches import augment_images, batch_sizes, draw_batches
from fedlp.training.loop import TrainResult, class_offsets
from fedlp.training.optimizers import Stepper, make_optimizer
from fedlp.training.schedules import Moment, lr_factor, make_schedule
from fedlp.training.stacked_pass import StackedBatch, Still, draws, stacked_losses

_PADDED_TO = 4  # a multiple of rows, so that batches of some sizes share a pass
Indices = NDArray[np.int64]
Trained = tuple[TrainResult, dict[str, Tensor]]
"""Report of a training, and the trained tensors by name."""


@dataclass(frozen=True, slots=True)
class Trainee:
    """One client's part in a stack.

    Attributes
    ----------
    values : mapping from name to Tensor
        Tensors that the model starts from; those that are absent are the model's own.
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


def train_stacked(
    model: nn.Module,
    trainees: Sequence[Trainee],
    info: DataInfo,
    config: LocalConfig,
    frozen: Collection[str] = (),
    moment: Moment = Moment(),  # noqa: B008 # frozen
    pads: bool = False,
) -> list[Trained]:
    """Return the training result of each client; see :func:`fedlp.training.loop.train_locally`.

    Parameters
    ----------
    model : nn.Module
        Architecture, and values of tensors that clients bring none of; its values are not changed.
    pads : bool
        Whether smaller batches may be padded; see ``stacked_pass``.

    Returns
    -------
    list of (TrainResult, dict from name to Tensor)
        In the order of ``trainees``; tensors of all names that ``state_tensors(model)`` has.
    """
    groups: dict[object, list[int]] = {}
    varies = config.schedule not in ("constant", {"name": "constant"})
    for number, trainee in enumerate(trainees):
        # Where the learning rate moves within a round, it depends on the number of steps.
        steps = _count_steps(len(trainee.examples), config) if varies else 0
        groups.setdefault((steps, frozenset(trainee.masks)), []).append(number)
    found: dict[int, Trained] = {}
    with held_still(model, frozenset(frozen)) as trained:
        ids = {id(parameter) for parameter in trained}
        names = [name for name, parameter in model.named_parameters() if id(parameter) in ids]
        for members in groups.values():
            stack = _Stack(model.train(), names, [trainees[i] for i in members], info, config, moment, pads)
            found.update(zip(members, stack.run(), strict=True))
    return [found[number] for number in range(len(trainees))]


def _count_steps(num_examples: int, config: LocalConfig) -> int:
    return config.epochs * len(batch_sizes(num_examples, config.batch_size))


class _Stack:
    """Clients that train together; position ``k`` of every stacked tensor is client ``k``'s."""

    def __init__(
        self,
        model: nn.Module,
        names: Sequence[str],
        trainees: Sequence[Trainee],
        info: DataInfo,
        config: LocalConfig,
        moment: Moment,
        pads: bool,
    ) -> None:
        self._model, self._trainees, self._info, self._config = model, trainees, info, config
        self._moment, self._pads = moment, pads
        self._device = next(model.parameters()).device
        state, parameters = state_tensors(model), dict(model.named_parameters(remove_duplicate=False))
        self._trained = {name: _stack_of(name, state[name], trainees).requires_grad_() for name in names}
        self._moving = {name: _stack_of(name, x, trainees) for name, x in state.items() if name not in parameters}
        still = state.keys() - self._trained.keys() - self._moving.keys()
        self._still = {name: _shared_or_stack(name, state[name], trainees) for name in sorted(still)}
        self._masks = {name: torch.stack([t.masks[name] for t in trainees]) for name in trainees[0].masks}
        self._anchors = [x.detach().clone() for x in self._trained.values()] if config.proximal else []
        self._lengths = [len(trainee.examples) for trainee in trainees]
        self._steps = [_count_steps(length, config) for length in self._lengths]
        self._starts = np.cumsum([0, *self._lengths])
        seeds = [int(trainee.rng.integers(2**63 - 1)) for trainee in trainees]
        self._generators = [torch.Generator(self._device).manual_seed(seed) for seed in seeds] if draws(model) else []
        self._batches = [draw_batches(n, config, t.rng) for n, t in zip(self._lengths, trainees, strict=True)]
        self._targets = torch.cat([trainee.examples.targets for trainee in trainees])
        whole = not info.augment and all(isinstance(trainee.examples.inputs, Tensor) for trainee in trainees)
        self._inputs = torch.cat([trainee.examples.inputs for trainee in trainees]) if whole else None
        self._offsets: Tensor | None = None
        if strength := config.logit_adjustment:
            offsets = [class_offsets(t.examples.targets, info.num_classes, strength) for t in trainees]
            self._offsets = torch.stack(offsets).to(self._device)

    def run(self) -> list[Trained]:
        """Train all clients for all epochs."""
        optimizer = make_optimizer(list(self._trained.values()), self._config)  # type: ignore[arg-type]
        rate, schedule = optimizer.lr, make_schedule(self._config.schedule)
        last = max(self._steps)
        losses: list[Tensor] = []
        results: dict[int, dict[str, Tensor]] = {}
        for step in range(last):
            factor = lr_factor(schedule, self._moment, step / last)
            optimizer.lr = rate if factor == 1.0 else rate * factor
            active = [k for k, steps in enumerate(self._steps) if step < steps]
            losses.append(self._step(active, optimizer))
            done = [k for k in active if self._steps[k] == step + 1]
            results |= {k: self._of_client(k, copies=step + 1 < last) for k in done}
        means = self._mean_losses(torch.stack(losses).tolist())
        lengths = [self._config.epochs * length for length in self._lengths]
        return [(TrainResult(lengths[k], means[k]), results[k]) for k in range(len(self._trainees))]

    def _of_client(self, k: int, copies: bool) -> dict[str, Tensor]:
        """Return a client's tensors; copies where others train on in the stack."""
        own = {name: x.detach()[k] for name, x in (self._trained | self._moving).items()}
        own = {name: x.clone() for name, x in own.items()} if copies else own
        still = {name: x if axis is None else x[k] for name, (x, axis) in self._still.items()}
        return own | still

    def _mean_losses(self, losses: list[list[float]]) -> list[float]:
        """Return each client's mean loss over the batches of its last epoch, weighted by their sizes."""
        means = []
        for k, length in enumerate(self._lengths):
            sizes = batch_sizes(length, self._config.batch_size)
            last = [losses[step][k] for step in range(self._steps[k] - len(sizes), self._steps[k])]
            means.append(sum(map(operator.mul, last, sizes)) / sum(sizes))
        return means

    # ---- a step
    def _step(self, active: Sequence[int], optimizer: Stepper) -> Tensor:
        """Let clients take a step; return their losses, (clients,), 0 of those that are done."""
        drawn = {k: next(self._batches[k]).numpy() for k in active}
        losses = torch.zeros(len(self._trainees), device=self._device)
        for x in self._trained.values():
            x.grad = None
        groups: dict[int, list[int]] = {}
        for k in active:
            groups.setdefault(self._rows(len(drawn[k])), []).append(k)
        for rows, members in groups.items():
            self._backward(members, [drawn[k] for k in members], rows, losses)
        self._adjust()
        optimizer.step()  # moves those that are done as well, whose tensors were copied out
        return losses

    def _rows(self, count: int) -> int:
        """Return the rows of the pass that a batch is in, from its own size alone."""
        size = self._config.batch_size
        return count if not self._pads or count >= size else min(size, -(-count // _PADDED_TO) * _PADDED_TO)

    def _backward(self, members: Sequence[int], drawn: Sequence[Indices], rows: int, losses: Tensor) -> None:
        """Note losses and gradients of clients whose batches are in one pass."""
        whole = len(members) == len(self._trainees)
        at = torch.tensor(members, device=self._device)

        def pick(stack: Tensor) -> Tensor:
            return stack if whole else stack.index_select(0, at)

        trained = {name: pick(x.detach()).requires_grad_() for name, x in self._trained.items()}
        moving = {name: pick(x) for name, x in self._moving.items()}
        still = {name: (x, None) if axis is None else (pick(x), 0) for name, (x, axis) in self._still.items()}
        batch = self._batch(members, drawn, rows)
        if self._offsets is not None:
            batch = replace(batch, offsets=pick(self._offsets))
        generators = [self._generators[k] for k in members] if self._generators else []
        with draw_from(generators, [len(index) for index in drawn]):
            found = stacked_losses(self._model, self._info, trained, moving, still, batch)
        gradients = torch.autograd.grad(found.sum(), list(trained.values()), allow_unused=True)
        losses[at] = found.detach()
        for x, gradient in zip(self._trained.values(), gradients, strict=True):
            if whole or gradient is None:
                x.grad = x.grad if gradient is None else gradient
            else:
                x.grad = torch.zeros_like(x) if x.grad is None else x.grad
                x.grad.index_copy_(0, at, gradient)
        if not whole:
            for name, x in moving.items():
                self._moving[name].index_copy_(0, at, x)

    def _batch(self, members: Sequence[int], drawn: Sequence[Indices], rows: int) -> StackedBatch:
        """Return the batches of some clients, padded to a number of rows."""
        index = np.empty((len(members), rows), dtype=np.int64)
        for i, (k, chosen) in enumerate(zip(members, drawn, strict=True)):
            index[i, : len(chosen)] = chosen
            index[i, len(chosen) :] = chosen[0]  # any example will do: its weight is 0
            index[i] += self._starts[k]
        flat = torch.from_numpy(index.reshape(-1))
        weights = None
        if self._pads:
            counts = torch.tensor([len(chosen) for chosen in drawn], device=self._device)[:, None]
            weights = (torch.arange(rows, device=self._device) < counts) / counts
        if self._inputs is not None:
            raw = self._inputs.index_select(0, flat)
        else:
            raw = torch.cat([self._raw(k, chosen, rows) for k, chosen in zip(members, drawn, strict=True)])
        targets = self._targets.index_select(0, flat)
        shape = len(members), rows
        return StackedBatch(raw.reshape(*shape, *raw.shape[1:]), targets.reshape(*shape, *targets.shape[1:]), weights)

    def _raw(self, k: int, chosen: Indices, rows: int) -> Tensor:
        """Return the inputs of one client's batch, varied where the data set asks for it, and padded."""
        trainee, info = self._trainees[k], self._info
        raw = trainee.examples.inputs.index_select(0, torch.from_numpy(chosen))
        if info.augment:
            raw = augment_images(raw, trainee.rng, info.padding, info.flip)
        return torch.cat([raw, raw[:1].expand(rows - len(raw), *raw.shape[1:])]) if rows > len(raw) else raw

    @torch.no_grad()
    def _adjust(self) -> None:
        """Mask gradients, add FedProx's, and clip each client's norm."""
        for name, mask in self._masks.items():
            if name in self._trained and (gradient := self._trained[name].grad) is not None:
                gradient.mul_(mask)
        moved = [x for x in self._trained.values() if x.grad is not None]
        for x, anchor in zip(self._trained.values(), self._anchors, strict=False):
            if x.grad is not None:
                x.grad.add_(x.detach() - anchor, alpha=self._config.proximal)
        if self._config.max_grad_norm is None:
            return
        gradients = [x.grad for x in moved if x.grad is not None]
        norms = torch.stack([torch.linalg.vector_norm(g.flatten(1), dim=1) for g in gradients])
        scale = (self._config.max_grad_norm / (torch.linalg.vector_norm(norms, dim=0) + 1e-6)).clamp(max=1.0)
        for gradient in gradients:
            gradient.mul_(scale.reshape(-1, *[1] * (gradient.ndim - 1)))


def _stack_of(name: str, own: Tensor, trainees: Sequence[Trainee]) -> Tensor:
    """Return a tensor of all clients, (clients, ...); new memory."""
    values = [trainee.values.get(name, own) for trainee in trainees]
    if all(value is values[0] for value in values):
        return values[0].to(own).expand(len(values), *own.shape).clone(memory_format=torch.contiguous_format)
    return torch.stack([value.to(own) for value in values])


def _shared_or_stack(name: str, own: Tensor, trainees: Sequence[Trainee]) -> Still:
    """Return a tensor that stays as it is: one for all where all clients have the same, else a stack."""
    values = [trainee.values.get(name, own) for trainee in trainees]
    if all(value is values[0] for value in values):
        return values[0].to(own), None
    return _stack_of(name, own, trainees), 0
