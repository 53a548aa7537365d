"""Registry of parts: models, allocators, scores, encodings and every other named object of a config.

A part is a class or function. Built-in parts, a user's own and those of installed packages register alike::

    @register("allocator", "mine")
    @dataclass(frozen=True)
    class Mine:
        steepness: float = 0.5

A name is looked up, in this order, among registered parts, as ``module:object``, among the built-in parts and among the
entry points of the group ``fedlp.<kind>``. Built-in parts are found by the text of their decorator, so that a list of
names imports nothing.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from difflib import get_close_matches
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from fedlp.errors import ConfigError, one_line

HOMES: Mapping[str, str] = {
    "model": "fedlp.models",
    "dataset": "fedlp.data",
    "partition": "fedlp.data",
    "task": "fedlp.tasks",
    "metric": "fedlp.tasks",
    "strategy": "fedlp.federation.strategies",
    "allocator": "fedlp.allocation.rules",
    "score": "fedlp.pruning.scores",
    "encoding": "fedlp.federation.wire",
    "aggregator": "fedlp.federation.aggregation",
    "server_optimizer": "fedlp.federation.aggregation",
    "optimizer": "fedlp.training",
    "schedule": "fedlp.training",
    "tracker": "fedlp.report.trackers",
    "callback": "fedlp.federation.server",
}
"""Kinds of parts, and the package in which the built-in parts of each live."""

GIVEN: Mapping[str, frozenset[str]] = {
    "model": frozenset({"input_shape", "num_classes", "in_channels", "in_features", "task", "vocabulary"}),
    "partition": frozenset({"train", "num_clients", "seed", "rng", "kinds"}),
    "aggregator": frozenset({"adapter_scale"}),
    "allocator": frozenset({"layers", "evidence", "cost", "limit"}),
    "score": frozenset({"view"}),
    "metric": frozenset({"outputs", "targets"}),
    "optimizer": frozenset({"params"}),
    "schedule": frozenset({"server_round", "num_rounds", "progress"}),
    "callback": frozenset({"record", "state", "task"}),
}
"""Parameters of each kind supplied by fedlp; all other parameters of a part are its options."""

METHODS: Mapping[str, tuple[str, ...]] = {
    "strategy": ("policy",),
    "encoding": ("encode", "signature", "decode"),
    "aggregator": ("begin",),
    "server_optimizer": ("step",),
}
"""Required methods of a class, by kind."""

ALIASES: Mapping[tuple[str, str], str] = {("task", "language"): "causal_lm"}
"""Names of earlier versions, by kind, and the names of today."""

_T = TypeVar("_T", bound=Callable[..., Any])
_PARTS: dict[tuple[str, str], Callable[..., Any]] = {}


@dataclass(frozen=True, slots=True)
class Option:
    """One option of a part: a parameter of its signature.

    Attributes
    ----------
    annotation : object
        Type as written; ``Any`` if there is none.
    default : object
        ``inspect.Parameter.empty`` if the option is required.
    """

    name: str
    annotation: Any
    default: Any


def register(kind: str, name: str) -> Callable[[_T], _T]:
    """Register a class or function as the part ``name`` of a kind; a decorator.

    Raises
    ------
    ConfigError
        If the kind does not exist, or another part has the name.
    """
    _check_kind(kind)

    def decorate(target: _T) -> _T:
        known = _PARTS.setdefault((kind, name), target)
        if (known.__module__, known.__qualname__) != (target.__module__, target.__qualname__):
            raise ConfigError(f"{kind} {name} is registered already, by {known.__module__}; choose another name")
        _PARTS[kind, name] = target  # a reloaded module's newer class
        return target

    return decorate


def lookup(kind: str, name: str) -> Callable[..., Any]:
    """Return the part of a kind by name or ``module:object``.

    Raises
    ------
    ConfigError
        If there is no such part; names close ones. If its module cannot be imported; quotes the reason.
    """
    _check_kind(kind)
    name = ALIASES.get((kind, name), name)
    if (kind, name) in _PARTS:
        return _PARTS[kind, name]
    if ":" in name:
        return _import_object(kind, name)
    if module := _built_in(kind).get(name):
        importlib.import_module(module)
        return _PARTS[kind, name]
    for point in entry_points(group=f"fedlp.{kind}"):
        if point.name == name:
            return _import_object(kind, point.value)
    close = get_close_matches(name, names(kind))
    hint = f"did you mean {' or '.join(close)}?" if close else f"choose one of {', '.join(names(kind))}."
    raise ConfigError(f"there is no {kind} {name}; {hint} One of your own is given as MODULE:OBJECT")


def name_of(kind: str, target: Callable[..., Any]) -> str:
    """Return the part name of a class or function; an unregistered one is registered under its own name."""
    _check_kind(kind)
    for (of, name), known in _PARTS.items():
        if of == kind and known is target:
            return name
    own = re.sub(r"\W", "_", getattr(target, "__name__", type(target).__name__))  # "<lambda>" is no name
    taken = {name for of, name in _PARTS if of == kind}
    name = next(name for name in (own, *(f"{own}_{i}" for i in range(2, len(taken) + 3))) if name not in taken)
    _PARTS[kind, name] = target
    return name


def own_parts(used: Iterable[str]) -> list[tuple[str, str, Callable[..., Any]]]:
    """Return (kind, name, part) of the registered parts of these names that are not fedlp's own."""
    wanted = set(used)
    return [
        (kind, name, target)
        for (kind, name), target in _PARTS.items()
        if name in wanted and target.__module__.partition(".")[0] != __package__
    ]


