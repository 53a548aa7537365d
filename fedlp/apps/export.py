"""The sub-models of a run as files that devices run without fedlp: the composition root of ``fedlp-export``.

A client's sub-model is the one that the last round had for it, with the final global values. With ``strategy=fedlp`` it
has the units of the best scores that its budget holds; ``regrow``, which gives units to learn more of them, is off.
Below full depth it ends in the client's own head, which never left the client's disk.
"""

from __future__ import annotations

import json
import logging
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from fedlp.apps.federate import Federation
from fedlp.apps.prune import save_model
from fedlp.apps.resumption import check_fits
from fedlp.config import read_run_config
from fedlp.data.datasets import FederatedData, tokenizer_of
from fedlp.errors import CheckpointError, ConfigError, DataError, FedLPError, one_line
from fedlp.federation.client.store import ClientStore
from fedlp.federation.server.checkpoint import ServerState, load_checkpoint
from fedlp.federation.server.run_directory import RunDirectory
from fedlp.federation.strategies.policy import Policy, offset_of, settled
from fedlp.models import lora_options, state_tensors
from fedlp.models.adapters import has_adapters, save_peft, without_adapters
from fedlp.models.cost import count_macs
from fedlp.models.unallocated import allocate
from fedlp.pruning.batch_norms import reestimate_batch_norms
from fedlp.pruning.tracing.widths import WidthSpec
from fedlp.rng import Stream, generator
from fedlp.tasks import task_of
from fedlp.training.calibration_data import batch_calibration
from fedlp.training.evaluation import evaluate_sums, metrics_from_sums
from fedlp.training.threads import one_thread
from fedlp.types import SubModel

log = logging.getLogger("fedlp")

INDEX = "artefacts.json"

_BATCH = 64  # examples that batch norms are measured on at a time


@dataclass(frozen=True)
class _Run:
    """Files of a finished run."""

    path: Path
    plan: Federation
    state: ServerState
    policy: Policy


@dataclass(frozen=True)
class _Artefact:
    """Sub-model, personal head, and the clients that share both."""

    submodel: SubModel
    head: Mapping[str, Tensor]
    clients: list[int]

    @property
    def name(self) -> str:
        """Name of its folder."""
        return f"client-{self.clients[0]}"


def export_run(
    run: Path, out: Path, clients: Sequence[int] | None = None, *, onnx: bool = True, examples: int = 1000
) -> dict[str, Any]:
    """Write the sub-models of a run's clients to ``out``; return the index, which is ``out/artefacts.json`` too.

    Clients that share a sub-model share a folder, ``client-I`` of the first: the files of ``fedlp-prune``, and
    ``model.onnx``. Nothing is left behind where anything fails.

    Parameters
    ----------
    clients : sequence of int or None
        Client ids; None for all, of which those without a sub-model (head elsewhere, budget out of reach) are named and
        left out.
    examples : int
        Training examples of the run's data set on which narrower models measure their batch norms: the global model's
        statistics are not theirs. 0 leaves those; whole models always keep them.

    Raises
    ------
    FedLPError
        If there is no such run, checkpoint or client, ``out`` exists, or a model cannot be written.
    """
    if out.exists():
        raise ConfigError(f"{out} is there already; choose another folder with --out")
    found = _open_run(run)
    artefacts, skipped = _collect(found, clients)
    data = _load_data(found.plan)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as partial, one_thread():
        folder = Path(partial) / out.name
        entries = {each.name: _write(found, each, data, folder / each.name, onnx, examples) for each in artefacts}
        index = _index(found, artefacts, entries, skipped)
        (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
        folder.replace(out)
    return index


def table(index: Mapping[str, Any]) -> str:
    """Return an index as lines of text."""
    clients = Counter(index["clients"].values())
    lines = [f"{'':<12}{'clients':>8}{'params':>14}{'MACs':>12}{'files':>12}  test set"]
    for name, entry in index["artefacts"].items():
        metrics = "  ".join(f"{key} {value:.4f}" for key, value in entry["metrics"].items())
        lines.append(
            f"{name:<12}{clients[name]:>8}{entry['params']:>14,}{entry['macs'] / 1e6:>10,.2f} M"
            f"{sum(entry['bytes'].values()) / 1e6:>9,.2f} MB  {metrics or 'not here'}"
        )
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------- parts
def _open_run(path: Path) -> _Run:
    if not (path / "config.yaml").is_file():
        raise ConfigError(f"{path} is not a run directory (it has no config.yaml)")
    config = read_run_config(path / "config.yaml")
    if not config.trains:
        raise ConfigError(f"{path} is a one-shot pruning, whose one model is in {path / 'model'} already")
    state = load_checkpoint(path / "checkpoint")
    if state is None:
        raise CheckpointError(f"{path} has no checkpoint yet, so there is no model to export")
    plan = Federation(config)
    check_fits(state, plan.submodels)
    return _Run(path, plan, state, plan.fit(RunDirectory(path).read_budgets()))


def _collect(run: _Run, clients: Sequence[int] | None) -> tuple[list[_Artefact], dict[int, str]]:
    """Return the distinct sub-models, and reasons of clients without one; a client requested by id must have one."""
    count = run.plan.config.num_clients
    unknown = next((client for client in clients or () if not 0 <= client < count), None)
    if unknown is not None:
        raise ConfigError(f"--clients {unknown}: the run has clients 0 to {count - 1}")
    policy = settled(run.policy)
    found: dict[object, _Artefact] = {}
    skipped: dict[int, str] = {}
    for client_id in range(count) if clients is None else sorted(set(clients)):
        try:
            submodel = policy.assign(run.state.server_round, client_id, run.state.memory, run.state.params).submodel
            head = _load_head(run, submodel, client_id)
        except FedLPError as error:
            if clients is not None:
                raise
            log.warning("%s", error)
            skipped[client_id] = str(error)
            continue
        key = submodel.depth, tuple(sorted(submodel.widths.items())), client_id if head else None
        found.setdefault(key, _Artefact(submodel, head, [])).clients.append(client_id)
    if not found:
        raise ConfigError(f"no client of {run.path} has a sub-model that can be exported; the lines above say why")
    return list(found.values()), skipped


def _load_head(run: _Run, submodel: SubModel, client_id: int) -> Mapping[str, Tensor]:
    """Return the personal tensors of a client's sub-model."""
    spec = run.plan.submodels.spec
    if submodel.depth in (None, len(spec.depths)):
        return {}
    who = f"client {client_id} (depth {submodel.depth} of {len(spec.depths)})"
    if spec.reads_tokens:
        raise ConfigError(f"{who} has a language model that ends early, which no class of transformers' describes")
    folder = RunDirectory(run.path).clients
    try:
        head = ClientStore(folder, horizon=0).load(client_id, before_round=run.state.server_round + 1)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"the head of {who} in {folder} cannot be read: {one_line(error)}") from error
    if not head:
        raise CheckpointError(
            f"{who} ends in a head of its own, which is not in {folder}: it never left the device, or was not kept "
            "(strategy.persist_heads), or not trained yet"
        )
    wanted = state_tensors(run.plan.costs.model(submodel)).items()
    if {n: t.shape for n, t in wanted if n not in spec.tensors} != {n: t.shape for n, t in head.items()}:
        raise CheckpointError(f"the head of {who} in {folder} is of another model")
    return head


