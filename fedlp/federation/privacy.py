"""Local differential privacy by Flower's own mod: what a client sends is clipped and noised before it leaves.

The mod subtracts what a client received from what it returns, array by array. So it works only where both are the same
entries, in float32; :func:`check_privacy` refuses everything else before a run begins. Of the mod's parameters the
sensitivity is not free: two updates of norm C at most differ by 2C at most, whatever the data.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from flwr.app import Context, Message, MetricRecord
from flwr.clientapp import mod

from fedlp.config import RunConfig
from fedlp.errors import ConfigError, DataError
from fedlp.federation.submodels import SubModels
from fedlp.federation.wire.messages import METRICS
from fedlp.rng import Stream, generator
from fedlp.training.calibration_data import make_method
from fedlp.types import TrainInstruction

log = logging.getLogger("fedlp")

_WHAT = "privacy=local_dp"


def check_privacy(config: RunConfig, submodels: SubModels) -> None:
    """Raise ConfigError, with the remedy, where uploads are to be noised but could not be, or would not be private."""
    if config.privacy.name == "none":
        return
    options, fleet = config.strategy.options, config.fleet
    if config.strategy.name == "oneshot":
        raise ConfigError(f"{_WHAT} does not go with strategy=oneshot: clients send sums over their data, not weights")
    rates = options.get("layer_preserving_rate", 1.0)
    if min(rates if isinstance(rates, list) else [rates]) < 1:
        raise ConfigError(f"{_WHAT} needs strategy.layer_preserving_rate=1: clients must return all that they received")
    if config.upload.name != "float32" or config.upload.values != "weights":
        raise ConfigError(
            f"{_WHAT} needs upload=float32 and upload.values=weights (and error_feedback=false), which is what "
            "Flower's mod clips"
        )
    if "sparsity" in options:
        limits_uploads = bool(fleet.devices) or (bool(fleet.fractions) and "upload_bytes" in fleet.limited)
        if options["sparsity"] > 0 or limits_uploads:
            raise ConfigError(
                f"{_WHAT} needs strategy.sparsity=0 and a fleet that does not limit uploads, since clients must return "
                "all units that they received; limit what they hold instead: fleet=tiers"
            )
        if make_method(config.pruner).score.needs:
            raise ConfigError(
                f"{_WHAT} needs pruner=random: scores of units would tell of a client's data without any noise"
            )
    for name, tensor in submodels.spec.tensors.items():
        if not tensor.trainable or tensor.dtype != torch.float32:
            kind = f"{'a trained' if tensor.trainable else 'an untrained'} {str(tensor.dtype).removeprefix('torch.')}"
            raise ConfigError(
                f"{_WHAT} needs a model of trained float32 tensors alone, but {name} is {kind} tensor, which noise "
                "would spoil; choose a model without batch norm, such as model=small_cnn, or model.norm=group"
            )
    if config.privacy.epsilon >= 1:
        log.warning("privacy.epsilon=%g: the Gaussian mechanism promises nothing from 1 on", config.privacy.epsilon)


def protect_update(
    config: RunConfig, instruction: TrainInstruction, message: Message, reply: Message, context: Context
) -> Message:
    """Return the reply that may leave the client: the one given, or one with noised weights and without its loss.

    The number of examples stays as it is. DataError where training changed nothing at all, which the mod cannot scale.
    """
    privacy = config.privacy
    if privacy.name == "none":
        return reply
    key = instruction.server_round, instruction.client_id
    rng = generator(config.seed, Stream.PRIVACY, *key) if privacy.seeded else np.random.default_rng()
    reply.content[METRICS] = MetricRecord({"num-examples": reply.content.metric_records[METRICS]["num-examples"]})
    noise = mod.LocalDpMod(privacy.clipping_norm, 2 * privacy.clipping_norm, privacy.epsilon, privacy.delta)
    try:
        with _numpy_seeded(rng), _no_news_of(logging.getLogger("flwr")):
            return noise(message, context, lambda *_: reply)
    except ZeroDivisionError as error:
        raise DataError(
            f"client {instruction.client_id}: training changed no weight, and Flower's mod divides by the change; "
            "raise local.lr"
        ) from error


@contextmanager
def _no_news_of(logger: logging.Logger) -> Iterator[None]:
    """Let a logger pass warnings alone: the mod tells of every upload, twice."""
    before = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(before)


@contextmanager
def _numpy_seeded(rng: np.random.Generator) -> Iterator[None]:
    """Let numpy's global generator, which Flower draws from, start anew from ``rng``; put it back afterwards.

    Without this, forked workers would all draw the same noise, and the server could take it off by subtraction.
    """
    before = np.random.get_state()  # noqa: NPY002
    np.random.seed(rng.integers(0, 2**32, size=16, dtype=np.uint32))  # noqa: NPY002
    try:
        yield
    finally:
        np.random.set_state(before)  # noqa: NPY002
