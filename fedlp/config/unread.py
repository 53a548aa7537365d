"""Overrides of groups that the chosen strategy does not read: refused, not ignored."""

from __future__ import annotations

from collections.abc import Iterable

from fedlp import registry
from fedlp.config.schema import RunConfig
from fedlp.errors import ConfigError

_METHOD_GROUPS = ("allocator", "pruner", "calibration")


def refuse_unread(config: RunConfig, overrides: Iterable[str]) -> None:
    """Raise ConfigError for an override of a group that the strategy does not read.

    A strategy lists the groups that it reads of allocator, pruner and calibration as ``reads``; one without the
    attribute may read all.
    """
    reads = getattr(config.strategy.target, "reads", None)
    if reads is None:
        return
    for override in overrides:
        group = override.lstrip("+~").partition("=")[0].partition(".")[0]
        if group in _METHOD_GROUPS and group not in reads:
            others = [name for name in registry.names("strategy") if group in _reads(name)]
            raise ConfigError(
                f"strategy={config.strategy.name} does not read {group}: drop {override.lstrip('+')}; "
                f"{', '.join(others)} read it"
            )


def _reads(name: str) -> frozenset[str]:
    return getattr(registry.lookup("strategy", name), "reads", frozenset())
