"""Random allocation functions, mutation and crossover.

All are right in their types, at most ``MAX_DEPTH`` levels high if their parents are, and in canonical form.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from fedlp.allocation.layer_metrics import KEYS, Key, LayerStatistics
from fedlp.allocation.search.expressions import Expression, canonical
from fedlp.allocation.search.tree_nodes import (
    BINARIES,
    NORMS,
    SCALARS,
    UNARIES,
    Binary,
    Constant,
    Metric,
    Node,
    Scalar,
    ScalarName,
    Unary,
    children,
    height,
)

MAX_DEPTH = 3
_CONSTANTS = (-2.0, 2.0)
_AMPLITUDES, _POWERS = (0.05, 2.0), (0.0, 2.0)
_METRIC, _SCALAR = 0.7, 0.9  # cumulative chances of what a leaf is; the rest are constants
_UNARY_CHANCE, _LEAF_CHANCE = 0.4, 0.2  # where a tree may still grow
_CURVES = tuple(op for op in UNARIES if op != "id")
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Values that leaves may read."""

    keys: tuple[Key, ...] = KEYS
    scalars: tuple[ScalarName, ...] = SCALARS

    @classmethod
    def of(cls, statistics: Sequence[LayerStatistics]) -> Vocabulary:
        """Return the values of these layers: keys of all tables; sensitivity and curve only if all layers have them."""
        keys = tuple(key for key in KEYS if all(key in layer.table for layer in statistics))
        return cls(keys, tuple(name for name in SCALARS if not any(np.isnan(getattr(x, name)) for x in statistics)))


def random_expression(rng: np.random.Generator, vocabulary: Vocabulary | None = None) -> Expression:
    """Return a random function; it may be degenerate."""
    words = vocabulary or Vocabulary()
    root: Node = Constant(0.0)
    while isinstance(root, Constant):
        root = canonical(_random_node(rng, words, MAX_DEPTH))
    low, high = np.log(_AMPLITUDES)
    return Expression(root, _rounded(float(np.exp(rng.uniform(low, high)))), _rounded(float(rng.uniform(*_POWERS))))


def mutate(expression: Expression, rng: np.random.Generator, vocabulary: Vocabulary | None = None) -> Expression:
    """Return a function that differs in one place: a new subtree, another operation or leaf there, or the amplitude."""
    words = vocabulary or Vocabulary()
    if rng.random() < 0.3:
        amplitude = float(np.clip(expression.amplitude * np.exp(rng.normal(0.0, 0.4)), *_AMPLITUDES))
        power = float(np.clip(expression.power + rng.normal(0.0, 0.3), *_POWERS))
        return Expression(expression.root, _rounded(amplitude), _rounded(power))
    path, chosen = _pick(list(_walk(expression.root)), rng)
    grow = rng.random() < 0.5
    new = _random_node(rng, words, MAX_DEPTH - len(path)) if grow else _altered(chosen, rng, words)
    return Expression(canonical(_replaced(expression.root, path, new)), expression.amplitude, expression.power)


def crossover(one: Expression, other: Expression, rng: np.random.Generator) -> Expression:
    """Return ``one`` with one subtree replaced by one of ``other``, and the amplitude of either."""
    path, _ = _pick([found for found in _walk(one.root) if len(found[0]) < MAX_DEPTH], rng)
    fitting = [node for _, node in _walk(other.root) if height(node) <= MAX_DEPTH - len(path)]
    source = _pick([one, other], rng)
    root = canonical(_replaced(one.root, path, _pick(fitting, rng)))
    return Expression(root, source.amplitude, source.power)


def _random_node(rng: np.random.Generator, words: Vocabulary, levels: int) -> Node:
    draw = rng.random()
    if levels <= 1 or draw < _LEAF_CHANCE:
        return _random_leaf(rng, words)
    if draw < _LEAF_CHANCE + _UNARY_CHANCE:
        return Unary(_pick(_CURVES, rng), _random_node(rng, words, levels - 1))
    left, right = (_random_node(rng, words, levels - 1) for _ in range(2))
    return Binary(_pick(BINARIES, rng), left, right)


def _random_leaf(rng: np.random.Generator, words: Vocabulary) -> Node:
    draw = rng.random()
    if words.keys and draw < _METRIC:
        return Metric(_pick(NORMS, rng), _pick(words.keys, rng))
    if draw < _SCALAR:
        return Scalar(_pick(words.scalars, rng))
    return Constant(_rounded(float(rng.uniform(*_CONSTANTS))))


def _altered(node: Node, rng: np.random.Generator, words: Vocabulary) -> Node:
    """Return a node of the same kind with the same children."""
    match node:
        case Unary():
            return Unary(_pick(_CURVES, rng), node.child)
        case Binary():
            return Binary(_pick(BINARIES, rng), node.left, node.right)
        case Constant():
            return Constant(_rounded(float(np.clip(node.value + rng.normal(0.0, 0.3), *_CONSTANTS))))
        case _:
            return _random_leaf(rng, words)


def _walk(node: Node, path: tuple[int, ...] = ()) -> Iterator[tuple[tuple[int, ...], Node]]:
    """Yield every subtree with its path from the root."""
    yield path, node
    for place, child in enumerate(children(node)):
        yield from _walk(child, (*path, place))


def _replaced(node: Node, path: tuple[int, ...], new: Node) -> Node:
    if not path:
        return new
    match node:
        case Unary():
            return Unary(node.op, _replaced(node.child, path[1:], new))
        case Binary() if path[0] == 0:
            return Binary(node.op, _replaced(node.left, path[1:], new), node.right)
        case Binary():
            return Binary(node.op, node.left, _replaced(node.right, path[1:], new))
        case _:
            raise IndexError(path)


def _pick(options: Sequence[_T], rng: np.random.Generator) -> _T:
    return options[int(rng.integers(len(options)))]


def _rounded(value: float) -> float:
    return round(value, 3)
