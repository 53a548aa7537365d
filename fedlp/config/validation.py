"""The ranges of config values, checked once where a config enters; past that they are trusted."""

from __future__ import annotations

import math
import re

from fedlp.config.schema import (
    AllocatorConfig,
    CalibrationConfig,
    FleetConfig,
    LocalConfig,
    ModelConfig,
    PrivacyConfig,
    PrunerConfig,
    RunConfig,
    StrategyConfig,
)
from fedlp.config.tools import ProfileConfig, PruneConfig, SearchConfig
from fedlp.errors import ConfigError

ONESHOT_RULES = ("uniform", "depth_line", "log_depth", "plan")
FEDERATED_RULES = ("uniform", "depth_line", "log_depth", "flap", "dp")
_RULES = ("uniform", "depth_line", "log_depth", "owl", "alphapruning", "dlp", "flap", "erk", "dp", "dsa", "plan")


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
    _validate_model(config.model)
    _validate_strategy(config.strategy, config.num_clients)
    _validate_local(config.local)
    _validate_fleet(config.fleet)
    _validate_pruning(config.pruner, config.allocator, config.calibration)
    _validate_uploads(config)
    _validate_privacy(config.privacy)
    simulation = config.simulation
    _choice("simulation.engine", simulation.engine, ("local", "ray"))
    if simulation.workers is not None:
        _require(simulation.workers >= 1, "simulation.workers", simulation.workers, "at least 1")
    _require(
        simulation.round_timeout_s > 0, "simulation.round_timeout_s", simulation.round_timeout_s, "above 0 (seconds)"
    )


def validate_prune(config: PruneConfig) -> None:
    """Check every range of a one-shot pruning; ConfigError says which value is wrong and what is allowed."""
    targets = {name: getattr(config, name) for name in ("sparsity", "target_params", "target_macs")}
    given = [name for name, value in targets.items() if value is not None]
    if len(given) != 1:
        raise ConfigError(f"give one of sparsity, target_params and target_macs, not {' and '.join(given) or 'none'}")
    value = targets[given[0]]
    if given == ["sparsity"]:
        _require(0 < value < 1, "sparsity", value, "in (0, 1)")
    _require(math.isfinite(value) and value > 0, given[0], value, "a finite number above 0")
    _require(config.seed >= 0, "seed", config.seed, "at least 0")
    _require(bool(re.fullmatch(r"cpu|cuda(:\d+)?", config.device)), "device", config.device, "cpu, cuda or cuda:NUMBER")
    _require(config.eval_batch_size >= 1, "eval_batch_size", config.eval_batch_size, "at least 1")
    _validate_model(config.model)
    _validate_pruning(config.pruner, config.allocator, config.calibration)
    finetune = config.finetune
    _choice("finetune.name", finetune.name, ("none", "newton", "lora", "full"))
    for name in ("epochs", "batch_size", "rank", "steps"):
        _require(getattr(finetune, name) >= 1, f"finetune.{name}", getattr(finetune, name), "at least 1")
    for name in ("lr", "alpha"):
        size = getattr(finetune, name)
        _require(math.isfinite(size) and size > 0, f"finetune.{name}", size, "a finite number above 0")


def _validate_pruning(pruner: PrunerConfig, allocator: AllocatorConfig, calibration: CalibrationConfig) -> None:
    _choice("pruner.name", pruner.name, ("obs", "slimgpt", "magnitude", "wanda", "flap", "taylor", "random"))
    _choice("pruner.recovery", pruner.recovery, ("least_squares", "bias", "none"))
    _require(0 <= pruner.correction <= 1, "pruner.correction", pruner.correction, "in [0, 1]")
    if pruner.damping is not None:
        _require(0 <= pruner.damping < math.inf, "pruner.damping", pruner.damping, "at least 0, or null")
    _choice("allocator.name", allocator.name, _RULES)
    if allocator.name == "plan" and allocator.path is None:
        raise ConfigError("allocator=plan needs allocator.path: a YAML or JSON file, layer name -> sparsity")
    if allocator.amplitude is not None:
        _require(0 <= allocator.amplitude <= 2, "allocator.amplitude", allocator.amplitude, "in [0, 2], or null")
    for name in ("examples", "batch_size"):
        _require(
            getattr(calibration, name) >= 1,
            f"calibration.{name}",
            getattr(calibration, name),
            "at least 1",
        )


