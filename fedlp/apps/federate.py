"""Composition root of a federated run: config in, objects out.

Longer than other files: the objects are made on first use, each from others.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedlp.apps.adapter_aggregation import check_adapter_aggregation, make_aggregator, with_self_pruning
from fedlp.apps.client_budgets import client_budgets, holders_of_all, kept_apart
from fedlp.apps.download_check import check_base, check_download
from fedlp.apps.engines import open_grid
from fedlp.apps.evaluation_check import check_evaluation, refuse_simulation
from fedlp.apps.pooled_submodels import PooledSubModelPruner, pooled_method, pooled_settings
from fedlp.apps.privacy_check import check_privacy
from fedlp.apps.privacy_ledger import PrivacyLedger, make_central_privacy, make_ledger
from fedlp.apps.resumption import check_fits, load_state
from fedlp.apps.round_keeping import RoundKeeper, check_metrics, check_trained
from fedlp.apps.run_settings import client_evaluation_settings, client_settings, make_download, round_settings
from fedlp.apps.secagg_check import check_secagg, check_secure_calibration
from fedlp.apps.strategy_kind import check_rounds, make_strategy
from fedlp.apps.submodel_pruning import (
    CalibratedPruner,
    check_adapters,
    check_pooled_calibration,
    first_examples,
)
from fedlp.apps.tier_table import describe_budgets, describe_tiers
from fedlp.config import RunConfig, to_plain, to_yaml
from fedlp.data.datasets import FederatedData, Loaded, Reader, make_reader
from fedlp.data.device_data import OwnPlace, describe_for_devices, load_at, reader_at
from fedlp.data.examples import Rows, no_examples
from fedlp.data.partition import partition_examples
from fedlp.errors import ConfigError, DataError, EvaluationError
from fedlp.federation.budgets import fit_submodels, layer_costs, submodel_costs
from fedlp.federation.client.runtime import ClientRuntime
from fedlp.federation.client.settings import ClientSettings
from fedlp.federation.client.shards import Shards
from fedlp.federation.client.store import ClientStore
from fedlp.federation.costs import Costs, expected_costs
from fedlp.federation.fleet import fleet_kinds, tier_names
from fedlp.federation.oneshot import costs as oneshot_costs
from fedlp.federation.oneshot.settings import OneShotSettings
from fedlp.federation.server.checkpoint import ServerState
from fedlp.federation.server.frozen_tensors import EncodedDownlink
from fedlp.federation.server.run_directory import RunDirectory
from fedlp.federation.server.strategy import FedLPStrategy, Observer
from fedlp.federation.strategies.policy import Policy, PolicyContext, Strategy, client_options
from fedlp.federation.submodels import SubModels
from fedlp.federation.wire import messages
from fedlp.federation.wire.encodings import Encoding
from fedlp.models import adapted, describe_model, state_tensors
from fedlp.models.blueprint import Blueprint
from fedlp.models.spec import describe_blueprint
from fedlp.pruning.pruner import Calibration
from fedlp.report.trackers import tracking
from fedlp.simulation.flower_apps import Grid
from fedlp.simulation.starting import refuse_unguarded
from fedlp.tasks import task_of, with_task
from fedlp.training.calibration_data import make_method
from fedlp.training.loop import check_loss
from fedlp.types import Budget, SubModel

log = logging.getLogger("fedlp")


class Federation:
    """One federated run before its first round: model, data, policy and costs, each made on first use.

    Parameters
    ----------
    config : RunConfig
    blueprint : Blueprint, optional
        Model of one's own, in place of the config's.
    data : FederatedData, optional
        Data of one's own, in place of the config's.
    parts : sequence of (n_k,) arrays, optional
        Indices of each client's training examples, in place of the config's partition.
    """

    def __init__(
        self,
        config: RunConfig,
        *,
        blueprint: Blueprint | None = None,
        data: FederatedData | None = None,
        parts: Sequence[NDArray[np.int64]] | None = None,
    ) -> None:
        self._read = _reader(config) if data is None else Loaded(data)
        self.own_blueprint = blueprint
        self._facts = describe_for_devices(config.dataset) if config.dataset.on_devices else self._read.describe()
        self.info = with_task(self._facts, config.task.make())
        info = self.info
        if blueprint is None:
            shape = info.input_shape
            spec = describe_model(config.model, shape, info.num_classes, info.task, info.vocabulary, config.adapter)
        else:
            frozen, shape = config.model.frozen, info.input_shape
            blueprint = adapted(blueprint, config.adapter)
            spec = describe_blueprint(blueprint, info.task, shape, info.num_classes, frozen, info.vocabulary)
        check_loss(config.local, info)
        check_metrics(config, task_of(info))
        self.submodels = SubModels(spec, config.pruner.depth)
        self._check(config)
        self.costs = Costs(self.submodels)
        self.strategy: Strategy = config.strategy.make()
        self.config = self._with_length(config)
        self._parts = None if parts is None else tuple(parts)
        self._has_own_data = data is not None
        self._runtimes: dict[tuple[str, OwnPlace | None], ClientRuntime] = {}
        self._apart: set[int] = set()  # clients that only_whole keeps out
        self._capable: set[int] = set()  # clients whose budgets hold the whole model
        self.policy = self.fit({})
        check_secagg(config, self.policy)
        check_base(config, self.policy)
        check_adapter_aggregation(config, self.policy)
        if self.pooled is not None:
            check_secure_calibration(config, len(self._capable), self.pooled.method.shrinks)

    def _check(self, config: RunConfig) -> None:
        """Raise ConfigError for options that do not go together."""
        check_rounds(config)
        check_privacy(config, self.submodels)
        check_adapters(config)
        check_evaluation(config)
        check_download(config, self.submodels)

    def _with_length(self, config: RunConfig) -> RunConfig:
        """Return the config with its number of rounds."""
        return config

    def initial_params(self) -> dict[str, Any]:
        """Return the tensors of the initial global model."""
        return dict(state_tensors(self.submodels.spec.build(self.config.seed)))

    @cached_property
    def data(self) -> FederatedData:
        """The data set; DataError if devices hold it."""
        if self.config.dataset.on_devices:
            raise DataError("dataset.on_devices=true: the training data are on the devices")
        return replace(self._read.load(self.config.seed), info=self.info)

    @cached_property
    def server_data(self) -> FederatedData:
        """Data of the server: its own test set, and no training data if devices bring their own."""
        if not self.config.dataset.on_devices:
            return self.data
        place, test = self.config.dataset.server, no_examples()
        if place is not None:
            test = load_at(self.config.dataset, place, self._facts, self.config.seed)
        return FederatedData(self.info, no_examples(), test)

    @cached_property
    def parts(self) -> tuple[NDArray[np.int64], ...]:
        """Indices of each client's training examples."""
        if self._parts is not None:
            return self._parts
        config = self.config
        kinds = fleet_kinds(config.fleet, config.num_clients, config.seed)
        return partition_examples(config.partition, self.data.train, config.num_clients, config.seed, kinds)

    @cached_property
    def pooled(self) -> OneShotSettings | None:
        """Settings of the calibration of sub-models on clients' sums; None where the server has examples."""
        config, options = self.config, self.config.strategy.options
        may_prune = self.submodels.spec.blueprint.is_pretrained
        asked = options.get("submodels", "slices")
        if not (asked == "pruned" or (asked is None and may_prune)):
            return None
        has_data = not config.dataset.on_devices or config.dataset.server is not None
        asked = options.get("calibrate_on") or ("server" if has_data else "clients")
        if asked == "server" and not has_data:
            raise ConfigError("strategy.calibrate_on=server needs dataset.server: the training data are on the devices")
        if asked == "server":
            return None
        check_pooled_calibration(config)
        return pooled_settings(config, pooled_method(make_method(config.pruner), self.submodels))

    @cached_property
    def pruner(self) -> CalibratedPruner:
        """Pruning of sub-models on the server's examples, read on first use, or on clients' sums."""
        config, wanted = self.config, self.config.calibration
        if self.pooled is not None:
            return PooledSubModelPruner(self.submodels, self.pooled, config.allocator.make(), lambda: self._capable)

        def calibration() -> Calibration:
            own = config.dataset.on_devices
            train = self.server_data.test if own else self.data.train
            return first_examples(train, self.info, wanted.examples, wanted.batch_size, config.seed, config.device, own)

        method = make_method(config.pruner)
        return CalibratedPruner(self.submodels, method, config.allocator.make(), calibration, config.device)

    @property
    def base_encoding(self) -> Encoding | None:
        """Encoding in which clients hold the base of adapters; None for float32."""
        return self.config.download.make() if self.config.adapter.base == "encoded" else None

    def fit(self, brought: Mapping[int, Budget]) -> Policy:
        """Return the policy that meets every client's budget: its device's own, else its fleet's."""
        config, submodels = self.config, self.submodels
        encoding: Encoding = config.upload.make()

        def cost(submodel: SubModel) -> dict[str, float]:
            return submodel_costs(submodel, submodels, self.costs, config.local, self.base_encoding)

        def whole() -> Mapping[str, float]:
            return cost(SubModel())

        budgets = self._budgets = client_budgets(config, brought, whole)
        self._capable = holders_of_all(budgets, whole)
        self._apart = kept_apart(config, budgets, whole)
        taking_part = [None if i in self._apart else budget for i, budget in enumerate(budgets)]
        context = PolicyContext(
            sends_deltas=config.upload.values == "deltas",
            pruner=self.pruner,
            seed=config.seed,
            num_clients=config.num_clients,
            num_rounds=config.num_rounds,
            submodels=submodels,
            budgets=tuple(budgets),
            fit=lambda offers: fit_submodels(taking_part, offers, cost, config.strategy.name),
            layer_costs=lambda: layer_costs(submodels, config.local, encoding, self.base_encoding),
            allocator=config.allocator.make(),
            batch_norm=config.aggregator.batch_norm,
            scores_units=bool(make_method(config.pruner).score.needs),
            is_pretrained=submodels.spec.blueprint.is_pretrained,
        )
        return with_self_pruning(config, self._with_batch_norm(context), submodels)

    def takes_part(self, client_id: int) -> bool:
        """Return whether a client may be sampled."""
        return client_id not in self._apart

    def _with_batch_norm(self, context: PolicyContext) -> Policy:
        """Return the strategy's policy; "auto" batch norms are static where some clients hold narrow sub-models."""
        if context.batch_norm != "auto":
            return self.strategy.policy(context)
        policy = self.strategy.policy(replace(context, batch_norm="average"))
        if not self.submodels.statistics:
            return policy
        if not any(case.submodel.widths for case in policy.cases(range(self.config.num_clients))):
            return policy
        return self.strategy.policy(replace(context, batch_norm="static"))

    def expected(self) -> dict[str, float]:
        """Return the expected cost of one client in one round."""
        config = self.config
        cases = self.policy.cases(range(config.num_clients))
        upload, params = config.upload, self.initial_params()
        downlink = EncodedDownlink(self.submodels, make_download(config), config.seed)
        return expected_costs(cases, self.submodels, self.costs, params, upload.make(), upload.entropy_coding, downlink)

    def runtime(self, state_dir: str, own: OwnPlace | None = None) -> ClientRuntime:
        """Return the runtime of a client process: data, partition, models. The local engine's workers inherit it.

        Parameters
        ----------
        own : OwnPlace, optional
            Location of the device's examples; read if ``dataset.on_devices``, refused otherwise.

        Raises
        ------
        DataError
            If a device brings data to a run that does not read them, or brings none to a run that does.
        """
        config = self.config
        if own is not None and not config.dataset.on_devices:
            raise DataError(
                f"the node brings data={own.path}, but this run trains on dataset={config.dataset.name} of its config; "
                "run with dataset.on_devices=true, or start the node without data"
            )
        key = state_dir, own
        if key not in self._runtimes:
            keeps = client_options(self.strategy).keeps_heads or config.upload.error_feedback
            horizon = 2 * config.checkpoint_every if config.rounds.name == "synchronous" else config.num_rounds
            store = ClientStore(Path(state_dir), horizon) if keeps else None
            frozen = ClientStore(Path(state_dir) / "frozen", horizon) if self.submodels.spec.frozen else None
            if config.dataset.on_devices:
                shards, test = self._own_shards(own), no_examples()
            else:
                fraction = config.dataset.client_test_fraction
                shards, test = Shards(self.data.train, self.parts, fraction, config.seed), self.data.test
            made = ClientRuntime(self.client_settings(), self.info, self.submodels, shards, test, store, frozen)
            self._runtimes = {key: made}
        return self._runtimes[key]

    def _own_shards(self, own: OwnPlace | None) -> Shards:
        """Return the examples of the one client on a device."""
        config = self.config
        if own is None:
            raise DataError(
                "dataset.on_devices=true, but the node has no data; start it with --node-config 'data=\"/srv/images\"'"
            )
        examples = load_at(config.dataset, own.path, self._facts, config.seed)
        part = np.arange(len(examples), dtype=np.int64)
        return Shards(examples, {own.client_id: part}, config.dataset.client_test_fraction, config.seed)

    def data_for_workers(self) -> FederatedData | None:
        """Return the data to hand to spawned workers; None if they map the same files themselves."""
        is_mapped = isinstance(self.data.train.inputs, Rows) and not self._has_own_data
        return None if is_mapped else replace(self.data, info=self._facts)

    def server_runtime(self, state_dir: str) -> ClientRuntime:
        """Return the server's evaluator; it holds no training data where devices bring their own."""
        if not self.config.dataset.on_devices:
            return self.runtime(state_dir)
        nobody = Shards(no_examples(), {})
        return ClientRuntime(self.client_settings(), self.info, self.submodels, nobody, self.server_data.test, None)

    def client_settings(self) -> ClientSettings:
        """Return the settings of clients."""
        return client_settings(self.config, client_options(self.strategy), self.pooled)

    def describe_tiers(self, policy: Policy, state: ServerState, directory: RunDirectory) -> dict[str, Any]:
        """Return the tables of the fleet's tiers, of those that the run has; see :mod:`fedlp.apps.tier_table`."""
        config, lines = self.config, directory.read_lines()
        found: dict[str, Any] = {}
        tiers = tier_names(config.fleet, config.num_clients, config.seed)

        def held(client_id: int) -> SubModel:
            return policy.assign(state.server_round, client_id, state.memory, state.params).submodel

        def cost(submodel: SubModel) -> Mapping[str, float]:
            return submodel_costs(submodel, self.submodels, self.costs, config.local, self.base_encoding)

        if config.evaluation.tiers:
            found["tiers"] = describe_tiers(tiers, held, cost, lines, lines[-1]["metrics"] if lines else {})
        if any(budget is not None for budget in self._budgets):
            found["budgets"] = describe_budgets(self._budgets, tiers, held, cost, lines)
        return found

    # ---- running
    def say_whole_parts(self) -> None:
        """Log which parts of the model stay whole, where the method cuts it."""
        if line := self.submodels.whole_parts():
            log.warning("%s", line)

    def serve(self, grid: Grid, out: Path, observers: Iterable[Observer] = ()) -> dict[str, Any]:
        """Run on a grid, from the start or from the last checkpoint; return the manifest."""
        directory = RunDirectory(out)
        self.say_whole_parts()
        runtime = self.server_runtime(str(directory.clients))  # where data is missing, nothing has been written yet
        with directory.claim():
            if not self.config.resume:
                directory.refuse_if_used()
            config = replace(self.config, resume=None)
            with tracking(config.tracker.name, config.tracker.make, to_plain(config), directory.path) as tracker:
                told = (*observers, lambda record, _: tracker.round(record))
                manifest = self._serve(grid, directory, runtime, told)
                tracker.end(manifest)
        return manifest

    def _serve(
        self, grid: Grid, directory: RunDirectory, runtime: ClientRuntime, observers: Iterable[Observer]
    ) -> dict[str, Any]:
        """Train on a grid; return the manifest."""
        return _serve_rounds(grid, self, directory, runtime, observers, make_ledger(self.config))

    def message_bytes(self) -> int:
        """Return an upper bound of the bytes of one message's arrays."""
        size: int = sum(tensor.numel() * tensor.element_size() for tensor in self.initial_params().values())
        if self.config.privacy.name == "secagg":  # masked values and shares
            size = size * self.config.privacy.bits // 16 + 512 * self.config.clients_per_round
        return size if self.pooled is None else max(size, oneshot_costs.largest_message(self.pooled, self.submodels))

    @property
    def keeps_states(self) -> bool:
        """Whether clients keep files from one message to the next."""
        config = self.config
        keeps = client_options(self.strategy).keeps_heads or config.upload.error_feedback
        has_frozen, pools = bool(self.submodels.spec.frozen), self.pooled is not None or not config.trains
        return keeps or has_frozen or pools or config.privacy.name == "secagg"

    def run_locally(self, out: Path, observers: Iterable[Observer] = ()) -> dict[str, Any]:
        """Run with the server in this process, on the local or the Ray engine; return the manifest."""
        refuse_unguarded()
        out = out.absolute()
        refuse_simulation(self.config)
        self.runtime(str(RunDirectory(out).clients))  # before the fork, so that workers share it
        with open_grid(self, out) as grid:
            return self.serve(grid, out, observers)


