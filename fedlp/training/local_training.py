"""Local training and evaluation: plain PyTorch loops on tensors that are already in memory.

Batches are indexed from the client's tensors; there is no per-item loader. Images are kept as uint8 and normalised
batch by batch, in channels-last layout, which is the faster one for convolutions on CPUs and GPUs alike.
"""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedlp.config import LocalConfig
from fedlp.data.datasets import IGNORE_INDEX, DataInfo, Examples
from fedlp.errors import ConfigError
from fedlp.models import forward_logits
from fedlp.models.layers import held_still


@dataclass(frozen=True, slots=True)
class TrainResult:
    """What local training reports: examples processed (over all epochs) and the mean training loss."""

    num_processed: int
    train_loss: float


class StepModel(Protocol):
    """A smaller model that a single step trains in the place of the whole."""

    def pull(self) -> nn.Module:
        """Return the smaller model, holding the whole's current values."""

    def push(self) -> None:
        """Hand gradients and buffers back to the whole."""


def prepare_inputs(inputs: Tensor, info: DataInfo, device: torch.device) -> Tensor:
    """Return a batch as the model reads it.

    Images: (n, C, H, W) uint8 -> float32, normalised by the data set's mean and std, channels last. Text: (n, L + 1)
    token ids -> (n, L) int64, padding replaced by token 0 (its loss is ignored).
    """
    batch = inputs.to(device)
    if info.task == "language":
        return batch[:, :-1].clamp(min=0)
    if not info.mean:
        return batch.to(torch.float32)
    mean, std = _channel_constants(info, device)
    return batch.to(torch.float32).sub_(mean).div_(std).contiguous(memory_format=torch.channels_last)


@lru_cache(maxsize=8)
def _channel_constants(info: DataInfo, device: torch.device) -> tuple[Tensor, Tensor]:
    mean = torch.tensor(info.mean, device=device).mul_(255).view(1, -1, 1, 1)
    std = torch.tensor(info.std, device=device).mul_(255).view(1, -1, 1, 1)
    return mean, std


def batch_loss(logits: Tensor, inputs: Tensor, targets: Tensor, info: DataInfo) -> tuple[Tensor, Tensor, int]:
    """Return summed cross-entropy, the number of right predictions, and how many predictions there were."""
    labels = targets if info.task == "classification" else inputs[:, 1:].reshape(-1)
    labels = labels.to(logits.device)
    flat = logits.reshape(-1, logits.shape[-1])
    loss = F.cross_entropy(flat, labels, ignore_index=IGNORE_INDEX, reduction="sum")
    counted = labels != IGNORE_INDEX
    correct = ((flat.argmax(dim=-1) == labels) & counted).sum()
    return loss, correct, int(counted.sum())


def mean_loss(logits: Tensor, inputs: Tensor, targets: Tensor, info: DataInfo) -> Tensor:
    """Return the mean cross-entropy of a batch."""
    labels = targets if info.task == "classification" else inputs[:, 1:].reshape(-1)
    return F.cross_entropy(logits.reshape(-1, logits.shape[-1]), labels.to(logits.device), ignore_index=IGNORE_INDEX)


def check_loss(config: LocalConfig, info: DataInfo) -> None:
    """Raise ConfigError if the config asks for a loss that the data set has none of."""
    if config.logit_adjustment and info.task != "classification":
        raise ConfigError(f"local.logit_adjustment is for classifiers, but {info.name} is text; set it to 0")


def class_offsets(targets: Tensor, num_classes: int, strength: float) -> Tensor:
    """Return what logits gain while training on these labels, (classes,): ``strength`` times the log of each share.

    What such a model learns is the class's likelihood, not how often the client has it, so that clients of different
    shares agree [1]_; a class without an example gets -inf and no gradient.

    References
    ----------
    .. [1] Menon, Jayasumana, Rawat, Jain, Veit, Kumar: Long-tail learning via logit adjustment. ICLR 2021, eq. (10).
       In federated learning: Zhang et al.: Federated Learning with Label Distribution Skew via Logits Calibration.
       ICML 2022.
    """
    return strength * torch.log(torch.bincount(targets, minlength=num_classes) / len(targets))


