"""Frozen tensors travel down once: fewer bytes, the same model, and a client that lost them gets them again."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fedlp.apps.federate import Federation
from fedlp.apps.run_settings import make_download
from fedlp.config import compose
from fedlp.errors import ConfigError
from fedlp.federation.server import strategy
from fedlp.federation.server.frozen_tensors import EncodedDownlink
from fedlp.federation.wire.digests import digest_tensors
from fedlp.types import SubModel
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


# ---- encoded downloads
NF4 = ("download=nf4", "download.block_size=16")


def decoded_model(done: Finished) -> dict[str, torch.Tensor]:
    """Return the run's model with the frozen tensors that its clients trained against."""
    federation = Federation(done.config)
    downlink = EncodedDownlink(federation.submodels, make_download(done.config), done.config.seed)
    layout = federation.submodels.layout(SubModel())
    return downlink.decoded(layout, federation.initial_params())


def test_encoded_they_are_counted_as_they_travel(once: Once) -> None:
    plain, done = once(*FROZEN, *METHODS["fedavg"]), once(*FROZEN, *METHODS["fedavg"], *NF4)
    spec = Federation(done.config).submodels.spec
    sizes = {name: plain.tensors[name].numel() for name in spec.frozen}
    travels = sum(-(-n // 2) + 2 * -(-n // 16) if plain.tensors[name].ndim > 1 else 4 * n for name, n in sizes.items())
    down = [[client["bytes_down"] for client in line["clients"]] for line in done.rounds]
    assert down[1] == down[2] == [client["bytes_down"] for client in plain.rounds[1]["clients"]]
    assert down[0][0] - down[1][0] == pytest.approx(travels, abs=600), "headers of arrays, the digest"


def test_clients_train_against_the_decoded_values_and_the_server_keeps_its_own(once: Once, tmp_path: Path) -> None:
    plain, done = once(*FROZEN, *METHODS["fedavg"]), once(*FROZEN, *METHODS["fedavg"], *NF4)
    frozen = Federation(done.config).submodels.spec.frozen
    assert all(torch.equal(done.tensors[name], plain.tensors[name]) for name in frozen)
    assert done.model != plain.model
    rounded = decoded_model(done)

    class Rounded(Federation):
        def initial_params(self) -> dict[str, torch.Tensor]:
            return rounded

    config = plain.config
    Rounded(config).run_locally(tmp_path / "rounded")
    found = load_file(tmp_path / "rounded/model.safetensors")
    for name, values in done.tensors.items():
        assert name in frozen or torch.equal(values, found[name])


def test_encoded_a_client_that_lost_them_gets_them_again(once: Once, tmp_path: Path) -> None:
    path = tmp_path / "run"
    shutil.copytree(once(*FROZEN, *METHODS["fedavg"], *NF4, "num_rounds=1").path, path)
    damaged = next((path / "clients/frozen/3").iterdir())
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\xff")
    shutil.rmtree(path / "clients/frozen/2")
    done = go_on(path, 3)
    assert done.failures == [(2, 2, "raised"), (2, 3, "raised")]
    down = {client["client_id"]: client["bytes_down"] for client in done.rounds[2]["clients"]}
    assert down[2] == down[3] > down[4]


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("encoding", ["int8", "nf4"])
def test_encoded_a_stop_changes_neither_model_nor_bytes(encoding: str, method: str, once: Once, tmp_path: Path) -> None:
    options = (*FROZEN, *METHODS[method], f"download={encoding}")
    shutil.copytree(once(*options, "num_rounds=2").path, tmp_path / "run")
    assert_same(go_on(tmp_path / "run", 3), once(*options))


@pytest.mark.slow
def test_tiers_are_evaluated_with_what_devices_hold(once: Once) -> None:
    tiers = ("strategy=heterofl", "strategy.widths=[1.0,0.5]", "evaluation.tiers=true")
    done = once(*FROZEN, *tiers, "download=block4")
    last = done.rounds[-1]["metrics"]
    whole = [value for name, value in last.items() if name.startswith("tier_") and name.endswith("_loss")]
    assert last["loss"] not in whole


DEVICES = "+fleet.devices={pi: {memory_bytes: 4e9, flops: 1e10, uplink_bytes_s: 5e6}}"
BUFFERED = ("rounds=asynchronous", "rounds.buffer_size=2", DEVICES, "fleet.clock=virtual")


@pytest.mark.slow
@pytest.mark.parametrize("rounds", [(), BUFFERED], ids=["synchronous", "asynchronous"])
def test_evaluations_on_clients_carry_them_encoded(rounds: tuple[str, ...], once: Once) -> None:
    asked = ("strategy=fedavg", "evaluation=both", "dataset.client_test_fraction=0.25", *rounds)
    plain, done = once(*FROZEN, *asked), once(*FROZEN, *asked, "download=nf4")
    assert done.failures == []
    assert sum(line["bytes_down"] for line in done.rounds) < sum(line["bytes_down"] for line in plain.rounds)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (("download=nf4",), "download=nf4 is for frozen tensors, but nothing is"),
        (("model.frozen=[fc1]", "download.name=topk"), "download=topk would set most weights to zero"),
    ],
)
def test_what_cannot_be_is_refused(overrides: tuple[str, ...], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Federation(compose((*TINY, *overrides)))
