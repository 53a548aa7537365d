"""Structured config: these dataclasses hold names, types, units and ranges; ``conf/*.yaml`` holds values.

Hydra composes and checks names and types against these schemas; :func:`validate` checks ranges. Past this module a
config is a plain :class:`RunConfig`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, cast

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fedlp.errors import ConfigError, FedLPError, one_line


@dataclass
class ModelConfig:
    """Which model is trained.

    ``source`` is one of ``fedlp_cnn``, ``fedlp_mlp``, ``small_cnn`` (ours), ``torchvision`` (``name`` is any of its
    classifiers), ``llama`` (a LLaMA of the sizes below) or ``hf`` (``path`` is a Hugging Face name or local folder).
    """

    name: str = MISSING
    source: str = MISSING
    path: str | None = None  # hf: model name or folder
    pretrained: bool = False  # torchvision, hf: start from pretrained weights
    variant: str = "plain"  # fedlp_mlp: "plain" (one hidden layer of 500), "deep" (five, each one a depth) or "linear"
    norm: str = "batch"  # torchvision: "batch" or "group" (GroupNorm in place of every BatchNorm)
    hidden_size: int = 64  # llama
    intermediate_size: int = 172  # llama
    num_layers: int = 4  # llama
    num_heads: int = 4  # llama: query heads
    num_kv_heads: int = 2  # llama: key/value heads


@dataclass
class DatasetConfig:
    """Which examples there are. ``root`` is where they lie or are downloaded to."""

    name: str = MISSING
    root: str | None = None
    download: bool = True
    path: str | None = None  # hf: data set name on the Hugging Face hub, or a local folder
    subset: str | None = None  # hf: configuration name
    split: str = "train"  # hf
    text_column: str = "text"  # hf
    tokenizer: str = "bytes"  # text: "bytes", or a Hugging Face tokenizer's name or folder
    documents: str = "auto"  # text: "file", "line", "paragraph", "separator", "speaker"; "auto" looks at the text
    sequence_length: int = 128  # text: tokens of context per example
    test_fraction: float = 0.1  # data sets without a test split of their own, in (0, 1)
    max_train_examples: int | None = None  # use only the first so many (after a seeded shuffle)
    max_test_examples: int | None = None
    augment: bool = False  # images: random crop with padding 4 and horizontal flip while training


@dataclass
class PartitionConfig:
    """How the training examples are spread over clients."""

    name: str = MISSING
    alpha: float = 1.0  # dirichlet: concentration, > 0
    shards_per_client: int = 2  # shards, mixed
    mixrate: float = 0.95  # mixed: fraction of a client's examples that come from label-sorted shards, in [0, 1]
    min_examples: int = 1  # smallest number of examples a client may get; dirichlet draws again until it is met


@dataclass
class StrategyConfig:
    """Which sub-model, upload set and weights each client gets; see ``conf/strategy``."""

    name: str = MISSING
    layer_preserving_rate: Any = 1.0  # probability that a layer is uploaded, in [0, 1]; or one per client
    mask_unit: str = "layer"  # "layer", or "tensor" as in FedLP's official code
    weighting: str = "examples"  # "examples" or "equal"
    depths: Any = "u"  # fedlp_hetero: "u" (uniform), a depth (0.6 there, rest shared), or one depth per client
    persist_heads: bool = True  # fedlp_hetero: keep personal heads between rounds
    widths: list[float] = field(default_factory=lambda: [1.0])  # width levels, each in (0, 1]
    width_probabilities: list[float] | None = None  # share of clients at each level; uniform where absent
    server_optimizer: str = "none"  # "none" (plain averaging), "momentum" or "adam"
    server_lr: float = 1.0
    server_momentum: float = 0.9  # momentum; adam: beta1
    server_beta2: float = 0.99  # adam
    server_epsilon: float = 1e-3  # adam


@dataclass
class LocalConfig:
    """How a client trains in one round."""

    optimizer: str = MISSING  # "sgd" or "adam"
    epochs: int = 1
    batch_size: int = 32
    lr: float = 0.05
    momentum: float = 0.0  # sgd
    weight_decay: float = 0.0
    max_grad_norm: float | None = None


@dataclass
class SimulationConfig:
    """Which engine carries the messages."""

    engine: str = MISSING  # "local" (worker processes of this machine) or "ray" (Flower's simulation runtime)
    workers: int | None = None  # processes; as many as cores where absent
    round_timeout_s: float = 3600.0  # a client that has not answered by then is counted as failed


@dataclass
class RunConfig:
    """One federated run."""

    seed: int = 0
    num_rounds: int = 10
    num_clients: int = 10
    clients_per_round: int = 5
    min_clients: int = 1  # a round with fewer good updates leaves the model unchanged
    eval_every: int = 1  # rounds between evaluations of the global model; the last round always is
    eval_batch_size: int = 500
    checkpoint_every: int = 1
    device: str = "cpu"  # where clients train: "cpu", "cuda", "cuda:1"...
    dry_run: bool = False
    resume: str | None = None  # a run directory
    plot_partition: bool = False  # draw who has how many examples of which class as partition.png (loads the data)
    label: str | None = None  # what reports call the run; a name is made from the config where absent
    model: ModelConfig = field(default_factory=ModelConfig)
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    partition: PartitionConfig = field(default_factory=PartitionConfig)
    strategy: StrategyConfig = field(default_factory=StrategyConfig)
    local: LocalConfig = field(default_factory=LocalConfig)
    simulation: SimulationConfig = field(default_factory=SimulationConfig)


# ---- composing, reading
def config_dir() -> Path:
    """Return the config tree: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parent
    installed = package / "conf"
    return installed if installed.is_dir() else package.parent / "conf"


