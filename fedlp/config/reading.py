"""Plain values to checked config objects: types, options of parts, close matches for what is misspelt."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import MISSING as NO_DEFAULT
from dataclasses import field, fields, is_dataclass, make_dataclass
from difflib import get_close_matches
from functools import cache
from typing import Any, TypeVar, cast, get_type_hints

from omegaconf import MISSING, OmegaConf

from fedlp import registry
from fedlp.config.parts import PartConfig, read_part
from fedlp.errors import ConfigError

_Config = TypeVar("_Config")


@cache
def part_groups(schema: Any) -> dict[str, type[PartConfig]]:
    """Return the groups of a schema in which a name stands for a part."""
    return {f.name: cast(type[PartConfig], f.default_factory) for f in fields(schema) if _is_part(f.default_factory)}


def read_config(schema: Callable[..., _Config], values: Mapping[str, Any]) -> _Config:
    """Return plain values as an object of the schema; ConfigError for an unknown option or a wrong value."""
    groups = part_groups(schema)
    base = {key: value for key, value in values.items() if key not in groups}
    for key in _keys(base):
        if key not in option_names(schema):
            raise ConfigError(no_such_option(schema, key))
    typed = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(_base_schema(schema)), base))
    parts = {}
    for name, group in groups.items():
        node = values.get(name)
        if node is not None and not isinstance(node, Mapping):
            raise ConfigError(f"{name}={node} is not allowed: it must be a choice of the group {name}")
        parts[name] = read_part(group, name, node or {})
    return schema(**vars(typed), **parts)


def drop_unread(schema: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config of an earlier version, whose groups held the options of all parts, without those unread."""
    found = dict(values)
    for name, group in part_groups(schema).items():
        node = found.get(name)
        if isinstance(node, Mapping):
            target = registry.lookup(group.kind, str(node.get(group.key)))
            known = {f.name for f in fields(group)} | set(registry.options(group.kind, target))
            found[name] = {key: value for key, value in node.items() if key in known}
    return found


def schema_node(schema: Any) -> dict[str, Any]:
    """Return what Hydra starts a schema's config from: types of fixed groups, open nodes for groups of parts."""
    node: dict[str, Any] = {}
    for f in fields(schema):
        made: Any = f.default_factory
        if _is_part(made):
            node[f.name] = {}
        elif is_dataclass(made):
            node[f.name] = OmegaConf.structured(made)
        else:
            node[f.name] = made() if made is not NO_DEFAULT else f.default
    return node


def no_such_option(schema: Any, name: str) -> str:
    """Return a line that says that an option does not exist, and which one may be meant."""
    known = option_names(schema)
    last = name.rpartition(".")[2]
    same = sorted(option for option in known if option.rpartition(".")[2] == last and option != name)
    close = same or get_close_matches(name, known, 1)
    if not close and "." not in name and (owners := _owners(schema, name)):
        return f"there is no option {name}; it is an option of {' and '.join(owners[:3])}"
    return f"there is no option {name}; " + (
        f"did you mean {' or '.join(close[:3])}?" if close else "fedlp --cfg job lists the options"
    )


def _owners(schema: Any, name: str) -> list[str]:
    """Return the parts that have an option of this name: ``strategy=fedlp_plan strategy.sparsity``, ..."""
    found = []
    for group, part in part_groups(schema).items():
        for choice in registry.names(part.kind):
            with suppress(ConfigError):
                if name in registry.options(part.kind, registry.lookup(part.kind, choice)):
                    found.append(f"{group}={choice} ({group}.{name}=...)")
    return found


@cache
def option_names(schema: Any) -> frozenset[str]:
    """Return the dotted names of all options of a schema, but for those of parts' own."""
    names = set()
    for f in fields(schema):
        names.add(f.name)
        nested: Any = f.default_factory
        if is_dataclass(nested):
            names |= {f"{f.name}.{name}" for name in option_names(nested) if name != "options"}  # type: ignore[arg-type]
    return frozenset(names)


def _keys(node: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield the dotted keys of a node; keys below an option that is a mapping itself belong to it."""
    for key, value in node.items():
        yield f"{prefix}{key}"
        if isinstance(value, Mapping) and not prefix:
            yield from _keys(value, f"{prefix}{key}.")


def _is_part(made: Any) -> bool:
    return isinstance(made, type) and issubclass(made, PartConfig)


@cache
def _base_schema(schema: Any) -> type:
    """Return the schema without its groups of parts."""
    hints = get_type_hints(schema)
    found: list[Any] = []
    for f in fields(schema):
        if not _is_part(f.default_factory):
            default = f.default if f.default is not NO_DEFAULT else MISSING
            made = (
                field(default=default) if f.default_factory is NO_DEFAULT else field(default_factory=f.default_factory)
            )
            found.append((f.name, hints[f.name], made))
    return make_dataclass(schema.__name__, found)
