"""One-shot pruning by secure aggregation: sums of the clients as in the open, with drop-outs in every phase."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import Context, Message

from fedlp.apps import runs as assembly
from fedlp.config import compose, to_yaml
from fedlp.errors import ConfigError, DataError
from fedlp.federation.oneshot import messages as wire
from fedlp.federation.oneshot.messages import Part
from fedlp.federation.secagg import messages as phases
from fedlp.federation.secagg.pooled_sums import PooledSums
from fedlp.federation.wire.messages import count_bytes
from tests.integration.running import App, Finished, run

Once = Callable[..., Finished]
SECAGG = "privacy=secagg"
COMMON = (
    *("federated=true", "num_clients=6", "clients_per_round=6", "sparsity=0.4", "simulation.workers=2"),
    *("model=small_cnn", "dataset=digits", "dataset.max_train_examples=120", "dataset.max_test_examples=30"),
    *("partition=iid", "calibration.examples=20", "calibration.batch_size=8", "allocator=log_depth", "sums=float64"),
)
CASES = {
    "slimgpt": ("pruner=slimgpt", "pruner.damping=0.01"),
    "obs, halves": ("pruner=obs", "pruner.fisher=false"),
    "obs, fisher": ("pruner=obs", "pruner.damping=0.01"),
    "votes": ("unit_selection=client", "pruner=slimgpt"),
    "batch norms": ("model=fedlp_cnn", "pruner=slimgpt", "pruner.keeps_batch_norm=false"),
}
SOME = [pytest.param(case, marks=() if case == "slimgpt" else pytest.mark.slow) for case in CASES]
PHASES = {"keys": phases.KEYS, "shares": phases.SHARES, "moments": wire.MOMENTS, "unmask": phases.UNMASK}
SLOW = [pytest.param(phase, marks=() if phase == "moments" else pytest.mark.slow) for phase in PHASES]


def silent(client: int, kind: str) -> App:
    """Return the clients' app, in which the answers of one never come."""

    def app(message: Message, context: Context) -> Message:
        reply = assembly.client_app(message, context)
        if message.metadata.message_type == kind and context.node_config["partition-id"] == client:
            raise RuntimeError("lost on the way")
        return reply

    return app


def assert_close(one: Finished, other: Finished) -> None:
    assert one.tensors.keys() == other.tensors.keys()
    for name, value in one.tensors.items():
        torch.testing.assert_close(value, other.tensors[name], rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize("case", SOME)
def test_the_pruned_model_is_that_of_open_sums(case: str, once: Once) -> None:
    secure, plain = once(*COMMON, *CASES[case], SECAGG), once(*COMMON, *CASES[case])
    assert [line["failures"] for line in secure.rounds] == [[]] * len(plain.rounds)
    assert_close(secure, plain)
    for line in secure.rounds:
        for way in ("bytes_down", "bytes_up"):
            assert sum(phase[way] for phase in line.get("phases", {}).values()) == line[way]


@pytest.mark.parametrize("phase", SLOW)
def test_the_sum_is_that_of_those_who_stay(phase: str, once: Once, tmp_path: Path) -> None:
    case = (*COMMON, *CASES["slimgpt"])
    done = run(tmp_path / "run", *case, SECAGG, app=silent(4, PHASES[phase]))
    assert {client for _, client, _ in done.failures} == {4}
    if phase == "unmask":  # its answer counts
        assert_close(done, once(*case))
    else:
        assert_close(done, run(tmp_path / "plain", *case, app=silent(4, wire.MOMENTS)))


def test_the_server_sees_no_clients_sums(tmp_path: Path) -> None:
    """No answer holds sums in the open: neither its records nor its bytes are those of open sums."""
    seen: list[set[str]] = []

    def app(message: Message, context: Context) -> Message:
        reply = assembly.client_app(message, context)
        if message.metadata.message_type == wire.MOMENTS:
            seen.append({*reply.content})
            assert wire.ANSWER not in reply.content
            assert count_bytes(reply.content) > 0
        return reply

    run(tmp_path, *COMMON, *CASES["slimgpt"], SECAGG, "simulation.workers=1", app=app)


PARTS = (Part("gram", (3, 3), symmetric=True), Part("total", (3,)))


@pytest.mark.parametrize("kind", [wire.MOMENTS, wire.FISHER, wire.NORMS])
def test_sums_of_integers_are_sums(kind: str) -> None:
    rng = np.random.default_rng(1)
    layout = PooledSums(kind, PARTS, 5)
    clients, words = [], np.zeros(layout.size, np.uint64)
    for number in range(5):
        x = torch.from_numpy(rng.normal(size=(40, 3)))
        clients.append({"gram": x.T @ x, "total": -10 * x.sum(dim=0)})
        words += layout.encode(clients[-1], 7 + number)
    found, examples = layout.decode(words)
    assert examples == 45
    gram = sum(client["gram"] for client in clients)
    lower = gram[torch.ones(3, 3, dtype=torch.bool).tril()]
    assert float((found["gram"] - lower).abs().max()) <= layout.error() * 1.01
    assert float((found["total"] - sum(client["total"] for client in clients)).abs().max()) <= layout.error() * 1.01


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 2.0**29])
def test_a_sum_out_of_range_is_refused_where_it_is_made(value: float) -> None:
    with pytest.raises(DataError, match=r"2\^28"):
        PooledSums(wire.MOMENTS, PARTS, 5).encode({"gram": torch.eye(3) * value, "total": torch.zeros(3)}, 3)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("unit_selection=client", "pruner=slimgpt", "clients_per_round=2"), "min_group=3"),
        (("pruner=obs", "clients_per_round=5"), "two halves"),
        (("pruner=slimgpt", "pruner.damping=0.01", "clients_per_round=2"), "min_group=3"),
    ],
)
def test_what_sums_cannot_serve_is_refused(overrides: tuple[str, ...], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        assembly.make_plan(to_yaml(compose([*COMMON, *overrides, SECAGG])))
