"""Residual branches of a traced classifier: layers between a shortcut's two ends that may lose all their units.

A branch is one chain: layers that compute or carry the units of an axis, the only layer that reads them, and what
follows it up to an addition with the shortcut. Without units it adds a constant. A chain with a second axis, such as a
bottleneck's, is none: its first layers would be left over.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import permutations

from torch import fx, nn

from fedlp.models.spec import named_tensors
from fedlp.pruning.tracing.rules import target_name
from fedlp.pruning.tracing.slicing import WidthSpec

_ADDITIONS = ("add", "add_", "iadd")


def residual_branches(graph: fx.Graph, model: nn.Module, spec: WidthSpec) -> dict[str, frozenset[str]]:
    """Return the axis of each residual branch, and the tensors of its layers that are not along the axis.

    Parameters
    ----------
    graph : fx.Graph
        Symbolic trace of ``model``.
    spec : WidthSpec
        Axes of ``model``.
    """
    calls = Counter(str(node.target) for node in graph.nodes if node.op == "call_module")
    found: dict[str, frozenset[str]] = {}
    for node in graph.nodes:
        if target_name(node) in _ADDITIONS and len(node.all_input_nodes) == 2:
            for end, shortcut in permutations(node.all_input_nodes):
                chain = list(_chain(end, set(_back(shortcut))))
                if not any(calls[path] > 1 and list(model.get_submodule(path).parameters()) for path in chain):
                    found |= _as_branch(chain, model, spec)
    return found


def _back(node: fx.Node) -> Iterator[fx.Node]:
    """Yield a node and those before it, up to the first of several inputs."""
    yield node
    while len(node.all_input_nodes) == 1:
        node = node.all_input_nodes[0]
        yield node


def _chain(end: fx.Node, shortcut: set[fx.Node]) -> Iterator[str]:
    """Yield the modules from the end of a branch back to the shortcut's beginning; nothing where it is no chain."""
    nodes: list[fx.Node] = []
    for node in _back(end):
        if node in shortcut:
            yield from (str(found.target) for found in nodes if found.op == "call_module")
            return
        if len(node.users) > 1:
            return
        nodes.append(node)


def _as_branch(paths: list[str], model: nn.Module, spec: WidthSpec) -> dict[str, frozenset[str]]:
    """Return the axis of a chain of modules, last first, and its tensors off the axis; empty where it is no branch."""
    reader = next((path for path in paths if isinstance(model.get_submodule(path), nn.Conv2d | nn.Linear)), "")
    dims = spec.dims.get(f"{reader}.weight")
    if dims is None or dims[1].axis is None:
        return {}
    axis, all_names = dims[1].axis, list(named_tensors(model))
    along = {name for name, each in spec.dims.items() if any(dim.axis == axis for dim in each)}
    owned = [{name for name in all_names if name.startswith(f"{path}.")} for path in paths[paths.index(reader) + 1 :]]
    names = set[str]().union(*owned)
    if any(own and own.isdisjoint(along) for own in owned) or along - names != {f"{reader}.weight"}:
        return {}
    return {axis: frozenset(names - along)}
