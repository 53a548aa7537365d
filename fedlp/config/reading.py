"""Conversion of plain values to validated config objects: types, options of parts, suggestions for misspelt names."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING as NO_DEFAULT
from dataclasses import field, fields, is_dataclass, make_dataclass
from difflib import get_close_matches
from functools import cache
from typing import Any, TypeVar, cast, get_args, get_type_hints

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import ValidationError

from fedlp import registry
from fedlp.config.parts import PartConfig, parts_with, read_part, structured
from fedlp.errors import ConfigError, one_line

_Config = TypeVar("_Config")


@cache
def part_groups(schema: Any) -> dict[str, type[PartConfig]]:
    """Return the groups of a schema that hold a part."""
    return {f.name: cast(type[PartConfig], f.default_factory) for f in fields(schema) if _is_part(f.default_factory)}


def read_config(schema: Callable[..., _Config], values: Mapping[str, Any]) -> _Config:
    """Return plain values as an object of the schema; ConfigError for an unknown option or a wrong value."""
    groups = part_groups(schema)
    base = {key: value for key, value in values.items() if key not in groups}
    for key in _keys(base):
        if key not in option_names(schema):
            raise ConfigError(no_such_option(schema, key))
    try:
        typed = OmegaConf.to_object(OmegaConf.merge(structured(_dataclass_of(schema, False)), base))
    except ValidationError as error:
        raise ConfigError(f"{error.full_key}: {one_line(error)}") from error
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


def schema_node(schema: Any) -> Any:
    """Return a schema's base config for Hydra: typed options, and an open node for each group of parts."""
    return OmegaConf.structured(_dataclass_of(schema, with_parts=True))


def no_such_option(schema: Any, name: str) -> str:
    """Return the message of an unknown option, with close names."""
    known = option_names(schema)
    for owner, entry in mapping_options(schema).items():
        if name.startswith(f"{owner}."):
            return _no_such_key(owner, entry, *name.removeprefix(f"{owner}.").partition(".")[::2])
    last = name.rpartition(".")[2]
    same = sorted(option for option in known if option.rpartition(".")[2] == last and option != name)
    if same:
        return f"there is no option {name}; did you mean {' or '.join(same[:3])}?"
    if of_parts := _options_of_parts(schema, last):
        return f"there is no option {name}; did you mean {' or '.join(of_parts[:3])}?"
    close = get_close_matches(name, known, 1)
    return f"there is no option {name}; " + (f"did you mean {close[0]}?" if close else "--cfg job lists the options")


def _options_of_parts(schema: Any, name: str) -> list[str]:
    """Return the options of parts that have a name, each with the choices that read it."""
    found = []
    for group, part in part_groups(schema).items():
        if readers := parts_with(part.kind, name):
            found.append(f"{group}.{name} (of {group}={' or '.join(readers)})")
    return found


@cache
def option_names(schema: Any) -> frozenset[str]:
    """Return the dotted names of all options of a schema, except parts' own."""
    names = set()
    for f in fields(schema):
        names.add(f.name)
        nested: Any = f.default_factory
        if is_dataclass(nested):
            names |= {f"{f.name}.{name}" for name in option_names(nested) if name != "options"}  # type: ignore[arg-type]
    return frozenset(names)


@cache
def mapping_options(schema: Any) -> dict[str, Any]:
    """Return the options whose keys are the user's, such as ``fleet.devices``, and the type of a value of each."""
    found: dict[str, Any] = {}
    for f in fields(schema):
        nested: Any = f.default_factory
        if nested is dict:
            found[f.name] = get_args(get_type_hints(schema)[f.name])[1]
        elif is_dataclass(nested) and not _is_part(nested):
            entries = mapping_options(nested)  # type: ignore[arg-type]
            found |= {f"{f.name}.{name}": entry for name, entry in entries.items()}
    return found


def _no_such_key(owner: str, entry: Any, key: str, item: str) -> str:
    """Return the message of an unknown key of a mapping, or of an unknown item of a known key."""
    items = [f.name for f in fields(entry)] if is_dataclass(entry) else []
    if item in items or not item:
        return f"{owner} has no {key}; a new one is given whole: {owner}={{{key}: {{{', '.join(items[:3])}, ...}}}}"
    return f"there is no option {owner}.{key}.{item}; {owner}.{key} has {', '.join(items) or 'no options'}"


def _keys(node: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield the dotted keys of a node; keys below an option that is a mapping itself belong to it."""
    for key, value in node.items():
        yield f"{prefix}{key}"
        if isinstance(value, Mapping) and not prefix:
            yield from _keys(value, f"{prefix}{key}.")


def _is_part(made: Any) -> bool:
    return isinstance(made, type) and issubclass(made, PartConfig)


@cache
def _dataclass_of(schema: Any, with_parts: bool) -> type:
    """Return the schema with mappings for its groups of parts, or without these groups."""
    hints = get_type_hints(schema)
    found: list[Any] = []
    for f in fields(schema):
        if _is_part(f.default_factory):
            found += [(f.name, dict[str, Any], field(default_factory=dict))] if with_parts else []
        else:
            default = f.default if f.default is not NO_DEFAULT else MISSING
            made = (
                field(default=default) if f.default_factory is NO_DEFAULT else field(default_factory=f.default_factory)
            )
            found.append((f.name, hints[f.name], made))
    return make_dataclass(schema.__name__, found)
