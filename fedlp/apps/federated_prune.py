"""Federated one-shot pruning: ``fedlp-prune`` with calibration data that stay with the clients.

``unit_selection=server``: for each layer in order, clients run their own examples through the model pruned so far and
send second moments of the layer's inputs; the server adds them up and prunes the layer as :class:`Pruner` does.
``unit_selection=client``: every client prunes alone and sends the units that it would keep; those with most votes stay,
with the weights that they had.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from fedlp.allocation.evidence import needs_of
from fedlp.apps import prune as oneshot
from fedlp.apps.federate import Federation
from fedlp.apps.secagg_check import check_secure_pruning, secagg_settings
from fedlp.config import FederatedPruneConfig, RunConfig, to_plain, to_yaml
from fedlp.data.datasets import FederatedData, tokenizer_of
from fedlp.errors import ConfigError
from fedlp.federation.client.runtime import ClientRuntime
from fedlp.federation.client.settings import ClientSettings
from fedlp.federation.oneshot import costs
from fedlp.federation.oneshot import messages as wire
from fedlp.federation.oneshot.messages import Question
from fedlp.federation.oneshot.model import ModelStates
from fedlp.federation.oneshot.pooled_pruner import PooledPruner, check_pooled
from fedlp.federation.oneshot.server import ClientPool, most_votes
from fedlp.federation.oneshot.settings import OneShotSettings
from fedlp.federation.server.checkpoint import ServerState, write_atomically
from fedlp.federation.server.roster import Roster
from fedlp.federation.server.run_directory import RunDirectory
from fedlp.federation.submodels import SubModels
from fedlp.federation.wire.messages import encode_params
from fedlp.models import state_tensors
from fedlp.models.cost import count_macs
from fedlp.pruning.batch_norms import following_batch_norms
from fedlp.pruning.io.model_files import round_weights
from fedlp.pruning.pruner import Calibration, LayerReport, Method, Pruned, Pruner
from fedlp.pruning.tracing.units import find_layers
from fedlp.pruning.tracing.widths import cut_model
from fedlp.rng import Stream, torch_seed
from fedlp.simulation.flower_apps import Grid
from fedlp.training.calibration_data import check_language_loss, make_method
from fedlp.training.threads import one_thread
from fedlp.types import RoundRecord

Observer = Callable[[RoundRecord, ServerState], object]
REPORT = "prune.json"

_REFERENCE_EXAMPLES = 8  # random inputs, whose means clients measure their own inputs from


class FederatedOneshot:
    """One run of federated one-shot pruning: model, clients, records and files.

    Parameters
    ----------
    data : FederatedData
        Its test examples give the metrics before and after.
    observers : callables
        Called with every finished line of ``rounds.jsonl``.
    """

    def __init__(
        self,
        config: FederatedPruneConfig,
        submodels: SubModels,
        data: FederatedData,
        directory: RunDirectory,
        observers: Iterable[Observer] = (),
    ) -> None:
        if config.unit_selection == "server":
            check_pooled(make_method(config.pruner).score)
        self.config, self.directory = config, directory
        self.plain = config.central()
        model = submodels.spec.build(config.seed).eval()
        shared = config.pruner.shared and not submodels.spec.reads_tokens
        layers = find_layers(model, submodels.widths, shared)
        self.subject = oneshot.Subject(
            submodels.spec, model, data.info, data, submodels.widths, layers, tokenizer_of(config.dataset)
        )
        self._observers = tuple(observers)
        self._settings = oneshot_settings(config)
        self._expected = costs.expected_costs(self._settings, submodels)
        self._coverage = {layer.name: 1.0 for layer in layers}
        self._records: list[RoundRecord] = []
        self._since = time.monotonic()

    def run(self, grid: Grid) -> dict[str, Any]:
        """Prune with a grid's clients, write all files and return the manifest."""
        started = time.monotonic()
        config, subject = self.config, self.subject
        before = oneshot.evaluate(subject.model, subject, self.plain)
        if "loss" in before:
            check_language_loss(before["loss"], subject.info, subject.tokenizer)
        roster = Roster(config.num_clients)
        roster.join(grid, config.simulation.round_timeout_s)
        example = subject.spec.example_inputs(1)
        macs = count_macs(subject.model, example).forward * (1 + make_method(config.pruner).corrects)
        pool = ClientPool(grid, roster, self._settings, tuple(subject.widths.axes), macs)
        self._since = time.monotonic()
        pruned = (self._by_votes if config.unit_selection == "client" else self._by_moments)(pool, before)
        round_weights(pruned.model, oneshot.written_dtype(self.plain, subject))
        after = oneshot.evaluate(pruned.model, subject, self.plain)
        self._finish_line(pool, after)
        return self._write(pruned, before, after, time.monotonic() - started)

    # ---- two ways
    def _by_moments(self, pool: ClientPool, before: Mapping[str, float]) -> Pruned:
        """Return the model pruned on clients' moments; the last record stays open for the metrics after pruning."""
        subject, method = self.subject, make_method(self.config.pruner)
        example = subject.spec.example_inputs(_REFERENCE_EXAMPLES)
        seed = torch_seed(self.config.seed, Stream.CALIBRATION, 1)
        pruner = PooledPruner(subject.model, subject.widths, subject.layers, method, pool, example, seed)
        kept = oneshot.allocate(self.plain, subject, pruner.data, pruner)
        done = 0

        def note(report: LayerReport) -> None:
            nonlocal done
            if report.kept_units < report.num_units or method.corrects:
                pruner.states.note(done)
            done += 1
            self._coverage[report.name] = report.kept_units / report.num_units
            if done < len(subject.layers):
                self._finish_line(pool, before if done == 1 else {})
                pool.begin(done + 1)

        return pruner.prune(kept, note)

    def _by_votes(self, pool: ClientPool, _: Mapping[str, float]) -> Pruned:
        """Return the model with the units of most votes, and their unchanged weights."""
        subject, method = self.subject, make_method(self.config.pruner)
        example = subject.spec.example_inputs(1)
        data = Calibration([example], [], 0)
        measures_nothing = Method(recovery=method.recovery, centred=method.centred)
        sizing = Pruner(subject.model, subject.widths, subject.layers, data, measures_nothing)
        kept = oneshot.allocate(self.plain, subject, data, sizing)
        model = cut_model(subject.model, subject.widths, {}).eval()
        states = ModelStates(model, subject.layers, following_batch_norms(model, example), method)
        votes = pool.votes(Question(wire.VOTE, kept=kept), subject.widths.axes, states)
        widths = most_votes(votes, kept)
        reports = [LayerReport(layer.name, layer.num_units, kept[layer.name], float("nan")) for layer in subject.layers]
        self._coverage = {report.name: report.kept_units / report.num_units for report in reports}
        return Pruned(cut_model(subject.model, subject.widths, widths).eval(), widths, tuple(reports))

    # ---- what is left behind
    def _finish_line(self, pool: ClientPool, metrics: Mapping[str, float]) -> None:
        now = time.monotonic()
        record = pool.finish(dict(self._coverage), dict(metrics), now - self._since)
        self._since = now
        self._records.append(record)
        self.directory.append_round(record)
        for observer in self._observers:
            observer(record, ServerState(record.server_round, {}))

    def _write(
        self, pruned: Pruned, before: dict[str, float], after: dict[str, float], seconds: float
    ) -> dict[str, Any]:
        oneshot.save_pruned(pruned, self.subject, self.plain, self.directory.path / "model")
        report = oneshot.make_report(self.plain, self.subject, pruned, before, after)
        upload = encode_params(state_tensors(self.subject.model)).count_bytes()
        by_layer = self._records if self.config.unit_selection == "server" else []
        for layer, record in zip(report["layers"], by_layer, strict=False):
            layer |= {"bytes_up": record.bytes_up, "bytes_down": record.bytes_down, "clients": len(record.cohort)}
        report |= {
            "masks": self.config.unit_selection,
            "bytes_up": sum(record.bytes_up for record in self._records),
            "bytes_down": sum(record.bytes_down for record in self._records),
            "bytes_of_one_model_upload": upload,
            "failures": sum(len(record.failures) for record in self._records),
            "wall_time_s": seconds,
            "config": to_plain(self.config),
        }
        state = ServerState(len(self._records), dict(state_tensors(pruned.model)))
        manifest = self.directory.finish(state, to_plain(self.config), self._expected)
        write_atomically(self.directory.path / REPORT, json.dumps(report, indent=1).encode() + b"\n")
        return manifest