def register_schemas() -> None:
    """Make the schema known to Hydra; ``conf/config.yaml`` starts from it."""
    ConfigStore.instance().store(name="schema", node=RunConfig)


def compose(overrides: Sequence[str] = ()) -> RunConfig:
    """Return the config that the command line ``fedlp OVERRIDES`` would run.

    Raises
    ------
    ConfigError
        For an option that does not exist, a value of the wrong type or out of range.
    """
    register_schemas()
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(config_dir()), version_base="1.3"):
            return from_omegaconf(hydra_compose("config", overrides=list(overrides)))
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise ConfigError(explain(error)) from error


def from_omegaconf(composed: DictConfig) -> RunConfig:
    """Return Hydra's composed config as a validated RunConfig."""
    config = OmegaConf.to_object(composed)
    if not isinstance(config, RunConfig):
        raise ConfigError("the config is not a run of fedlp: its defaults list must start with 'schema'")
    _refuse_unknown(config)
    validate(config)
    return config


def _refuse_unknown(config: object, prefix: str = "") -> None:
    """Raise for an option that Hydra added to the schema, as it does for ``+name=value``."""
    for name, value in vars(config).items():
        if f"{prefix}{name}" not in _option_names(RunConfig):
            raise ConfigError(_no_such_option(f"{prefix}{name}"))
        if is_dataclass(value):
            _refuse_unknown(value, f"{prefix}{name}.")


def to_yaml(config: RunConfig) -> str:
    """Return the config as YAML, every value resolved."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def from_yaml(text: str) -> RunConfig:
    """Return a validated config from YAML, as :func:`to_yaml` writes it; ConfigError where it does not fit."""
    try:
        return from_omegaconf(
            cast(DictConfig, OmegaConf.merge(OmegaConf.structured(RunConfig), OmegaConf.create(text)))
        )
    except (OmegaConfBaseException, yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"the run's config cannot be read: {explain(error)}") from error


def with_absolute_paths(config: RunConfig) -> RunConfig:
    """Return the config with its local files named so that they are found from any working folder."""
    dataset, model = config.dataset, config.model
    root = dataset.root and str(Path(dataset.root).expanduser().absolute())
    tokenizer = dataset.tokenizer if dataset.tokenizer == "bytes" else _absolute(dataset.tokenizer)
    dataset = replace(dataset, root=root, path=dataset.path and _absolute(dataset.path), tokenizer=tokenizer)
    return replace(config, dataset=dataset, model=replace(model, path=model.path and _absolute(model.path)))


def _absolute(name: str) -> str:
    """Return the absolute path of what exists; the name of anything else, which may lie on a hub."""
    path = Path(name).expanduser()
    return str(path.absolute()) if path.exists() else name


def to_plain(config: RunConfig) -> dict[str, Any]:
    """Return the config as nested dicts of JSON values."""
    return asdict(config)


def explain(error: BaseException) -> str:
    """Return in one line what an error of Hydra or OmegaConf says: our own words at its root, where there are some."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, FedLPError):
            return str(cause)
        cause = cause.__cause__
    if unknown := re.match(r"Could not override '([^']+)'", str(error)):
        return _no_such_option(unknown[1])
    if str(error).startswith("Error merging override") and error.__cause__ is not None:
        return f"{one_line(error)}: {one_line(error.__cause__)}"
    return re.sub(r"^\w+ raised while resolving interpolation: ", "", one_line(error))


def _no_such_option(name: str) -> str:
    close = get_close_matches(name, _option_names(RunConfig))
    return f"there is no option {name}; " + (f"did you mean {close[0]}?" if close else "fedlp --cfg job lists them all")


def _option_names(schema: type, prefix: str = "") -> list[str]:
    names = []
    for item in fields(schema):
        names.append(prefix + item.name)
        nested: Any = item.default_factory
        if is_dataclass(nested):
            names += _option_names(cast(type, nested), f"{prefix}{item.name}.")
    return names


