"""Federated search for an allocation function: ``fedlp-search`` with data that stay with clients.

Clients send second moments of each layer's inputs through the dense model once; from the sums the server knows every
layer's order of removal and refit, and sends these back once. A candidate is then a plan, a byte per layer, and its
judgement the sum over a client's own examples of the KL divergence of the refitted model from the dense one. The server
adds: the same function is found as on all data in one place.

*Deviation* from the central search: the held-out check judges finalists by the same refits, on examples that nobody has
searched on; they are not pruned anew, which would cost a one-shot pruning each.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fedlp.apps.client_fitness import ClientFitness
from fedlp.apps.federate import Federation
from fedlp.apps.federated_prune import check_pooling
from fedlp.apps.model_allocator import Allocator
from fedlp.apps.prune import load_run
from fedlp.apps.search_modes import Modes, compare_held_out, write_search
from fedlp.apps.search_settings import count_lines, expected_search_costs, search_oneshot_settings
from fedlp.apps.secagg_check import check_secure_search
from fedlp.config import FederatedSearchConfig, RunConfig, read_run_config, to_plain, to_yaml
from fedlp.data.datasets import FederatedData, tokenizer_of
from fedlp.errors import ConfigError
from fedlp.federation.client.runtime import ClientRuntime
from fedlp.federation.client.settings import ClientSettings
from fedlp.federation.oneshot.client_judge import ClientJudge
from fedlp.federation.oneshot.plans import RefitStates
from fedlp.federation.oneshot.pooled_pruner import PooledPruner
from fedlp.federation.oneshot.search_costs import largest_message
from fedlp.federation.oneshot.server import ClientPool
from fedlp.federation.oneshot.settings import Share
from fedlp.federation.server.checkpoint import ServerState
from fedlp.federation.server.roster import Roster
from fedlp.federation.server.run_directory import RunDirectory
from fedlp.federation.submodels import SubModels
from fedlp.models import state_tensors
from fedlp.models.cost import count_macs
from fedlp.pruning.costs.footprint import Footprint
from fedlp.pruning.kernels.obs import Elimination
from fedlp.pruning.precomputed_models import divergence_curves
from fedlp.pruning.reader_layers import Reader
from fedlp.pruning.tracing.units import find_layers
from fedlp.rng import Stream, torch_seed
from fedlp.simulation.flower_apps import Grid
from fedlp.tasks import task_of
from fedlp.training.calibration_data import batch_calibration, check_tokenizer, whole_examples
from fedlp.training.threads import one_thread
from fedlp.types import PrunableLayer, RoundRecord

Observer = Callable[[RoundRecord, ServerState], object]
REPORT, LOG = "search.json", "search.jsonl"

_REFERENCE_EXAMPLES = 8  # random inputs, whose means clients measure their own inputs from


class PooledAllocator(Allocator):
    """Allocation on one model whose statistics are clients' sums, and whose plans clients judge.

    Parameters
    ----------
    pool : ClientPool
        The pruner's.
    dtype : torch.dtype
        Of the refits that clients get.
    """

    def __init__(self, pruner: PooledPruner, pool: ClientPool, dtype: torch.dtype) -> None:
        super().__init__(pruner, Footprint(pruner.model, pruner.spec).count)
        dense, labels = pruner.states.name, pruner.positions[1]
        refits = self.precomputed.refits(dtype)  # asks about every layer
        self.judge = ClientJudge(pool, RefitStates(dense, self.layers, refits), labels)

    def measure(self, plans: Sequence[Mapping[str, int]]) -> Sequence[float]:
        """Return the divergence of each plan on the clients' examples for statistics."""
        return self.judge.divergences(plans, Share.STATISTICS)

    def measured_curves(self) -> Mapping[str, Sequence[float]]:
        """Return each layer's divergence over units removed, on the same examples."""
        return divergence_curves(self.layers, self.measure)


class _TellingPruner(PooledPruner):
    """Pruner that tells when it knows a layer's order of removal."""

    told: Callable[[], None]

    def removal_order(self, layer: PrunableLayer, readers: Sequence[Reader], count: int) -> Elimination:
        found = super().removal_order(layer, readers, count)
        self.told()
        return found


