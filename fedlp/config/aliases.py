"""Renamed options: old names are aliases that warn once."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from typing import Any

RENAMED: Mapping[str, str] = {
    "strategy.masks": "strategy.unit_selection",
    "strategy.mask_unit": "strategy.upload_unit",
    "strategy.weighting": "aggregator.weighting",
    "strategy.batch_norm": "aggregator.batch_norm",
    "strategy.encoding": "upload",
    "strategy.entropy_coding": "upload.entropy_coding",
    "strategy.coarseness": "upload.coarseness",
    "strategy.values": "upload.values",
    "strategy.error_feedback": "upload.error_feedback",
    "strategy.skip_backward": "local.skip_backward",
    "strategy.server_optimizer": "server_optimizer",
    "strategy.server_lr": "server_optimizer.lr",
    "strategy.server_momentum": "server_optimizer.momentum",
    "strategy.server_beta2": "server_optimizer.beta2",
    "strategy.server_epsilon": "server_optimizer.epsilon",
}
"""Old option -> new option; a new option without a dot is a choice of a group."""

RENAMED_CHOICES: Mapping[tuple[str, str], str] = {("strategy", "fedlp"): "fedlp_plan"}

_BEFORE: Mapping[str, str] = {"upload": "float32", "pruner": "obs", "allocator": "dp"}
"""Choices of groups that the first versions did not have."""

_told: set[str] = set()


def current_override(override: str) -> str:
    """Return a command line override under current names; an old name warns once on stderr."""
    key, equals, value = override.partition("=")
    prefix, name = key[: len(key) - len(key.lstrip("+~"))], key.lstrip("+~")
    if name == "strategy.encoding" and value == "float64":  # of sums, which one-shot pruning sends
        tell_once(name, "sums")
        name = "sums"
    elif name in RENAMED:
        tell_once(name, RENAMED[name])
        name, prefix = RENAMED[name], prefix if "." in RENAMED[name] else ""
    for (group, old), new in RENAMED_CHOICES.items():
        if name == group and re.search(rf"(^|,){old}(,|$)", value):
            tell_once(f"{group}={old}", f"{group}={new}")
            value = re.sub(rf"(?<![^,]){old}(?![^,])", new, value)
    return f"{prefix}{name}{equals}{value}"


def is_current(config: Mapping[str, Any]) -> bool:
    """Return whether a stored config has the current layout."""
    strategy = config.get("strategy")
    if not isinstance(strategy, Mapping):
        return True
    if "upload" in config:
        return strategy.get("name") != "oneshot"
    return not any(old.removeprefix("strategy.") in strategy for old in RENAMED)


def current_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a stored config in the current layout; one of an earlier version is divided into the current groups."""
    if is_current(config):
        return dict(config)
    found = {key: dict(value) if isinstance(value, Mapping) else value for key, value in config.items()}
    own = found["strategy"]
    own["name"] = RENAMED_CHOICES.get(("strategy", str(own.get("name"))), own.get("name"))
    one_shot = own["name"] == "oneshot"
    if one_shot:
        own["sums"] = own.pop("encoding", own.get("sums", "float32"))
    for old, new in RENAMED.items():
        option = old.removeprefix("strategy.")
        if option in own:
            group, _, name = new.partition(".")
            target = found.setdefault(group, {})
            if isinstance(target, dict):
                target[name or "name"] = own.pop(option)
    found.setdefault("aggregator", {}).setdefault("name", "coverage_average")
    for group, name in _BEFORE.items():
        if isinstance(target := found.setdefault(group, {}), dict):
            target.setdefault("name", name)
    if isinstance(dataset := found.get("dataset"), dict):
        dataset.setdefault("label_column", None)  # text was for language modelling alone
    if one_shot:
        found |= {"federated": True} | {
            name: own[name] for name in ("sparsity", "unit_selection", "sums") if name in own
        }
        found["strategy"] = {"name": "fedavg"}
    return found


def tell_once(old: str, new: str) -> None:
    """Say once on stderr that an old name has a new one."""
    if old not in _told:
        _told.add(old)
        print(f"fedlp: {old} is now {new}; the old name works for now", file=sys.stderr)