# ---- validation
def validate(config: RunConfig) -> None:
    """Check every range; ConfigError says which value is wrong and what is allowed."""
    for name in ("num_rounds", "num_clients", "clients_per_round", "eval_every", "eval_batch_size", "checkpoint_every"):
        _require(getattr(config, name) >= 1, name, getattr(config, name), "at least 1")
    _require(config.seed >= 0, "seed", config.seed, "at least 0")
    _require(bool(re.fullmatch(r"cpu|cuda(:\d+)?", config.device)), "device", config.device, "cpu, cuda or cuda:NUMBER")
    _require(
        config.clients_per_round <= config.num_clients,
        "clients_per_round",
        config.clients_per_round,
        f"at most num_clients={config.num_clients}",
    )
    _require(
        0 <= config.min_clients <= config.clients_per_round,
        "min_clients",
        config.min_clients,
        f"in [0, clients_per_round={config.clients_per_round}]",
    )
    for name in ("hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads"):
        _require(getattr(config.model, name) >= 1, f"model.{name}", getattr(config.model, name), "at least 1")
    _validate_strategy(config.strategy, config.num_clients)
    local = config.local
    _choice("local.optimizer", local.optimizer, ("sgd", "adam"))
    _require(local.epochs >= 1, "local.epochs", local.epochs, "at least 1")
    _require(local.batch_size >= 1, "local.batch_size", local.batch_size, "at least 1")
    _require(math.isfinite(local.lr) and local.lr > 0, "local.lr", local.lr, "a finite number above 0")
    _require(0 <= local.momentum < 1, "local.momentum", local.momentum, "in [0, 1)")
    _require(local.weight_decay >= 0, "local.weight_decay", local.weight_decay, "at least 0")
    if local.max_grad_norm is not None:
        _require(local.max_grad_norm > 0, "local.max_grad_norm", local.max_grad_norm, "above 0")
    simulation = config.simulation
    _choice("simulation.engine", simulation.engine, ("local", "ray"))
    if simulation.workers is not None:
        _require(simulation.workers >= 1, "simulation.workers", simulation.workers, "at least 1")
    _require(
        simulation.round_timeout_s > 0, "simulation.round_timeout_s", simulation.round_timeout_s, "above 0 (seconds)"
    )


def _validate_strategy(strategy: StrategyConfig, num_clients: int) -> None:
    rate = strategy.layer_preserving_rate
    rates = rate if isinstance(rate, list) else [rate]
    for value in rates:
        _require(_is_number(value) and 0 <= value <= 1, "strategy.layer_preserving_rate", value, "in [0, 1]")
    if isinstance(rate, list):
        _require(
            len(rate) == num_clients,
            "strategy.layer_preserving_rate",
            f"a list of {len(rate)}",
            f"one number, or one per client ({num_clients})",
        )
    _choice("strategy.mask_unit", strategy.mask_unit, ("layer", "tensor"))
    _choice("strategy.weighting", strategy.weighting, ("examples", "equal"))
    depths = strategy.depths
    whole = [depths] if not isinstance(depths, list) else depths
    fits = depths == "u" or all(isinstance(d, int) and not isinstance(d, bool) and d >= 1 for d in whole)
    _require(fits, "strategy.depths", depths, "u, a depth (1, 2, ...), or a list with one depth per client")
    if isinstance(depths, list):
        _require(
            len(depths) == num_clients, "strategy.depths", f"a list of {len(depths)}", f"one per client ({num_clients})"
        )
    widths, shares = strategy.widths, strategy.width_probabilities
    _require(bool(widths) and all(0 < width <= 1 for width in widths), "strategy.widths", widths, "levels in (0, 1]")
    if shares is not None:
        fits = len(shares) == len(widths) and min(shares) >= 0 and abs(sum(shares) - 1) < 1e-6
        _require(fits, "strategy.width_probabilities", shares, "one share per width, summing to 1")
    _choice("strategy.server_optimizer", strategy.server_optimizer, ("none", "momentum", "adam"))
    lr = strategy.server_lr
    _require(math.isfinite(lr) and lr > 0, "strategy.server_lr", lr, "a finite number above 0")
    for name in ("server_momentum", "server_beta2"):
        _require(0 <= getattr(strategy, name) < 1, f"strategy.{name}", getattr(strategy, name), "in [0, 1)")
    _require(strategy.server_epsilon > 0, "strategy.server_epsilon", strategy.server_epsilon, "above 0")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _require(holds: bool, name: str, value: object, allowed: str) -> None:
    if not holds:
        raise ConfigError(f"{name}={value} is not allowed: it must be {allowed}")


def _choice(name: str, value: str, options: tuple[str, ...]) -> None:
    _require(value in options, name, value, "one of " + ", ".join(options))
