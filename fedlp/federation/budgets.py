"""Budgets met by whole sub-models: each client gets the largest one offered by its strategy that fits."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path

import torch
import yaml
from torch import Tensor, nn

from fedlp.allocation.budget.costs import CostModel, LatencyTable, given_limits, make_costs
from fedlp.config import LocalConfig
from fedlp.errors import AllocationError, ConfigError, DataError, one_line
from fedlp.federation.costs import Costs
from fedlp.federation.submodels import SubModels
from fedlp.federation.wire.encoded_tensors import widened_entries
from fedlp.federation.wire.encodings import Encoding, encoded_bytes
from fedlp.federation.wire.ranges import LARGEST_COST, read_number, show
from fedlp.models.adapters import has_adapters
from fedlp.models.encoded_base import WIDENING_BYTES, encodable
from fedlp.models.spec import named_tensors
from fedlp.pruning.costs.activations import activation_footprint
from fedlp.pruning.costs.footprint import Footprint, macs_footprint
from fedlp.pruning.tracing.widths import WidthSpec
from fedlp.types import Budget, SubModel

SubModelCosts = Mapping[str, float]  # by the limits' names in ``Budget``
_BYTES = 4
_COPIES = {"sgd": 2, "momentum": 3, "adam": 4}  # of the weights: themselves, gradients, the optimizer's state
_RECEIVED = 1  # the received message, held to the end of the round


def submodel_costs(
    submodel: SubModel, submodels: SubModels, costs: Costs, local: LocalConfig, base: Encoding | None = None
) -> dict[str, float]:
    """Return a client's costs of one sub-model: parameters, forward MACs, bytes in training and of an upload.

    Parameters
    ----------
    base : Encoding, optional
        Encoding in which frozen weights are held; float32 if absent.
    """
    layout = submodels.layout(submodel)
    params = layout.num_params()
    frozen = sum(math.prod(shape) for name, shape, _ in layout.signature() if name in submodels.spec.frozen)
    optimizer = optimizer_kind(local)
    model = costs.model(submodel)
    held = trained = sum(parameter.numel() for parameter in model.parameters())  # a personal head is trained, and stays
    if has_adapters(model):
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    activations = activation_footprint(model, WidthSpec({}, {}), submodels.spec.example_inputs(1)).count({})
    encoded, in_base = 0.0, 0
    if base is not None:
        shapes = base_shapes(model, submodels)
        signature = base.signature(tuple((name, shape, torch.float32) for name, shape in shapes.items()))
        encoded = sum(math.prod(shape) * dtype.itemsize for _, shape, dtype in signature) + _widening(base, shapes)
        encoded += _LAST_BLOCK * len(shapes)  # so that a budget of the whole model holds it by :func:`layer_costs`, too
        in_base = sum(map(math.prod, shapes.values()))
    return {
        "params": float(params + frozen),
        "macs": costs.macs(submodel).forward,
        "memory_bytes": float(_BYTES * ((1 + _RECEIVED) * (held - in_base) + (_COPIES[optimizer] - 1) * trained))
        + encoded
        + local.batch_size * activations,
        "upload_bytes": float(_BYTES * params),
    }


def base_shapes(model: nn.Module, submodels: SubModels) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the frozen weights of a model that can stay encoded."""
    tensors = named_tensors(model)
    return {name: tuple(tensors[name].shape) for name in sorted(encodable(model, submodels.spec.frozen))}


def _widening(base: Encoding, shapes: Mapping[str, tuple[int, ...]]) -> float:
    """Return the bytes of the rows of the largest weight that are widened at once."""
    return WIDENING_BYTES * max((widened_entries(base, *shape) for shape in shapes.values()), default=0)


def layer_costs(
    submodels: SubModels, local: LocalConfig, encoding: Encoding, base: Encoding | None = None
) -> CostModel:
    """Return the client's cost model over units of the prunable layers; ``base`` as of :func:`submodel_costs`."""
    trained = {name: 1.0 for name, info in submodels.spec.tensors.items() if info.trainable}
    model, inputs, axes = submodels.skeleton(), submodels.spec.example_inputs(1), [x.name for x in submodels.layers]
    return make_costs(
        submodels.layers,
        Footprint(model, submodels.widths).terms(axes),
        macs_footprint(model, submodels.widths, inputs).terms(axes),
        activation_footprint(model, submodels.widths, inputs).terms(axes),
        local.batch_size,
        optimizer_kind(local),
        upload_footprint(model, submodels.widths, encoding).terms(axes),
        trained=Footprint(model, submodels.widths, trained).terms(axes) if has_adapters(model) else None,
        received=_RECEIVED,
        held_bytes=None if base is None else _held_footprint(model, submodels, base).terms(axes),
    )


