"""Preparation of command line overrides for Hydra: old names, options of parts, parts without a YAML."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from fedlp import registry
from fedlp.config.aliases import current_override
from fedlp.config.reading import mapping_options, part_groups


def prepare_overrides(schema: type, conf: Path, overrides: Iterable[str]) -> list[str]:
    """Return overrides in the form for Hydra.

    An option of a part is added by force, since the part's own schema checks it later. A part's name by its own option,
    such as ``strategy.name=heterofl``, is the choice ``strategy=heterofl``. A choice that has no YAML in the config
    tree, such as ``module:object``, becomes known to Hydra. Keys of an option that is a mapping, such as
    ``fleet.devices``, are added to those that it has.
    """
    groups, mappings = part_groups(schema), mapping_options(schema)
    prepared, todays = [], [current_override(override) for override in overrides]
    chosen = {override.partition("=")[0] for override in todays}
    for override in todays:
        key, _, value = override.partition("=")
        if key == "callbacks" and value and not value.startswith("[") and value != "null":
            override = f"callbacks=[{value}]"  # one alone
        group, _, option = key.lstrip("+").partition(".")
        if group in groups and option == groups[group].key and value and group not in chosen:
            override, option = f"{group}={value}", ""  # the choice of a part, without the options of another
        if key in mappings or key.rpartition(".")[0] in mappings:
            override = _with_keys(key, value, key in mappings)
        elif group in groups and option and "=" in override:
            override = f"++{override.lstrip('+')}"
        elif group in groups and "=" in override:
            _store_choices(group, groups[group].kind, groups[group].key, conf, override)
        prepared.append(override)
    return prepared


def _with_keys(option: str, value: str, is_whole: bool) -> str:
    """Return the override that adds keys to a mapping; one key alone, ``option.key=value``, as a mapping of it."""
    if is_whole:
        return f"++{option}={value}"
    owner, _, key = option.rpartition(".")
    return f"++{owner}={{{key}: {value}}}"


def _store_choices(group: str, kind: str, key: str, conf: Path, override: str) -> None:
    """Register choices without a YAML with Hydra if they can be parts."""
    try:
        parsed = OverridesParser.create().parse_override(override)
    except HydraException:
        return  # Hydra says what is wrong with it
    choices = parsed.sweep_iterator() if parsed.is_sweep_override() else [parsed.value()]
    for choice in map(str, choices):
        name = choice.strip("'\"")
        if (conf / group / f"{name}.yaml").is_file():
            continue
        if ":" in name or name in registry.names(kind):
            node = {key: name} if key == "name" else {key: name, "name": name.rpartition(":")[2]}
            ConfigStore.instance().store(group=group, name=name, node=node)
