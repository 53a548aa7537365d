"""Budgets of a fleet: device classes or tiers, distributed over clients in exact shares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedlp.config import DeviceConfig, FleetConfig
from fedlp.errors import ConfigError
from fedlp.federation.budgets import read_steps
from fedlp.federation.server.virtual_clock import Device
from fedlp.rng import Stream, generator
from fedlp.types import Budget

_FLOPS_PER_MAC = 2
_TRAINING_PASSES = 3  # a backward pass costs about two forward ones


def fleet_budgets(
    config: FleetConfig, num_clients: int, seed: int, whole_costs: Mapping[str, float]
) -> tuple[Budget | None, ...]:
    """Return the budget of each client, None for no limit; equal for equal seeds.

    Every class gets its exact share of clients, rounded by largest remainder; the assignment is random.

    Parameters
    ----------
    whole_costs : mapping from limit name to float
        Costs of the whole model: every name in ``config.limited``, for tiers.

    Raises
    ------
    ConfigError
        If a cost that tiers limit is not among ``whole_costs``.
    """
    members = fleet_kinds(config, num_clients, seed)
    if members is None:
        return (None,) * num_clients
    if config.fractions:
        for name in config.limited:
            if name not in whole_costs:
                raise ConfigError(
                    f"fleet.limited={name}: what the whole model costs of it is not known here; choose from "
                    + ", ".join(whole_costs)
                )
        kinds: list[Budget] = [
            Budget(**{name: fraction * whole_costs[name] for name in config.limited}) for fraction in config.fractions
        ]
    else:
        kinds = [_device_budget(config, device) for device in config.devices.values()]
    return tuple(kinds[kind] for kind in members)


def fleet_kinds(config: FleetConfig, num_clients: int, seed: int) -> NDArray[np.int64] | None:
    """Return the index of each client's tier or device class; None without a fleet."""
    if config.fractions:
        shares = config.shares or [1.0] * len(config.fractions)
    elif config.devices:
        shares = [device.share for device in config.devices.values()]
    else:
        return None
    counts = split_exactly(shares, num_clients)
    return generator(seed, Stream.FLEET).permutation(np.repeat(np.arange(len(counts)), counts))


def fleet_devices(config: FleetConfig, num_clients: int, seed: int) -> tuple[Device, ...]:
    """Return the device of each client, as speeds of a virtual clock; empty without device classes."""
    members = fleet_kinds(config, num_clients, seed)
    if members is None or not config.devices:
        return ()
    classes = [
        Device(
            name=name,
            flops=device.flops,
            downlink_bytes_s=device.downlink_bytes_s or device.uplink_bytes_s,
            uplink_bytes_s=device.uplink_bytes_s,
            watts=device.watts,
            measured=None if device.profile is None else read_steps(Path(device.profile).expanduser()),
        )
        for name, device in config.devices.items()
    ]
    return tuple(classes[kind] for kind in members.tolist())


def tier_names(config: FleetConfig, num_clients: int, seed: int) -> dict[int, str]:
    """Return the tier (its fraction) or device class of each client; empty without a fleet."""
    members = fleet_kinds(config, num_clients, seed)
    names = [f"{fraction:g}" for fraction in config.fractions] or list(config.devices)
    return {} if members is None else {client_id: names[kind] for client_id, kind in enumerate(members.tolist())}


def split_exactly(shares: Sequence[float], total: int) -> NDArray[np.int64]:
    """Return whole counts that sum to ``total``, each within one of its share; the largest remainders go up."""
    wanted = np.asarray(shares, dtype=np.float64) / sum(shares) * total
    counts = np.floor(wanted + 1e-9).astype(np.int64)
    missing = total - int(counts.sum())
    counts[np.argsort(np.round(counts - wanted, 9), kind="stable")[:missing]] += 1
    return counts


def _device_budget(config: FleetConfig, device: DeviceConfig) -> Budget:
    return Budget(
        macs=device.flops * config.seconds_per_example / (_FLOPS_PER_MAC * _TRAINING_PASSES),
        memory_bytes=config.memory_share * device.memory_bytes,
        upload_bytes=device.uplink_bytes_s * config.upload_s,
    )