def _held_footprint(model: nn.Module, submodels: SubModels, base: Encoding) -> Footprint:
    """Return the bytes of weights, and of the received ones, where frozen weights stay encoded; rounded up."""
    spec, shapes, tensors = submodels.widths, base_shapes(model, submodels), named_tensors(model)
    encoded = {name: tensors[name] for name in shapes}
    plain = {name: float(_BYTES * (1 + _RECEIVED)) for name in tensors if name not in shapes}
    costs = {name: encoded_bytes(shape, torch.float32, base) for name, shape in shapes.items()}
    footprint = Footprint(model, spec, plain | {name: per_entry for name, (per_entry, _) in costs.items()})
    _add_rows(footprint, encoded, costs, spec)
    footprint.add(None, _LAST_BLOCK * len(shapes) + _widening(base, shapes))
    return footprint


_LAST_BLOCK = 4  # most bytes by which a last block that is not full exceeds its entries' share


def upload_footprint(model: nn.Module, spec: WidthSpec, encoding: Encoding) -> Footprint:
    """Return the upload bytes of a model's parameters: a polynomial in the units sent."""
    parameters = {name: tensor for name, tensor in named_tensors(model).items() if tensor.requires_grad}
    costs = {name: encoded_bytes(tensor.shape, tensor.dtype, encoding) for name, tensor in parameters.items()}
    footprint = Footprint(model, spec, {name: per_entry for name, (per_entry, _) in costs.items()})
    _add_rows(footprint, parameters, costs, spec)
    return footprint


def _add_rows(
    footprint: Footprint, tensors: Mapping[str, Tensor], costs: Mapping[str, tuple[float, float]], spec: WidthSpec
) -> None:
    """Add the bytes of rows, beside those of their entries."""
    for name, (_, per_row) in costs.items():
        if per_row:
            axis = spec.dims[name][0].axis if name in spec.dims else None
            per_unit = per_row * len(tensors[name]) / (1 if axis is None else spec.axes[axis])
            footprint.add(axis, per_unit, spec.branch_of.get(name))


def optimizer_kind(local: LocalConfig) -> str:
    """Return the kind of optimizer state: "sgd" (none), "momentum" (one copy of the weights) or "adam" (two).

    Any other optimizer counts as Adam; FedProx keeps a copy of the initial weights of the round.
    """
    copies = (2 if local.optimizer != "sgd" else bool(local.momentum)) + bool(local.proximal)
    return ("sgd", "momentum", "adam")[min(copies, 2)]


def fit_submodels(
    budgets: Sequence[Budget | None],
    offers: Sequence[SubModel],
    cost: Callable[[SubModel], SubModelCosts],
    strategy: str,
) -> tuple[int, ...]:
    """Return the index of each client's offer: the last that meets its budget; the last of all without one.

    Parameters
    ----------
    offers : sequence of SubModel
        From the smallest to the largest.

    Raises
    ------
    ConfigError
        If the smallest exceeds a client's budget; names client, limit and its cost.
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


def read_budget(path: Path) -> Budget | None:
    """Return the budget in a file of ``fedlp-profile``, None if it limits nothing.

    The file, YAML or JSON, holds fields of :class:`~fedlp.types.Budget`. A limit on seconds becomes one on MACs by
    the device's measurements in ``profile.json`` beside the file: the server needs none.

    Raises
    ------
    DataError
        If a file is absent or invalid; names it.
    """
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise DataError(f"the budget {path} cannot be read: {one_line(error)}") from error
    names = [item.name for item in fields(Budget)]
    if not isinstance(found, dict) or not found.keys() <= set(names):
        raise DataError(f"the budget {path} must hold limits on {', '.join(names)}, and nothing else")
    limits = {name: value for name, value in found.items() if value is not None}
    for name, value in limits.items():
        if read_number(value, 0.0, LARGEST_COST) in (None, 0.0):
            raise DataError(
                f"the budget {path} has {name}={show(value)}; a limit is a number above 0 and up to {LARGEST_COST:g}"
            )
    budget = Budget(**{name: float(value) for name, value in limits.items()})
    if budget.latency_s is not None:
        macs = _measured(path.with_name("profile.json"), "macs", "a limit on latency_s needs the device's").most_macs(
            budget.latency_s
        )
        budget = replace(budget, macs=min(macs, budget.macs or math.inf), latency_s=None)
    return None if budget == Budget() else budget


def read_steps(path: Path) -> LatencyTable:
    """Return seconds of a training step by its multiply-accumulates, forward and backward, from ``profile.json``.

    Raises
    ------
    DataError
        If the file is absent or invalid; names it.
    """
    return _measured(path, "step_macs", "fleet.devices: a profile needs the device's")


def _measured(path: Path, column: str, what: str) -> LatencyTable:
    """Return the seconds of a step that ``fedlp-profile`` measured, by a column of its report."""
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        return LatencyTable(tuple(map(float, report[column])), tuple(map(float, report["step_s"])))
    except (OSError, ArithmeticError, ValueError, LookupError, TypeError, AllocationError) as error:
        raise DataError(f"{what} {path}, which cannot be read: {one_line(error)}") from error
