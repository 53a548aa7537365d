"""Federated one-shot pruning: ``fedlp-prune`` where the calibration data stay with the clients.

``unit_selection=server``: for each layer in order, clients run their own examples through the model pruned so far and
send second moments of the layer's inputs; the server adds them up and prunes the layer as :class:`Pruner` does.
``unit_selection=client``: every client prunes alone and sends the units that it would keep; those with most votes stay,
with the weights that they had.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from fedlp.apps import prune as oneshot
from fedlp.config import FinetuneConfig, PruneConfig, RunConfig, to_plain, to_yaml
from fedlp.data.datasets import FederatedData, tokenizer_of
from fedlp.errors import ConfigError
from fedlp.federation.oneshot import messages as wire
from fedlp.federation.oneshot.costs import expected_costs
from fedlp.federation.oneshot.messages import Question
from fedlp.federation.oneshot.model import ModelStates
from fedlp.federation.oneshot.pooled_pruner import PooledPruner, check_pooled
from fedlp.federation.oneshot.server import ClientPool, tally
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
from fedlp.types import Keep, RoundRecord

Observer = Callable[[RoundRecord, ServerState], object]
REPORT = "prune.json"

_REFERENCE_EXAMPLES = 8  # random inputs, whose means clients measure their own inputs from


class FederatedOneshot:
    """One run: what is pruned, the clients, and the lines and files that come of it.

    Parameters
    ----------
    data : FederatedData
        Its test examples give the metrics before and after.
    observers : callables
        Told of every finished line of ``rounds.jsonl``.
    """

    def __init__(
        self,
        config: RunConfig,
        submodels: SubModels,
        data: FederatedData,
        directory: RunDirectory,
        observers: Iterable[Observer] = (),
    ) -> None:
        if config.strategy.unit_selection == "server":
            check_pooled(make_method(config.pruner).score)
        self.config, self.directory = config, directory
        self.plain = prune_config(config)
        model = submodels.spec.build(config.seed).eval()
        shared = config.pruner.shared and not submodels.spec.reads_tokens
        layers = find_layers(model, submodels.widths, shared)
        self.subject = oneshot.Subject(
            submodels.spec, model, data.info, data, submodels.widths, layers, tokenizer_of(config.dataset)
        )
        self._observers = tuple(observers)
        self._settings = oneshot_settings(config)
        self._expected = expected_costs(self._settings, submodels)
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
        pruned = (self._by_votes if config.strategy.unit_selection == "client" else self._by_moments)(pool, before)
        round_weights(pruned.model, oneshot.written_dtype(self.plain, subject))
        after = oneshot.evaluate(pruned.model, subject, self.plain)
        self._finish_line(pool, after)
        return self._write(pruned, before, after, time.monotonic() - started)

    # ---- two ways
    def _by_moments(self, pool: ClientPool, before: Mapping[str, float]) -> Pruned:
        """Return the model pruned on what clients send; leaves the last line open, for the metrics after."""
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
        """Return the model with the units that most clients would keep, and the weights they had."""
        subject, method = self.subject, make_method(self.config.pruner)
        example = subject.spec.example_inputs(1)
        data = Calibration([example], [], 0)
        measures_nothing = Method(recovery=method.recovery, centred=method.centred)
        sizing = Pruner(subject.model, subject.widths, subject.layers, data, measures_nothing)
        kept = oneshot.allocate(self.plain, subject, data, sizing)
        model = cut_model(subject.model, subject.widths, {}).eval()
        states = ModelStates(model, subject.layers, following_batch_norms(model, example), method)

        def decode(content: Any, most: int, who: str) -> tuple[dict[str, Keep], int]:
            return wire.decode_vote(content, kept, subject.widths.axes, most, who)

        widths = tally([vote for _, vote, _ in pool.ask(Question(wire.VOTE, kept=kept), states, decode)], kept)
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
        by_layer = self._records if self.config.strategy.unit_selection == "server" else []
        for layer, record in zip(report["layers"], by_layer, strict=False):
            layer |= {"bytes_up": record.bytes_up, "bytes_down": record.bytes_down, "clients": len(record.cohort)}
        report |= {
            "masks": self.config.strategy.unit_selection,
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


def serve_oneshot(
    grid: Grid,
    config: RunConfig,
    submodels: SubModels,
    data: FederatedData,
    directory: RunDirectory,
    observers: Iterable[Observer] = (),
) -> dict[str, Any]:
    """Run federated one-shot pruning on a grid; return the manifest.

    Writes one line per layer to ``rounds.jsonl`` (one in all for votes), the pruned model to ``model/`` and the report
    to ``prune.json``. ``model.safetensors`` holds the pruned model's own tensors.

    Raises
    ------
    FedLPError
        If too few clients answer, their data are too few, or the folder already holds a pruned model.
    """
    if (directory.path / REPORT).exists():
        raise ConfigError(f"hydra.run.dir={directory.path} already holds a pruned model; choose another folder")
    with one_thread():
        run = FederatedOneshot(config, submodels, data, directory, observers)
        directory.begin(to_yaml(config))
        return run.run(grid)


def oneshot_settings(config: RunConfig) -> OneShotSettings:
    """Return the settings of federated one-shot pruning that a config holds."""
    return OneShotSettings(
        method=make_method(config.pruner),
        seed=config.seed,
        device=config.device,
        clients_per_round=config.clients_per_round,
        min_clients=config.min_clients,
        timeout_s=config.simulation.round_timeout_s,
        examples=config.calibration.examples,
        batch_size=config.calibration.batch_size,
        votes=config.strategy.unit_selection == "client",
        shared=config.pruner.shared,
        wide_sums=config.strategy.sums == "float64",
    )


def pooled_settings(config: RunConfig, method: Method) -> OneShotSettings:
    """Return the settings of pruning the sub-models of ``strategy=fedlp_plan`` on clients' sums."""
    return OneShotSettings(
        method=method,
        seed=config.seed,
        device=config.device,
        clients_per_round=config.clients_per_round,
        timeout_s=config.simulation.round_timeout_s,
        examples=config.calibration.examples,
        batch_size=config.calibration.batch_size,
        shared=True,
    )


def prune_config(config: RunConfig) -> PruneConfig:
    """Return the config of the same pruning in one place."""
    return PruneConfig(
        seed=config.seed,
        sparsity=config.strategy.sparsity,
        eval_batch_size=config.eval_batch_size,
        model=config.model,
        dataset=config.dataset,
        task=config.task,
        pruner=config.pruner,
        allocator=config.allocator,
        calibration=config.calibration,
        finetune=FinetuneConfig(name="none"),
    )
