"""Refusal of overrides of groups that the chosen strategy does not read."""

from __future__ import annotations

from collections.abc import Iterable

from fedlp import registry
from fedlp.config.schema import RunConfig
from fedlp.errors import ConfigError

_METHOD_GROUPS = ("allocator", "pruner", "calibration")


def refuse_unread(config: RunConfig, overrides: Iterable[str]) -> None:
    """Raise ConfigError for an override of a group that the strategy does not read.

    A strategy lists the groups that it reads of allocator, pruner and calibration as ``reads``; one without the
    attribute may read all. Of the other groups it reads all but those in ``ignores``.
    """
    for override in overrides:
        group = override.lstrip("+~").partition("=")[0].partition(".")[0]
        if not _reads(config.strategy.target, group):
            names = registry.names("strategy")
            others = [name for name in names if _reads(registry.lookup("strategy", name), group)]
            raise ConfigError(
                f"strategy={config.strategy.name} does not read {group}: drop {override.lstrip('+')}; "
                f"{', '.join(others)} read it"
            )


def unread_groups(strategy: str) -> frozenset[str]:
    """Return the groups that a strategy, by name, does not read; empty if it cannot be imported here."""
    try:
        target = registry.lookup("strategy", strategy)
    except ConfigError:
        return frozenset()
    left = {group for group in _METHOD_GROUPS if not _reads(target, group)}
    return frozenset(left | set(getattr(target, "ignores", ())))


def _reads(strategy: object, group: str) -> bool:
    if group in _METHOD_GROUPS:
        return group in getattr(strategy, "reads", _METHOD_GROUPS)
    return group not in getattr(strategy, "ignores", ())
