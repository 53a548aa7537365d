"""Flower strategy of a run: plain, by secure aggregation, or on a virtual clock."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from fedlp.apps.secagg_check import secagg_settings
from fedlp.config import RunConfig
from fedlp.federation.fleet import fleet_devices
from fedlp.federation.secagg.strategy import SecureStrategy
from fedlp.federation.server.asynchronous import AsynchronousStrategy
from fedlp.federation.server.strategy import FedLPStrategy
from fedlp.federation.server.timed_rounds import TimedStrategy
from fedlp.federation.server.virtual_clock import VirtualClock


def make_strategy(config: RunConfig) -> Callable[..., FedLPStrategy]:
    """Return what makes the strategy from the parameters of ``FedLPStrategy``."""
    secagg = secagg_settings(config)
    if secagg is not None:
        return partial(SecureStrategy, secagg=secagg)
    if config.fleet.clock != "virtual":
        return FedLPStrategy
    clock, rounds = make_clock(config), config.rounds
    if rounds.name == "synchronous":
        return partial(TimedStrategy, clock=clock)
    size = rounds.buffer_size or config.clients_per_round
    return partial(AsynchronousStrategy, clock=clock, buffer_size=size, staleness_exponent=rounds.staleness_exponent)


def make_clock(config: RunConfig) -> VirtualClock:
    """Return the virtual clock of a fleet of device classes."""
    return VirtualClock(
        devices=fleet_devices(config.fleet, config.num_clients, config.seed),
        batch_size=config.local.batch_size,
        local_epochs=config.local.epochs,
        deadline_s=config.rounds.deadline_s,
    )
