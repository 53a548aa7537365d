"""A broken state is not accepted, and the client that broke it is named."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fedlp.errors import ProtocolError
from fedlp.federation.server.checkpoint import ServerState, load_checkpoint, save_checkpoint
from fedlp.federation.server.state_check import RoundGuard, find_fault
from fedlp.types import ClientUpdate, Keep

PARAMS = {
    "conv.weight": torch.tensor([[0.5, -2.0], [0.1, 0.0]]),
    "bn.running_var": torch.tensor([1.0, 0.25]),
    "bn.num_batches_tracked": torch.tensor(7),
}
STATE = ServerState(3, PARAMS, {"momentum.conv.weight": torch.ones(2, 2)}, {"score.a": torch.zeros(2)})
TRAINED = frozenset({"conv.weight"})


def update(client_id: int, **changed: Tensor) -> ClientUpdate:
    renamed = {name.replace("__", "."): tensor for name, tensor in changed.items()}
    return ClientUpdate(4, client_id, 10, {}, params={**PARAMS, **renamed})


def guard(state: ServerState = STATE, holds_weights: bool = True) -> RoundGuard:
    return RoundGuard(state, TRAINED, holds_weights)


# ---- updates
def test_an_honest_update_passes() -> None:
    guard().admit(update(1, bn__running_var=torch.tensor([1e6, 0.0]), conv__weight=torch.full((2, 2), 1e4)), {})


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"conv__weight": torch.full((2, 2), -2.1e4)}, "conv.weight holds 2.1e+04; more than 2e+04"),
        ({"bn__running_var": torch.tensor([1.0, 1.1e8])}, "bn.running_var holds 1.1e+08; more than 1e+08"),
        ({"bn__running_var": torch.tensor([1.0, -1e-9])}, "bn.running_var holds negative variances"),
    ],
)
def test_what_no_training_gives_is_rejected(changed: Mapping[str, Tensor], words: str) -> None:
    with pytest.raises(ProtocolError) as error:
        guard().admit(update(5, **changed), {})
    assert str(error.value).startswith("client 5, round 4: ")
    assert words in str(error.value)


def test_differences_may_be_negative_but_not_the_variance_that_they_give() -> None:
    falls = ClientUpdate(4, 1, 10, {}, params={"bn.running_var": torch.tensor([-0.25])})
    keeps = {"bn.running_var": (Keep(2, ((1, 2),)),)}
    guard(holds_weights=False).admit(falls, keeps)
    with pytest.raises(ProtocolError, match="negative variances"):
        guard(holds_weights=True).admit(falls, keeps)
    below = ClientUpdate(4, 1, 10, {}, params={"bn.running_var": torch.tensor([-0.26])})
    with pytest.raises(ProtocolError, match="negative variances"):
        guard(holds_weights=False).admit(below, keeps)


# ---- states
@pytest.mark.parametrize(
    ("part", "name", "value", "words"),
    [
        (
            "params",
            "conv.weight",
            torch.tensor([[math.inf, 0.0], [0.0, 0.0]]),
            "conv.weight would hold NaN or infinite",
        ),
        ("params", "bn.running_var", torch.tensor([1.0, -0.1]), "bn.running_var would hold negative variances"),
        ("params", "bn.num_batches_tracked", torch.tensor(-(2**63)), "would hold a count outside [0, "),
        ("optimizer", "momentum.conv.weight", torch.full((2, 2), math.nan), "the server optimizer's momentum.conv"),
        ("optimizer", "variance.conv.weight", torch.full((2, 2), -1.0), "variance.conv.weight would hold negative"),
    ],
)
def test_a_broken_state_is_found(part: str, name: str, value: Tensor, words: str) -> None:
    assert find_fault(STATE) is None
    parts = {"params": STATE.params, "optimizer": STATE.optimizer, "memory": STATE.memory}
    fault = find_fault(ServerState(4, **{**parts, part: {**parts[part], name: value}}))
    assert fault is not None
    assert words in fault.text


def judge(extents: Mapping[int, float], broken: ServerState) -> tuple[ServerState, list[tuple[int, str]]]:
    """Return what is accepted after updates of some extents of the weight, and the accused."""
    accused: list[tuple[int, str]] = []
    watch = guard()
    for client_id, extent in extents.items():
        watch.admit(update(client_id, conv__weight=torch.tensor([[extent, 0.0], [0.0, -extent / 2]])), {})
    return watch.accept(broken, lambda client_id, reason, _: accused.append((client_id, reason))), accused


BROKEN = ServerState(4, {**PARAMS, "conv.weight": torch.full((2, 2), math.inf)})


def test_the_round_is_undone_and_who_stands_out_is_named(caplog: pytest.LogCaptureFixture) -> None:
    state, accused = judge({1: 2.0, 2: 1.9, 3: 2e4, 4: 3.0, 5: 1e3}, BROKEN)
    assert accused == [(3, "suspected"), (5, "suspected")]
    assert (state.server_round, state.suspects) == (4, (3, 5))
    assert state.params is STATE.params
    assert state.optimizer is STATE.optimizer
    assert "round 4 is undone: conv.weight would hold NaN or infinite values" in caplog.text


def test_nobody_is_named_where_nobody_stands_out(caplog: pytest.LogCaptureFixture) -> None:
    state, accused = judge({1: 2.0, 2: 150.0, 3: 2e2}, BROKEN)
    assert (accused, state.suspects) == ([], ())
    assert "lower server_optimizer.lr" in caplog.text


def test_the_only_one_is_the_suspect() -> None:
    assert judge({2: 1.0}, BROKEN)[1] == [(2, "suspected")]


def test_a_sound_state_is_accepted() -> None:
    sound = ServerState(4, PARAMS)
    state, accused = judge({1: 2.0, 3: 2e4}, sound)
    assert state is sound
    assert not accused


def test_a_suspect_is_remembered_beyond_a_stop(tmp_path: Path) -> None:
    state, _ = judge({1: 2.0, 2: 1.9, 3: 2e4}, BROKEN)
    save_checkpoint(tmp_path, state)
    loaded = load_checkpoint(tmp_path)
    assert loaded is not None
    assert loaded.suspects == (3,)
    with pytest.raises(ProtocolError, match="client 3, round 4: its updates are not used any more"):
        guard(loaded).admit(update(3), {})
    guard(loaded).admit(update(1), {})
