"""Config groups of parts: the signature of the named part is the schema of its options.

A group's node in the config tree is flat: the part's name, the options that all parts of the group share, and the
part's own options. In a :class:`PartConfig` the part's own options are under ``options``, and are attributes too.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, make_dataclass
from difflib import get_close_matches
from functools import cache, partial
from typing import Any, ClassVar, TypeVar

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException, ValidationError

from fedlp import registry
from fedlp.errors import ConfigError, FedLPError, one_line

_P = TypeVar("_P", bound="PartConfig")


@dataclass
class PartConfig:
    """One part by name, with its options.

    Attributes
    ----------
    kind : str
        Kind of the part in the registry.
    key : str
        The option that holds the part's name.
    options : dict
        All of the part's own options.
    """

    kind: ClassVar[str] = ""
    key: ClassVar[str] = "name"

    name: str = MISSING
    options: dict[str, Any] = field(default_factory=dict)

    def __getattr__(self, name: str) -> Any:
        options = self.__dict__.get("options", {})
        if name in options:
            return options[name]
        raise AttributeError(f"{type(self).__name__} {self.__dict__.get(self.key)} has no option {name}")

    def _has(self, name: str) -> bool:
        return name in self.options or hasattr(self, name)

    @property
    def target(self) -> Callable[..., Any]:
        """Class or function of the name."""
        return registry.lookup(self.kind, getattr(self, self.key))

    def make(self, **given: Any) -> Any:
        """Return the part with its options: an instance of a class, the result of a factory, else a function.

        Parameters
        ----------
        **given
            Values for ``registry.GIVEN``; without any, a function is returned with its options filled in.
        """
        target = self.target
        known, own = registry.options(self.kind, target), self.options  # an own option may be called "target"
        chosen = {name: own[name] if name in own else getattr(self, name) for name in known if self._has(name)}
        if not given and not isinstance(target, type):
            return partial(target, **chosen)
        taken = registry.given_to(self.kind, target)
        return target(**chosen, **{name: value for name, value in given.items() if name in taken})


def read_part(schema: type[_P], group: str, node: Mapping[str, Any]) -> _P:
    """Return the checked config of a group from its flat node.

    Raises
    ------
    ConfigError
        For an unknown part, an option that the part does not have, a value of the wrong type or out of
        range.
    """
    names = {f.name for f in fields(schema)} - {"options"}
    shared = _typed(schema, group, {key: value for key, value in node.items() if key in names})
    name = str(shared.get(schema.key))
    if name in ("None", MISSING):
        raise ConfigError(f"{group}.{schema.key} is missing; choose one of {', '.join(registry.names(schema.kind))}")
    target = registry.lookup(schema.kind, name)
    registry.check_methods(schema.kind, name, target)
    declared = registry.options(schema.kind, target)
    own = {key: value for key, value in node.items() if key not in names}
    if unknown := [key for key in own if key not in declared]:
        raise ConfigError(_no_such_option(schema, group, name, unknown[0], [*declared, *names]))
    missing = [
        o.name for o in declared.values() if o.default is inspect.Parameter.empty and o.name not in {*own, *names}
    ]
    if missing:
        raise ConfigError(f"{group}.{missing[0]} is missing: {group}={name} needs a value for it")
    options = _typed(_schema_of(schema.kind, target, frozenset(names)), group, own)
    found = schema(**shared, options=options)
    _check_ranges(found, group, name, target)
    return found


def _check_ranges(found: PartConfig, group: str, name: str, target: Callable[..., Any]) -> None:
    """Instantiate a dataclass part once, so that its ``__post_init__`` checks ranges."""
    if not (isinstance(target, type) and hasattr(target, "__dataclass_fields__")):
        return
    try:
        found.make()
    except FedLPError as error:
        raise ConfigError(str(error)) from error
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{group}={name}: {one_line(error)}") from error


@cache
def _schema_of(kind: str, target: Callable[..., Any], names: frozenset[str]) -> type:
    """Return a dataclass of a part's own options; a type unknown to OmegaConf becomes ``Any``."""
    found = []
    for option in registry.options(kind, target).values():
        if option.name in names:
            continue
        default: Any = MISSING if option.default is inspect.Parameter.empty else option.default
        made = (
            field(default_factory=partial(_plain, default))
            if isinstance(default, list | dict | tuple)
            else field(default=default)
        )
        found.append((option.name, _known_type(option.annotation, default), made))
    return make_dataclass("Options", found)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value.copy()


def _known_type(annotation: Any, default: Any) -> Any:
    plain = list(default) if isinstance(default, tuple) else default
    try:
        probe = make_dataclass("Probe", [("value", annotation, field(default_factory=lambda: plain))])
        OmegaConf.structured(probe)
    except (OmegaConfBaseException, NameError, TypeError, ValueError):
        return Any
    return annotation


@cache
def structured(schema: type) -> DictConfig:
    """Return a schema with its defaults; to be merged with values, never changed."""
    made = OmegaConf.structured(schema)
    assert isinstance(made, DictConfig)
    return made


def _typed(schema: type, group: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return all values of a schema, converted to its types."""
    try:
        node = OmegaConf.merge(structured(schema), values)
    except ValidationError as error:
        key = error.full_key or ""
        raise ConfigError(f"{group}.{key}: {one_line(error)}") from error
    assert isinstance(node, DictConfig)
    found = OmegaConf.to_container(node, resolve=True)
    assert isinstance(found, dict)
    return {str(key): value for key, value in found.items() if key != "options"}


def _no_such_option(schema: type[PartConfig], group: str, name: str, option: str, known: list[str]) -> str:
    """Return the message of an unknown option: the parts that have it, or close names."""
    text = f"there is no option {group}.{option} with {group}={name}"
    if close := get_close_matches(option, known, 1):
        return f"{text}; did you mean {group}.{close[0]}?"
    others = [other for other in parts_with(schema.kind, option) if other != name]
    return f"{text}; " + (
        f"{', '.join(others)} {'read' if len(others) > 1 else 'reads'} it"
        if others
        else f"it has {', '.join(sorted(known))}"
    )


def parts_with(kind: str, option: str) -> list[str]:
    """Return the names of the parts of a kind that have an option."""
    return [name for name in registry.names(kind) if option in _options_of(kind, name)]


def _options_of(kind: str, name: str) -> dict[str, registry.Option]:
    try:
        return registry.options(kind, registry.lookup(kind, name))
    except ConfigError:
        return {}