def _serve_rounds(
    grid: Grid,
    plan: Federation,
    directory: RunDirectory,
    runtime: ClientRuntime,
    observers: Iterable[Observer],
    ledger: PrivacyLedger | None,
) -> dict[str, Any]:
    """Train on a grid, from the start or from the last checkpoint; return the manifest."""
    config = replace(plan.config, resume=None)  # a resumed run leaves the files of one that was never stopped
    state = _begin(plan, directory, to_yaml(config))
    keeper = RoundKeeper(directory, config, task_of(plan.info), ledger)
    is_over = state is not None and keeper.recall()
    strategy = _strategy(config, plan, directory, runtime, (keeper, *observers), ledger, state)
    if note := getattr(plan.policy, "note", ""):
        log.warning(note)
    try:
        if not is_over:
            timeout = config.simulation.round_timeout_s
            strategy.start(grid, messages.encode_params(plan.initial_params()), config.num_rounds, timeout)
    except EvaluationError as error:
        raise EvaluationError(f"{error}; go on with: fedlp resume={directory.path}") from error
    assert strategy.state is not None
    results = {**keeper.results(), **plan.describe_tiers(strategy.policy, strategy.state, directory)}
    manifest = directory.finish(strategy.state, to_plain(config), plan.expected(), **results)
    check_trained(manifest, directory.path)
    return manifest


