"""Flower strategy of a run: plain, asynchronous, by secure aggregation, or on a virtual clock."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from fedlp.apps.secagg_check import secagg_settings
from fedlp.config import RunConfig
from fedlp.errors import ConfigError
from fedlp.federation.fleet import fleet_devices
from fedlp.federation.secagg.strategy import SecureStrategy
from fedlp.federation.server.asynchronous import AsynchronousStrategy
from fedlp.federation.server.buffered_rounds import BufferedStrategy
from fedlp.federation.server.strategy import FedLPStrategy
from fedlp.federation.server.timed_rounds import TimedStrategy
from fedlp.federation.server.virtual_clock import VirtualClock


def make_strategy(config: RunConfig) -> Callable[..., FedLPStrategy]:
    """Return a factory of the strategy, called with the parameters of ``FedLPStrategy``."""
    secagg = secagg_settings(config)
    if secagg is not None:
        return partial(SecureStrategy, secagg=secagg)
    rounds, is_virtual = config.rounds, config.fleet.clock == "virtual"
    if rounds.name == "synchronous":
        return partial(TimedStrategy, clock=make_clock(config)) if is_virtual else FedLPStrategy
    size, exponent = rounds.buffer_size or config.clients_per_round, rounds.staleness_exponent
    if not is_virtual:
        return partial(BufferedStrategy, buffer_size=size, staleness_exponent=exponent)
    return partial(AsynchronousStrategy, clock=make_clock(config), buffer_size=size, staleness_exponent=exponent)


def check_rounds(config: RunConfig) -> None:
    """Raise ConfigError, with the remedy, where clock, rounds and privacy do not go together."""
    is_virtual, privacy = config.fleet.clock == "virtual", config.privacy.name
    if is_virtual and privacy == "secagg":
        raise ConfigError("fleet.clock=virtual knows no phases of privacy=secagg: choose fleet.clock=wall")
    if config.rounds.name == "synchronous":
        return
    for holds, remedy in (
        (
            is_virtual or not config.simulation.batched,
            "simulation.batched=false on the wall clock, where clients train one by one",
        ),
        (not config.fleet.extra_clients, "fleet.extra_clients=0: no round ends that could leave out the slowest"),
        (privacy not in ("central_dp", "secagg"), "privacy=none or local_dp: others draw or sum over a cohort"),
    ):
        if not holds:
            raise ConfigError(f"rounds=asynchronous needs {remedy}")


def make_clock(config: RunConfig) -> VirtualClock:
    """Return the virtual clock of a fleet of device classes."""
    return VirtualClock(
        devices=fleet_devices(config.fleet, config.num_clients, config.seed),
        batch_size=config.local.batch_size,
        local_epochs=config.local.epochs,
        deadline_s=config.rounds.deadline_s,
    )