class SearchRun:
    """One federated search: model, clients, records and files.

    Parameters
    ----------
    data : FederatedData
        One of its test examples, if any, tells a wrong tokenizer.
    observers : callables
        Called with every finished line of ``rounds.jsonl``.
    """

    def __init__(
        self,
        config: FederatedSearchConfig,
        submodels: SubModels,
        data: FederatedData,
        directory: RunDirectory,
        observers: Iterable[Observer] = (),
    ) -> None:
        self._config, self._submodels, self._data, self._directory = config, submodels, data, directory
        self._observers = tuple(observers)
        self._settings = search_oneshot_settings(config)
        self._records: list[RoundRecord] = []
        self._since = time.monotonic()

    def run(self, grid: Grid) -> dict[str, Any]:
        """Search with a grid's clients, write all files and return the manifest."""
        started, config = time.monotonic(), self._config
        pool = self._pool(grid)
        allocator = self._allocator(pool)
        modes = Modes(config.search, config.seed, allocator)
        file = self._directory.path / LOG
        fitness = ClientFitness(
            *(allocator.judge, allocator.layers, modes.rules["uniform"], file),
            lambda best: self._finish_line(pool, {"divergence": best}),
        )
        report = modes.run(fitness)
        report["held_out"] = self._check(allocator, modes, report)
        report["winner"] = min(report["held_out"], key=lambda name: report["held_out"][name]["mean"])
        self._finish_line(pool, {"divergence": report["held_out"][report["winner"]]["mean"]}, is_last=True)
        return self._write(report, time.monotonic() - started)

    def _pool(self, grid: Grid) -> ClientPool:
        config, submodels = self._config, self._submodels
        roster = Roster(config.num_clients)
        roster.join(grid, config.simulation.round_timeout_s)
        macs = count_macs(submodels.skeleton().eval(), submodels.spec.example_inputs(1)).forward
        self._since = time.monotonic()
        return ClientPool(grid, roster, self._settings, tuple(submodels.widths.axes), macs)

    def _allocator(self, pool: ClientPool) -> PooledAllocator:
        """Return the allocator of the dense model, after the clients were asked about each layer."""
        config, submodels, settings = self._config, self._submodels, self._settings
        model = submodels.spec.build(config.seed).eval()
        if config.run is not None:
            load_run(model, Path(config.run) / "model.safetensors")
            live = state_tensors(model)
            pool.send_model({name: live[name] for name in submodels.names})
        self._check_tokenizer(model)
        layers = find_layers(model, submodels.widths, settings.shared and not submodels.spec.reads_tokens)
        example = submodels.spec.example_inputs(_REFERENCE_EXAMPLES)
        seed = torch_seed(config.seed, Stream.CALIBRATION, 1)
        pruner = _TellingPruner(model, submodels.widths, layers, settings.method, pool, example, seed)
        pruner.told = lambda: self._finish_line(pool, {})
        return PooledAllocator(pruner, pool, settings.dtype)

    def _check_tokenizer(self, model: nn.Module) -> None:
        """Raise CalibrationError where a test example of the server, if any, tells a wrong tokenizer."""
        data, config = self._data, self._config
        if len(data.test) and len(whole := whole_examples(data.test, data.info)):
            one = batch_calibration(whole.select(np.arange(1)), data.info, 1, 0, torch.device("cpu"))
            check_tokenizer(model, one, data.info, tokenizer_of(config.dataset))

    def _check(self, allocator: PooledAllocator, modes: Modes, report: Mapping[str, Any]) -> dict[str, Any]:
        """Return the finalists' divergences on the clients' held-out examples."""
        ratios, finalists = self._config.search.ratios, modes.finalists(report)
        plans = [plan for by_ratio in finalists.values() for plan in by_ratio]
        values = allocator.judge.divergences(plans, Share.HELD_OUT)
        rows = [values[start : start + len(ratios)] for start in range(0, len(values), len(ratios))]
        return dict(compare_held_out(dict(zip(finalists, rows, strict=True)), ratios))

    # ---- what is left behind
    def _finish_line(self, pool: ClientPool, metrics: Mapping[str, float], is_last: bool = False) -> None:
        now = time.monotonic()
        record = pool.finish({}, dict(metrics), now - self._since)
        self._since = now
        self._records.append(record)
        self._directory.append_round(record)
        for observer in self._observers:
            observer(record, ServerState(record.server_round, {}))
        if not is_last:
            pool.begin(record.server_round + 1)

    def _write(self, report: dict[str, Any], seconds: float) -> dict[str, Any]:
        config, records = self._config, self._records
        report |= {
            "bytes_up": sum(record.bytes_up for record in records),
            "bytes_down": sum(record.bytes_down for record in records),
            "failures": sum(len(record.failures) for record in records),
            "wall_time_s": seconds,
        }
        expected = expected_search_costs(config, self._submodels)
        results = {"search": {key: report[key] for key in ("winner", "held_out")}}
        manifest = self._directory.finish(None, to_plain(config), expected, **results)
        source = config.run or config.model.options.get("path") or config.model.name
        write_search(report, self._directory.path, f"{source} and clients' data, seed {config.seed}")
        return manifest


