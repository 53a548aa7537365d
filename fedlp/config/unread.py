"""Refusal of overrides of groups that the chosen strategy does not read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from fedlp import registry
from fedlp.config.federated_prune import schema_for
from fedlp.config.reading import read_config
from fedlp.config.schema import RunConfig
from fedlp.config.unread_options import refuse_unread_options, unread_with
from fedlp.errors import ConfigError

_METHOD_GROUPS = ("allocator", "pruner", "calibration")


def refuse_unread(config: object, overrides: Iterable[str]) -> None:
    """Raise ConfigError for an override of a group or an option that the chosen parts do not read.

    A strategy lists the groups that it reads of allocator, pruner and calibration as ``reads``; one without the
    attribute may read all. Of the other groups it reads all but ``ignores``.
    """
    overrides = list(overrides)
    refuse_unread_options(config, overrides)
    if not isinstance(config, RunConfig):
        return
    for override in overrides:
        group = override.lstrip("+~").partition("=")[0].partition(".")[0]
        if group in config.unread:
            raise ConfigError(f"{config.command} does not read {group}: drop {override.lstrip('+')}")
        if config.trains and not _reads(config.strategy.target, group):
            names = registry.names("strategy")
            others = [name for name in names if _reads(registry.lookup("strategy", name), group)]
            raise ConfigError(
                f"strategy={config.strategy.name} does not read {group}: drop {override.lstrip('+')}; "
                f"{', '.join(others)} {'read' if len(others) > 1 else 'reads'} it"
            )


def unread_groups(config: Mapping[str, Any]) -> frozenset[str]:
    """Return the groups that the method of a plain config does not read; empty if it cannot be imported here."""
    if unread := schema_for(config).unread:
        return unread
    try:
        target = registry.lookup("strategy", str(config["strategy"]["name"]))
    except ConfigError:
        return frozenset()
    left = {group for group in _METHOD_GROUPS if not _reads(target, group)}
    return frozenset(left | set(getattr(target, "ignores", ())))


def unread_options(config: Mapping[str, Any]) -> frozenset[str]:
    """Return the dotted options of a plain config that its other choices do not read; empty if it does not fit here."""
    try:
        return frozenset(unread_with(read_config(schema_for(config), config)))
    except ConfigError:
        return frozenset()


def _reads(strategy: object, group: str) -> bool:
    if group in _METHOD_GROUPS:
        return group in getattr(strategy, "reads", _METHOD_GROUPS)
    return group not in getattr(strategy, "ignores", ())
