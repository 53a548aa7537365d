"""Trained tensors encoded on their way down: counted as they travel, trained from, and added to the server's own."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from fedlp.apps.federate import Federation
from fedlp.apps.run_settings import make_download
from fedlp.config import compose
from fedlp.errors import ConfigError
from fedlp.federation.server.frozen_tensors import EncodedDownlink
from fedlp.types import SubModel
from tests.integration.running import TINY, Finished
from tests.integration.test_resume import assert_same, go_on

Once = Callable[..., Finished]
ALL = (*TINY, "upload.values=deltas", "simulation.workers=1")
EIGHT = ("download=block8", "download.tensors=all")
METHODS = {
    "fedavg": ("strategy=fedavg",),
    "heterofl": ("strategy=heterofl", "strategy.widths=[1.0,0.5]"),
    "hetero": ("strategy=fedlp_hetero",),
    "plan": ("strategy=fedlp_plan", "calibration.examples=8", "fleet=tiers", "fleet.fractions=[1.0,0.6]"),
    "frozen": ("strategy=fedavg", "model.frozen=[fc1,fc2]"),
    "asynchronous": (
        *("strategy=fedavg", "rounds=asynchronous", "rounds.buffer_size=2", "fleet.clock=virtual"),
        "+fleet.devices={pi: {memory_bytes: 4e9, flops: 1e10, uplink_bytes_s: 5e6}}",
    ),
}


def received(done: Finished) -> dict[str, Tensor]:
    """Return the initial model as clients receive it."""
    federation = Federation(done.config)
    downlink = EncodedDownlink(federation.submodels, make_download(done.config), done.config.seed)
    return downlink.decoded(federation.submodels.layout(SubModel()), federation.initial_params())


@pytest.mark.parametrize("encoding", ["block8", "nf4", "int8", "bfloat16"])
def test_clients_train_from_what_they_receive_and_the_server_adds_their_differences_to_its_own(
    encoding: str, once: Once, tmp_path: Path
) -> None:
    one_round = (*ALL, "strategy=fedavg", "clients_per_round=6", "num_rounds=1")
    done = once(*one_round, f"download={encoding}", "download.tensors=all")
    before, rounded = Federation(done.config).initial_params(), received(done)

    class Rounded(Federation):
        def initial_params(self) -> dict[str, Tensor]:
            return rounded

    Rounded(compose(one_round)).run_locally(tmp_path / "rounded")
    trained = load_file(tmp_path / "rounded/model.safetensors")
    moved = [name for name, tensor in before.items() if not torch.equal(rounded[name], tensor)]
    assert sum(name.endswith("weight") for name in moved) == sum(tensor.ndim > 1 for tensor in before.values()) > 0
    for name, tensor in done.tensors.items():
        torch.testing.assert_close(tensor, before[name] + (trained[name] - rounded[name]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_all_methods_send_a_quarter_down(method: str, once: Once) -> None:
    options = METHODS[method]
    plain, done = once(*ALL, *options), once(*ALL, *options, *EIGHT)
    assert done.failures == []
    down, before = (sum(line["bytes_down"] for line in found.rounds) for found in (done, plain))
    assert 0.25 < down / before < 0.35, "8.25 bits of 32, and vectors, index sets, names"
    assert (
        done.manifest["expected"]["bytes_down_per_client"] < 0.35 * plain.manifest["expected"]["bytes_down_per_client"]
    )


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_stop_changes_neither_model_nor_bytes(method: str, once: Once, tmp_path: Path) -> None:
    options = (*ALL, *METHODS[method], *EIGHT)
    shutil.copytree(once(*options).path, tmp_path / "run")
    assert_same(go_on(tmp_path / "run", 3), once(*options, "num_rounds=3"))


def test_batched_clients_read_them_too(once: Once) -> None:
    options = (*ALL, "strategy=fedavg", *EIGHT)
    alone, together = once(*options), once(*options, "simulation.batched=true")
    assert together.failures == []
    assert [line["bytes_down"] for line in together.rounds] == [line["bytes_down"] for line in alone.rounds]
    for name, tensor in alone.tensors.items():
        torch.testing.assert_close(together.tensors[name], tensor, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (("download=block8", "download.tensors=some"), "download.tensors=some is not allowed: it must be one of"),
        (("download=block8", "download.tensors=all"), "download.tensors=all needs upload.values=deltas"),
        (("download.tensors=all", "upload.values=deltas"), "encodes nothing with download=float32"),
    ],
)
def test_what_cannot_be_is_refused(overrides: tuple[str, ...], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Federation(compose((*TINY, *overrides)))
