"""Local training of one client: a plain PyTorch loop on tensors in memory."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from fedlp.config import LocalConfig
from fedlp.data.examples import DataInfo, Examples
from fedlp.models import forward_logits
from fedlp.models.layers import held_still
from fedlp.tasks import task_of
from fedlp.training.batches import augment_images, batch_sizes, draw_batches
from fedlp.training.optimizers import SGD, Stepper, make_optimizer
from fedlp.training.schedules import Moment, lr_factor, make_schedule

Penalty = Callable[[nn.Module], Tensor]
"""Term that a step adds to the loss of its batches, from the model's parameters."""

_LARGE = 1 << 22  # trained numbers of a model whose gradients are not kept together


@dataclass(frozen=True, slots=True)
class TrainResult:
    """Result of local training: examples processed (over all epochs) and the mean training loss."""

    num_processed: int
    train_loss: float


class StepModel(Protocol):
    """Smaller model that a single step trains in place of the whole."""

    def pull(self) -> nn.Module:
        """Return the smaller model, holding the whole's current values."""

    def push(self) -> None:
        """Hand gradients and buffers back to the whole."""


def train_locally(
    model: nn.Module,
    examples: Examples,
    info: DataInfo,
    config: LocalConfig,
    rng: np.random.Generator,
    nested: Sequence[StepModel] = (),
    frozen: Collection[str] = (),
    moment: Moment = Moment(),  # noqa: B008 # frozen
    penalty: Penalty | None = None,
) -> TrainResult:
    """Train ``model`` in place on one client's examples.

    Parameters
    ----------
    rng : numpy Generator
        Orders the batches and seeds torch's generators (dropout); the result depends on nothing else.
    nested : sequence of StepModel
        Nested sub-models of which each step trains one, drawn uniformly; none for plain training.
    frozen : collection of str
        Frozen parameters: neither gradients nor momentum nor weight decay move them. The backward pass
        ends where all that lies before is frozen (but for nested sub-models, which compute all gradients). Running
        statistics of frozen BatchNorms move on all the same: they are buffers, whose names here do nothing, nor do
        names that the model does not have.
    moment : Moment
        The round, which schedules of the learning rate depend on.
    penalty : callable, optional
        Term added to the loss of every step; the reported loss is without it.

    Returns
    -------
    TrainResult
        The loss is the mean over the last epoch's batches, weighted by their sizes.
    """
    with held_still(model, frozenset(frozen)) as trained:
        return _Loop(model, trained, examples, info, config, rng, nested, moment, penalty).run()


def check_loss(config: LocalConfig, info: DataInfo) -> None:
    """Raise ConfigError if the configured loss does not fit the data set."""
    task = task_of(info)
    if config.logit_adjustment:
        task.require_classes("local.logit_adjustment", info)
    task.check(info)
    make_schedule(config.schedule)


def class_offsets(targets: Tensor, num_classes: int, strength: float) -> Tensor:
    """Return the offsets of logits in training on these labels, (classes,): ``strength`` times the log of each share.

    Such a model learns class likelihoods, not the client's class frequencies, so that clients of different
    shares agree [1]_; a class without an example gets -inf and no gradient.

    References
    ----------
    .. [1] Menon, Jayasumana, Rawat, Jain, Veit, Kumar: Long-tail learning via logit adjustment. ICLR 2021, eq. (10).
       In federated learning: Zhang et al.: Federated Learning with Label Distribution Skew via Logits Calibration.
       ICML 2022.
    """
    return strength * torch.log(torch.bincount(targets, minlength=num_classes) / len(targets))