def augment_images(batch: Tensor, rng: np.random.Generator, padding: int, flip: bool) -> Tensor:
    """Return uint8 images, (n, C, H, W), randomly cropped after zero padding and, if ``flip``, mirrored at random."""
    count, _, height, width = batch.shape
    padded = F.pad(batch, (padding,) * 4)
    tops, lefts = rng.integers(0, 2 * padding + 1, (2, count))
    flips = rng.random(count) < (0.5 if flip else 0.0)
    rows = torch.from_numpy(tops)[:, None] + torch.arange(height)
    columns = torch.from_numpy(lefts)[:, None] + torch.arange(width)
    columns = torch.where(torch.from_numpy(flips)[:, None], columns.flip(1), columns)
    index = torch.arange(count)[:, None, None]
    cropped = padded.permute(0, 2, 3, 1)[index, rows[:, :, None], columns[:, None, :]]
    return cropped.permute(0, 3, 1, 2)


class SGD:
    """torch's SGD, bit for bit, without what torch.optim does around a step: for a small model that costs more."""

    def __init__(self, parameters: Sequence[nn.Parameter], lr: float, momentum: float, weight_decay: float) -> None:
        self._parameters, self._lr, self._momentum, self._weight_decay = parameters, lr, momentum, weight_decay
        self._velocities: dict[Tensor, Tensor] = {}

    @torch.no_grad()
    def step(self) -> None:
        """Move every parameter that has a gradient."""
        moved: list[Tensor] = [parameter for parameter in self._parameters if parameter.grad is not None]
        steps = [parameter.grad for parameter in moved if parameter.grad is not None]
        if self._weight_decay:
            steps = list(torch._foreach_add(steps, moved, alpha=self._weight_decay))
        if self._momentum:
            for i, parameter in enumerate(moved):
                old = self._velocities.get(parameter)
                new = steps[i].clone() if old is None else old.mul_(self._momentum).add_(steps[i])
                self._velocities[parameter] = steps[i] = new
        torch._foreach_add_(moved, steps, alpha=-self._lr)


def make_optimizer(parameters: Sequence[nn.Parameter], config: LocalConfig) -> SGD | torch.optim.Adam:
    """Return a fresh optimiser; a client starts every round without momentum from the last one."""
    if config.optimizer == "adam":
        return torch.optim.Adam(parameters, lr=config.lr, weight_decay=config.weight_decay)
    return SGD(parameters, config.lr, config.momentum, config.weight_decay)


