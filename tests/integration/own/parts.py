"""One part of every kind, as a stranger writes them: each one class or function in one file of another package."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from fedlp import FixedPolicy, Keep, SubModel, register
from fedlp.tasks import Task


@register("model", "res_cnn")
class ResCNN(nn.Module):
    """Residual CNN."""

    def __init__(self, num_classes: int, in_channels: int, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(in_channels, width, 3, padding=1)
        one, two = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)
        self.block = nn.Sequential(one, nn.ReLU(), two)
        self.wide = nn.Conv2d(width, 2 * width, 3, padding=1)
        self.head = nn.Linear(2 * width, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(x + self.block(x))
        return self.head(torch.relu(self.wide(x)).mean((2, 3)))


@register("dataset", "blobs")
def load(count: int = 200, seed: int = 0):  # type: ignore[no-untyped-def]
    """Noisy images of four classes: where the bright corner lies."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 4, count)
    images = rng.normal(0, 0.3, (count, 1, 8, 8)).astype(np.float32)
    for image, label in zip(images, labels, strict=True):
        image[0, 4 * (label // 2) : 4 * (label // 2) + 4, 4 * (label % 2) : 4 * (label % 2) + 4] += 1.0
    half = count * 3 // 4
    return (images[:half], labels[:half]), (images[half:], labels[half:])


@register("partition", "alternate")
def alternate(train, num_clients: int, offset: int = 0):  # type: ignore[no-untyped-def]
    """Example i goes to client i + offset, round and round."""
    return (np.arange(len(train)) + offset) % num_clients


@register("task", "smoothed")
@dataclass(frozen=True)
class Smoothed(Task):
    """Cross-entropy with smoothed labels."""

    smoothing: float = 0.1
    metrics: tuple[str, ...] = ("accuracy", "other_package.parts:ErrorRate")
    has_classes = True

    def loss(self, outputs, inputs, targets):  # type: ignore[no-untyped-def]
        return F.cross_entropy(outputs, targets.to(outputs.device), label_smoothing=self.smoothing)

    def loss_sum(self, outputs, inputs, targets):  # type: ignore[no-untyped-def]
        return F.cross_entropy(outputs, targets.to(outputs.device), reduction="sum")


@register("metric", "error_rate")
@dataclass(frozen=True)
class ErrorRate:
    """Fraction of wrong predictions."""

    label: str = "error_rate"
    larger_is_better: bool = False

    def sums(self, outputs, targets):  # type: ignore[no-untyped-def]
        return {"wrong": (outputs.argmax(dim=-1) != targets).sum(), "all": float(len(targets))}

    def value(self, sums):  # type: ignore[no-untyped-def]
        return float(sums["wrong"] / sums["all"])


@register("strategy", "first_units")
@dataclass(frozen=True)
class FirstUnits:
    """Every client holds the first units of each layer."""

    share: float = 0.5

    def policy(self, context):  # type: ignore[no-untyped-def]
        axes = context.submodels.widths.axes
        held = SubModel(widths={axis: Keep.first(max(1, int(self.share * size)), size) for axis, size in axes.items()})
        return FixedPolicy(context, lambda server_round, client_id: held)


@register("allocator", "even")
def even(layers, evidence, cost, limit, least: int = 1):  # type: ignore[no-untyped-def]
    """One unit less in every layer, in turn, until the limit is met."""
    kept = {layer.name: layer.num_units for layer in layers}
    while cost(kept) > limit:
        name = max(kept, key=lambda name: kept[name] - least)
        kept[name] -= 1
    return kept


@register("score", "norms")
@dataclass(frozen=True)
class Norms:
    """Norm of the columns that read a unit."""

    power: float = 2.0
    needs = frozenset({"weights"})

    def __call__(self, view):  # type: ignore[no-untyped-def]
        return view.sum_columns(lambda reader: reader.weight.abs().pow(self.power).sum(dim=0))


@register("encoding", "signs")
@dataclass(frozen=True)
class Signs:
    """Sign and mean magnitude of each tensor."""

    def encode(self, params, generator):  # type: ignore[no-untyped-def]
        found = {}
        for name, tensor in params.items():
            is_float = tensor.is_floating_point()
            found[name] = torch.sign(tensor).to(torch.int8) if is_float else tensor
            if is_float:
                found[f"mean of {name}"] = tensor.abs().mean()[None]
        return found

    def signature(self, signature):  # type: ignore[no-untyped-def]
        found = []
        for name, shape, dtype in signature:
            found.append((name, shape, torch.int8 if dtype.is_floating_point else dtype))
            if dtype.is_floating_point:
                found.append((f"mean of {name}", (1,), torch.float32))
        return tuple(found)

    def decode(self, encoded, signature, who):  # type: ignore[no-untyped-def]
        return {
            name: encoded[name].to(dtype) * encoded[f"mean of {name}"] if dtype.is_floating_point else encoded[name]
            for name, _, dtype in signature
        }


@register("aggregator", "midrange")
@dataclass(frozen=True)
class Midrange:
    """Middle of the smallest and the largest value of each entry."""

    def begin(self, params):  # type: ignore[no-untyped-def]
        from fedlp.federation.aggregation.held_updates import HeldUpdates

        class Middle(HeldUpdates):
            def combine(self, stack, center):  # type: ignore[no-untyped-def]
                low, high = stack.nan_to_num(nan=torch.inf).amin(dim=0), stack.nan_to_num(nan=-torch.inf).amax(dim=0)
                return 0.5 * (low + high)

        return Middle(params)


@register("server_optimizer", "half_step")
@dataclass(frozen=True)
class HalfStep:
    """Half of the way to the aggregate."""

    lr: float = 0.5

    def step(self, delta, state):  # type: ignore[no-untyped-def]
        return self.lr * delta, {"last": (state.get("last", torch.zeros_like(delta)), delta)}


@register("optimizer", "sign_sgd")
class SignSGD:
    """Signs of gradients."""

    def __init__(self, params, lr: float = 0.01) -> None:  # type: ignore[no-untyped-def]
        self.lr, self._params = lr, params

    @torch.no_grad()
    def step(self) -> None:
        for parameter in self._params:
            if parameter.grad is not None:
                parameter -= self.lr * torch.sign(parameter.grad)


@register("schedule", "halving")
def halving(server_round: int, num_rounds: int, progress: float, every: int = 1) -> float:
    """Half of the learning rate every few rounds."""
    return 0.5 ** ((server_round - 1) // every)


@register("tracker", "lines")
@dataclass
class Lines:
    """One line of text per round."""

    file: str = "lines.txt"

    def begin(self, config, run_dir):  # type: ignore[no-untyped-def]
        self._path = run_dir / self.file

    def round(self, record):  # type: ignore[no-untyped-def]
        with self._path.open("a") as file:
            file.write(f"{record.server_round} {record.metrics.get('error_rate')}\n")

    def end(self, manifest):  # type: ignore[no-untyped-def]
        with self._path.open("a") as file:
            file.write("end\n")


@register("callback", "stop_after")
@dataclass(frozen=True)
class StopAfter:
    """End of the run after some rounds."""

    rounds: int = 5

    def __call__(self, record, state):  # type: ignore[no-untyped-def]
        return record.server_round >= self.rounds
