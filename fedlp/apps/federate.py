"""The one composition root: config in, objects out; and the two Flower apps that every engine runs.

``flwr run .`` finds ``server_app`` and ``client_app`` here through ``pyproject.toml``. Their run config holds the whole
composed config as one YAML string (``cfg``), or Hydra overrides (``overrides``), and where to write (``out``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedlp.allocation.budget.fleet import fleet_budgets, fleet_kinds
from fedlp.apps.federated_prune import serve_oneshot
from fedlp.config import RunConfig, from_yaml, to_plain, to_yaml
from fedlp.data.datasets import DataInfo, FederatedData, describe_dataset, load_dataset
from fedlp.data.partition import partition_examples, plot_partition
from fedlp.errors import CheckpointError, ConfigError, EvaluationError
from fedlp.federation.budgets import fit_submodels, layer_costs, submodel_costs
from fedlp.federation.client.app import ClientRuntime, Shards, make_client_app
from fedlp.federation.client.store import ClientStore
from fedlp.federation.costs import Costs, expected_costs
from fedlp.federation.oneshot import costs as pooling_costs
from fedlp.federation.privacy import check_privacy
from fedlp.federation.server.app import Grid, make_server_app
from fedlp.federation.server.checkpoint import ServerState
from fedlp.federation.server.run_directory import RunDirectory
from fedlp.federation.server.strategy import FedLPStrategy, Observer
from fedlp.federation.strategies.fedlp_plan import PrunedSlices
from fedlp.federation.strategies.policies import Policy, build_policy, fit_policy
from fedlp.federation.submodels import SubModels
from fedlp.federation.wire import messages
from fedlp.models import describe_model, state_tensors
from fedlp.progress import Progress
from fedlp.simulation.flower_run import run_on_flower
from fedlp.simulation.local import LocalGrid
from fedlp.training.local_training import check_loss, count_cores
from fedlp.types import Budget, SubModel


@dataclass(frozen=True)
class Plan:
    """What a run is made of before any data is loaded."""

    config: RunConfig
    info: DataInfo
    submodels: SubModels
    policy: Policy
    costs: Costs

    def initial_params(self) -> dict[str, Any]:
        """Return the tensors of the initial global model."""
        return dict(state_tensors(self.submodels.spec.build(self.config.seed)))

    def fit(self, brought: Mapping[int, Budget]) -> Policy:
        """Return the policy for the budgets that devices brought, by client id."""
        return _make_policy(self.config, self.submodels, self.costs, brought)

    def expected(self) -> dict[str, float]:
        """Return the expected cost of one client in one round."""
        if self.config.strategy.name == "oneshot":
            return pooling_costs.expected_costs(self.config, self.submodels)
        cases = self.policy.cases(range(self.config.num_clients))
        return expected_costs(cases, self.submodels, self.costs, self.initial_params(), self.config.strategy)


@lru_cache(maxsize=4)
def make_plan(cfg: str) -> Plan:
    """Return the plan of a config (YAML)."""
    config = from_yaml(cfg)
    info = describe_dataset(config.dataset)
    spec = describe_model(config.model, info.input_shape, info.num_classes, info.task)
    check_loss(config.local, info)
    submodels = SubModels(spec)
    check_privacy(config, submodels)
    costs = Costs(submodels)
    if config.strategy.name == "oneshot":
        config = replace(config, num_rounds=pooling_costs.count_lines(config, submodels))
    return Plan(config, info, submodels, _make_policy(config, submodels, costs, {}), costs)


def _make_policy(config: RunConfig, submodels: SubModels, costs: Costs, brought: Mapping[int, Budget]) -> Policy:
    """Return the policy that meets every client's budget: the one its device brought, else the one of its fleet.

    With ``strategy=fedlp`` each client gets and sends as many units as its budget holds, else the largest sub-model.
    """

    def cost(submodel: SubModel) -> dict[str, float]:
        return submodel_costs(submodel, submodels, costs, config.local)

    budgets: list[Budget | None] = [None] * config.num_clients
    if config.fleet.fractions or config.fleet.devices:
        budgets = list(fleet_budgets(config.fleet, config.num_clients, config.seed, cost(SubModel())))
    for client_id, budget in brought.items():
        budgets[client_id] = budget
        if config.privacy.name != "none" and budget.upload_bytes is not None:
            raise ConfigError(
                f"client {client_id} brought a limit on uploads, but privacy={config.privacy.name} needs all units "
                "back; take upload_bytes out of its budget"
            )
    if config.strategy.name == "fedlp":
        layers = layer_costs(submodels, config.local, config.strategy.encoding)
        return PrunedSlices(config, submodels, layers, tuple(budgets))
    policy = build_policy(config.strategy, config.seed, config.num_clients, submodels)
    if any(budget is not None for budget in budgets):
        policy = fit_policy(policy, lambda offers: fit_submodels(budgets, offers, cost, config.strategy.name))
    return policy


@lru_cache(maxsize=1)
def load_parts(cfg: str) -> tuple[FederatedData, tuple[NDArray[np.int64], ...]]:
    """Return the data of a config (YAML), and the indices of each client's training examples."""
    config = make_plan(cfg).config
    data = load_dataset(config.dataset, config.seed)
    kinds = fleet_kinds(config.fleet, config.num_clients, config.seed)
    return data, partition_examples(config.partition, data.train, config.num_clients, config.seed, kinds)