def seed_torch(seed: int, device: torch.device) -> None:
    """Seed the generators that dropout draws from."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


@dataclass
class _Loop:
    """One client's training, step by step; ``trained`` are the parameters that move."""

    model: nn.Module
    trained: Sequence[nn.Parameter]
    examples: Examples
    info: DataInfo
    config: LocalConfig
    rng: np.random.Generator
    nested: Sequence[StepModel]
    moment: Moment
    penalty: Penalty | None = None
    losses: list[Tensor] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        config, self.device = self.config, next(self.model.parameters()).device
        seed_torch(int(self.rng.integers(2**63 - 1)), self.device)
        self.model.train()
        self.task = task_of(self.info)
        self.criterion = self.task.criterion(self.examples)
        self.optimizer: Stepper | None = make_optimizer(self.trained, config) if self.trained else None
        self.schedule = make_schedule(config.schedule)
        self.offsets: Tensor | None = None
        if config.logit_adjustment:
            offsets = class_offsets(self.examples.targets, self.info.num_classes, config.logit_adjustment)
            self.offsets = offsets.to(self.device)
        self.anchors = [p.detach().clone() for p in self.trained] if config.proximal else []

    def run(self) -> TrainResult:
        """Train for all epochs."""
        config = self.config
        per_epoch = len(batch_sizes(len(self.examples), config.batch_size))
        num_steps = config.epochs * -(-per_epoch // config.accumulation)
        rate = None if self.optimizer is None else self.optimizer.lr
        with self._descending():
            for number, group in enumerate(self._groups(per_epoch)):
                if self.optimizer is not None and rate is not None:
                    factor = lr_factor(self.schedule, self.moment, number / num_steps)
                    self.optimizer.lr = rate if factor == 1.0 else rate * factor
                self._step(group)
        for parameter in self.trained:  # their memory is for the update
            parameter.grad = None
        last, weights = torch.stack(self.losses[-per_epoch:]).tolist(), self.sizes[-per_epoch:]
        return TrainResult(sum(self.sizes), sum(map(operator.mul, last, weights)) / sum(weights))

    @contextmanager
    def _descending(self) -> Iterator[None]:
        """Let each parameter of a large model move once its gradient is known, so that memory never holds all of them.

        Only where a step does nothing else: then results are the same, bit for bit.
        """
        config, optimizer = self.config, self.optimizer
        adjusts = self.nested or config.proximal or config.max_grad_norm is not None or config.accumulation > 1
        is_large = sum(parameter.numel() for parameter in self.trained) >= _LARGE
        if not (isinstance(optimizer, SGD) and optimizer.is_plain and is_large) or adjusts:
            yield
            return
        move = optimizer.descend
        hooks = [p.register_post_accumulate_grad_hook(move) for p in self.trained]  # type: ignore[no-untyped-call]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _groups(self, per_epoch: int) -> Iterator[list[Tensor]]:
        """Yield the batches of each step: ``accumulation`` of them, fewer at the end of a pass."""
        group: list[Tensor] = []
        for number, index in enumerate(draw_batches(len(self.examples), self.config, self.rng), start=1):
            group.append(index)
            if len(group) == self.config.accumulation or number % per_epoch == 0:
                yield group
                group = []

    def _step(self, group: Sequence[Tensor]) -> None:
        """Accumulate the gradient of the mean loss over the batches of one step, and move."""
        for parameter in self.trained:
            parameter.grad = None
        step: StepModel | None = None
        stepped = self.model
        counts = self._counts(group) if len(group) > 1 else []
        for number, index in enumerate(group):
            raw = self.examples.inputs.index_select(0, index)
            if self.info.augment:
                raw = augment_images(raw, self.rng, self.info.padding, self.info.flip)
            if self.nested and number == 0:
                step = self.nested[int(self.rng.integers(len(self.nested)))]
                stepped = step.pull().train()
            loss = self._loss(stepped, raw, self.examples.targets.index_select(0, index))
            if self.optimizer is not None:
                share = loss if not counts else loss * (counts[number] / max(1, sum(counts)))
                if self.penalty is not None and number == 0:
                    share = share + self.penalty(stepped)
                share.backward()  # type: ignore[no-untyped-call]
            self.losses.append(loss.detach())
            self.sizes.append(len(index))
        if step is not None:
            step.push()
        if self.optimizer is not None:
            self._move(self.optimizer)

    def _counts(self, group: Sequence[Tensor]) -> list[int]:
        """Return the number of predictions in each batch."""
        examples = self.examples
        return [
            self.task.count(examples.inputs.index_select(0, index), examples.targets.index_select(0, index))
            for index in group
        ]

    def _loss(self, model: nn.Module, raw: Tensor, targets: Tensor) -> Tensor:
        """Return the mean loss of a batch."""
        with self._precision():
            outputs = forward_logits(model, self.task.prepare(raw, self.info, self.device))
        if outputs.dtype != torch.float32 and self.config.precision != "float32":
            outputs = outputs.to(torch.float32)
        if self.offsets is not None:
            outputs = outputs + self.offsets
        return self.criterion(outputs, raw, targets)

    def _precision(self) -> AbstractContextManager[object]:
        if self.config.precision == "float32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    def _move(self, optimizer: Stepper) -> None:
        """Let the optimizer take one step."""
        for parameter, anchor in zip(self.trained, self.anchors, strict=False):
            if parameter.grad is not None:  # FedProx: the gradient of mu / 2 times the squared distance from the start
                parameter.grad.add_(parameter.detach() - anchor, alpha=self.config.proximal)
        if self.config.max_grad_norm is not None:
            nn.utils.clip_grad_norm_(self.trained, self.config.max_grad_norm)
        optimizer.step()
