"""Grouping of runs that differ only in their seed, and labels by method."""

from __future__ import annotations

import inspect
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache
from typing import Any

from fedlp import registry
from fedlp.errors import ConfigError
from fedlp.report.runs import Run

ABSENT = "–"
_NOT_COMPARED = {"seed", "resume", "label", "dataset.root", "dataset.download", "keep_best", "objective"}
_METHODS = {
    "fedavg": "FedAvg",
    "fedlp_homo": "FedLP-Homo",
    "fedlp_hetero": "FedLP-Hetero",
    "heterofl": "HeteroFL",
    "fjord": "FjORD",
    "fedrolex": "FedRolex",
    "fedlp_plan": "FedLP-Plan",
    "fedlp": "FedLP-Plan",  # names in runs of earlier versions
    "oneshot": "one-shot pruning",
}
_METHOD_VALUE = {"fedlp_homo": "layer_preserving_rate", "fedlp_hetero": "depths"}
_PARTITION_VALUE = {"dirichlet": "alpha", "shards": "shards_per_client", "mixed": "mixrate", "devices": "mixrate"}
_LONGEST_VALUE = 24
_MOST_TAGS = 3


@dataclass(frozen=True, slots=True)
class Group:
    """Runs of one config under one or more seeds; ``label`` tells the group from the others of its report."""

    label: str
    runs: tuple[Run, ...]

    @property
    def counted(self) -> tuple[Run, ...]:
        """The runs that the group's numbers come from, one for each seed.

        Finished runs, or unfinished ones where none has finished; of several runs with one seed the one that got
        furthest. Empty where all are dry runs.
        """
        real = [run for run in self.runs if not run.dry]
        pool = [run for run in real if run.finished] or real
        by_seed: dict[int, Run] = {}
        for run in pool:
            if run.seed not in by_seed or run.last_round > by_seed[run.seed].last_round:
                by_seed[run.seed] = run
        return tuple(by_seed[seed] for seed in sorted(by_seed))

    @property
    def dry(self) -> bool:
        """Whether all runs are dry runs."""
        return all(run.dry for run in self.runs)

    @property
    def config(self) -> Mapping[str, Any]:
        """The config of the first run; the others differ from it in the seed."""
        return self.runs[0].config


def run_label(config: Mapping[str, Any]) -> str:
    """Return the run's own ``label``, or its method with the value that defines it, such as ``FedLP-Homo(0.5)``."""
    if config.get("label") is not None:
        return clean(str(config["label"]))
    if config.get("federated"):
        return "search" if "search" in config else "one-shot pruning"
    strategy = _section(config, "strategy")
    name = clean(str(strategy.get("name", "run")))
    label = _METHODS.get(name, name)
    if name in _METHOD_VALUE:
        value = strategy.get(_METHOD_VALUE[name])
        label += "(per client)" if isinstance(value, list) else f"({show(value)})"
    return label


def group_runs(runs: Sequence[Run]) -> list[Group]:
    """Group runs that differ only in their seed (or in the path of their data), in order.

    Labels are distinct: the method, then data set, model and partition where those differ between groups, then
    any other option that tells groups of the same name apart.
    """
    grouped: dict[str, list[Run]] = {}
    for run, compared in zip(runs, _compared([run.config for run in runs]), strict=True):
        key = json.dumps([run.config.get("label"), compared], sort_keys=True, default=str)
        grouped.setdefault(key, []).append(run)
    members = list(grouped.values())
    labels = _distinct_labels([group[0].config for group in members])
    return [Group(label, tuple(group)) for label, group in zip(labels, members, strict=True)]


def differences(groups: Sequence[Group]) -> dict[str, list[str]]:
    """Return the config keys (dotted) in which the groups differ, each with one value a group."""
    flat = _compared([group.config for group in groups])
    keys = dict.fromkeys(key for config in flat for key in config)
    table = {key: [show(config[key]) if key in config else ABSENT for config in flat] for key in keys}
    return {key: values for key, values in table.items() if len(set(values)) > 1}


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the leaves of a nested config under dotted keys; a list is a leaf."""
    leaves: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            leaves |= flatten(value, f"{prefix}{key}.")
        else:
            leaves[f"{prefix}{key}"] = value
    return leaves


def show(value: Any) -> str:
    """Return a config value in one short line, as YAML would spell it."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, list):
        return f"[{', '.join(show(item) for item in value)}]"
    return f"{value:g}" if isinstance(value, float) else clean(str(value))