@lru_cache(maxsize=1)
def make_runtime(cfg: str, state_dir: str) -> ClientRuntime:
    """Return what a client process keeps: data, partition, models. The local engine's workers inherit the parent's."""
    plan = make_plan(cfg)
    config = plan.config
    data, parts = load_parts(cfg)
    keeps_heads = config.strategy.name == "fedlp_hetero" and config.strategy.persist_heads
    keeps = keeps_heads or config.strategy.error_feedback
    store = ClientStore(Path(state_dir), horizon=2 * config.checkpoint_every) if keeps else None
    return ClientRuntime(config, plan.info, plan.submodels, Shards(data.train, parts), data.test, store)


def serve_run(grid: Grid, cfg: str, out: Path, observers: Iterable[Observer] = ()) -> dict[str, Any]:
    """Run a federated run on a grid, from its start or from its last checkpoint; return the manifest."""
    plan = make_plan(cfg)
    directory = RunDirectory(out)
    runtime = make_runtime(cfg, str(directory.clients))  # where data is missing, nothing has been written yet
    with directory.claim():
        if plan.config.strategy.name == "oneshot":
            config = replace(plan.config, resume=None)
            return serve_oneshot(grid, config, plan.submodels, load_parts(cfg)[0], directory, observers)
        return _serve_rounds(grid, plan, directory, runtime, observers)


def _serve_rounds(
    grid: Grid, plan: Plan, directory: RunDirectory, runtime: ClientRuntime, observers: Iterable[Observer]
) -> dict[str, Any]:
    config = replace(plan.config, resume=None)  # a resumed run leaves the files of one that was never stopped
    state = _load_state(directory, plan.config)
    if state is None:
        directory.begin(to_yaml(config))
    else:
        check_fits(state, plan.submodels)
        directory.write_config(to_yaml(config))

    def record(round_record: Any, round_state: ServerState) -> None:
        directory.append_round(round_record)
        if round_state.server_round % config.checkpoint_every == 0 or round_state.server_round == config.num_rounds:
            directory.save_state(round_state)

    def fit(brought: Mapping[int, Budget]) -> Policy:
        policy = plan.fit(brought)
        directory.add_budgets(brought)
        return policy

    strategy = FedLPStrategy(
        config,
        plan.submodels,
        plan.policy,
        evaluate=runtime.evaluate,
        num_test=len(runtime.test),
        macs=lambda submodel: plan.costs.macs(submodel).training,
        fit=fit,
        observers=(record, *observers),
        state=state,
    )
    initial = messages.encode_params(plan.initial_params())
    try:
        strategy.start(grid, initial, config.num_rounds, config.simulation.round_timeout_s)
    except EvaluationError as error:
        raise EvaluationError(f"{error}; go on with: fedlp resume={directory.path}") from error
    assert strategy.state is not None
    return directory.finish(strategy.state, to_plain(config), plan.expected())


