r"""Allocation functions as small typed trees over the statistics of layers.

``add(sq(minmax(wanda,log,var)),depth)`` is one: a leaf takes a number per layer from the table of
``fedlp.allocation.layer_metrics`` and normalises it over the layers; unary and binary operations follow. The values,
brought to [0, 1] over the layers, are the shape z (the higher, the more is removed), and :math:`a(S) = a_0 S^p` its
amplitude.

============ =========================================================================================================
minmax rank  of the layers by (leaf, pre, reduce), in [0, 1]
depth, share as in ``LayerStatistics``
sensitivity  min-max over the layers of log KL divergence
curve        min-max over the layers of the sparsity that error tables give each at one half
id neg sq    as they say
sqrt log     sign(x) sqrt(\|x\|) and sign(x) log10(1 + 9\|x\|), which both map [-1, 1] onto itself
tanh         as it says
add mul max  as they say; their operands' order does not matter, and is sorted
============ =========================================================================================================

All operations are total. An expression that is constant over the layers, or overflows, is degenerate.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedlp.allocation.layer_metrics import LOG_FLOOR, Key, LayerStatistics, Vector, min_max, ranks
from fedlp.allocation.search.tree_nodes import (
    Binary,
    BinaryName,
    Constant,
    Metric,
    Node,
    Scalar,
    Unary,
    UnaryName,
    format_node,
    parse_node,
)
from fedlp.errors import AllocationError

_FLAT = 1e-9  # spreads below this are rounding errors


@dataclass(frozen=True, slots=True)
class Expression:
    """Allocation function: a tree for the shape, and the range of sparsities at a mean sparsity of S.

    Attributes
    ----------
    amplitude : float
        :math:`a_0`, > 0: the range of the sparsities at S = 1.
    power : float
        p, >= 0.
    """

    root: Node
    amplitude: float = 0.3
    power: float = 1.0

    def amplitude_at(self, sparsity: float) -> float:
        """Return :math:`a_0 S^p`."""
        return float(self.amplitude * sparsity**self.power)

    def __str__(self) -> str:
        return format_node(self.root)

    def to_config(self) -> dict[str, Any]:
        """Return plain values from which :meth:`from_config` makes the same function."""
        return {"function": str(self), "amplitude": self.amplitude, "power": self.power}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Expression:
        """Return the function of :meth:`to_config`; AllocationError with the fault if the values are invalid."""
        for name in ("function", "amplitude", "power"):
            if name not in config:
                raise AllocationError(f"an allocation function needs {name}; it has {', '.join(config) or 'nothing'}")
        try:
            amplitude, power = float(config["amplitude"]), float(config["power"])
        except (TypeError, ValueError) as error:
            raise AllocationError(f"amplitude and power of an allocation function must be numbers ({error})") from error
        if not (0 < amplitude < float("inf") and 0 <= power < float("inf")):
            raise AllocationError(f"amplitude={amplitude:g} and power={power:g}: they must be > 0 and >= 0, and finite")
        return cls(parse_node(str(config["function"])), amplitude, power)


def canonical(node: Node) -> Node:
    """Return the canonical form of a tree, shared by all trees that differ in notation alone."""
    match node:
        case Unary():
            return _canonical_unary(node.op, canonical(node.child))
        case Binary():
            left, right = sorted((canonical(node.left), canonical(node.right)), key=format_node)
            if node.op == "max" and left == right:
                return left
            return _folded(Binary(node.op, left, right))
        case _:
            return node


def _canonical_unary(op: UnaryName, child: Node) -> Node:
    match op, child:
        case "id", _:
            return child
        case "neg", Unary("neg", inner):
            return inner
        case "sq", Unary("neg", inner):
            return _folded(Unary("sq", inner))
        case (("sqrt" | "log" | "tanh"), Unary("neg", inner)):  # odd: the sign goes outside
            return _canonical_unary("neg", _canonical_unary(op, inner))
        case _:
            return _folded(Unary(op, child))


def _folded(node: Unary | Binary) -> Node:
    """Return the constant value of a tree of constants; any other tree unchanged."""
    children = (node.child,) if isinstance(node, Unary) else (node.left, node.right)
    if not all(isinstance(child, Constant) for child in children):
        return node
    value = float(_values(node, ())[0])
    return Constant(value) if np.isfinite(value) else node


# ----------------------------------------------------------------------------------------------------------- evaluation
_UNARY: dict[UnaryName, Callable[[Vector], Vector]] = {
    "id": lambda x: x,
    "neg": np.negative,
    "sq": np.square,
    "sqrt": lambda x: np.sign(x) * np.sqrt(np.abs(x)),
    "log": lambda x: np.sign(x) * np.log1p(9.0 * np.abs(x)) / np.log(10.0),
    "tanh": np.tanh,
}
_BINARY: dict[BinaryName, Callable[[Vector, Vector], Vector]] = {"add": np.add, "mul": np.multiply, "max": np.maximum}


def evaluate(expression: Expression, statistics: Sequence[LayerStatistics]) -> dict[str, float]:
    """Return the shape over the layers, in [0, 1], by layer name: the higher, the more is removed.

    Raises
    ------
    AllocationError
        If the expression is degenerate for these layers, or reads statistics that they lack.
    """
    values = _values(expression.root, statistics)
    if _is_flat(values):
        raise AllocationError(f"{expression}: it does not tell these {len(statistics)} layers apart; use another one")
    return {layer.name: float(z) for layer, z in zip(statistics, min_max(values), strict=True)}


def is_degenerate(expression: Expression, statistics: Sequence[LayerStatistics]) -> bool:
    """Return whether an expression has no shape over these layers: constant up to rounding, or not finite."""
    return _is_flat(_values(expression.root, statistics))


def signature(sparsities: Mapping[str, float], digits: int = 3) -> tuple[float, ...]:
    """Return rounded sparsities in the order of the layers' names: functions that share it prune the same model."""
    return tuple(round(sparsities[name], digits) + 0.0 for name in sorted(sparsities))