def clean(text: str) -> str:
    """Return ``text`` as one line of printable characters."""
    return " ".join("".join(char if char.isprintable() else " " for char in text).split())


def shorten(text: str, width: int) -> str:
    """Return at most ``width`` characters of ``text``, with an ellipsis where some are missing."""
    return text if len(text) <= width else f"{text[: width - 1]}…"


def _section(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = config.get(name)
    return section if isinstance(section, Mapping) else {}


def _compared(configs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the distinguishing options of each run; an option newer than a run has its default."""
    from fedlp.config import RunConfig
    from fedlp.config.aliases import current_config
    from fedlp.config.reading import part_groups

    flat = [_defaults() | flatten(current_config(config)) for config in configs]
    for name, group in part_groups(RunConfig).items():
        alike: dict[str, list[dict[str, Any]]] = {}
        for one in flat:
            alike.setdefault(str(one.get(f"{name}.{group.key}")), []).append(one)
        for part, members in alike.items():
            keys = {key for one in members for key in one if key.startswith(f"{name}.")}
            if any(not keys <= one.keys() for one in members):  # seldom: the part is imported for its defaults
                defaults = {f"{name}.{key}": value for key, value in _part_defaults(group.kind, part).items()}
                for one in members:
                    one |= {key: defaults[key] for key in keys & defaults.keys() if key not in one}
    order = [f.name for f in fields(RunConfig)]
    return [_ordered(one, order) for one in flat]


def _ordered(flat: Mapping[str, Any], groups: Sequence[str]) -> dict[str, Any]:
    """Return the compared options, in the order of the config's groups."""
    rank = {name: index for index, name in enumerate(groups)}
    keys = sorted(flat, key=lambda key: rank.get(key.partition(".")[0], len(rank)))
    return {key: flat[key] for key in keys if key not in _NOT_COMPARED and not key.startswith("tracker.")}


def _part_defaults(kind: str, part: str) -> dict[str, Any]:
    """Return the defaults of a part's own options; empty if it cannot be imported here."""
    try:
        found = registry.options(kind, registry.lookup(kind, part)).values()
    except ConfigError:
        return {}
    return {option.name: option.default for option in found if option.default is not inspect.Parameter.empty}


@cache
def _defaults() -> dict[str, Any]:
    from fedlp.config import RunConfig, to_plain  # loads Hydra, which a report's readers do without

    return {key: value for key, value in flatten(to_plain(RunConfig())).items() if value != "???"}  # has no default


def _partition(config: Mapping[str, Any]) -> str:
    section = _section(config, "partition")
    name = str(section.get("name"))
    return f"{name}({show(section.get(_PARTITION_VALUE[name]))})" if name in _PARTITION_VALUE else name


def _distinct_labels(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    traits = [
        [clean(str(_section(config, "dataset").get("name"))) for config in configs],
        [clean(str(_section(config, "model").get("name"))) for config in configs],
        [clean(_partition(config)) for config in configs],
    ]
    differing = [values for values in traits if len(set(values)) > 1]
    labels = []
    for index, config in enumerate(configs):
        words = [] if config.get("label") is not None else [values[index] for values in differing]
        words += ["dry run"] if config.get("dry_run") else []
        labels.append(", ".join([run_label(config), *words]))
    for label in [label for label, count in Counter(labels).items() if count > 1]:
        alike = [index for index, other in enumerate(labels) if other == label]
        for index, tag in zip(alike, _tags([configs[index] for index in alike]), strict=True):
            labels[index] = f"{label}, {tag}"
    return labels


def _tags(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return distinct tags of configs of one label by their differing options; by number if too long or ambiguous."""
    flat = _compared(configs)
    keys = [
        key
        for key in dict.fromkeys(key for one in flat for key in one)
        if len({repr(one.get(key)) for one in flat}) > 1
    ]
    short = Counter(key.rsplit(".", 1)[-1] for key in keys)
    names = {key: key if short[key.rsplit(".", 1)[-1]] > 1 else key.rsplit(".", 1)[-1] for key in keys}
    tags = [
        ", ".join(f"{names[key]}={shorten(show(one.get(key)), _LONGEST_VALUE)}" for key in keys[:_MOST_TAGS])
        for one in flat
    ]
    repeated = Counter(tags)
    return [tag if repeated[tag] == 1 else f"{tag} #{index}".strip() for index, tag in enumerate(tags, start=1)]