def validate_profile(config: ProfileConfig) -> None:
    """Check every range of a profile; ConfigError says which value is wrong and what is allowed."""
    densities = config.densities
    fits = bool(densities) and all(0 < value <= 1 for value in densities) and len(set(densities)) == len(densities)
    _require(fits and max(densities) == 1, "densities", densities, "different numbers in (0, 1], 1 among them")
    _require(config.repeats >= 1, "repeats", config.repeats, "at least 1")
    _require(config.seed >= 0, "seed", config.seed, "at least 0")
    _require(bool(re.fullmatch(r"cpu|cuda(:\d+)?", config.device)), "device", config.device, "cpu, cuda or cuda:NUMBER")
    for name in ("memory_bytes", "latency_s", "upload_bytes"):
        value = getattr(config, name)
        _require(value is None or (_is_number(value) and value > 0), name, value, "a finite number above 0, or null")
    _validate_model(config.model)
    _validate_local(config.local)


def _validate_local(local: LocalConfig) -> None:
    _choice("local.optimizer", local.optimizer, ("sgd", "adam"))
    _require(local.epochs >= 1, "local.epochs", local.epochs, "at least 1")
    _require(local.batch_size >= 1, "local.batch_size", local.batch_size, "at least 1")
    _require(math.isfinite(local.lr) and local.lr > 0, "local.lr", local.lr, "a finite number above 0")
    _require(0 <= local.momentum < 1, "local.momentum", local.momentum, "in [0, 1)")
    _require(local.weight_decay >= 0, "local.weight_decay", local.weight_decay, "at least 0")
    if local.max_grad_norm is not None:
        _require(local.max_grad_norm > 0, "local.max_grad_norm", local.max_grad_norm, "above 0")
    adjustment = local.logit_adjustment
    _require(math.isfinite(adjustment) and adjustment >= 0, "local.logit_adjustment", adjustment, "finite, at least 0")


def _validate_fleet(fleet: FleetConfig) -> None:
    _require(not (fleet.fractions and fleet.devices), "fleet", fleet.name, "one of fractions or devices, not both")
    _require(all(0 < value <= 1 for value in fleet.fractions), "fleet.fractions", fleet.fractions, "each in (0, 1]")
    limits = ("params", "macs", "memory_bytes", "upload_bytes", "latency_s")
    for name in fleet.limited:
        _choice("fleet.limited", name, limits)
    if fleet.shares is not None:
        fits = len(fleet.shares) == len(fleet.fractions) and min(fleet.shares) >= 0 and 0 < sum(fleet.shares) < math.inf
        _require(fits, "fleet.shares", fleet.shares, "one share of at least 0 per fraction, not all 0")
    for name in ("memory_share", "seconds_per_example", "upload_s"):
        value = getattr(fleet, name)
        _require(0 < value < math.inf, f"fleet.{name}", value, "a finite number above 0")
    _require(fleet.memory_share <= 1, "fleet.memory_share", fleet.memory_share, "in (0, 1]")
    for name, device in fleet.devices.items():
        for figure, value in vars(device).items():
            fits = 0 < value < math.inf or (figure == "share" and value == 0)
            _require(fits, f"fleet.devices.{name}.{figure}", value, "a finite number above 0 (a share may be 0)")
    shares = [device.share for device in fleet.devices.values()]
    _require(not shares or sum(shares) > 0, "fleet.devices", "shares", "not all 0")


def validate_search(config: SearchConfig) -> None:
    """Check every range of a search; ConfigError says which value is wrong and what is allowed."""
    _require(config.seed >= 0, "seed", config.seed, "at least 0")
    _validate_model(config.model)
    search = config.search
    _choice("search.space", search.space, ("trees", "chains"))
    _require(bool(search.modes), "search.modes", search.modes, "at least one of evolution, random, vector")
    for mode in search.modes:
        _choice("search.modes", mode, ("evolution", "random", "vector"))
    for name in ("evaluations", "population", "fitness_examples", "held_out_examples", "batch_size"):
        _require(getattr(search, name) >= 1, f"search.{name}", getattr(search, name), "at least 1")
    fits = bool(search.ratios) and all(0 < ratio < 1 for ratio in search.ratios)
    _require(fits, "search.ratios", search.ratios, "sparsities in (0, 1)")
    if search.workers is not None:
        _require(search.workers >= 1, "search.workers", search.workers, "at least 1")


def _validate_model(model: ModelConfig) -> None:
    for name in ("hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads"):
        _require(getattr(model, name) >= 1, f"model.{name}", getattr(model, name), "at least 1")


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
    _choice("strategy.weighting", strategy.weighting, ("examples", "equal", "held"))
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