def draw_batches(count: int, config: LocalConfig, rng: np.random.Generator) -> Iterator[Tensor]:
    """Yield index tensors: ``epochs`` passes in fresh random order; the last batch of a pass may be smaller.

    A last batch of a single example joins the one before it: BatchNorm cannot normalise one value per channel.
    """
    sizes = [config.batch_size] * (count // config.batch_size)
    if rest := count % config.batch_size:
        if rest == 1 and sizes and config.batch_size > 1:
            sizes[-1] += 1
        else:
            sizes.append(rest)
    for _ in range(config.epochs):
        yield from torch.split(torch.from_numpy(rng.permutation(count)), sizes)


def train_locally(
    model: nn.Module,
    examples: Examples,
    info: DataInfo,
    config: LocalConfig,
    rng: np.random.Generator,
    nested: Sequence[StepModel] = (),
    frozen: Collection[str] = (),
) -> TrainResult:
    """Train ``model`` in place on one client's examples.

    Parameters
    ----------
    rng : numpy Generator
        Orders the batches and seeds torch's generators (dropout); the result depends on nothing else.
    nested : sequence of StepModel
        Nested sub-models of which each step trains one, drawn uniformly; none for plain training.
    frozen : collection of str
        Parameters that stay as they are: neither gradients nor momentum nor weight decay move them. The backward pass
        ends where all that lies before is frozen (but for nested sub-models, which compute all gradients). Running
        statistics of frozen BatchNorms move on all the same: they are buffers, whose names here do nothing, nor do
        names that the model does not have.

    Returns
    -------
    TrainResult
        The loss is the mean over the last epoch's batches, weighted by their sizes.
    """
    with held_still(model, frozenset(frozen)) as trained:
        return _train(model, trained, examples, info, config, rng, nested)


def _train(
    model: nn.Module,
    trained: Sequence[nn.Parameter],
    examples: Examples,
    info: DataInfo,
    config: LocalConfig,
    rng: np.random.Generator,
    nested: Sequence[StepModel],
) -> TrainResult:
    device = next(model.parameters()).device
    seed_torch(int(rng.integers(2**63 - 1)), device)
    model.train()
    optimizer = make_optimizer(trained, config) if trained else None
    offsets = None
    if config.logit_adjustment:
        offsets = class_offsets(examples.targets, info.num_classes, config.logit_adjustment).to(device)
    losses: list[Tensor] = []
    sizes: list[int] = []
    for index in draw_batches(len(examples), config, rng):
        raw = examples.inputs.index_select(0, index)
        if info.augment:
            raw = augment_images(raw, rng, info.padding, info.flip)
        for parameter in trained:
            parameter.grad = None
        step = nested[int(rng.integers(len(nested)))] if nested else None
        stepped = model if step is None else step.pull().train()
        logits = forward_logits(stepped, prepare_inputs(raw, info, device))
        if offsets is not None:
            logits = logits + offsets
        loss = mean_loss(logits, raw, examples.targets.index_select(0, index), info)
        if optimizer is not None:
            loss.backward()  # type: ignore[no-untyped-call]
        if step is not None:
            step.push()
        if optimizer is not None:
            if config.max_grad_norm is not None:
                nn.utils.clip_grad_norm_(trained, config.max_grad_norm)
            optimizer.step()
        losses.append(loss.detach())
        sizes.append(len(index))
    num_batches = len(losses) // config.epochs
    last, weights = torch.stack(losses[-num_batches:]).tolist(), sizes[-num_batches:]
    return TrainResult(sum(sizes), sum(map(operator.mul, last, weights)) / sum(weights))


@torch.inference_mode()
def evaluate_sums(
    model: nn.Module, examples: Examples, info: DataInfo, batch_size: int, start: int = 0, stop: int | None = None
) -> dict[str, float]:
    """Return summed ``loss``, ``correct`` and ``count`` over examples ``start`` to ``stop``.

    Sums add up over disjoint ranges; with range borders at multiples of ``batch_size`` the total does not depend on how
    the examples were divided.
    """
    device = next(model.parameters()).device
    model.eval()
    total, right, count = 0.0, 0, 0
    for begin in range(start, len(examples) if stop is None else stop, batch_size):
        end = min(begin + batch_size, len(examples) if stop is None else stop)
        raw = examples.inputs[begin:end]
        logits = forward_logits(model, prepare_inputs(raw, info, device))
        loss, correct, counted = batch_loss(logits, raw, examples.targets[begin:end], info)
        total, right, count = total + float(loss), right + int(correct), count + counted
    return {"loss": total, "correct": float(right), "count": float(count)}


def metrics_from_sums(sums: dict[str, float], task: str) -> dict[str, float]:
    """Return ``accuracy`` (classification) or ``perplexity`` (language), and the mean ``loss`` in nats."""
    loss = sums["loss"] / sums["count"]
    if task == "language":
        return {"perplexity": math.exp(loss) if loss < 700 else math.inf, "loss": loss}
    return {"accuracy": sums["correct"] / sums["count"], "loss": loss}


def seed_torch(seed: int, device: torch.device) -> None:
    """Seed the generators that dropout draws from."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


@contextmanager
def one_thread() -> Iterator[None]:
    """Run with one torch thread: on shared cores, more are slower and sums may come out in another order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def count_cores() -> int:
    """Return the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
