"""Trees of allocation functions, and their text: ``add(sq(minmax(wanda,log,var)),depth)``.

``fedlp.allocation.search.expressions`` defines each node.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any, Literal, NoReturn, get_args

from fedlp.allocation.layer_metrics import LEAVES, PRES, REDUCES, Key, is_defined
from fedlp.errors import AllocationError

Norm = Literal["minmax", "rank"]
ScalarName = Literal["curve", "depth", "sensitivity", "share"]
UnaryName = Literal["id", "neg", "sq", "sqrt", "log", "tanh"]
BinaryName = Literal["add", "mul", "max"]
NORMS: tuple[Norm, ...] = get_args(Norm)
SCALARS: tuple[ScalarName, ...] = get_args(ScalarName)
UNARIES: tuple[UnaryName, ...] = get_args(UnaryName)
BINARIES: tuple[BinaryName, ...] = get_args(BinaryName)
_LONGEST = 1000  # characters of a tree that is read


_TOKEN = re.compile(r"\s*([(),]|[^\s(),]+)")


@dataclass(frozen=True, slots=True)
class Metric:
    """Number per layer from the table, normalised over the layers."""

    norm: Norm
    key: Key


@dataclass(frozen=True, slots=True)
class Scalar:
    """Other scalar of a layer."""

    name: ScalarName


@dataclass(frozen=True, slots=True)
class Constant:
    """Equal number for all layers."""

    value: float


@dataclass(frozen=True, slots=True)
class Unary:
    """Operation on one tree."""

    op: UnaryName
    child: Node


@dataclass(frozen=True, slots=True)
class Binary:
    """Commutative operation on two trees."""

    op: BinaryName
    left: Node
    right: Node


Node = Metric | Scalar | Constant | Unary | Binary


def format_node(node: Node) -> str:
    """Return a tree as text; :func:`parse_node` reads it."""
    match node:
        case Metric():
            return f"{node.norm}({','.join(node.key)})"
        case Scalar():
            return node.name
        case Constant():
            return repr(node.value)
        case Unary():
            return f"{node.op}({format_node(node.child)})"
        case Binary():
            return f"{node.op}({format_node(node.left)},{format_node(node.right)})"


def children(node: Node) -> tuple[Node, ...]:
    """Return the operands of a tree's operation."""
    match node:
        case Unary():
            return (node.child,)
        case Binary():
            return (node.left, node.right)
        case _:
            return ()


def height(node: Node) -> int:
    """Return the levels of a tree; 1 for a leaf."""
    return 1 + max((height(child) for child in children(node)), default=0)


def parse_node(text: str) -> Node:
    """Return the tree that :func:`format_node` wrote; spaces do not matter.

    Raises
    ------
    AllocationError
        If the text is invalid; names the position and the expected tokens.
    """
    return _Parser(text).parse()


class _Parser:
    """Recursive descent over one text."""

    def __init__(self, text: str) -> None:
        self._text, self._tokens = text, list(_TOKEN.finditer(text[:_LONGEST]))
        self._next = 0

    def parse(self) -> Node:
        if len(self._text) > _LONGEST:
            raise AllocationError(f"an allocation function of {len(self._text)} characters; {_LONGEST} are the most")
        node = self._node()
        if self._token():
            self._fail("the end")
        return node

    def _token(self) -> str:
        return self._tokens[self._next][1] if self._next < len(self._tokens) else ""

    def _fail(self, wanted: str) -> NoReturn:
        place = self._tokens[self._next].start(1) + 1 if self._token() else len(self._text) + 1
        found = repr(self._token()) if self._token() else "the end"
        raise AllocationError(f"allocation function {self._text!r}, position {place}: {found} where {wanted} must be")

    def _take(self, wanted: str) -> None:
        if self._token() != wanted:
            self._fail(repr(wanted))
        self._next += 1

    def _choose(self, names: tuple[str, ...]) -> Any:
        name = self._token()
        if name not in names:
            self._fail(f"one of {' '.join(names)}")
        self._next += 1
        return name

    def _node(self) -> Node:
        if re.match(r"[-+.\d]", self._token()):
            return self._constant()
        op = self._choose((*NORMS, *SCALARS, *UNARIES, *BINARIES))
        if op in SCALARS:
            return Scalar(op)
        self._take("(")
        node: Node
        if op in NORMS:
            node = Metric(op, self._key())
        elif op in UNARIES:
            node = Unary(op, self._node())
        else:
            left = self._node()
            self._take(",")
            node = Binary(op, left, self._node())
        self._take(")")
        return node

    def _constant(self) -> Constant:
        try:
            value = float(self._token())
        except ValueError:
            self._fail("a number")
        if not math.isfinite(value):
            self._fail("a finite number")
        self._next += 1
        return Constant(value)

    def _key(self) -> Key:
        leaf = self._choose(LEAVES)
        self._take(",")
        pre = self._choose(PRES)
        self._take(",")
        return leaf, pre, self._choose(tuple(reduce for reduce in REDUCES if is_defined(pre, reduce)))
