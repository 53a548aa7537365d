"""Ranges of config values, checked once where a config enters."""

from __future__ import annotations

import math
import re

from fedlp import registry
from fedlp.config.federated_prune import FederatedPruneConfig
from fedlp.config.federated_search import FederatedSearchConfig
from fedlp.config.schema import (
    CalibrationConfig,
    FleetConfig,
    LocalConfig,
    PrivacyConfig,
    PrunerConfig,
    RunConfig,
    SimulationConfig,
)
from fedlp.config.tools import ProfileConfig, PruneConfig, SearchConfig, SearchSettings
from fedlp.errors import ConfigError

_SMALLEST_STORE = 75 << 20  # of Ray


def validate(config: RunConfig) -> None:
    """Check every range; ConfigError names the value and the allowed range."""
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
    for chosen in config.callbacks:
        named = isinstance(chosen, str) or (isinstance(chosen, dict) and isinstance(chosen.get("name"), str))
        _require(named, "callbacks", config.callbacks, "a list of names, or of mappings with name and options")
    _validate_local(config.local)
    _validate_fleet(config.fleet)
    most = config.num_clients - config.clients_per_round
    extra = config.fleet.extra_clients
    _require(extra <= most, "fleet.extra_clients", extra, f"at most num_clients - clients_per_round = {most}")
    _validate_pruning(config.pruner, config.calibration)
    _validate_privacy(config.privacy)
    _choice("adapter.name", config.adapter.name, ("none", "lora"))
    _validate_evaluation(config)
    _validate_rounds(config)
    _validate_simulation(config.simulation, config.device)


def validate_prune(config: PruneConfig) -> None:
    """Check every range of a one-shot pruning; ConfigError names the value and the allowed range."""
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
    _choice("dtype", config.dtype, ("auto", "float32", "float16", "bfloat16"))
    _validate_pruning(config.pruner, config.calibration)
    finetune = config.finetune
    _choice("finetune.name", finetune.name, ("none", "newton", "lora", "full"))
    for name in ("epochs", "batch_size", "rank", "steps"):
        _require(getattr(finetune, name) >= 1, f"finetune.{name}", getattr(finetune, name), "at least 1")
    for name in ("lr", "alpha"):
        size = getattr(finetune, name)
        _require(math.isfinite(size) and size > 0, f"finetune.{name}", size, "a finite number above 0")


def validate_federated_prune(config: FederatedPruneConfig) -> None:
    """Check every range of a federated one-shot pruning; ConfigError names the value and the allowed range."""
    validate_prune(config.central())
    _choice("unit_selection", config.unit_selection, ("server", "client"))
    _choice("sums", config.sums, ("float32", "float64"))


def _validate_pruning(pruner: PrunerConfig, calibration: CalibrationConfig) -> None:
    _choice("pruner.recovery", pruner.recovery, ("least_squares", "bias", "none"))
    _require(0 <= pruner.correction <= 1, "pruner.correction", pruner.correction, "in [0, 1]")
    if pruner.damping is not None:
        _require(0 <= pruner.damping < math.inf, "pruner.damping", pruner.damping, "at least 0, or null")
    for name in ("examples", "batch_size"):
        _require(
            getattr(calibration, name) >= 1,
            f"calibration.{name}",
            getattr(calibration, name),
            "at least 1",
        )


def validate_profile(config: ProfileConfig) -> None:
    """Check every range of a profile; ConfigError names the value and the allowed range."""
    densities = config.densities
    fits = bool(densities) and all(0 < value <= 1 for value in densities) and len(set(densities)) == len(densities)
    _require(fits and max(densities) == 1, "densities", densities, "different numbers in (0, 1], 1 among them")
    _require(config.repeats >= 1, "repeats", config.repeats, "at least 1")
    _require(config.seed >= 0, "seed", config.seed, "at least 0")
    _require(bool(re.fullmatch(r"cpu|cuda(:\d+)?", config.device)), "device", config.device, "cpu, cuda or cuda:NUMBER")
    for name in ("memory_bytes", "latency_s", "upload_bytes"):
        value = getattr(config, name)
        _require(value is None or (_is_number(value) and value > 0), name, value, "a finite number above 0, or null")
    _validate_local(config.local)


