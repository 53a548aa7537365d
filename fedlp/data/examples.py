"""Loaded data sets: examples as whole tensors, and the facts that model and training need."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor, dtype

IGNORE_INDEX: Final = -100
"""Pads the end of token sequences; the cross-entropy of torch leaves it out."""


@dataclass(frozen=True, slots=True)
class DataInfo:
    """Facts of a data set, known before it is loaded.

    Attributes
    ----------
    task : str or Task
        Task that the targets are for, or its name; see :func:`fedlp.tasks.task_of`.
    input_shape : tuple of int
        (C, H, W) of an image, (sequence_length,) of a text, any shape of an array.
    num_classes : int
        Number of the model's outputs: classes, labels or values; the vocabulary's size of a language model.
    num_train, num_test : int or None
        Examples; None if unknown before loading.
    mean, std : tuple of float
        Per channel of the training images on a [0, 1] scale; empty if inputs are not normalised.
    augment : bool
        Whether training images are augmented: random crop after zero padding, and mirroring if ``flip``.
    padding : int
        Pixels of zero padding on every side before the random crop.
    flip : bool
        Whether a mirrored image keeps its class (a mirrored digit does not).
    vocabulary : int or None
        Number of tokens, where inputs are tokens and ``num_classes`` is not their number.
    labels : tuple of str
        Name of each class or label; empty if they have none.
    separator : int or None
        Token at the end of the first of two texts, for models that read token types.
    """

    name: str
    task: Any
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
    separator: int | None = None


class Rows:
    """Selected rows of a large tensor, such as a memory-mapped file, copied only when indexed.

    Parameters
    ----------
    whole : Tensor
        (m, ...).
    index : Tensor
        int64 (n,): row of ``whole`` behind each row here.
    """

    def __init__(self, whole: Tensor, index: Tensor) -> None:
        self._whole, self._index = whole, index

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, rows: slice) -> Tensor:
        return self._whole.index_select(0, self._index[rows])

    @property
    def shape(self) -> tuple[int, ...]:
        """(n, ...)."""
        return (len(self), *self._whole.shape[1:])

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return self._whole.ndim

    @property
    def dtype(self) -> dtype:
        """Type of the values."""
        return self._whole.dtype

    def is_floating_point(self) -> bool:
        """Whether values are floats."""
        return self._whole.is_floating_point()

    def index_select(self, dim: int, index: Tensor) -> Tensor:
        """Return copies of rows; ``dim`` must be 0."""
        assert dim == 0
        return self._whole.index_select(0, self._index.index_select(0, index))

    def choose(self, index: Tensor) -> Rows:
        """Return rows of these rows, without a copy."""
        return Rows(self._whole, self._index.index_select(0, index))

    def join(self, other: Rows) -> Tensor | Rows:
        """Return these rows, then others; copies if they belong to different tensors."""
        import torch

        if self._whole is other._whole:
            return Rows(self._whole, torch.cat([self._index, other._index]))
        return torch.cat([self[: len(self)], other[: len(other)]])


@dataclass(frozen=True, slots=True)
class Examples:
    """``n`` examples as whole tensors.

    Attributes
    ----------
    inputs : Tensor
        Images: uint8 (n, C, H, W); they may be :class:`Rows` of a memory-mapped file. Arrays: float32 (n, ...). Text:
        int64 (n, tokens), padded at the end with ``IGNORE_INDEX``; for language modelling sequence_length + 1 of them,
        where position ``i`` predicts ``i + 1``.
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
        """Return the examples at ``indices``, in their order: copies, but for inputs that are :class:`Rows`."""
        import torch

        index = torch.from_numpy(np.ascontiguousarray(indices, dtype=np.int64))
        groups = None if self.groups is None else self.groups[indices]
        inputs: Any = self.inputs
        chosen: Any = inputs.choose(index) if isinstance(inputs, Rows) else inputs.index_select(0, index)
        return Examples(chosen, self.targets.index_select(0, index), groups)


@dataclass(frozen=True, slots=True)
class FederatedData:
    """A data set with its held-out part; only ``train`` is spread over clients."""

    info: DataInfo
    train: Examples
    test: Examples


def concatenate(first: Examples, second: Examples) -> Examples:
    """Return the examples of both; rows of one memory-mapped file are not copied."""
    import torch

    one, other = first.inputs, second.inputs
    inputs: Any = one.join(other) if isinstance(one, Rows) and isinstance(other, Rows) else torch.cat([one, other])
    both = first.groups is not None and second.groups is not None
    groups = np.concatenate([first.groups, second.groups]) if both else None
    return Examples(inputs, torch.cat([first.targets, second.targets]), groups)


def no_examples() -> Examples:
    """Return an empty set of examples."""
    import torch

    return Examples(torch.empty(0), torch.empty(0, dtype=torch.int64), None)


def subset(examples: Examples, limit: int | None, rng: np.random.Generator) -> Examples:
    """Return at most ``limit`` examples (None: all), drawn without replacement and kept in their order."""
    if limit is None or limit >= len(examples):
        return examples
    return examples.select(np.sort(rng.permutation(len(examples))[:limit]))
