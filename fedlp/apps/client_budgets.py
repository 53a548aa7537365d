"""Budgets of clients, and the clients whose budgets hold the whole model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from fedlp.allocation.budget.costs import given_limits
from fedlp.config import RunConfig
from fedlp.errors import ConfigError
from fedlp.federation.fleet import fleet_budgets
from fedlp.types import Budget

Whole = Callable[[], Mapping[str, float]]
"""Returns the costs of the whole model, by limit; called where they are needed."""


def client_budgets(config: RunConfig, brought: Mapping[int, Budget], whole: Whole) -> list[Budget | None]:
    """Return every client's budget: its device's own, else its fleet's; None for no limit."""
    budgets: list[Budget | None] = [None] * config.num_clients
    if config.fleet.fractions or config.fleet.devices:
        budgets = list(fleet_budgets(config.fleet, config.num_clients, config.seed, whole()))
    for client_id, budget in brought.items():
        budgets[client_id] = budget
        if config.privacy.name == "local_dp" and budget.upload_bytes is not None:
            raise ConfigError(
                f"client {client_id} brought a limit on uploads, but privacy={config.privacy.name} needs all units "
                "back; take upload_bytes out of its budget"
            )
    return budgets


def holders_of_all(budgets: Sequence[Budget | None], whole: Whole) -> set[int]:
    """Return the clients whose budgets hold the whole model; uploads do not count."""
    costs = whole() if any(budget is not None for budget in budgets) else {}
    return {
        client_id
        for client_id, budget in enumerate(budgets)
        if all(costs[name] <= limit for name, limit in given_limits(budget) if name in costs and name != "upload_bytes")
    }


def kept_apart(config: RunConfig, budgets: Sequence[Budget | None], whole: Whole) -> set[int]:
    """Return the clients that ``fleet.only_whole`` keeps out; ConfigError if these are all."""
    if not config.fleet.only_whole:
        return set()
    costs = whole()
    apart = {i for i, budget in enumerate(budgets) if any(costs[name] > limit for name, limit in given_limits(budget))}
    if len(apart) == config.num_clients:
        raise ConfigError("fleet.only_whole=true, but no client's budget holds the whole model")
    return apart
