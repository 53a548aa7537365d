"""Composition, reading and writing of a validated :class:`RunConfig`.

Hydra checks the names and types of fixed groups, a part's signature those of its own options; :func:`validate` checks
ranges. Past this package a config is a plain dataclass.

Longer than other files: the doors of every root of ``conf``, and the list of what they give.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, cast

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from fedlp.config.absolute_paths import with_absolute_paths
from fedlp.config.aliases import current_config, is_current
from fedlp.config.federated_prune import FederatedPruneConfig, federated_prune_overrides, schema_for
from fedlp.config.federated_search import FederatedSearchConfig
from fedlp.config.overrides import prepare_overrides
from fedlp.config.own_tokenizer import with_tokenizer
from fedlp.config.parts import PartConfig
from fedlp.config.reading import drop_unread, no_such_option, part_groups, read_config, schema_node
from fedlp.config.schema import (
    AdapterConfig,
    AggregatorConfig,
    AllocatorConfig,
    CalibrationConfig,
    CallbackConfig,
    DatasetConfig,
    DeviceConfig,
    EvaluationConfig,
    FleetConfig,
    LocalConfig,
    ModelConfig,
    PartitionConfig,
    PrivacyConfig,
    PrunerConfig,
    RoundsConfig,
    RunConfig,
    ServerOptimizerConfig,
    SimulationConfig,
    StrategyConfig,
    TaskConfig,
    TrackerConfig,
    UploadConfig,
)
from fedlp.config.tools import FinetuneConfig, ProfileConfig, PruneConfig, SearchConfig, SearchSettings
from fedlp.config.unread import refuse_unread, unread_groups, unread_options
from fedlp.config.validation import (
    validate,
    validate_federated_prune,
    validate_federated_search,
    validate_profile,
    validate_prune,
    validate_search,
)
from fedlp.errors import ConfigError, FedLPError, one_line

__all__ = [
    "ROOTS",
    "AdapterConfig",
    "AggregatorConfig",
    "AllocatorConfig",
    "CalibrationConfig",
    "CallbackConfig",
    "DatasetConfig",
    "DeviceConfig",
    "EvaluationConfig",
    "FederatedPruneConfig",
    "FederatedSearchConfig",
    "FinetuneConfig",
    "FleetConfig",
    "LocalConfig",
    "ModelConfig",
    "PartConfig",
    "PartitionConfig",
    "PrivacyConfig",
    "ProfileConfig",
    "PruneConfig",
    "PrunerConfig",
    "RoundsConfig",
    "RunConfig",
    "SearchConfig",
    "SearchSettings",
    "ServerOptimizerConfig",
    "SimulationConfig",
    "StrategyConfig",
    "TaskConfig",
    "TrackerConfig",
    "UploadConfig",
    "compose",
    "compose_federated_search",
    "compose_profile",
    "compose_prune",
    "compose_search",
    "config_dir",
    "explain",
    "federated_prune_overrides",
    "from_omegaconf",
    "from_yaml",
    "prepare",
    "read_run_config",
    "refuse_unread",
    "register_schema",
    "schema_for",
    "schema_of",
    "to_plain",
    "to_yaml",
    "todays_config",
    "unread_groups",
    "unread_options",
    "validate",
    "with_absolute_paths",
]

_Config = TypeVar("_Config", RunConfig, PruneConfig, ProfileConfig, SearchConfig)
ROOTS: dict[type, str] = {
    RunConfig: "config",
    PruneConfig: "prune",
    FederatedPruneConfig: "federated_prune",
    FederatedSearchConfig: "federated_search",
    ProfileConfig: "profile",
    SearchConfig: "search",
}


def config_dir() -> Path:
    """Return the folder of the config tree: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "conf"
    return installed if installed.is_dir() else package.parent / "conf"


def schema_of(root: str) -> type:
    """Return the schema of a root of ``conf``."""
    return next(schema for schema, name in ROOTS.items() if name == root)


@cache
def register_schema(root: str) -> None:
    """Register the schema of one root of ``conf``; only one, since Hydra copies its whole store often."""
    ConfigStore.instance().store(name=f"{root}_schema", node=schema_node(schema_of(root)))


def prepare(root: str, overrides: Sequence[str]) -> list[str]:
    """Return the overrides of a command line in the form for Hydra."""
    return prepare_overrides(schema_of(root), config_dir(), overrides)


def compose(overrides: Sequence[str] = ()) -> RunConfig:
    """Return the config that the command line ``fedlp OVERRIDES`` would run.

    With ``federated=true`` among the overrides it is that of ``fedlp-prune``, a :class:`FederatedPruneConfig`.

    Raises
    ------
    ConfigError
        For an option that does not exist, a value of the wrong type or out of range.
    """
    pruning = federated_prune_overrides(overrides)
    return _compose(RunConfig, overrides) if pruning is None else _compose(FederatedPruneConfig, pruning)


def compose_prune(overrides: Sequence[str] = ()) -> PruneConfig:
    """Return the config that ``fedlp-prune OVERRIDES`` would run; ConfigError as for :func:`compose`."""
    return _compose(PruneConfig, overrides)


def compose_profile(overrides: Sequence[str] = ()) -> ProfileConfig:
    """Return the config that ``fedlp-profile OVERRIDES`` would run; ConfigError as for :func:`compose`."""
    return _compose(ProfileConfig, overrides)


def compose_search(overrides: Sequence[str] = ()) -> SearchConfig:
    """Return the config that ``fedlp-search OVERRIDES`` would run; ConfigError as for :func:`compose`."""
    return _compose(SearchConfig, overrides)


