"""Budgets of clients met by whole sub-models: each gets the largest that fits, of those that its strategy offers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from fedlp.allocation.costs import CostModel, given_limits, make_costs
from fedlp.config import LocalConfig
from fedlp.errors import ConfigError
from fedlp.federation.costs import Costs
from fedlp.federation.submodels import SubModels
from fedlp.pruning.activations import activation_footprint
from fedlp.pruning.footprint import Footprint, macs_footprint
from fedlp.pruning.groups import WidthSpec
from fedlp.types import Budget, SubModel

_NUMBER_BYTES = {"float32": 4.0, "bfloat16": 2.0, "int8": 1.0}

SubModelCosts = Mapping[str, float]  # by the limits' names in ``Budget``
_BYTES = 4
_COPIES = {"sgd": 2, "momentum": 3, "adam": 4}  # of the weights: themselves, gradients, the optimiser's state


def submodel_costs(submodel: SubModel, submodels: SubModels, costs: Costs, local: LocalConfig) -> dict[str, float]:
    """Return what a client needs for one sub-model: numbers, forward MACs, bytes in training and of an upload."""
    params = submodels.layout(submodel).num_params()
    optimizer = optimizer_kind(local)
    model = costs.model(submodel)
    trained = sum(parameter.numel() for parameter in model.parameters())  # a personal head is trained, and stays
    activations = activation_footprint(model, WidthSpec({}, {}), submodels.spec.example_inputs(1)).count({})
    return {
        "params": float(params),
        "macs": costs.macs(submodel).forward,
        "memory_bytes": float(_BYTES * _COPIES[optimizer] * trained) + local.batch_size * activations,
        "upload_bytes": float(_BYTES * params),
    }


def layer_costs(submodels: SubModels, local: LocalConfig, encoding: str) -> CostModel:
    """Return what any choice of units of the prunable layers costs a client."""
    model, inputs, axes = submodels.skeleton(), submodels.spec.example_inputs(1), [x.name for x in submodels.layers]
    return make_costs(
        submodels.layers,
        Footprint(model, submodels.widths).terms(axes),
        macs_footprint(model, submodels.widths, inputs).terms(axes),
        activation_footprint(model, submodels.widths, inputs).terms(axes),
        local.batch_size,
        optimizer_kind(local),
        upload_bytes_per_number=_NUMBER_BYTES[encoding],
    )


def optimizer_kind(local: LocalConfig) -> str:
    """Return what decides how much an optimiser keeps: "sgd", "momentum" or "adam"."""
    return "adam" if local.optimizer == "adam" else "momentum" if local.momentum else "sgd"


def fit_submodels(
    budgets: Sequence[Budget | None],
    offers: Sequence[SubModel],
    cost: Callable[[SubModel], SubModelCosts],
    strategy: str,
) -> tuple[int, ...]:
    """Return which offer each client gets: the last that meets all limits of its budget, the last of all without one.

    Parameters
    ----------
    offers : sequence of SubModel
        From the smallest to the largest.

    Raises
    ------
    ConfigError
        If even the smallest is too much for a client; names client, limit and what it would need.
    """
    found: dict[Budget | None, int] = {}
    needed = [cost(offer) for offer in offers] if any(budget is not None for budget in budgets) else []
    for client_id, budget in enumerate(budgets):
        if budget not in found:
            limits = given_limits(budget)
            fitting = [i for i in range(len(offers)) if all(needed[i][name] <= limit for name, limit in limits)]
            if not fitting:
                name, limit = next((name, limit) for name, limit in limits if needed[0][name] > limit)
                raise ConfigError(
                    f"client {client_id} has a budget of {limit:,.0f} {name}, but the smallest sub-model that strategy "
                    f"{strategy} offers needs {needed[0][name]:,.0f}; offer smaller ones (strategy.widths) or choose "
                    "another fleet"
                )
            found[budget] = fitting[-1]
    return tuple(found[budget] for budget in budgets)