def _is_flat(values: Vector) -> bool:
    if not np.isfinite(values).all():
        return True
    low, high = float(values.min()), float(values.max())
    spread = high - low
    return not _FLAT * max(1.0, abs(low), abs(high)) < spread < float("inf")


def _values(node: Node, statistics: Sequence[LayerStatistics]) -> Vector:
    """Return a tree's value for each layer; those without layers are constants."""
    match node:
        case Metric():
            found = [_look_up(layer, node.key) for layer in statistics]
            return min_max(found) if node.norm == "minmax" else ranks(found)
        case Scalar("depth"):
            return np.array([layer.depth for layer in statistics])
        case Scalar("share"):
            return np.array([layer.share for layer in statistics])
        case Scalar(name):
            measured = np.array([getattr(layer, name) for layer in statistics])
            if np.isnan(measured).any():
                missing = statistics[int(np.isnan(measured).argmax())].name
                raise AllocationError(f"layer {missing}: its {name} has not been measured; measure it, or do without")
            return min_max(np.log(np.maximum(measured, LOG_FLOOR)) if name == "sensitivity" else measured)
        case Constant():
            return np.full(max(len(statistics), 1), node.value)
        case Unary():
            with np.errstate(all="ignore"):
                return _UNARY[node.op](_values(node.child, statistics))
        case Binary():
            left, right = _values(node.left, statistics), _values(node.right, statistics)
            with np.errstate(all="ignore"):
                return _BINARY[node.op](left, right)


def _look_up(layer: LayerStatistics, key: Key) -> float:
    if key not in layer.table:
        raise AllocationError(f"layer {layer.name}: it has no {'.'.join(key)}; collect the leaf {key[0]} for it")
    return layer.table[key]
