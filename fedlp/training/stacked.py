"""Local training of several clients at once: their parameters are stacked, and one pass serves all of them.

Clients of one architecture and one set of options train together by ``torch.func.vmap``, those of fully connected
networks by batched products, adapters of one base by one pass of it: each has its own weights, its own batches in its
own order, its own optimizer state, gradient norm, dropout and running statistics. A client that has fewer steps than
others leaves the stack when it is done; a batch that is smaller than others' is padded with rows of weight 0 where the
task's loss is a mean over examples, and computed apart where it is not.

A client's result does not depend on the other clients, not in a bit (but for the last bits of batch norms and of
adapters of one base), and agrees with that of training alone up to rounding: 1e-5 of a tensor's largest entry after a
few steps. ``stacked_pass.find_obstacle`` compares both for each architecture before its first use.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from fedlp.config import LocalConfig
from fedlp.data.examples import DataInfo
from fedlp.models import state_tensors
from fedlp.models.dropout import draw_from
from fedlp.models.layers import held_still
from fedlp.training.batches import augment_images, batch_sizes
from fedlp.training.loop import TrainResult, class_offsets
from fedlp.training.optimizers import SGD, Stepper, make_optimizer
from fedlp.training.schedules import Moment, lr_factor, make_schedule
from fedlp.training.stacked_adjustment import adjust_gradients
from fedlp.training.stacked_cohort import Cohort, StackedResult, Trained, Trainee, Way, as_cohort
from fedlp.training.stacked_order import BatchOrder, Indices
from fedlp.training.stacked_pass import StackedBatch, Still, descend_chain, draws, stacked_gradients

_PADDED_TO = 4  # a multiple of rows, so that batches of some sizes share a pass


def train_stacked(
    model: nn.Module,
    trainees: Sequence[Trainee],
    info: DataInfo,
    config: LocalConfig,
    frozen: Collection[str] = (),
    moment: Moment = Moment(),  # noqa: B008 # frozen
    way: Way = Way(),  # noqa: B008 # frozen
) -> list[Trained]:
    """Return the training result of each client; see :func:`fedlp.training.loop.train_locally`.

    Parameters
    ----------
    model : nn.Module
        Architecture, and values of tensors that clients bring none of; its values are not changed.

    Returns
    -------
    list of (TrainResult, dict from name to Tensor)
        In the order of ``trainees``; tensors of all names that ``state_tensors(model)`` has, in its order.
    """
    groups: dict[object, list[int]] = {}
    for number, trainee in enumerate(trainees):
        steps = count_steps(len(trainee.examples), config) if moves_within_rounds(config) else 0
        groups.setdefault((steps, frozenset(trainee.masks)), []).append(number)
    found: dict[int, Trained] = {}
    for members in groups.values():
        chosen = [trainees[i] for i in members]
        result = train_cohort(model, as_cohort(model, chosen), info, config, frozen, moment, way)
        for k, number in enumerate(members):
            report = TrainResult(config.epochs * len(chosen[k].examples), result.losses[k])
            found[number] = report, {name: x[k] for name, x in result.tensors.items()}
    return [found[number] for number in range(len(trainees))]


def moves_within_rounds(config: LocalConfig) -> bool:
    """Return whether the learning rate moves within a round, so that a cohort needs equal numbers of steps."""
    return config.schedule not in ("constant", {"name": "constant"})


def count_steps(num_examples: int, config: LocalConfig) -> int:
    """Return the number of steps of a client."""
    return config.epochs * len(batch_sizes(num_examples, config.batch_size))


def train_cohort(
    model: nn.Module,
    cohort: Cohort,
    info: DataInfo,
    config: LocalConfig,
    frozen: Collection[str] = (),
    moment: Moment = Moment(),  # noqa: B008 # frozen
    way: Way = Way(),  # noqa: B008 # frozen
) -> StackedResult:
    """Return the training result of all clients, as one stack; see :func:`train_stacked`.

    Where the learning rate moves within rounds, all clients must have as many steps.
    """
    with held_still(model, frozenset(frozen)) as trained:
        ids = {id(parameter) for parameter in trained}
        names = [name for name, parameter in model.named_parameters() if id(parameter) in ids]
        return _Stack(model.train(), names, cohort, info, config, moment, way).run()


class _Stack:
    """Clients that train together; position ``k`` of every stacked tensor is client ``k``'s."""

    def __init__(
        self,
        model: nn.Module,
        names: Sequence[str],
        cohort: Cohort,
        info: DataInfo,
        config: LocalConfig,
        moment: Moment,
        way: Way,
    ) -> None:
        self._model, self._cohort, self._info, self._config = model, cohort, info, config
        self._moment, self._way = moment, way
        self._device = next(model.parameters()).device
        self._order = BatchOrder(cohort.lengths, config, cohort.rngs, draws_later=info.augment)
        self._count = len(cohort.lengths)
        self._all = np.arange(self._count)
        state, parameters = state_tensors(model), dict(model.named_parameters(remove_duplicate=False))
        self._names = list(state)
        self._trained = {name: self._stack(name, state[name]).requires_grad_() for name in names}
        self._moving = {name: self._stack(name, x) for name, x in state.items() if name not in parameters}
        still = state.keys() - self._trained.keys() - self._moving.keys()
        self._still: dict[str, Still] = {name: self._kept(name, state[name]) for name in sorted(still)}
        self._masks = cohort.masks
        self._anchors = [x.detach().clone() for x in self._trained.values()] if config.proximal else []
        seeds = self._order.seeds if draws(model) else []
        self._generators = [torch.Generator(self._device).manual_seed(seed) for seed in seeds]
        self._offsets: Tensor | None = None
        if strength := config.logit_adjustment:
            targets = torch.split(cohort.examples.targets, list(cohort.lengths))
            offsets = [class_offsets(own, info.num_classes, strength) for own in targets]
            self._offsets = torch.stack(offsets).to(self._device)

    def _stack(self, name: str, own: Tensor) -> Tensor:
        """Return the tensor that each client starts from, (clients, ...); new memory."""
        if name in self._cohort.own:
            return self._cohort.own[name].to(own, copy=True)
        value = self._cohort.shared.get(name, own).to(own)
        return value.expand(self._count, *own.shape).clone(memory_format=torch.contiguous_format)

    def _kept(self, name: str, own: Tensor) -> Still:
        """Return a tensor that stays as it is: a stack where clients have their own, else one for all."""
        if name in self._cohort.own:
            return self._cohort.own[name].to(own), 0
        return self._cohort.shared.get(name, own).to(own), None

    def run(self) -> StackedResult:
        """Train all clients for all epochs."""
        optimizer = make_optimizer(list(self._trained.values()), self._config)  # type: ignore[arg-type]
        rate, schedule = optimizer.lr, make_schedule(self._config.schedule)
        order, last = self._order, self._order.counts.shape[1]
        losses: list[Tensor] = []
        done: list[tuple[Tensor, dict[str, Tensor]]] = []  # clients whose last step was an earlier one
        for step in range(last):
            factor = lr_factor(schedule, self._moment, step / last)
            optimizer.lr = rate if factor == 1.0 else rate * factor
            order.begin(step)
            losses.append(self._step(step, optimizer))
            ended = np.flatnonzero(order.steps == step + 1)
            if len(ended) and step + 1 < last:
                at = torch.from_numpy(ended).to(self._device)
                done.append((at, {name: x.detach()[at] for name, x in self._stacks().items()}))
        for at, values in done:  # later steps of others moved them as well
            for name, x in self._stacks().items():
                x.detach().index_copy_(0, at, values[name])
        return StackedResult(self._result(), self._mean_losses(torch.stack(losses)))

    def _stacks(self) -> dict[str, Tensor]:
        return self._trained | self._moving

    def _result(self) -> dict[str, Tensor]:
        """Return all tensors of all clients."""
        own = {name: x.detach() for name, x in self._stacks().items()}
        still = {
            name: x.expand(self._count, *x.shape) if axis is None else x for name, (x, axis) in self._still.items()
        }
        return {name: own[name] if name in own else still[name] for name in self._names}

    def _mean_losses(self, losses: Tensor) -> list[float]:
        """Return each client's mean loss over the batches of its last epoch, weighted by their sizes."""
        sizes = self._order.last_epoch()
        found = np.where(sizes > 0, losses.cpu().numpy().T.astype(np.float64) * sizes, 0.0)
        means: list[float] = (np.add.accumulate(found, axis=1)[:, -1] / sizes.sum(axis=1)).tolist()
        return means

    # ---- a step
    def _step(self, step: int, optimizer: Stepper) -> Tensor:
        """Let clients take a step; return their losses, (clients,), 0 of those that are done."""
        counts = self._order.counts[:, step]
        rows = self._rows(counts)
        passes = [
            (np.flatnonzero((rows == size) & (counts > 0)), size) for size in np.unique(rows[counts > 0]).tolist()
        ]
        losses = torch.zeros(self._count, device=self._device)
        if self._is_plain(optimizer):
            for members, size in passes:
                self._descend(step, members, size, losses, optimizer.lr)
            return losses
        for x in self._trained.values():
            x.grad = None
        for members, size in passes:
            self._backward(step, members, size, losses)
        adjust_gradients(self._trained, self._anchors, self._masks, self._config)
        optimizer.step()  # moves those that are done as well, whose tensors were copied out
        return losses

    def _is_plain(self, optimizer: Stepper) -> bool:
        """Whether a step subtracts the gradient and does nothing else."""
        config = self._config
        adjusts = self._masks or config.proximal or config.max_grad_norm is not None
        decays = config.momentum or config.weight_decay
        return bool(self._way.chain) and isinstance(optimizer, SGD) and not adjusts and not decays

    def _rows(self, counts: Indices) -> Indices:
        """Return the rows of the pass that each batch is in, from its own size alone."""
        if not self._way.pads:
            return counts
        size = self._config.batch_size
        return np.where(counts >= size, counts, np.minimum(size, -(-counts // _PADDED_TO) * _PADDED_TO))

    def _descend(self, step: int, members: Indices, rows: int, losses: Tensor, lr: float) -> None:
        """Let clients whose batches are in one pass take a plain step; note their losses."""
        at = torch.from_numpy(members).to(self._device)
        whole = len(members) == self._count
        own = {name: x.detach() for name, x in self._trained.items()}
        moved = own if whole else {name: x.index_select(0, at) for name, x in own.items()}
        still: dict[str, Still] = {
            name: (x, axis) if axis is None or whole else (x.index_select(0, at), 0)
            for name, (x, axis) in self._still.items()
        }
        batch = self._batch(step, members, rows)
        losses[at] = descend_chain(self._way.chain, self._info, moved, still, batch, lr)
        if not whole:
            for name, x in own.items():
                x.index_copy_(0, at, moved[name])

    def _backward(self, step: int, members: Indices, rows: int, losses: Tensor) -> None:
        """Note losses and gradients of clients whose batches are in one pass."""
        whole = len(members) == self._count
        at = torch.from_numpy(members).to(self._device)

        def pick(stack: Tensor) -> Tensor:
            return stack if whole else stack.index_select(0, at)

        trained = {name: pick(x.detach()) for name, x in self._trained.items()}
        moving = {name: pick(x) for name, x in self._moving.items()}
        still = {name: (x, None) if axis is None else (pick(x), 0) for name, (x, axis) in self._still.items()}
        batch = self._batch(step, members, rows)
        generators = [self._generators[k] for k in members] if self._generators else []
        with draw_from(generators, self._order.counts[members, step].tolist()):
            found, gradients = stacked_gradients(self._model, self._way, self._info, trained, moving, still, batch)
        losses[at] = found
        for x, gradient in zip(self._trained.values(), gradients, strict=True):
            if whole or gradient is None:
                x.grad = x.grad if gradient is None else gradient
            else:
                x.grad = torch.zeros_like(x) if x.grad is None else x.grad
                x.grad.index_copy_(0, at, gradient)
        if not whole:
            for name, x in moving.items():
                self._moving[name].index_copy_(0, at, x)

    def _batch(self, step: int, members: Indices, rows: int) -> StackedBatch:
        """Return the batches of some clients, padded to a number of rows."""
        examples, counts = self._cohort.examples, self._order.counts[members, step]
        index = self._order.index(step, members, rows)
        flat = torch.from_numpy(index.reshape(-1))
        weights = None
        if self._way.pads:
            sizes = torch.from_numpy(counts).to(self._device)[:, None]
            weights = (torch.arange(rows, device=self._device) < sizes) / sizes
        raw = self._augmented(members, index, counts) if self._info.augment else examples.inputs.index_select(0, flat)
        targets = examples.targets.index_select(0, flat)
        shape = len(members), rows
        offsets = None if self._offsets is None else self._offsets[torch.from_numpy(members).to(self._device)]
        return StackedBatch(
            raw.reshape(*shape, *raw.shape[1:]), targets.reshape(*shape, *targets.shape[1:]), weights, offsets
        )

    def _augmented(self, members: Indices, index: Indices, counts: Indices) -> Tensor:
        """Return the images of some clients' batches, each varied by its client's generator, and padded."""
        info, found = self._info, []
        for k, chosen, count in zip(members.tolist(), index, counts.tolist(), strict=True):
            raw = self._cohort.examples.inputs.index_select(0, torch.from_numpy(chosen[:count]))
            raw = augment_images(raw, self._order.rngs[k], info.padding, info.flip)
            found.append(torch.cat([raw, raw[:1].expand(len(chosen) - count, *raw.shape[1:])]))
        return torch.cat(found)
