"""Fleets give every class its exact share of clients, and every client the budget of its class."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from fedlp.config import FleetConfig, compose
from fedlp.errors import ConfigError
from fedlp.federation.fleet import fleet_budgets, fleet_kinds, split_exactly
from fedlp.types import Budget

WHOLE = {"params": 1000.0, "macs": 5000.0}


def test_the_default_fleet_has_no_budgets() -> None:
    assert fleet_budgets(compose().fleet, 3, 0, WHOLE) == (None, None, None)


def test_tiers_are_fractions_of_the_whole_model_in_equal_shares() -> None:
    budgets = fleet_budgets(compose(["fleet=tiers"]).fleet, 40, 0, WHOLE)
    assert Counter(budgets) == {Budget(params=1000.0 * f, macs=5000.0 * f): 10 for f in (1.0, 0.5, 0.25, 0.1)}
    assert budgets == fleet_budgets(compose(["fleet=tiers"]).fleet, 40, 0, WHOLE)
    assert budgets != fleet_budgets(compose(["fleet=tiers"]).fleet, 40, 1, WHOLE)


def test_kinds_are_those_of_the_budgets() -> None:
    config = compose(["fleet=tiers", "fleet.shares=[1,2,3,4]"]).fleet
    kinds, budgets = fleet_kinds(config, 30, 5), fleet_budgets(config, 30, 5, WHOLE)
    assert kinds is not None
    assert np.bincount(kinds).tolist() == [3, 6, 9, 12]
    assert [config.fractions[kind] * 1000 for kind in kinds] == [budget and budget.params for budget in budgets]
    assert fleet_kinds(compose().fleet, 3, 0) is None


def test_devices_limit_memory_macs_and_uploads() -> None:
    config = compose(["fleet=mixed", "fleet.upload_s=10", "fleet.seconds_per_example=0.6"]).fleet
    counts = Counter(budget and budget.memory_bytes for budget in fleet_budgets(config, 20, 0, WHOLE))
    assert counts[0.5 * 2**20] == 2  # STM32H7
    assert counts[0.5 * 6 * 2**30] == 4  # phones
    assert Budget(macs=2.4e7, memory_bytes=2**19, upload_bytes=1.25e7) in fleet_budgets(config, 20, 0, WHOLE)


@pytest.mark.parametrize("seed", range(20))
def test_shares_are_split_exactly(seed: int) -> None:
    rng = np.random.default_rng(seed)
    shares, total = rng.uniform(0, 1, int(rng.integers(1, 9))), int(rng.integers(1, 200))
    counts = split_exactly(shares.tolist(), total)
    assert counts.sum() == total
    assert (abs(counts - shares / shares.sum() * total) < 1).all()


def test_a_limit_whose_whole_cost_is_unknown_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"fleet\.limited=latency_s: .* choose from params, macs"):
        fleet_budgets(FleetConfig(fractions=[0.5], limited=["latency_s"]), 3, 0, WHOLE)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("fleet=mixed fleet.devices.phone.flops=-1", r"fleet\.devices\.phone\.flops=-1"),
        ("fleet=mixed fleet.fractions=[0.5]", "one of fractions or devices"),
        ("fleet=tiers fleet.fractions=[1.5]", r"fleet\.fractions"),
        ("fleet=tiers fleet.limited=[speed]", r"fleet\.limited=speed .* one of params"),
        ("fleet=tiers fleet.shares=[1]", r"fleet\.shares"),
        ("fleet=tiers fleet.memory_share=2", r"fleet\.memory_share"),
    ],
)
def test_what_is_out_of_range_is_refused(override: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        compose(override.split())