def _begin(plan: Federation, directory: RunDirectory, config: str) -> ServerState | None:
    """Return the state to resume from, None without; ``config`` is written to the run directory."""
    state = load_state(directory, plan.config)
    if state is None:
        directory.begin(config)
    else:
        check_fits(state, plan.submodels)
        directory.write_config(config)
    return state


def _strategy(
    config: RunConfig,
    plan: Federation,
    directory: RunDirectory,
    runtime: ClientRuntime,
    observers: Iterable[Observer],
    ledger: PrivacyLedger | None,
    state: ServerState | None,
) -> FedLPStrategy:
    """Return the strategy; budgets that devices bring are written to the run directory."""

    def fit(brought: Mapping[int, Budget]) -> Policy:
        policy = plan.fit(brought)
        directory.add_budgets(brought)
        return policy

    return make_strategy(config)(
        plan.submodels,
        plan.policy,
        round_settings(config),
        encoding=config.upload.make(),
        download=make_download(config),
        aggregator=make_aggregator(config),
        server_optimizer=config.server_optimizer.make(),
        evaluate=runtime.evaluate,
        num_test=0 if config.evaluation.name == "clients" else len(runtime.test),
        client_evaluation=client_evaluation_settings(config, plan.info, plan.submodels),
        tiers=tier_names(config.fleet, config.num_clients, config.seed),
        fit=fit,
        takes_part=plan.takes_part,
        calibration=plan.pruner if isinstance(plan.pruner, PooledSubModelPruner) else None,
        central_privacy=make_central_privacy(config, ledger),
        ledger=None if ledger is None else ledger.note,
        observers=observers,
        state=state,
    )


def _reader(config: RunConfig) -> Reader:
    return reader_at(config.dataset, None) if config.dataset.on_devices else make_reader(config.dataset)
