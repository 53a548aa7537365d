"""Pruning of clients' sub-models on the server, calibrated on the server's data set."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from fedlp.allocation.evidence import NEEDS, Evidence, needs_of
from fedlp.apps.model_allocator import Allocator
from fedlp.config import RunConfig
from fedlp.data.datasets import DataInfo, Examples
from fedlp.errors import ConfigError, DataError
from fedlp.federation.submodels import SubModels
from fedlp.models import state_tensors
from fedlp.models.adapters import merge_adapters
from fedlp.pruning.costs.footprint import Footprint
from fedlp.pruning.pruner import Calibration, Method, Pruned, Pruner
from fedlp.rng import Stream, torch_seed
from fedlp.training.calibration_data import batch_calibration, whole_examples
from fedlp.training.threads import one_thread
from fedlp.types import Keep, SubModel

log = logging.getLogger("fedlp")

_ATTRIBUTES = {"model": "statistics"}  # of Evidence, by need; the others are called like the need


class CalibratedPruner:
    """Pruning of the global model on calibration examples of the server.

    Parameters
    ----------
    method : Method
        Score and recovery. Readers get no bias where the global model has no place for one.
    rule : AllocationRule
        Rule whose needs select the measured evidence.
    calibration : callable
        Returns the examples; called when they are first needed.
    device : str
    """

    asks_clients = False

    def __init__(
        self,
        submodels: SubModels,
        method: Method,
        rule: Any,
        calibration: Callable[[], Calibration],
        device: str = "cpu",
    ) -> None:
        self._submodels, self._rule, self._device = submodels, rule, torch.device(device)
        self._method = replace(method, keeps_batch_norm=True)
        self._calibration = cache(calibration)

    def evidence(self, params: Mapping[str, Tensor]) -> Evidence:
        """Return the global model's evidence for allocation rules, measured on first use."""
        measures = bool(needs_of(self._rule) & {"error_curves", "model"})
        damping = self._method.damping
        method = Method(fisher=True, damping=damping, keeps_batch_norm=True) if measures else Method()
        method = self._measuring(method)

        @cache
        def measured() -> Evidence:
            model = self._model(params)
            cost = Footprint(model, self._submodels.widths).count
            return Allocator(self._pruner(model, method), cost).evidence

        def supply(need: str) -> Any:
            with one_thread():
                return getattr(measured(), _ATTRIBUTES.get(need, need))

        return Evidence(self._submodels.layers, 0.5, **{need: lambda need=need: supply(need) for need in NEEDS})

    def prune(
        self, params: Mapping[str, Tensor], kept: Mapping[str, int]
    ) -> tuple[Mapping[str, Keep], Mapping[str, Tensor]]:
        """Return the kept units of each layer, and the differences of refitted from global values."""
        with one_thread():
            model = self._model(params)
            pruner = self._pruner(model, self._method)
            if pruner.num_added_params():
                pruner = self._pruner(model, replace(self._method, centred=False))
            pruned = self._run(pruner, kept)
        narrow = {axis: keep for axis, keep in pruned.widths.items() if not keep.is_full}
        plain = self._submodels.layout(SubModel(widths=narrow)).slice(state_tensors(model))
        statistics = self._submodels.statistics
        return pruned.widths, {
            name: (tensor - plain[name]).cpu()
            for name, tensor in state_tensors(pruned.model).items()
            if tensor.is_floating_point() and name not in statistics
        }

    def _measuring(self, method: Method) -> Method:
        """Return the method that evidence is measured by."""
        return method

    def _run(self, pruner: Pruner, kept: Mapping[str, int]) -> Pruned:
        """Return the pruned model."""
        return pruner.prune(kept)

    def _pruner(self, model: nn.Module, method: Method) -> Pruner:
        return Pruner(model, self._submodels.widths, self._submodels.layers, self._calibration(), method)

    def _model(self, params: Mapping[str, Tensor]) -> nn.Module:
        """Return the global model with its values, adapters merged into them."""
        model = self._submodels.skeleton()
        for name, tensor in state_tensors(model).items():
            tensor.copy_(params[name])
        return merge_adapters(model).eval().to(self._device)


def first_examples(
    train: Examples, info: DataInfo, count: int, batch_size: int, seed: int, device: str, own: bool = False
) -> Calibration:
    """Return the first whole examples, prepared; DataError if there are fewer.

    Parameters
    ----------
    own : bool
        Whether they are the server's own; else clients hold them too, and a warning says so.
    """
    whole = whole_examples(train, info)
    if count > len(whole):
        raise DataError(f"calibration.examples={count}, but the server has {len(whole)} whole examples; lower it")
    if not own:
        log.warning(
            "sub-models are pruned on the first %d training examples of the server's copy of the data, which in a "
            "simulation clients hold too",
            count,
        )
    chosen = whole.select(torch.arange(count).numpy())
    return batch_calibration(chosen, info, batch_size, torch_seed(seed, Stream.CALIBRATION, 1), torch.device(device))


def check_pooled_calibration(config: RunConfig) -> None:
    """Raise ConfigError for options that calibration on clients' sums does not go with."""
    if config.privacy.name not in ("none", "secagg"):
        raise ConfigError(
            f"strategy.calibrate_on=clients does not go with privacy={config.privacy.name}: clients send sums over "
            "their inputs, which privacy=secagg alone protects"
        )
    for option, is_set in (("adapter=lora", config.adapter.name != "none"), ("pruner.depth=true", config.pruner.depth)):
        if is_set:
            raise ConfigError(
                f"strategy.calibrate_on=clients does not go with {option}; set strategy.calibrate_on=server (and "
                "dataset.server, if the data are on devices), or strategy.submodels=slices"
            )


def check_adapters(config: RunConfig) -> None:
    """Raise ConfigError for options that read trained weights, which adapters leave unchanged."""
    if config.adapter.name == "none":
        return
    options = config.strategy.options
    if options.get("compensate") or options.get("criterion") == "update":
        raise ConfigError("adapter=lora does not go with strategy.compensate=true or strategy.criterion=update")