def _validate_uploads(config: RunConfig) -> None:
    """Check what clients send, and what goes with what."""
    strategy = config.strategy
    _require(0 <= strategy.sparsity < 1, "strategy.sparsity", strategy.sparsity, "in [0, 1)")
    _choice("strategy.spread", strategy.spread, ("allocator", "macs"))
    _choice("strategy.masks", strategy.masks, ("client", "server", "random"))
    _choice("strategy.criterion", strategy.criterion, ("weights", "update"))
    encodings = (
        ("float32", "float64") if strategy.name == "oneshot" else ("float32", "bfloat16", "int8", "int4", "int2")
    )
    _choice("strategy.encoding", strategy.encoding, encodings)
    coarseness = strategy.coarseness
    _require(1 <= coarseness < math.inf, "strategy.coarseness", coarseness, "a finite number of at least 1")
    if coarseness > 1 and not strategy.encoding.startswith("int"):
        raise ConfigError("strategy.coarseness needs strategy.encoding=int8, int4 or int2: others have no steps")
    _choice("strategy.values", strategy.values, ("weights", "deltas"))
    _choice("strategy.batch_norm", strategy.batch_norm, ("average", "whole", "static"))
    for name in ("refresh_every", "width_multiple"):
        _require(getattr(strategy, name) >= 1, f"strategy.{name}", getattr(strategy, name), "at least 1")
    for name in ("warmup_rounds", "ramp_rounds"):
        _require(getattr(strategy, name) >= 0, f"strategy.{name}", getattr(strategy, name), "at least 0")
    _require(0 <= strategy.ramp_from < 1, "strategy.ramp_from", strategy.ramp_from, "in [0, 1)")
    if strategy.ramp_from and not strategy.ramp_rounds:
        raise ConfigError("strategy.ramp_from needs strategy.ramp_rounds: over how many rounds sparsity changes")
    _require(
        strategy.regrow is None or 0 <= strategy.regrow <= 1, "strategy.regrow", strategy.regrow, "null or in [0, 1]"
    )
    if strategy.error_feedback and strategy.values != "deltas":
        raise ConfigError(
            "strategy.error_feedback=true needs strategy.values=deltas: only differences can be caught up"
        )
    if strategy.compensate and (strategy.masks != "client" or config.pruner.recovery != "least_squares"):
        raise ConfigError(
            "strategy.compensate=true needs strategy.masks=client and a pruner that refits (pruner=obs or slimgpt)"
        )
    if strategy.name == "oneshot":
        _validate_oneshot(config)
    if strategy.name != "fedlp":
        return
    if config.allocator.name not in FEDERATED_RULES:
        raise ConfigError(
            f"allocator={config.allocator.name} needs data, which the server of a federated run has not; choose one of "
            + ", ".join(FEDERATED_RULES)
        )


def _validate_oneshot(config: RunConfig) -> None:
    """Check what federated one-shot pruning cannot do."""
    strategy = config.strategy
    _require(strategy.sparsity > 0, "strategy.sparsity", strategy.sparsity, "in (0, 1)")
    _choice("strategy.masks", strategy.masks, ("server", "client"))
    if config.resume is not None:
        raise ConfigError("a run of strategy=oneshot cannot be resumed: start it anew in another hydra.run.dir")
    if config.fleet.fractions or config.fleet.devices:
        raise ConfigError(f"fleet={config.fleet.name} does not go with strategy=oneshot: all clients get one model")
    if strategy.masks == "server" and config.pruner.name == "taylor":
        raise ConfigError("pruner=taylor needs gradients, which clients do not send; choose another, or masks=client")
    if config.allocator.name not in ONESHOT_RULES:
        raise ConfigError(
            f"allocator={config.allocator.name} needs data, which the server has not; strategy=oneshot takes "
            + ", ".join(ONESHOT_RULES)
        )


def _validate_privacy(privacy: PrivacyConfig) -> None:
    _choice("privacy.name", privacy.name, ("none", "local_dp"))
    for name in ("clipping_norm", "epsilon"):
        value = getattr(privacy, name)
        _require(0 < value < math.inf, f"privacy.{name}", value, "a finite number above 0")
    _require(0 < privacy.delta < 1, "privacy.delta", privacy.delta, "in (0, 1)")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _require(holds: bool, name: str, value: object, allowed: str) -> None:
    if not holds:
        raise ConfigError(f"{name}={value} is not allowed: it must be {allowed}")


def _choice(name: str, value: str, options: tuple[str, ...]) -> None:
    _require(value in options, name, value, "one of " + ", ".join(options))
