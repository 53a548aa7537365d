"""Protocol of tasks, with defaults for arrays and images."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from fedlp.data.examples import DataInfo, Examples
from fedlp.errors import ConfigError, DataError
from fedlp.tasks.metrics import Metric, make_metrics

Sums = dict[str, float | list[float]]
"""Additive sums over disjoint ranges of examples, and over clients: numbers, or lists of equal lengths."""

Inputs = Tensor | Mapping[str, Tensor]
"""Batch as model input: one tensor, or keyword arguments."""

LossFn = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Mean loss of outputs, raw inputs and targets."""


class Task(ABC):
    """Task: loss, metrics and preparation of batches.

    Subclasses are frozen dataclasses; their fields are the options. Only :meth:`loss` and :meth:`loss_sum` must be
    given; the other methods fit one target for each example.

    Attributes
    ----------
    reads_tokens : bool
        Whether inputs are int64 token ids, (n, tokens); else they are images or arrays.
    exact_outputs : bool
        Whether the model's number of outputs must equal the data set's; else it may be larger.
    targets : str
        Kind of the targets, in words; empty for any. A data set of another kind is refused.
    has_classes : bool
        Whether targets are class indices, (n,), so that class shares are defined.
    is_softmax : bool
        Whether outputs are the logits of one softmax and the loss is their cross-entropy.
    auto_model : str
        Auto class of transformers for models of this task; empty if there is none.
    peft_type : str
        Name of the task in peft; empty if adapters are not supported.
    least_loss : float
        Smallest mean loss; a client's sums with one below are rejected.
    metrics : tuple of str
        Names of metrics reported beside the loss; the first one is the run's main metric.
    """

    reads_tokens: ClassVar[bool] = False
    exact_outputs: ClassVar[bool] = True
    targets: ClassVar[str] = ""
    has_classes: ClassVar[bool] = False
    is_softmax: ClassVar[bool] = False
    auto_model: ClassVar[str] = ""
    peft_type: ClassVar[str] = ""
    least_loss: ClassVar[float] = -math.inf
    metrics: tuple[str, ...] = ()

    # ---- a batch
    @property
    def averages_rows(self) -> bool:
        """Whether the training loss of a batch is the mean of the losses of its examples, each by itself."""
        return False

    def prepare(self, inputs: Tensor, info: DataInfo, device: torch.device) -> Inputs:
        """Return a batch as model input.

        uint8 images, (n, C, H, W): float32 on a [0, 1] scale. Then, as for float arrays, the mean is subtracted and the
        deviation divided by, where the data set has them. Images are channels last in memory.
        """
        if inputs.dtype == torch.uint8 and info.mean:
            mean, std = _pixel_constants(info.mean, info.std, device)
            batch = inputs.to(device).to(torch.float32).sub_(mean).div_(std)
        else:
            batch = inputs.to(device).to(torch.float32)
            if inputs.dtype == torch.uint8:
                batch = batch / 255
            elif info.mean:
                mean, std = _constants(info.mean, info.std, inputs.ndim, device)
                batch = (batch - mean) / std
        return batch.contiguous(memory_format=torch.channels_last) if batch.ndim == 4 else batch

    @abstractmethod
    def loss(self, outputs: Tensor, inputs: Tensor, targets: Tensor) -> Tensor:
        """Return the mean training loss, a differentiable scalar.

        Parameters
        ----------
        outputs : (n, outputs)
            Of the model; (n, tokens, vocabulary) of a language model.
        inputs, targets : (n, ...)
            As the data set holds them, before :meth:`prepare`; they may be on another device.
        """

    def row_losses(self, outputs: Tensor, inputs: Tensor, targets: Tensor) -> Tensor:
        """Return the training loss of each example, (n,), of a task that averages rows."""
        raise NotImplementedError

    def criterion(self, examples: Examples) -> LossFn:
        """Return the training loss for one client's examples; class weights may depend on all of them."""
        return self.loss

    def count(self, inputs: Tensor, targets: Tensor) -> int:
        """Return the number of predictions in a batch's mean loss."""
        return len(inputs)

    def most_predictions(self, info: DataInfo) -> float:
        """Return the most predictions of an example: 1, or infinity for a task with a count of its own."""
        return 1.0 if type(self).count is Task.count else math.inf

    # ---- evaluation
    @abstractmethod
    def loss_sum(self, outputs: Tensor, inputs: Tensor, targets: Tensor) -> Tensor:
        """Return the summed loss of a batch, without options of training such as smoothing."""

    def predictions(self, outputs: Tensor, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return outputs and targets by prediction, for metrics: (predictions, outputs) and (predictions,)."""
        return outputs, targets.to(outputs.device)

    def sums(self, outputs: Tensor, inputs: Tensor, targets: Tensor) -> Sums:
        """Return the batch's ``loss`` and ``count``, and the sums of every metric as ``metric.key``."""
        sums: Sums = {"loss": float(self.loss_sum(outputs, inputs, targets))}
        sums["count"] = float(self.count(inputs, targets))
        predicted, wanted = self.predictions(outputs, inputs, targets)
        for metric in self.measures():
            sums |= {f"{metric.label}.{key}": _plain(value) for key, value in metric.sums(predicted, wanted).items()}
        return sums

    def summarize(self, sums: Mapping[str, float | list[float]]) -> dict[str, float]:
        """Return the value of every metric and the mean ``loss``, from sums over at least one prediction.

        Raises
        ------
        DataError
            If nothing was predicted.
        """
        count = sums["count"]
        assert isinstance(count, float)
        if not count:
            raise DataError("there is nothing to evaluate on: no example gives a prediction")
        values = {}
        for metric in self.measures():
            prefix = f"{metric.label}."
            own = {key.removeprefix(prefix): value for key, value in sums.items() if key.startswith(prefix)}
            values[metric.label] = metric.value({"loss": sums["loss"], "count": count, **own})
        return values | {"loss": float(sums["loss"]) / count}  # type: ignore[arg-type]

    def measures(self) -> tuple[Metric, ...]:
        """Return the metrics themselves, in the order of their names."""
        return make_metrics(tuple(self.metrics))

    # ---- calibration, profiles and exports
    def whole(self, examples: Examples) -> Examples:
        """Return the examples for calibration: those without padding."""
        return examples

    def calibration_batches(self, examples: Examples, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield raw inputs and targets of batches without padding, of at most ``batch_size`` examples."""
        for start in range(0, len(examples), batch_size):
            yield examples.rows(start, min(start + batch_size, len(examples)))

    def prepare_whole(self, inputs: Tensor, info: DataInfo, device: torch.device) -> Tensor:
        """Return a batch without padding as one tensor, for tools that run parts of a model."""
        batch = self.prepare(inputs, info, device)
        assert isinstance(batch, Tensor)
        return batch

    def labels(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Return the targets by prediction, (predictions,) or (predictions, outputs)."""
        return targets

    def draw_examples(self, info: DataInfo, count: int, rng: np.random.Generator) -> Examples:
        """Return noise in the shape of the data set's examples."""
        if len(info.input_shape) == 3:
            noise = torch.from_numpy(rng.integers(0, 256, (count, *info.input_shape), dtype="uint8"))
        else:
            noise = torch.from_numpy(rng.standard_normal((count, *info.input_shape), dtype=np.float32))
        return Examples(noise, self.draw_targets(info, count, rng), None)

    def draw_targets(self, info: DataInfo, count: int, rng: np.random.Generator) -> Tensor:
        """Return random targets, (count,) or (count, outputs)."""
        return torch.from_numpy(rng.integers(0, info.num_classes, count))

    def describe_inputs(self, info: DataInfo, tokenizer: str) -> dict[str, Any]:
        """Return a description of an exported model's inputs, as plain values."""
        if self.reads_tokens:
            return {"name": "input_ids", "dtype": "int64", "tokenizer": tokenizer}
        name = "images" if len(info.input_shape) == 3 else "inputs"
        return {"name": name, "dtype": "float32", "shape": info.input_shape, "mean": info.mean, "std": info.std}

    # ---- checks
    def check(self, info: DataInfo) -> None:  # noqa: B027 # most tasks fit any data set
        """Raise ConfigError if the options do not fit the data set."""

    def require_classes(self, option: str, info: DataInfo) -> None:
        """Raise ConfigError if an option needs classes, which this task lacks."""
        if not self.has_classes:
            raise ConfigError(f"{option} is for classifiers, but {info.name} has no class for an example; set it to 0")

    def require_softmax(self, option: str, info: DataInfo) -> None:
        """Raise ConfigError if an option needs the logits of one softmax, which this task lacks."""
        if not self.is_softmax:
            raise ConfigError(
                f"{option} is for classifiers and language models; the data set {info.name} asks for neither"
            )


def add_sums(parts: Iterable[Mapping[str, float | list[float]]]) -> Sums:
    """Return the total of sums over disjoint ranges; lists are added element-wise.

    Raises
    ------
    DataError
        If lists of one key differ in length.
    """
    total: Sums = {}
    for part in parts:
        for key, value in part.items():
            known = total.get(key)
            if known is None:
                total[key] = list(value) if isinstance(value, list) else value
            elif isinstance(value, list) and isinstance(known, list) and len(value) == len(known):
                total[key] = [a + b for a, b in zip(known, value, strict=True)]
            elif isinstance(value, list) or isinstance(known, list):
                raise DataError(f"sums of {key} do not fit each other: they are of models of different outputs")
            else:
                total[key] = known + value
    return total


def _plain(value: Tensor | float | Sequence[float]) -> float | list[float]:
    if isinstance(value, Tensor):
        return [float(x) for x in value.tolist()] if value.ndim else float(value)
    return float(value) if isinstance(value, int | float) else [float(x) for x in value]


@lru_cache(maxsize=8)
def _pixel_constants(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return mean and deviation per channel on a [0, 255] scale, (1, C, 1, 1)."""
    means = torch.tensor(mean, device=device).mul_(255).view(1, -1, 1, 1)
    return means, torch.tensor(std, device=device).mul_(255).view(1, -1, 1, 1)


@lru_cache(maxsize=8)
def _constants(
    mean: tuple[float, ...], std: tuple[float, ...], ndim: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return mean and deviation along dimension 1 of an array of ``ndim`` dimensions."""
    shape = (1, -1, *(1,) * (ndim - 2))
    return torch.tensor(mean, device=device).view(shape), torch.tensor(std, device=device).view(shape)
