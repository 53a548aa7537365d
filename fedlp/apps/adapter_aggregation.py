"""Aggregators of a run; those that combine a client's A and B need both, as values, with the first ranks."""

from __future__ import annotations

import math
from typing import Any

from fedlp.config import RunConfig
from fedlp.errors import ConfigError
from fedlp.federation.strategies.policy import Case, Policy
from fedlp.federation.strategies.self_pruned_ranks import RANKS, SelfPrunedRanks
from fedlp.federation.submodels import SubModels


def make_aggregator(config: RunConfig) -> Any:
    """Return the aggregator of a run."""
    return config.aggregator.make(adapter_scale=config.adapter.alpha / config.adapter.rank)


def with_self_pruning(config: RunConfig, policy: Policy, submodels: SubModels) -> Policy:
    """Return the policy, under which clients may cut ranks if the config says so; ConfigError if they cannot."""
    adapter = config.adapter
    if adapter.name == "none" or not adapter.self_pruning:
        return policy
    for holds, text in (
        (adapter.cut == "ranks", "cuts ranks of adapters: set adapter.cut=ranks"),
        (
            getattr(config.aggregator.target, "combines_adapters", False),
            "needs a server step for several ranks: set aggregator=hetlora, flexlora or flora",
        ),
        (0 < adapter.rank_decay < 1, f"needs adapter.rank_decay in (0, 1), not {adapter.rank_decay}"),
        (0 <= adapter.rank_penalty < math.inf, f"needs adapter.rank_penalty of at least 0, not {adapter.rank_penalty}"),
        (
            1 <= adapter.min_rank <= adapter.rank,
            f"needs adapter.min_rank in [1, {adapter.rank}], the rank, not {adapter.min_rank}",
        ),
        (
            not any(case.submodel.nested_levels for case in policy.cases(range(config.num_clients))),
            f"needs one rank per client and round, but strategy={config.strategy.name} trains several; choose heterofl",
        ),
    ):
        if not holds:
            raise ConfigError(f"adapter.self_pruning=true {text}")
    return SelfPrunedRanks(policy, submodels.widths.axes[RANKS], adapter.rank_decay, adapter.min_rank)


def check_adapter_aggregation(config: RunConfig, policy: Policy) -> None:
    """Raise ConfigError, with the remedy, where the aggregator combines adapters and updates do not hold them so."""
    if getattr(config.aggregator.target, "combines_adapters", False) and (text := _refusal(config, policy)):
        raise ConfigError(f"aggregator={config.aggregator.name} {text}")


def _refusal(config: RunConfig, policy: Policy) -> str:
    """Return why adapters cannot be combined, and what to do; empty if they can."""
    cases = policy.cases(range(config.num_clients))
    name = config.strategy.name
    optimizer = config.server_optimizer
    for holds, text in (
        (config.adapter.name != "none", "combines adapters, of which there are none: set adapter=lora"),
        (not config.adapter.freeze_a, "combines A and B, but adapter.freeze_a=true sends B alone: drop one of them"),
        (
            config.upload.values == "weights",
            "multiplies B and A: set upload.values=weights, since differences do not do",
        ),
        (config.rounds.name != "asynchronous", "needs updates of one model: drop rounds=asynchronous"),
        (
            getattr(optimizer.make(), "is_identity", False),
            f"takes no steps from an average: drop server_optimizer={optimizer.name}",
        ),
        (
            all(case.layer_preserving_rate == 1 and case.sent is None for case in cases),
            f"needs all that a client trains, but strategy={name} sends parts; choose fedavg or heterofl",
        ),
        (
            not getattr(policy, "rolls", False) and all(map(_has_first_ranks, cases)),
            f"needs clients with the first ranks, but strategy={name} gives others; choose heterofl",
        ),
    ):
        if not holds:
            return text
    return ""


def _has_first_ranks(case: Case) -> bool:
    keep = case.submodel.widths.get(RANKS)
    return keep is None or keep.runs == ((0, keep.count),)
