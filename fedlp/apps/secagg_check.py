"""Secure aggregation of a run: its settings, and the options that it refuses because they need single updates."""

from __future__ import annotations

import logging
from collections import defaultdict

from fedlp.config import FederatedPruneConfig, FederatedSearchConfig, RunConfig
from fedlp.errors import ConfigError
from fedlp.federation.secagg.fixed_point import FixedPoint
from fedlp.federation.secagg.settings import SecAggSettings
from fedlp.federation.strategies.policy import Policy
from fedlp.training.calibration_data import make_method

log = logging.getLogger("fedlp")
_WHAT = "privacy=secagg"
_LEAST_FRACTION_BITS = 8


def secagg_settings(config: RunConfig) -> SecAggSettings | None:
    """Return the settings of secure aggregation; None where a run has none."""
    privacy = config.privacy
    if privacy.name != "secagg":
        return None
    return SecAggSettings(
        threshold=privacy.threshold,
        min_group=privacy.min_group,
        bits=privacy.bits,
        value_range=privacy.value_range,
        by_examples=config.aggregator.weighting != "equal",
        phase_timeout_s=privacy.phase_timeout_s,
    )


def check_secagg(config: RunConfig, policy: Policy) -> None:
    """Raise ConfigError, with the remedy, where an option needs single updates, or a group would be too small."""
    settings = secagg_settings(config)
    if settings is None or not config.trains:
        return
    if text := _refusal(config, policy):
        raise ConfigError(f"{_WHAT} {text}")
    if config.clients_per_round < settings.min_group:
        raise ConfigError(
            f"{_WHAT} opens sums of privacy.min_group={settings.min_group} updates or more, but "
            f"clients_per_round={config.clients_per_round}; raise it, or lower privacy.min_group"
        )
    evaluation = config.evaluation
    if evaluation.name != "central" and (evaluation.clients or config.num_clients) < settings.min_group:
        raise ConfigError(
            f"{_WHAT} opens sums of privacy.min_group={settings.min_group} evaluations or more, but evaluation.clients="
            f"{evaluation.clients}; raise it"
        )
    fixed = FixedPoint(settings.bits, settings.value_range, config.clients_per_round)
    if fixed.fraction_bits < _LEAST_FRACTION_BITS:
        raise ConfigError(
            f"{_WHAT} leaves {fixed.fraction_bits} bits behind the point for privacy.value_range="
            f"{settings.value_range:g} and {config.clients_per_round} clients; lower the range, or set privacy.bits=64"
        )
    _check_groups(config, policy, settings)


def check_secure_pruning(config: FederatedPruneConfig) -> None:
    """Raise ConfigError, with the remedy, where secure aggregation cannot serve a federated one-shot pruning."""
    settings = secagg_settings(config)
    if settings is None:
        return
    has_halves = config.unit_selection == "server" and make_method(config.pruner).shrinks
    _check_answers(config, settings, config.clients_per_round, has_halves, "")


def check_secure_search(config: FederatedSearchConfig) -> None:
    """Raise ConfigError, with the remedy, where secure aggregation cannot serve a federated search."""
    settings = secagg_settings(config)
    if settings is not None:
        _check_answers(config, settings, config.clients_per_round, config.pruner.damping is None, "")


def check_secure_calibration(config: RunConfig, num_capable: int, has_halves: bool) -> None:
    """Raise ConfigError, with the remedy, where too few clients hold the whole model for secure sums of calibration."""
    settings = secagg_settings(config)
    if settings is not None:
        asked = min(config.clients_per_round, num_capable)
        _check_answers(config, settings, asked, has_halves, f" and {num_capable} clients hold the whole model")


def _check_answers(config: RunConfig, settings: SecAggSettings, asked: int, has_halves: bool, also: str) -> None:
    """Raise ConfigError where some clients, or each half of them, are too few for a group."""
    if asked < (2 if has_halves else 1) * settings.min_group:
        remedy = "raise it, or set pruner.damping=0.01" if has_halves else "raise it, or lower privacy.min_group"
        why = ", of two halves of the clients for pruner.damping=null" if has_halves else ""
        raise ConfigError(
            f"{_WHAT} opens sums of privacy.min_group={settings.min_group} answers or more{why}, but clients_per_round="
            f"{config.clients_per_round}{also}; {remedy}"
        )


def _refusal(config: RunConfig, policy: Policy) -> str:
    """Return the first option that sums cannot serve, and its remedy; empty if all can."""
    options, upload, aggregator = config.strategy.options, config.upload, config.aggregator
    rates = options.get("layer_preserving_rate", 1.0)
    if min(rates if isinstance(rates, list) else [rates]) < 1:
        return "needs strategy.layer_preserving_rate=1: draws give every client another index set"
    if options.get("unit_selection", "server") == "client":
        return "needs strategy.unit_selection=server: units that clients choose give each another index set"
    if aggregator.name != "coverage_average":
        return f"needs aggregator=coverage_average: aggregator={aggregator.name} looks at single updates"
    if upload.name != "float32" or upload.error_feedback:
        return "needs upload=float32 upload.error_feedback=false: masked values are integers already"
    if getattr(policy, "measures_statistics", False) or aggregator.batch_norm == "static":
        return (
            "needs aggregator.batch_norm=average or whole, or a model without batch norm: single clients send static "
            "statistics"
        )
    if config.fleet.extra_clients:
        return "needs fleet.extra_clients=0: a client that is left out has dealt shares already"
    return ""


def _check_groups(config: RunConfig, policy: Policy, settings: SecAggSettings) -> None:
    """Raise ConfigError for a group that is too small in the whole federation; warn where it often will be."""
    sizes: dict[tuple[object, ...], float] = defaultdict(float)
    names: dict[tuple[object, ...], str] = {}
    for case in policy.cases(range(config.num_clients)):
        widths = {axis: keep.count for axis, keep in case.submodel.widths.items()}
        depth = case.submodel.depth
        key: tuple[object, ...] = depth, tuple(sorted(widths.items()))
        sizes[key] += case.probability * config.num_clients
        names[key] = _describe(depth, widths)
    for key, size in sizes.items():
        if round(size) < settings.min_group:
            raise ConfigError(
                f"{_WHAT} opens sums of privacy.min_group={settings.min_group} updates or more, but {round(size)} of "
                f"{config.num_clients} clients hold {names[key]}; let more clients hold the same, or lower it"
            )
        expected = size * config.clients_per_round / config.num_clients
        if expected < settings.min_group:
            log.warning(
                "%s: a round has %.1f clients with %s on average; where there are fewer than privacy.min_group=%d "
                "their round is lost",
                *(_WHAT, expected, names[key], settings.min_group),
            )


def _describe(depth: int | None, widths: dict[str, int]) -> str:
    if depth is not None:
        return f"depth {depth}"
    if not widths:
        return "the whole model"
    first = sorted(widths)[0]
    return f"the sub-model with {widths[first]} units of {first}"
