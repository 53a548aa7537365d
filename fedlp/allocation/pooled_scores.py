r"""One score per prunable layer from many clients, none of which shows its inputs.

What a client sends is a sum, so that the server (or secure aggregation) only has to add:

:class:`InputSquares`
    :math:`\sum x_j^2` and the number of vectors. Pooled, they are those of the union of the data: the server gets
    exactly Wanda's metric of all clients' data, and any reduction of it.
:class:`LogSums`
    Three numbers per reader from which, with the weights that the server has, the mean and variance of
    :math:`\log(|W_{ij}| \sqrt{E x_j^2})` follow exactly.
:class:`ScalarSum`
    A score that the client has reduced itself, weighted by its examples.

Only prunable layers are ever asked for or accepted: statistics of embeddings and heads would show token frequencies.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from functools import reduce as fold
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fedlp.allocation.layer_metrics import LOG_FLOOR, Pre, Reduce, Vector, reduce_elements, wanda_elements
from fedlp.errors import AllocationError
from fedlp.types import PrunableLayer

if TYPE_CHECKING:
    from fedlp.pruning.kernels.hessian import Moments


_LARGEST = 1e100  # any sum of finitely many is finite


@dataclass(frozen=True, slots=True)
class InputSquares:
    """Sums of squares over ``count`` input vectors of one reader; ``total`` is (n,)."""

    count: float
    total: Vector

    @classmethod
    def from_moments(cls, moments: Moments) -> InputSquares:
        """Return the diagonal of second moments."""
        return cls(float(moments.count), moments.gram.diagonal().double().cpu().numpy().copy())

    def __add__(self, other: InputSquares) -> InputSquares:
        """Return the sums over the union of two disjoint data sets."""
        return InputSquares(self.count + other.count, self.total + other.total)

    @property
    def mean(self) -> Vector:
        """Mean square of each input, (n,)."""
        return self.total / self.count


@dataclass(frozen=True, slots=True)
class LogSums:
    r"""Weighted sums over clients of what one reader's inputs :math:`x_j = \sqrt{E x_j^2}` add to Wanda's logarithm.

    Attributes
    ----------
    weight : float
        Sum of the clients' weights, > 0.
    log, log_square : float
        Weight times the mean over j of :math:`\log x_j` and of its square.
    cross : float
        Weight times the mean over j of :math:`c_j \log x_j`, where :math:`c_j` is column j's mean
        :math:`\log |W_{ij}|`.
    """

    weight: float
    log: float
    log_square: float
    cross: float

    @classmethod
    def of_inputs(cls, matrix: ArrayLike, squares: InputSquares, weight: float) -> LogSums:
        """Return the sums of one client of this weight, for a reader's (out, n) matrix."""
        logs = np.log(np.maximum(np.sqrt(squares.mean), LOG_FLOOR))
        columns = _log_magnitudes(matrix).mean(axis=0)
        means = (float(logs.mean()), float(np.square(logs).mean()), float((columns * logs).mean()))
        return cls(weight, *(weight * mean for mean in means))

    def __add__(self, other: LogSums) -> LogSums:
        """Return the sums over two sets of clients."""
        return LogSums(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def moments(self, matrix: ArrayLike) -> tuple[float, float]:
        """Return the mean of Wanda's logarithm over all elements and clients, and that of its square."""
        own = _log_magnitudes(matrix)
        mean = float(own.mean()) + self.log / self.weight
        square = float(np.square(own).mean()) + (2.0 * self.cross + self.log_square) / self.weight
        return mean, square


@dataclass(frozen=True, slots=True)
class ScalarSum:
    """Weighted sum over clients of a layer's score; ``weight`` is the clients' examples."""

    weight: float
    total: float

    @classmethod
    def of_score(cls, score: float, num_examples: int) -> ScalarSum:
        """Return one client's part."""
        return cls(float(num_examples), num_examples * score)

    def __add__(self, other: ScalarSum) -> ScalarSum:
        """Return the sum over two sets of clients."""
        return ScalarSum(self.weight + other.weight, self.total + other.total)


LayerSums = InputSquares | LogSums | ScalarSum


@dataclass(frozen=True, slots=True)
class ClientScores:
    """What one client says of its prunable layers: one sum per reader of each, or one :class:`ScalarSum` per layer."""

    client_id: int
    sums: Mapping[str, tuple[LayerSums, ...]]


def check_scores(answer: ClientScores, layers: Sequence[PrunableLayer]) -> None:
    """Raise AllocationError, naming client and layer, unless an answer has finite numbers of exactly these layers."""
    who = f"client {answer.client_id}"
    for name in answer.sums:
        if name not in {layer.name for layer in layers}:
            raise AllocationError(f"{who}, layer {name}: it is not prunable, and its statistics must not be sent")
    for layer in layers:
        where = f"{who}, layer {layer.name}"
        if layer.num_units < 1:
            raise AllocationError(f"{where}: it has no units left; a layer needs at least one")
        if layer.name not in answer.sums:
            raise AllocationError(f"{where}: its scores are missing")
        parts = answer.sums[layer.name]
        wanted = 1 if all(isinstance(part, ScalarSum) for part in parts) else len(layer.readers)
        if len(parts) != wanted:
            raise AllocationError(f"{where}: it sent {len(parts)} statistics, not {wanted}")
        for part in parts:
            _check_sums(part, where)
            if isinstance(part, InputSquares) and (not part.total.size or part.total.size % layer.num_units):
                raise AllocationError(
                    f"{where}: it sent sums over {part.total.size} inputs, which {layer.num_units} units cannot have"
                )


def _check_sums(part: LayerSums, where: str) -> None:
    for value in _numbers(part):
        if not abs(value) < _LARGEST:  # nor nan
            raise AllocationError(f"{where}: its score is {value}; scores must be finite and less than {_LARGEST:g}")
    weight = part.count if isinstance(part, InputSquares) else part.weight
    if weight <= 0:
        raise AllocationError(f"{where}: its statistics are of {weight:g} examples; they need at least one")
    if isinstance(part, InputSquares) and part.total.size and part.total.min() < 0:
        raise AllocationError(f"{where}: its sums of squares are negative")


def _numbers(part: LayerSums) -> Iterator[float]:
    match part:
        case InputSquares():
            yield part.count
            yield from (float(part.total.max()), float(part.total.min())) if part.total.size else ()
        case LogSums():
            yield from (part.weight, part.log, part.log_square, part.cross)
        case ScalarSum():
            yield from (part.weight, part.total)


def pool_sums(answers: Sequence[ClientScores], layers: Sequence[PrunableLayer]) -> dict[str, tuple[LayerSums, ...]]:
    """Return the sums over all clients, by layer; the order of the answers does not matter.

    Raises
    ------
    AllocationError
        If there are no answers, one of them is bad, or they are of different kinds; names client and layer.
    """
    if not answers:
        raise AllocationError("no client sent scores of its layers; nothing can be pooled")
    ordered = sorted(answers, key=lambda answer: answer.client_id)
    for answer in ordered:
        check_scores(answer, layers)
        for layer in layers:
            if not _alike(answer.sums[layer.name], ordered[0].sums[layer.name]):
                raise AllocationError(
                    f"client {answer.client_id}, layer {layer.name}: its statistics are not of the kind and size that "
                    f"client {ordered[0].client_id} sent"
                )
    columns = {layer.name: zip(*(answer.sums[layer.name] for answer in ordered), strict=True) for layer in layers}
    return {name: tuple(fold(_add, parts) for parts in column) for name, column in columns.items()}


def _alike(one: tuple[LayerSums, ...], other: tuple[LayerSums, ...]) -> bool:
    def kind(part: LayerSums) -> tuple[str, int]:
        return type(part).__name__, part.total.size if isinstance(part, InputSquares) else 0

    return [kind(part) for part in one] == [kind(part) for part in other]


def _add(one: LayerSums, other: LayerSums) -> LayerSums:
    return one + other  # type: ignore[operator] # of one kind: checked


def pool_scores(
    answers: Sequence[ClientScores],
    layers: Sequence[PrunableLayer],
    weights: Mapping[str, Sequence[NDArray[np.floating]]],
    pre: Pre = "log",
    reduce: Reduce = "var",
) -> dict[str, float]:
    """Return one score per layer from what the clients sent.

    Parameters
    ----------
    weights : mapping from layer name to sequence of (out, n)
        The readers' matrices on the server; may be empty for clients that send scalars.
    pre, reduce : str
        The reduction of Wanda's elements, where clients send :class:`InputSquares`. :class:`LogSums` give the variance
        of the logarithm over the elements of all clients side by side: with one client, or equal ones, "log" and "var".
    """
    pooled = pool_sums(answers, layers)
    return {name: _score(parts, weights.get(name, ()), pre, reduce) for name, parts in pooled.items()}


def _score(parts: tuple[LayerSums, ...], matrices: Sequence[NDArray[np.floating]], pre: Pre, reduce: Reduce) -> float:
    if isinstance(parts[0], ScalarSum):
        return parts[0].total / parts[0].weight
    elements, size, mean, square = [], 0, 0.0, 0.0
    for part, matrix in zip(parts, matrices, strict=True):
        if isinstance(part, InputSquares):
            elements.append(wanda_elements(matrix, part.mean).ravel())
        elif isinstance(part, LogSums):
            own, own_square = part.moments(matrix)
            size, mean, square = size + matrix.size, mean + matrix.size * own, square + matrix.size * own_square
    if elements:
        return reduce_elements(np.concatenate(elements), pre, reduce)
    return max(square / size - (mean / size) ** 2, 0.0)


def _log_magnitudes(matrix: ArrayLike) -> Vector:
    return np.log(np.maximum(np.abs(np.asarray(matrix, dtype=np.float64)), LOG_FLOOR))