class FederatedPruning(Federation):
    """Federated one-shot pruning: the clients of a federation, asked for sums over their examples in place of training.

    Writes one line per layer to ``rounds.jsonl`` (one in all for votes), the pruned model to ``model/`` and the report
    to ``prune.json``. ``model.safetensors`` holds the pruned model's own tensors.
    """

    config: FederatedPruneConfig

    def _check(self, config: RunConfig) -> None:
        """Raise ConfigError for options that pruning cannot honour."""
        check_pooling(config)
        if config.dataset.on_devices and config.dataset.server is None:
            raise ConfigError(f"{config.command}: the server needs a test set: set dataset.server=PATH")
        assert isinstance(config, FederatedPruneConfig)
        check_secure_pruning(config)
        if missing := sorted(needs_of(config.allocator.make()) - {"weights"}):
            raise ConfigError(
                f"fedlp-prune federated=true: the allocator needs {missing[0]}, which the server lacks; take a rule of "
                "depth or weights: uniform, depth_line, log_depth, alphapruning, erk, plan"
            )

    def _with_length(self, config: RunConfig) -> RunConfig:
        """Return the config with a round for each layer."""
        assert isinstance(config, FederatedPruneConfig)
        return replace(config, num_rounds=costs.count_lines(oneshot_settings(config), self.submodels))

    def expected(self) -> dict[str, float]:
        """Return the expected cost of one client in one round."""
        return costs.expected_costs(oneshot_settings(self.config), self.submodels)

    def client_settings(self) -> ClientSettings:
        """Return the settings of clients."""
        return replace(super().client_settings(), oneshot=oneshot_settings(self.config))

    def message_bytes(self) -> int:
        """Return an upper bound of the bytes of one message's arrays."""
        return max(super().message_bytes(), costs.largest_message(oneshot_settings(self.config), self.submodels))

    def _serve(
        self, grid: Grid, directory: RunDirectory, runtime: ClientRuntime, observers: Iterable[Observer]
    ) -> dict[str, Any]:
        """Prune on a grid; return the manifest.

        Raises
        ------
        FedLPError
            If too few clients answer, data are too few, or the folder already holds a pruned model.
        """
        if (directory.path / REPORT).exists():
            raise ConfigError(f"hydra.run.dir={directory.path} already holds a pruned model; choose another folder")
        with one_thread():
            run = FederatedOneshot(self.config, self.submodels, self.server_data, directory, observers)
            directory.begin(to_yaml(self.config))
            return run.run(grid)