def compose_federated_search(overrides: Sequence[str] = ()) -> FederatedSearchConfig:
    """Return the config that ``fedlp-search OVERRIDES`` would run, with ``federated=true`` among the overrides.

    ConfigError as for :func:`compose`.
    """
    return cast(FederatedSearchConfig, _compose(FederatedSearchConfig, overrides))


def _compose(schema: type[_Config], overrides: Sequence[str]) -> _Config:
    root = ROOTS[schema]
    register_schema(root)
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(config_dir()), version_base="1.3"):
            config = from_omegaconf(hydra_compose(root, overrides=prepare(root, overrides)), schema)
            refuse_unread(config, overrides)
            return config
    except (HydraException, OmegaConfBaseException, ValueError, yaml.YAMLError) as error:
        raise ConfigError(explain(error, schema)) from error


def from_omegaconf(composed: DictConfig, schema: type[_Config]) -> _Config:
    """Return Hydra's composed config as a validated one of the schema."""
    values = OmegaConf.to_container(composed, resolve=True)
    if not isinstance(values, dict):
        raise ConfigError("the config is not one of fedlp's: it does not map names to values")
    values.pop("hydra", None)
    config = read_config(schema, todays_config(cast(dict[str, Any], values), schema))
    match config:
        case RunConfig():
            validate(config)
            if isinstance(config, FederatedPruneConfig):
                validate_federated_prune(config)
            if isinstance(config, FederatedSearchConfig):
                validate_federated_search(config)
        case PruneConfig():
            validate_prune(config)
        case ProfileConfig():
            validate_profile(config)
        case SearchConfig():
            validate_search(config)
    return replace(config, dataset=with_tokenizer(config.dataset, config.model))


def todays_config(values: Mapping[str, Any], schema: type = RunConfig) -> dict[str, Any]:
    """Return plain values in the current layout; options of earlier versions that are no longer read are dropped."""
    return dict(values) if is_current(values) else drop_unread(schema, current_config(values))


def to_yaml(config: RunConfig | PruneConfig | ProfileConfig | SearchConfig) -> str:
    """Return the config as YAML, every value resolved."""
    return str(yaml.safe_dump(to_plain(config), sort_keys=False, allow_unicode=True))


def from_yaml(text: str) -> RunConfig:
    """Return a validated config from YAML, as :func:`to_yaml` writes it; ConfigError if it does not fit."""
    try:
        created = OmegaConf.create(text)
        if not isinstance(created, DictConfig):
            raise ConfigError("it does not map names to values")
        return from_omegaconf(
            created, schema_for(current_config(cast(dict[str, Any], OmegaConf.to_container(created))))
        )
    except (OmegaConfBaseException, yaml.YAMLError, ValueError, ConfigError) as error:
        raise ConfigError(f"the run's config cannot be read: {explain(error)}") from error


def read_run_config(path: Path) -> RunConfig:
    """Return the validated config of a run's file; ConfigError, which names the file, where it cannot be read."""
    try:
        return from_yaml(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: the run's config cannot be read: {explain(error)}") from error
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def to_plain(config: RunConfig | PruneConfig | ProfileConfig | SearchConfig) -> dict[str, Any]:
    """Return the config as nested dicts of JSON values; a part's own options stand beside its group's."""
    plain = asdict(config)
    for f in fields(config):
        value = getattr(config, f.name)
        if isinstance(value, PartConfig):
            plain[f.name] = asdict(value)
            plain[f.name] |= plain[f.name].pop("options")
    return plain


def explain(error: BaseException, schema: type = RunConfig) -> str:
    """Return an error of Hydra or OmegaConf as one line; the message of a FedLPError at its root takes precedence."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, FedLPError):
            return str(cause)
        cause = cause.__cause__
    if isinstance(error, yaml.MarkedYAMLError):
        return _explain_yaml(error)
    if isinstance(error, UnicodeDecodeError):
        return f"byte {error.start + 1} is not UTF-8; save the file as UTF-8"
    if unknown := re.match(r"Could not override '([^']+)'", str(error)):
        return no_such_option(schema, unknown[1])
    if plugin := re.search(r"Could not find 'hydra/(launcher|sweeper)/([^'_]+)([^']*)'", str(error)):
        kind, package, rest = plugin.groups()
        return f"there is no hydra/{kind}={package}{rest}; if it is a plugin, run: pip install hydra-{package}-{kind}"
    if missing := re.search(r"Could not find '(\w+)/([^']+)'", str(error)):
        choices = sorted(path.stem for path in (config_dir() / missing[1]).glob("*.yaml"))
        close = get_close_matches(missing[2], choices)
        hint = f"did you mean {' or '.join(close)}?" if close else f"choose one of {', '.join(choices)}."
        own = " One of your own is MODULE:OBJECT." if missing[1] in part_groups(schema) else ""
        return f"there is no {missing[1]}={missing[2]}; {hint}{own}".removesuffix(".")
    if isinstance(error, MissingMandatoryValue) and error.full_key:
        return f"{error.full_key} is missing"
    if (merging := re.match(r"Error merging override \+*(.*)", one_line(error))) and error.__cause__ is not None:
        return f"Error merging override {merging[1]}: {one_line(error.__cause__)}"
    return re.sub(r"^\w+ raised while resolving interpolation: ", "", one_line(error))


def _explain_yaml(error: yaml.MarkedYAMLError) -> str:
    """Return position and reason of a YAML error as one line."""
    mark, problem = error.problem_mark, error.problem or "it is not YAML"
    where = "" if mark is None else f"line {mark.line + 1}, column {mark.column + 1}: "
    file = f"{mark.name}, " if mark is not None and not mark.name.startswith("<") else ""
    advice = "; indent with spaces, not with tabs" if r"'\t'" in problem else ""
    return f"{file}{where}{problem}{advice}"