def _validate_simulation(simulation: SimulationConfig, device: str) -> None:
    _choice("simulation.engine", simulation.engine, ("local", "ray", "flower"))
    is_known = isinstance(simulation.batched, bool) or simulation.batched == "auto"
    _require(is_known, "simulation.batched", simulation.batched, "true, false or auto")
    fits = not simulation.batched or simulation.engine == "local"
    _require(fits, "simulation.batched", simulation.batched, f"false with simulation={simulation.engine}")
    _choice("simulation.start", simulation.start, ("auto", "fork", "spawn"))
    fits = simulation.start == "auto" or simulation.engine == "local"
    _require(fits, "simulation.start", simulation.start, f"auto with simulation={simulation.engine}")
    if simulation.workers is not None:
        least = 0 if simulation.engine == "local" else 1
        _require(simulation.workers >= least, "simulation.workers", simulation.workers, f"at least {least}")
    fits = simulation.start == "auto" or simulation.workers != 0
    _require(fits, "simulation.start", simulation.start, "auto with simulation.workers=0, which starts no process")
    _require(
        simulation.round_timeout_s > 0, "simulation.round_timeout_s", simulation.round_timeout_s, "above 0 (seconds)"
    )
    on_ray = simulation.engine == "ray"
    for name in ("address", "gpus_per_client", "object_store_bytes"):
        value = getattr(simulation, name)
        _require(value is None or on_ray, f"simulation.{name}", value, f"null with simulation={simulation.engine}")
    if on_ray:
        _validate_ray(simulation, device)


def _validate_ray(simulation: SimulationConfig, device: str) -> None:
    address, gpus, size = simulation.address, simulation.gpus_per_client, simulation.object_store_bytes
    _require(device in ("cpu", "cuda"), "device", device, "cpu or cuda with simulation=ray, which chooses the GPUs")
    if address not in (None, "auto"):
        host, _, port = str(address).rpartition(":")
        fits = bool(re.fullmatch(r"[\w.-]+|\[[0-9a-fA-F:.]+\]", host)) and port.isdecimal() and 0 < int(port) < 1 << 16
        _require(fits, "simulation.address", address, "null, auto or HOST:PORT of a Ray cluster's head node")
    if gpus is not None:
        fits = math.isfinite(gpus) and gpus >= 0 and (gpus <= 1 or gpus == int(gpus))
        _require(fits, "simulation.gpus_per_client", gpus, "in [0, 1], or a whole number")
        fits = (gpus > 0) == (device == "cuda")
        _require(fits, "simulation.gpus_per_client", gpus, "above 0 with device=cuda, and 0 with device=cpu")
    if size is not None:
        _require(address is None, "simulation.object_store_bytes", size, "null with simulation.address")
        _require(size >= _SMALLEST_STORE, "simulation.object_store_bytes", size, f"at least {_SMALLEST_STORE}")


def _validate_local(local: LocalConfig) -> None:
    if ":" not in local.optimizer:
        _choice("local.optimizer", local.optimizer, registry.names("optimizer"))
    _require(local.epochs >= 1, "local.epochs", local.epochs, "at least 1")
    _require(local.batch_size >= 1, "local.batch_size", local.batch_size, "at least 1")
    _require(math.isfinite(local.lr) and local.lr > 0, "local.lr", local.lr, "a finite number above 0")
    _require(0 <= local.momentum < 1, "local.momentum", local.momentum, "in [0, 1)")
    _require(local.weight_decay >= 0, "local.weight_decay", local.weight_decay, "at least 0")
    if local.max_grad_norm is not None:
        _require(local.max_grad_norm > 0, "local.max_grad_norm", local.max_grad_norm, "above 0")
    _require(0 <= local.proximal < math.inf, "local.proximal", local.proximal, "a finite number of at least 0")
    _require(local.accumulation >= 1, "local.accumulation", local.accumulation, "at least 1")
    _choice("local.precision", local.precision, ("float32", "bfloat16"))
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
    there = fleet.availability
    fits = there is None or isinstance(there, str) or (_is_number(there) and 0 < there <= 1)
    _require(fits, "fleet.availability", there, "a probability in (0, 1], a CSV file, or null")
    is_duration = fleet.round_s is None or 0 < fleet.round_s < math.inf
    _require(is_duration, "fleet.round_s", fleet.round_s, "a finite number of seconds above 0, or null")
    if fleet.round_s is not None and not isinstance(there, str):
        raise ConfigError("fleet.round_s is for a trace in seconds: set fleet.availability=FILE too")
    _require(0 <= fleet.dropout < 1, "fleet.dropout", fleet.dropout, "in [0, 1)")
    _require(fleet.extra_clients >= 0, "fleet.extra_clients", fleet.extra_clients, "at least 0")
    for name, device in fleet.devices.items():
        for figure in vars(device).keys() - {"profile"}:
            value = getattr(device, figure)
            fits = value is None or 0 < value < math.inf or (figure == "share" and value == 0)
            _require(fits, f"fleet.devices.{name}.{figure}", value, "a finite number above 0 (a share may be 0)")
    shares = [device.share for device in fleet.devices.values()]
    _require(not shares or sum(shares) > 0, "fleet.devices", "shares", "not all 0")
    _choice("fleet.clock", fleet.clock, ("wall", "virtual"))
    if fleet.clock == "virtual" and not fleet.devices:
        raise ConfigError("fleet.clock=virtual needs device classes: choose fleet=mixed, or give fleet.devices")
    if fleet.clock == "virtual" and fleet.round_s is not None:
        raise ConfigError("fleet.round_s is not read with fleet.clock=virtual: a trace is in seconds of that clock")