def _load_data(plan: Federation) -> FederatedData | None:
    try:
        return plan.data
    except DataError as error:
        log.warning("no metrics, and batch norms stay the global model's: %s", error)
        return None


def _write(
    run: _Run, artefact: _Artefact, data: FederatedData | None, folder: Path, onnx: bool, examples: int
) -> dict[str, Any]:
    """Write one sub-model and return its entry of the index."""
    plan, submodel = run.plan, artefact.submodel
    config, spec, submodels = plan.config, plan.submodels.spec, plan.submodels
    layout = submodels.layout(submodel)
    model = allocate(plan.costs.model(submodel)).eval()
    values = {**layout.slice(run.state.params), **artefact.head}
    for name, offset in offset_of(run.policy, artefact.clients[0], run.state.memory).values.items():
        values[name] = values[name] + offset
    for name, tensor in state_tensors(model).items():
        tensor.copy_(values[name])
    measured = data is not None and examples > 0 and bool(layout.keeps) and not submodels.statistics.isdisjoint(values)
    metrics = {}
    if data is not None:
        if measured:
            _measure_batch_norms(model, data, plan, examples)
        metrics = metrics_from_sums(
            evaluate_sums(model, data.test, plan.info, config.eval_batch_size), task_of(plan.info)
        )
    axes = submodels.widths if submodel.widths else WidthSpec({}, {})
    adapter = folder.with_name(f"{folder.name}-adapter")
    if layout.is_whole and config.adapter.name != "none":  # of a sub-model the base is another one
        save_peft(model, lora_options(config.adapter), str(config.model.options.get("path")), adapter)
    if has_adapters(model):
        model = without_adapters(model)
    save_model(model, spec, axes, submodel.widths, tokenizer_of(config.dataset), folder, onnx)
    return {
        "params": sum(parameter.numel() for parameter in model.parameters()),
        "macs": count_macs(model, spec.example_inputs(1)).forward,
        "bytes": {path.name: path.stat().st_size for path in sorted(folder.iterdir())},
        "batch_norms_measured": measured,
        "metrics": metrics,
    }


def _measure_batch_norms(model: nn.Module, data: FederatedData, plan: Federation, examples: int) -> None:
    order = generator(plan.config.seed, Stream.CALIBRATION).permutation(len(data.train))
    chosen = data.train.select(order[:examples])
    reestimate_batch_norms(model, batch_calibration(chosen, plan.info, _BATCH, 0, torch.device("cpu")).batches)


def _index(
    run: _Run, artefacts: Sequence[_Artefact], entries: Mapping[str, Any], skipped: Mapping[int, str]
) -> dict[str, Any]:
    config = run.plan.config
    folders = {client: artefact.name for artefact in artefacts for client in artefact.clients}
    return {
        "model": run.plan.submodels.spec.blueprint.name,
        "strategy": config.strategy.name,
        "server_round": run.state.server_round,
        "inputs": task_of(run.plan.info).describe_inputs(run.plan.info, tokenizer_of(config.dataset)),
        "clients": {str(client): folders[client] for client in sorted(folders)},
        "skipped": {str(client): reason for client, reason in skipped.items()},
        "artefacts": dict(entries),
    }