class FederatedSearching(Federation):
    """Federated search: the clients of a federation, asked for sums over their examples in place of training.

    Writes one line per layer, generation and check to ``rounds.jsonl``, and the files of ``fedlp-search``. A stopped
    search goes on in the same folder: clients are asked about layers anew, but about no candidate twice.
    """

    config: FederatedSearchConfig

    def _check(self, config: RunConfig) -> None:
        """Raise ConfigError for options that a search cannot honour."""
        assert isinstance(config, FederatedSearchConfig)
        check_pooling(config)
        check_secure_search(config)
        own = config.model.options
        if config.run is None and not own.get("pretrained") and own.get("path") is None:
            raise ConfigError(
                f"model {config.model.name} has no trained weights; give model=hf model.path=DIR, "
                "model.pretrained=true, or run=RUN_DIR for the model of a federated run"
            )
        task_of(self.info).require_softmax("fedlp-search", self.info)

    def _with_length(self, config: RunConfig) -> RunConfig:
        """Return the config with a round for each line."""
        assert isinstance(config, FederatedSearchConfig)
        return replace(config, num_rounds=count_lines(config, self.submodels))

    def expected(self) -> dict[str, float]:
        """Return the expected cost of one client in one round."""
        return expected_search_costs(self.config, self.submodels)

    def client_settings(self) -> ClientSettings:
        """Return the settings of clients."""
        return replace(super().client_settings(), oneshot=search_oneshot_settings(self.config))

    def message_bytes(self) -> int:
        """Return an upper bound of the bytes of one message's arrays."""
        return max(super().message_bytes(), largest_message(search_oneshot_settings(self.config), self.submodels))

    def _serve(
        self, grid: Grid, directory: RunDirectory, runtime: ClientRuntime, observers: Iterable[Observer]
    ) -> dict[str, Any]:
        """Search on a grid; return the manifest.

        Raises
        ------
        FedLPError
            If too few clients answer, data are too few, or the folder holds a finished search or one of another config.
        """
        self._refuse_other(directory)
        with one_thread():
            run = SearchRun(self.config, self.submodels, self.server_data, directory, observers)
            directory.begin(to_yaml(self.config))
            return run.run(grid)

    def _refuse_other(self, directory: RunDirectory) -> None:
        """Raise ConfigError where the folder holds a finished search, or values of another config."""
        path = directory.path
        if (path / REPORT).exists():
            raise ConfigError(f"hydra.run.dir={path} already holds a finished search; choose another folder")
        if (path / LOG).exists() and (path / "config.yaml").exists():
            stored, own = (to_plain(x) for x in (read_run_config(path / "config.yaml"), self.config))
            if {**stored, "simulation": None} != {**own, "simulation": None}:
                raise ConfigError(f"hydra.run.dir={path} holds a search of another config; choose another folder")
