"""Policies of a model without budgets, as methods make them."""

from __future__ import annotations

from typing import Any, NoReturn

from fedlp.allocation.rules.uniform import Uniform
from fedlp.federation.strategies.policy import PolicyContext
from fedlp.federation.submodels import SubModels


def unlimited_policy(strategy: Any, seed: int, num_clients: int, submodels: SubModels) -> Any:
    """Return the policy of a strategy where no client has a budget, so that nothing is fitted to any."""

    def refuse(*_: object) -> NoReturn:
        raise AssertionError("nobody has a budget")

    return strategy.policy(
        PolicyContext(
            seed=seed,
            num_clients=num_clients,
            num_rounds=1,
            submodels=submodels,
            budgets=(None,) * num_clients,
            fit=refuse,
            layer_costs=refuse,
            allocator=Uniform(),
        )
    )
