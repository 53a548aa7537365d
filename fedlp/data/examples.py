"""What a data set is once it is loaded: whole tensors, and what a model and a trainer must know of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

IGNORE_INDEX: Final = -100
"""Pads the end of token sequences; the cross-entropy of torch leaves it out."""


@dataclass(frozen=True, slots=True)
class DataInfo:
    """What can be said of a data set before it is loaded.

    Attributes
    ----------
    task : str
        Name of the task that the targets are for; see :mod:`fedlp.tasks`.
    input_shape : tuple of int
        (C, H, W) of an image, (sequence_length,) of a text, any shape of an array.
    num_classes : int
        Number of the model's outputs: classes, labels or values; the vocabulary's size of a language model.
    num_train, num_test : int or None
        Examples; None where only loading tells.
    mean, std : tuple of float
        Per channel of the training images on a [0, 1] scale; empty where inputs are not normalised.
    augment : bool
        Whether training images are to be varied: a random crop after zero padding, and a flip where ``flip`` allows it.
    padding : int
        Pixels of zero padding on every side before the random crop.
    flip : bool
        Whether a mirrored image keeps its class (a mirrored digit does not).
    vocabulary : int or None
        Number of tokens, where inputs are tokens and ``num_classes`` is not their number.
    labels : tuple of str
        Name of each class or label; empty where they have none.
    """

    name: str
    task: str
    input_shape: tuple[int, ...]
    num_classes: int
    num_train: int | None
    num_test: int | None
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    augment: bool = False
    padding: int = 0
    flip: bool = False
    vocabulary: int | None = None
    labels: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Examples:
    """``n`` examples as whole tensors.

    Attributes
    ----------
    inputs : Tensor
        Images: uint8 (n, C, H, W). Arrays: float32 (n, ...). Text: int64 (n, tokens), padded at the end with
        ``IGNORE_INDEX``; for language modelling sequence_length + 1 of them, where position ``i`` predicts ``i + 1``.
    targets : Tensor
        int64 (n,): the class; for language modelling the document's number. float32 (n,) or (n, k): values. uint8
        (n, k): whether the example has each label.
    groups : (n,) int64 or None
        Natural owner of each example (document, speaker, file).
    """

    inputs: Tensor
    targets: Tensor
    groups: NDArray[np.int64] | None

    def __len__(self) -> int:
        return int(self.inputs.shape[0])

    def rows(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Return inputs and targets of the examples ``start`` to ``stop``."""
        return self.inputs[start:stop], self.targets[start:stop]

    def select(self, indices: NDArray[np.int64]) -> Examples:
        """Return copies of the examples at ``indices``, in their order."""
        import torch

        index = torch.from_numpy(np.ascontiguousarray(indices, dtype=np.int64))
        groups = None if self.groups is None else self.groups[indices]
        return Examples(self.inputs.index_select(0, index), self.targets.index_select(0, index), groups)


@dataclass(frozen=True, slots=True)
class FederatedData:
    """A data set with its held-out part; only ``train`` is spread over clients."""

    info: DataInfo
    train: Examples
    test: Examples


def subset(examples: Examples, limit: int | None, rng: np.random.Generator) -> Examples:
    """Return at most ``limit`` examples (None: all), drawn without replacement and kept in their order."""
    if limit is None or limit >= len(examples):
        return examples
    return examples.select(np.sort(rng.permutation(len(examples))[:limit]))
