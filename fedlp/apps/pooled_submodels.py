"""Pruning of clients' sub-models on moments pooled from clients: the server needs no data.

Clients whose budgets hold the whole model send second moments of each layer's inputs on their own examples, layer by
layer, through the model pruned so far: the machinery of ``strategy=oneshot``, once for each kind of client. Sums over
clients are those over all their examples in one place, so sub-models are the centrally pruned ones to float tolerance.
Where the global model is not the initial one any more, these clients are sent it first. All bytes count.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from fedlp.apps.secagg_check import secagg_settings
from fedlp.apps.submodel_pruning import CalibratedPruner
from fedlp.config import RunConfig
from fedlp.errors import ConfigError
from fedlp.federation.oneshot.pooled_pruner import PooledPruner, check_pooled
from fedlp.federation.oneshot.server import ClientPool
from fedlp.federation.oneshot.settings import OneShotSettings
from fedlp.federation.server.roster import Roster
from fedlp.federation.submodels import SubModels
from fedlp.federation.wire.digests import digest_tensors
from fedlp.models import state_tensors
from fedlp.models.cost import count_macs
from fedlp.pruning.pruner import Calibration, LayerReport, Method, Pruned, Pruner
from fedlp.rng import Stream, torch_seed
from fedlp.simulation.flower_apps import Grid
from fedlp.types import RoundRecord

_REFERENCE_EXAMPLES = 8  # random inputs, whose means clients measure their own inputs from


class PooledSubModelPruner(CalibratedPruner):
    """Prunes the global model on moments of the clients that hold the whole of it.

    Parameters
    ----------
    settings : OneShotSettings
        As clients have them; the method is one that :func:`pooled_method` returned.
    capable : callable
        Returns the clients whose budgets hold the whole model.
    """

    asks_clients = True

    def __init__(
        self, submodels: SubModels, settings: OneShotSettings, rule: Any, capable: Callable[[], Collection[int]]
    ) -> None:
        super().__init__(submodels, settings.method, rule, lambda: Calibration([], []), settings.device)
        self._settings, self._capable = settings, capable
        self._grid: Grid | None = None
        self._roster = Roster(0)
        self._pools: list[ClientPool] = []
        self._params: Mapping[str, Tensor] = {}
        self._initial = b""
        self._dismissed: set[int] = set()  # clients that dealt false shares

    def connect(self, grid: Grid, roster: Roster) -> None:
        """Take the clients to ask."""
        self._grid, self._roster = grid, roster

    def spent(self) -> list[RoundRecord]:
        """Return a record of the questions of each time since the last call."""
        records = [pool.finish({}, {}, 0.0) for pool in self._pools]
        self._pools = []
        return records

    def _measuring(self, method: Method) -> Method:
        """Return a method for evidence whose sums are those that clients send."""
        if not self._method.needs_moments:
            return self._method
        return replace(method, correction=self._method.correction)

    def _run(self, pruner: Pruner, kept: Mapping[str, int]) -> Pruned:
        assert isinstance(pruner, PooledPruner)
        numbers = {layer.name: number for number, layer in enumerate(self._submodels.layers)}

        def note(report: LayerReport) -> None:
            if report.kept_units < report.num_units or pruner.method.corrects:
                pruner.states.note(numbers[report.name])

        return pruner.prune(kept, note)

    def _model(self, params: Mapping[str, Tensor]) -> nn.Module:
        self._params = params
        return super()._model(params)

    def _pruner(self, model: nn.Module, method: Method) -> Pruner:
        submodels = self._submodels
        example = submodels.spec.example_inputs(_REFERENCE_EXAMPLES).to(self._device)
        seed = torch_seed(self._settings.seed, Stream.CALIBRATION, 1)
        return PooledPruner(model, submodels.widths, submodels.layers, method, self._pool(model), example, seed)

    def _pool(self, model: nn.Module) -> ClientPool:
        """Return the clients to ask, with the model in their hands."""
        assert self._grid is not None
        capable = sorted(set(self._capable()) & set(self._roster.client_ids) - self._dismissed)
        if not capable:
            raise ConfigError(
                "strategy.calibrate_on=clients, but no client's budget holds the whole model, through which inputs are "
                "measured; give the server examples (dataset.server) and set strategy.calibrate_on=server"
            )
        macs = count_macs(model, self._submodels.spec.example_inputs(1)).forward * (1 + self._method.corrects)
        axes = tuple(self._submodels.widths.axes)
        pool = ClientPool(self._grid, self._roster, self._settings, axes, macs, capable)
        self._pools.append(pool)
        pool.dismissed = self._dismissed
        if not self._initial:
            self._initial = digest_tensors(state_tensors(self._submodels.spec.build(self._settings.seed)))
        if digest_tensors(self._params) != self._initial:
            pool.send_model({name: self._params[name] for name in self._submodels.names})
        return pool


def pooled_settings(config: RunConfig, method: Method) -> OneShotSettings:
    """Return the settings of calibration on clients' sums."""
    return OneShotSettings(
        method=method,
        seed=config.seed,
        device=config.device,
        clients_per_round=config.clients_per_round,
        timeout_s=config.simulation.round_timeout_s,
        examples=config.calibration.examples,
        batch_size=config.calibration.batch_size,
        shared=True,
        secagg=secagg_settings(config),
    )


def pooled_method(method: Method, submodels: SubModels) -> Method:
    """Return the method that server and clients use: without biases where some reader has no place for one."""
    check_pooled(method.score)
    method = replace(method, keeps_batch_norm=True)
    example = Calibration([submodels.spec.example_inputs(1)], [], 0)
    probe = replace(method, fisher=False, correction=0.0)
    found = Pruner(submodels.skeleton().eval(), submodels.widths, submodels.layers, example, probe)
    return replace(method, centred=False) if found.num_added_params() else method