def check_pooling(config: RunConfig) -> None:
    """Raise ConfigError for options that one cohort of clients, which send sums and train nothing, cannot honour."""
    fleet = config.fleet
    wrong = {
        "adapter=lora trains adapters, and pruning trains nothing": config.adapter.name != "none",
        "clients send sums over their data, which privacy=secagg alone protects": (
            config.privacy.name not in ("none", "secagg")
        ),
        "the model is evaluated on the server's test set alone": config.evaluation.name != "central",
        "all clients get one model: drop the fleet's budgets": bool(fleet.fractions or fleet.devices),
        "one cohort is asked: drop fleet.availability, fleet.dropout and fleet.extra_clients": (
            fleet.availability is not None or bool(fleet.dropout or fleet.extra_clients)
        ),
    }
    if reason := next((text for text, is_so in wrong.items() if is_so), None):
        raise ConfigError(f"{config.command}: {reason}")


def oneshot_settings(config: FederatedPruneConfig) -> OneShotSettings:
    """Return the settings of federated one-shot pruning of a config."""
    return OneShotSettings(
        method=make_method(config.pruner),
        seed=config.seed,
        device=config.device,
        clients_per_round=config.clients_per_round,
        min_clients=config.min_clients,
        timeout_s=config.simulation.round_timeout_s,
        examples=config.calibration.examples,
        batch_size=config.calibration.batch_size,
        votes=config.unit_selection == "client",
        shared=config.pruner.shared,
        wide_sums=config.sums == "float64",
        secagg=secagg_settings(config),
    )