def run_locally(cfg: str, out: Path, observers: Iterable[Observer] = ()) -> dict[str, Any]:
    """Run on the local engine; return the manifest."""
    plan, out = make_plan(cfg), out.absolute()
    config = plan.config
    runtime = make_runtime(cfg, str(RunDirectory(out).clients))  # before the fork, so that workers share it
    size = sum(tensor.numel() * tensor.element_size() for tensor in plan.initial_params().values())
    if config.strategy.name == "oneshot":
        size = max(size, pooling_costs.largest_message(config, plan.submodels))
    workers = config.simulation.workers or count_cores()
    with LocalGrid(
        lambda: client_app,
        num_clients=config.num_clients,
        num_workers=min(workers, config.clients_per_round),
        message_bytes=size + 4096 * len(runtime.submodels.spec.tensors),
        run_config={"cfg": cfg, "out": str(out)},
    ) as grid:
        return serve_run(grid, cfg, out, observers)


def run(cfg: str, out: Path, label: Callable[[dict[str, Any]], str]) -> dict[str, Any]:
    """Run on the config's engine with live progress; return the manifest.

    Parameters
    ----------
    label : callable
        Names a run from its plain config.
    """
    config = from_yaml(cfg)
    _check_device(config.device)
    directory = RunDirectory(out)
    state = None
    if config.resume:
        with directory.claim():
            state = _load_state(directory, config)
    else:
        directory.refuse_if_used()
    done = 0 if state is None else state.server_round
    _plot_partition(cfg, out)
    progress = Progress(make_plan(cfg).config.num_rounds, label(to_plain(config)), done)
    if config.simulation.engine == "ray":
        workers = config.simulation.workers or count_cores()
        run_on_flower(cfg, out, config.num_clients, workers, progress.show, seen=done)
        return directory.read_manifest()
    return run_locally(cfg, out, [lambda record, _: progress.show(asdict(record))])


def _plot_partition(cfg: str, out: Path) -> None:
    """Draw the partition where the config asks for it."""
    if make_plan(cfg).config.plot_partition:
        data, parts = load_parts(cfg)
        plot_partition(parts, data.train.targets, out / "partition.png")


def _load_state(directory: RunDirectory, config: RunConfig) -> ServerState | None:
    """Return where to go on; ConfigError where that is beyond the run's end. None: from the start."""
    state = directory.resume() if config.resume else None
    if state is not None and state.server_round > config.num_rounds:
        raise ConfigError(
            f"num_rounds={config.num_rounds}, but the run in {directory.path} has done {state.server_round}; give a "
            "larger number"
        )
    return state


def check_fits(state: ServerState, submodels: SubModels) -> None:
    """Raise CheckpointError where a checkpoint is not one of this model."""
    found = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in state.params.items()}
    for name, info in submodels.spec.tensors.items():
        if found.get(name) != (info.shape, info.dtype):
            raise CheckpointError(
                f"the checkpoint of round {state.server_round} does not fit the model of config.yaml (tensor {name}); "
                f"restore the config.yaml that the run began with"
            )


def _check_device(name: str) -> None:
    """Raise ConfigError where this machine has no such device; CUDA is not started, which would not survive a fork."""
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= (count := torch.cuda.device_count()):
        raise ConfigError(
            f"device={name}: this machine has {count} CUDA devices that this PyTorch can use; set device=cpu"
        )


def dry_run(cfg: str, out: Path) -> dict[str, Any]:
    """Write and return a manifest with expected costs, without loading data or training."""
    plan = make_plan(cfg)
    expected = plan.expected()
    per_round = plan.config.clients_per_round
    totals = {
        "rounds": plan.config.num_rounds,
        "bytes_down": expected["bytes_down_per_client"] * per_round * plan.config.num_rounds,
        "bytes_up": expected["bytes_up_per_client"] * per_round * plan.config.num_rounds,
    }
    if plan.info.num_train is not None:
        examples = plan.info.num_train / plan.config.num_clients * per_round * plan.config.local.epochs
        totals["macs"] = expected["training_macs_per_example"] * examples * plan.config.num_rounds
    directory = RunDirectory(out)
    directory.refuse_if_used()
    _plot_partition(cfg, out)
    return directory.write_manifest(to_plain(plan.config), expected, expected_totals=totals)


server_app = make_server_app(serve_run)
client_app = make_client_app(make_runtime)