def validate_search(config: SearchConfig) -> None:
    """Check every range of a search; ConfigError names the value and the allowed range."""
    _require(config.seed >= 0, "seed", config.seed, "at least 0")
    _validate_search_settings(config.search)


def validate_federated_search(config: FederatedSearchConfig) -> None:
    """Check every range of a federated search that other runs do not have; ConfigError names value and range."""
    _validate_search_settings(config.search)
    _choice("pruner", config.pruner.name, ("obs",))
    _choice("sums", config.sums, ("float32", "float64"))


def _validate_search_settings(search: SearchSettings) -> None:
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


def _validate_privacy(privacy: PrivacyConfig) -> None:
    _choice("privacy.name", privacy.name, ("none", "local_dp", "central_dp", "secagg"))
    for name in ("clipping_norm", "epsilon", "noise_multiplier", "max_epsilon", "value_range", "phase_timeout_s"):
        value = getattr(privacy, name)
        _require(value is None or 0 < value < math.inf, f"privacy.{name}", value, "a finite number above 0")
    _choice("privacy.accountant", privacy.accountant, ("pld", "rdp"))
    quantile = privacy.clipping_quantile
    _require(quantile is None or 0 < quantile < 1, "privacy.clipping_quantile", quantile, "in (0, 1), or null")
    _require(privacy.epsilon is not None or privacy.name != "local_dp", "privacy.epsilon", None, "a number")
    _require(0 < privacy.delta < 1, "privacy.delta", privacy.delta, "in (0, 1)")
    _require(0.5 < privacy.threshold <= 1, "privacy.threshold", privacy.threshold, "in (0.5, 1]")
    _require(privacy.min_group >= 2, "privacy.min_group", privacy.min_group, "at least 2")
    _require(privacy.bits in (32, 64), "privacy.bits", privacy.bits, "32 or 64")


def _validate_evaluation(config: RunConfig) -> None:
    evaluation = config.evaluation
    _choice("evaluation", evaluation.name, ("central", "clients", "both"))
    _require(evaluation.personal_steps >= 0, "evaluation.personal_steps", evaluation.personal_steps, "at least 0")
    if evaluation.clients is not None:
        _require(evaluation.clients >= 1, "evaluation.clients", evaluation.clients, "at least 1, or null for all")
    if evaluation.tiers and evaluation.name == "clients":
        raise ConfigError("evaluation.tiers=true needs the server's test set: choose evaluation=central or both")


def _validate_rounds(config: RunConfig) -> None:
    rounds, is_virtual = config.rounds, config.fleet.clock == "virtual"
    _choice("rounds", rounds.name, ("synchronous", "asynchronous"))
    deadline, size, exponent = rounds.deadline_s, rounds.buffer_size, rounds.staleness_exponent
    _require(deadline is None or 0 < deadline < math.inf, "rounds.deadline_s", deadline, "seconds above 0, or null")
    _require(0 <= exponent < math.inf, "rounds.staleness_exponent", exponent, "a finite number of at least 0")
    if deadline is not None and not is_virtual:
        raise ConfigError(
            "rounds.deadline_s is in simulated seconds: set fleet.clock=virtual too, or simulation.round_timeout_s"
        )
    if rounds.name == "synchronous":
        _require(size is None, "rounds.buffer_size", size, "null with rounds=synchronous")
        return
    least, most = max(1, config.min_clients), config.num_clients
    fits = size is None or least <= size <= most
    _require(fits, "rounds.buffer_size", size, f"in [{least}, num_clients={most}], or null")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _require(holds: bool, name: str, value: object, allowed: str) -> None:
    if not holds:
        raise ConfigError(f"{name}={value} is not allowed: it must be {allowed}")


def _choice(name: str, value: str, options: tuple[str, ...]) -> None:
    _require(value in options, name, value, "one of " + ", ".join(options))