def check_methods(kind: str, name: str, target: Callable[..., Any]) -> None:
    """Raise ConfigError for a class without a required method of the kind."""
    missing = [method for method in METHODS.get(kind, ()) if not hasattr(target, method)]
    if isinstance(target, type) and missing:
        raise ConfigError(f"{kind} {name} has no method {missing[0]}, so it is no part of this kind")


def names(kind: str) -> tuple[str, ...]:
    """Return the names of all parts of a kind, sorted; imports none of them."""
    _check_kind(kind)
    registered = {name for of, name in _PARTS if of == kind}
    installed = {point.name for point in entry_points(group=f"fedlp.{kind}")}
    return tuple(sorted(registered | installed | set(_built_in(kind))))


def options(kind: str, target: Callable[..., Any]) -> dict[str, Option]:
    """Return the options of a part by name: its parameters, less those of ``GIVEN``."""
    given = GIVEN.get(kind, frozenset())
    try:
        signature = inspect.signature(target, eval_str=True)
    except (NameError, TypeError, ValueError):  # an annotation that only type checkers can see
        signature = inspect.signature(target)
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    items = fields(target) if isinstance(target, type) and is_dataclass(target) else ()
    made = {f.name: f.default_factory for f in items if f.default_factory is not MISSING}
    hints = _hints(target) if items else {}  # of inherited fields too, which their own modules resolve
    return {
        p.name: Option(
            p.name,
            hints.get(p.name, Any if p.annotation is p.empty or isinstance(p.annotation, str) else p.annotation),
            made[p.name]() if p.name in made else p.default,
        )
        for p in signature.parameters.values()
        if p.kind in kinds and p.name not in given
    }


def _hints(target: Callable[..., Any]) -> dict[str, Any]:
    try:
        return get_type_hints(target)
    except NameError:  # an annotation that only type checkers can see
        return {}


def given_to(kind: str, target: Callable[..., Any]) -> frozenset[str]:
    """Return the parameters of ``GIVEN`` that a part takes."""
    return GIVEN.get(kind, frozenset()) & inspect.signature(target).parameters.keys()


def summary(target: Callable[..., Any]) -> str:
    """Return the first line of a part's docstring."""
    return (inspect.getdoc(target) or "").partition("\n")[0]


def _check_kind(kind: str) -> None:
    if kind not in HOMES:
        raise ConfigError(f"there is no kind of part {kind!r}; choose one of {', '.join(HOMES)}")


@cache
def _built_in(kind: str) -> dict[str, str]:
    """Return the module of each built-in part of a kind, found by its decorator's source text."""
    spec = importlib.util.find_spec(HOMES[kind])
    found: dict[str, str] = {}
    decorator = re.compile(rf'^@register\("{kind}", "(\w+)"\)', re.MULTILINE)
    for folder in map(Path, spec.submodule_search_locations or [] if spec else []):
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            module = ".".join((HOMES[kind], *(part for part in parts if part != "__init__")))
            found |= dict.fromkeys(decorator.findall(path.read_text(encoding="utf-8")), module)
    return found


def _import_object(kind: str, name: str) -> Callable[..., Any]:
    """Return the object of ``module:object``; modules in the working folder are included."""
    module, _, path = name.partition(":")
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    importlib.invalidate_caches()  # a file written a moment ago, as in a notebook
    try:
        found: Any = _import_module(module)
    except Exception as error:
        raise ConfigError(f"{kind}={name}: module {module} cannot be imported: {one_line(error)}") from error
    for attribute in path.split("."):
        if not hasattr(found, attribute):
            close = get_close_matches(attribute, dir(found))
            hint = f"; did you mean {close[0]}?" if close else ""
            raise ConfigError(f"{kind}={name}: {module} has no {attribute}{hint}")
        found = getattr(found, attribute)
    if not callable(found):
        raise ConfigError(f"{kind}={name} is a {type(found).__name__}; it must be a class or function")
    return found  # type: ignore[no-any-return]


def _import_module(name: str) -> Any:
    """Import a user's module, also next to a torchvision that was built for another torch."""
    try:
        return importlib.import_module(name)
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        importlib.import_module("fedlp.models.torchvision_compat").ensure_operators()
        return importlib.import_module(name)
