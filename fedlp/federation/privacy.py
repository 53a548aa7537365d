"""Local differential privacy by Flower's own mod: a client's upload is clipped and noised before it leaves.

The mod subtracts received from returned values, array by array. So it works only if both are the same
entries, in float32; ``apps.privacy_check`` refuses everything else before a run begins. Of the mod's parameters the
sensitivity is not free: two updates of norm C at most differ by 2C at most, for all data.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from flwr.app import Context, Message, MetricRecord
from flwr.clientapp import mod

from fedlp.config import PrivacyConfig
from fedlp.errors import DataError
from fedlp.federation.wire.messages import METRICS
from fedlp.rng import Stream, generator
from fedlp.types import ClientUpdate

log = logging.getLogger("fedlp")

_WHAT = "privacy=local_dp"


def protect_update(
    privacy: PrivacyConfig,
    seed: int,
    update: ClientUpdate,
    message: Message,
    reply: Message,
    context: Context,
) -> Message:
    """Return the reply that leaves the client: the given one, or one with noised weights and without its loss.

    The number of examples is not changed. DataError if training changed no entry, which the mod cannot scale.
    """
    if privacy.name != "local_dp":
        return reply
    assert privacy.epsilon is not None
    key = update.server_round, update.client_id
    rng = generator(seed, Stream.PRIVACY, *key) if privacy.seeded else np.random.default_rng()
    reply.content[METRICS] = MetricRecord({"num-examples": reply.content.metric_records[METRICS]["num-examples"]})
    noise = mod.LocalDpMod(privacy.clipping_norm, 2 * privacy.clipping_norm, privacy.epsilon, privacy.delta)
    try:
        with _numpy_seeded(rng), _no_news_of(logging.getLogger("flwr")):
            return noise(message, context, lambda *_: reply)
    except ZeroDivisionError as error:
        raise DataError(
            f"client {update.client_id}: training changed no weight, and Flower's mod divides by the change; "
            "raise local.lr"
        ) from error


@contextmanager
def _no_news_of(logger: logging.Logger) -> Iterator[None]:
    """Restrict a logger to warnings within a context: the mod logs every upload twice."""
    before = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(before)


@contextmanager
def _numpy_seeded(rng: np.random.Generator) -> Iterator[None]:
    """Seed numpy's global generator, which Flower draws from, from ``rng`` within a context.

    Without this, forked workers would all draw the same noise, and the server could take it off by subtraction.
    """
    before = np.random.get_state()  # noqa: NPY002
    np.random.seed(rng.integers(0, 2**32, size=16, dtype=np.uint32))  # noqa: NPY002
    try:
        yield
    finally:
        np.random.set_state(before)  # noqa: NPY002
