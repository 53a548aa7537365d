"""Whole rounds with a client of mutated replies: the run goes on, and the model does not feel what is refused."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Error, Message
from torch import Tensor

from fedlp.apps import runs as assembly
from fedlp.config import compose, to_yaml
from fedlp.federation.server.checkpoint import ServerState
from fedlp.federation.wire import messages
from fedlp.types import RoundRecord
from tests.hostile.conftest import Figures
from tests.hostile.instant_clients import InstantClient, InstantGrid
from tests.hostile.mutations import TEXTS, mutate, pick
from tests.hostile.test_soak import resident
from tests.integration.running import read

PLAIN = (
    *("model=fedlp_cnn", "dataset=digits", "dataset.max_train_examples=60", "dataset.max_test_examples=8"),
    *("num_clients=3", "clients_per_round=3", "checkpoint_every=100000", "eval_every=100000"),
)
CASES = {
    "fedavg": ("strategy=fedavg",),
    "adam": ("strategy=fedavg", "server_optimizer=adam", "server_optimizer.lr=0.01"),
    "deltas": ("strategy=fedavg", "upload.values=deltas"),
    "clients choose units": (
        *("strategy=fedlp_plan", "strategy.unit_selection=client", "strategy.sparsity=0.5", "strategy.refresh_every=1"),
        *("upload=float32", "upload.values=weights"),
    ),
    "statistics, momentum": (
        "strategy=heterofl",
        "aggregator.batch_norm=static",
        "eval_every=1",
        "server_optimizer=momentum",
        "server_optimizer.lr=0.01",
    ),
}
ATTACKER = 1


class Mutant(InstantClient):
    """One of its clients sends mutated replies, and an error instead of every tenth."""

    def __call__(self, message: Message, client_id: int) -> Message:
        reply = super().__call__(message, client_id)
        if client_id != ATTACKER or message.metadata.message_type not in (messages.TRAIN, messages.STATISTICS):
            return reply
        rng = np.random.default_rng((int(message.metadata.group_id), 9))
        if rng.random() < 0.1:
            return Message(Error(int(rng.integers(9)), str(pick(rng, TEXTS[:-3]))), reply_to=message)
        return Message(mutate(rng, reply.content), reply_to=message)


@pytest.mark.parametrize("case", CASES)
def test_a_client_of_mutated_replies_harms_nobody(
    case: str, num_cases: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, figures: Figures
) -> None:
    started = time.process_time()
    num_rounds = max(20, num_cases // 100)
    monkeypatch.setattr(logging.getLogger("fedlp"), "disabled", True)  # pytest keeps whatever is logged
    config = compose((*PLAIN, *CASES[case], f"num_rounds={num_rounds}"))
    cfg = to_yaml(config)
    refused, before = 0, []

    def judge(record: RoundRecord, state: ServerState) -> None:
        nonlocal refused
        assert {failure.client_id for failure in record.failures} <= {ATTACKER}
        assert all(failure.message.isprintable() for failure in record.failures)
        assert all(len(failure.message) < 400 for failure in record.failures)
        assert state.suspects in ((), (ATTACKER,))
        check_bounds(state)
        refused += len(record.failures)
        if record.server_round == 10:
            before.append(resident())
        if record.failures and case == "fedavg":
            assert all(bool((tensor == honest(tensor)).all()) for tensor in state.params.values())

    assembly.serve_run(InstantGrid(config.num_clients, Mutant(cfg)), cfg, tmp_path, [judge])
    assert refused > num_rounds // 3
    assert resident() - before[0] < 128e6, f"{(resident() - before[0]) / 1e6:.0f} MB more after {num_rounds} rounds"
    figures[f"rounds: {case}"] = {
        "cases": num_rounds,
        "refused": refused,
        "cpu_s": round(time.process_time() - started, 1),
        "grown_mb": round((resident() - before[0]) / 1e6, 1),
    }
    totals: dict[str, Any] = read(tmp_path).manifest["totals"]
    assert all(isinstance(value, int | float) for value in totals.values())


def honest(tensor: Tensor) -> float | int:
    """Return the entries of what the honest clients send."""
    return float(torch.tensor(0.01)) if tensor.is_floating_point() else 1


def check_bounds(state: ServerState) -> None:
    for tensors in (state.params, state.optimizer, state.memory):
        for name, tensor in tensors.items():
            assert bool(torch.isfinite(tensor).all()), name
            assert "var" not in name.rpartition(".")[2] or bool((tensor >= 0).all()), name
            if not tensor.is_floating_point():
                assert 0 <= int(tensor.min()) <= int(tensor.max()) <= 2**53, name
