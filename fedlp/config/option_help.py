"""``fedlp options GROUP``: the options of a config group with meaning, type and default."""

from __future__ import annotations

import inspect
from dataclasses import fields
from typing import Any

from fedlp import registry
from fedlp.config import RunConfig, config_dir
from fedlp.config.reading import part_groups
from fedlp.errors import ConfigError


def describe_group(group: str) -> str:
    """Return the options of a group, choice by choice; ConfigError if there is no such group."""
    groups = part_groups(RunConfig)
    made = {f.name: f.default_factory for f in fields(RunConfig)}
    if group not in made:
        raise ConfigError(f"there is no group {group}; choose one of {', '.join(sorted(made))}")
    schema: Any = made[group]
    lines = [_source_options(schema)] if isinstance(schema, type) else []
    if group in groups:
        kind = groups[group].kind
        for name in registry.names(kind):
            lines.append(_describe_part(group, kind, name))
    elif found := sorted(path.stem for path in (config_dir() / group).glob("*.yaml")):
        lines.append(f"choices: {' '.join(found)}")
    return "\n\n".join(line for line in lines if line)


def _source_options(schema: type) -> str:
    """Return a schema's docstring and its fields with their comments, read from its source."""
    body = [line.strip() for line in inspect.getsource(schema).splitlines()]
    names = {f.name for f in fields(schema)} - {"name", "options"}
    kept, ours = [], False
    for line in body:
        ours = line.partition(":")[0] in names or (ours and line.startswith("#"))
        kept += [f"  {line}"] if ours else []
    return "\n".join([(inspect.getdoc(schema) or "").partition("\n")[0], *kept])


def _describe_part(group: str, kind: str, name: str) -> str:
    target = registry.lookup(kind, name)
    lines = [f"{group}={name}: {registry.summary(target)}"]
    meanings: dict[str, str] = {}
    for base in reversed(target.__mro__) if isinstance(target, type) else (target,):
        meanings |= _meanings(inspect.cleandoc(base.__doc__ or ""))
    for option in registry.options(kind, target).values():
        kind_of = getattr(option.annotation, "__name__", str(option.annotation))
        default = "required" if option.default is inspect.Parameter.empty else f"default {option.default}"
        lines.append(f"  {group}.{option.name} ({kind_of}, {default}): {meanings.get(option.name, '')}".rstrip(": "))
    return "\n".join(lines)


def _meanings(doc: str) -> dict[str, str]:
    """Return the meaning of each attribute or parameter in a numpydoc docstring, in one line."""
    found: dict[str, str] = {}
    current: list[str] = []
    for line in doc.splitlines():
        if line and not line.startswith(" ") and " : " in line:
            current = [name.strip() for name in line.partition(" : ")[0].split(",")]
            found |= dict.fromkeys(current, "")
        elif line.startswith("    ") and current:
            found |= {name: f"{found[name]} {line.strip()}".strip() for name in current}
        elif line and not line.startswith(" "):
            current = []
    return found
