"""Frozen tensors travel down once: fewer bytes, the same model, and a client that lost them gets them again."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fedlp.apps.federate import Federation
from fedlp.federation.server import strategy
from fedlp.federation.wire.digests import digest_tensors
from tests.integration.running import TINY, Finished, run
from tests.integration.test_resume import assert_same, go_on

Once = Callable[..., Finished]
FROZEN = (*TINY, "model.frozen=[fc1,fc2]", "clients_per_round=6", "num_rounds=3", "simulation.workers=1")
METHODS = {
    "fedavg": ("strategy=fedavg",),
    "fedrolex": ("strategy=fedrolex", "strategy.widths=[1.0,0.5]"),
    "hetero": ("strategy=fedlp_hetero",),
    "plan": ("strategy=fedlp_plan", "calibration.examples=8", "fleet=tiers", "fleet.fractions=[1.0,0.6]"),
}


def frozen_bytes(done: Finished) -> int:
    spec = Federation(done.config).submodels.spec
    return sum(4 * done.tensors[name].numel() for name in spec.frozen)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_the_model_is_the_same_as_if_they_travelled_each_time(
    method: str, once: Once, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = once(*FROZEN, *METHODS[method])
    monkeypatch.setattr(strategy, "holds", lambda *_: False)
    each_time = run(tmp_path / "each", *FROZEN, *METHODS[method])
    assert done.failures == each_time.failures == []
    assert done.model == each_time.model
    down, all_down = ([line["bytes_down"] for line in found.rounds] for found in (done, each_time))
    assert down[0] == all_down[0]
    assert sum(down) < sum(all_down)


def test_they_are_counted_once(once: Once) -> None:
    done = once(*FROZEN, *METHODS["fedavg"])
    costs = [{client["client_id"]: client["bytes_down"] for client in line["clients"]} for line in done.rounds]
    still = frozen_bytes(done)
    for client_id in range(6):
        first, second, third = (cost[client_id] for cost in costs)
        assert second == third
        assert first - second == pytest.approx(still, abs=100), "the digest takes a few"


def test_a_client_that_lost_them_fails_once_and_gets_them_again(once: Once, tmp_path: Path) -> None:
    path = tmp_path / "run"
    shutil.copytree(once(*FROZEN, *METHODS["fedavg"], "num_rounds=1").path, path)
    shutil.rmtree(path / "clients/frozen/2")
    done = go_on(path, 3)
    assert done.failures == [(2, 2, "raised")]
    assert "lost the frozen tensors" in done.rounds[1]["failures"][0]["message"]
    down = {client["client_id"]: client["bytes_down"] for client in done.rounds[2]["clients"]}
    assert down[2] - down[3] == pytest.approx(frozen_bytes(done), abs=100)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fedavg", "fedrolex"])
def test_a_stop_changes_neither_model_nor_bytes(method: str, once: Once, tmp_path: Path) -> None:
    shutil.copytree(once(*FROZEN, *METHODS[method], "num_rounds=2").path, tmp_path / "run")
    assert_same(go_on(tmp_path / "run", 3), once(*FROZEN, *METHODS[method]))


def test_a_digest_tells_names_shapes_and_values() -> None:
    one = {"a": torch.zeros(2, 3), "b": torch.ones(1)}
    assert digest_tensors(one) == digest_tensors(dict(reversed(one.items())))
    others = [
        {"a": torch.zeros(3, 2), "b": torch.ones(1)},
        {"a": torch.zeros(2, 3), "c": torch.ones(1)},
        {"a": torch.zeros(2, 3), "b": -torch.ones(1)},
        {"a": torch.zeros(2, 3, dtype=torch.float64), "b": torch.ones(1)},
    ]
    assert len({digest_tensors(found) for found in [one, *others]}) == 5
