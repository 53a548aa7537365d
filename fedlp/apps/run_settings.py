"""Settings of server and clients from the config of a run."""

from __future__ import annotations

from fedlp.apps.secagg_check import secagg_settings
from fedlp.config import RunConfig
from fedlp.data.examples import DataInfo
from fedlp.federation.client.settings import ClientSettings
from fedlp.federation.oneshot.settings import OneShotSettings
from fedlp.federation.server.availability import make_availability
from fedlp.federation.server.client_evaluation import ClientEvaluationSettings, sum_lengths
from fedlp.federation.server.round_settings import RoundSettings
from fedlp.federation.strategies.policy import ClientOptions
from fedlp.federation.submodels import SubModels
from fedlp.federation.wire.downloads import Download
from fedlp.tasks import task_of
from fedlp.training.calibration_data import make_method


def round_settings(config: RunConfig) -> RoundSettings:
    """Return the settings of the server's rounds."""
    return RoundSettings(
        num_clients=config.num_clients,
        clients_per_round=config.clients_per_round,
        seed=config.seed,
        min_clients=config.min_clients,
        eval_every=config.eval_every,
        eval_batch_size=config.eval_batch_size,
        local_epochs=config.local.epochs,
        weighting=config.aggregator.weighting,
        measures_statistics=config.aggregator.batch_norm == "static",
        sends_deltas=config.upload.values == "deltas",
        entropy_coding=config.upload.entropy_coding,
        timeout_s=config.simulation.round_timeout_s,
        evaluates_tiers=config.evaluation.tiers,
        availability=make_availability(
            config.fleet.availability, config.seed, config.fleet.round_s, config.fleet.clock == "virtual"
        ),
        dropout=config.fleet.dropout,
        extra_clients=config.fleet.extra_clients,
    )


def make_download(config: RunConfig) -> Download:
    """Return the encoding of downloads."""
    return Download(config.download.make(), config.download.tensors == "all")


def client_settings(config: RunConfig, options: ClientOptions, pooled: OneShotSettings | None) -> ClientSettings:
    """Return the settings of clients."""
    return ClientSettings(
        local=config.local,
        seed=config.seed,
        num_rounds=config.num_rounds,
        device=config.device,
        eval_batch_size=config.eval_batch_size,
        personal_steps=config.evaluation.personal_steps,
        encoding=config.upload.make(),
        download=make_download(config),
        encoded_base=config.adapter.base == "encoded",
        rank_penalty=config.adapter.rank_penalty,
        sends_deltas=config.upload.values == "deltas",
        error_feedback=config.upload.error_feedback,
        entropy_coding=config.upload.entropy_coding,
        options=options,
        method=make_method(config.pruner),
        calibration=config.calibration,
        privacy=config.privacy,
        oneshot=pooled,
        secagg=secagg_settings(config),
        batched=config.simulation.batched,
    )


def client_evaluation_settings(
    config: RunConfig, info: DataInfo, submodels: SubModels
) -> ClientEvaluationSettings | None:
    """Return the settings of evaluations on clients; None if there are none."""
    if config.evaluation.name == "central":
        return None
    local, task = config.local, task_of(info)
    return ClientEvaluationSettings(
        task=task,
        lengths=sum_lengths(submodels.skeleton(), info),
        seed=config.seed,
        num_clients=config.evaluation.clients,
        most_predictions=task.most_predictions(info),
        steps_examples=config.evaluation.personal_steps * local.accumulation * local.batch_size,
        is_private=config.privacy.name != "none",
    )
