"""Clients that cut their own ranks: the rule, what travels, a stop, what is refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fedlp.apps.federate import Federation
from fedlp.config import compose
from fedlp.errors import ConfigError, ProtocolError
from fedlp.federation.strategies.self_pruned_ranks import SelfPrunedRanks
from fedlp.federation.wire import messages
from fedlp.models.adapter_ranks import tail_norm, tail_start
from fedlp.types import ClientProfile, Keep
from tests.integration.running import Finished
from tests.integration.test_adapter_ranks import RANKED
from tests.integration.test_adapters import LORA
from tests.integration.test_resume import assert_same, go_on

Once = Callable[..., Finished]
FIXED = (*RANKED, "aggregator=hetlora", "clients_per_round=6", "num_rounds=4", "local.epochs=2")
PRUNING = (*FIXED, "adapter.self_pruning=true", "adapter.rank_decay=0.6", "adapter.rank_penalty=5")


@pytest.mark.parametrize(
    ("rank", "decay", "least", "left"),
    [(50, 0.99, 5, 49), (8, 0.99, 1, 7), (5, 0.5, 4, 4), (1, 0.9, 1, 1), (2, 0.9, 4, 2)],
)
def test_a_cut_leaves_a_share_rounded_down(rank: int, decay: float, least: int, left: int) -> None:
    assert tail_start(rank, decay, least) == left


def test_the_norm_is_that_of_the_paper_summed_over_layers() -> None:
    rng = torch.Generator().manual_seed(0)
    layers = [(torch.randn(4, 6, generator=rng), torch.randn(5, 4, generator=rng)) for _ in range(2)]
    tensors = {
        f"{k}.{part}": x for k, pair in enumerate(layers) for part, x in zip(("lora_a", "lora_b"), pair, strict=True)
    }
    expected = sum(np.linalg.norm(b.numpy()[:, 3:]) * np.linalg.norm(a.numpy()[3:]) for a, b in layers)
    assert float(tail_norm({**tensors, "x.weight": torch.ones(2, 2)}, 3)) == pytest.approx(expected)
    zero = {name: torch.zeros_like(x).requires_grad_() for name, x in tensors.items()}
    tail_norm(zero, 3).backward()
    assert all(bool(torch.isfinite(x.grad).all()) for x in zero.values() if x.grad is not None)


def test_ranks_fall_and_so_do_bytes(once: Once) -> None:
    done, fixed = once(*PRUNING), once(*FIXED)
    assert done.failures == fixed.failures == []
    first, last = (
        {client["client_id"]: (client["bytes_down"], client["bytes_up"]) for client in done.rounds[k]["clients"]}
        for k in (1, -1)
    )
    assert {i for i in last if last[i] < first[i]}
    assert all(last[i] <= first[i] for i in last)
    assert sum(x["bytes_up"] for x in done.rounds) < sum(x["bytes_up"] for x in fixed.rounds)
    assert done.rounds[-1]["metrics"]["loss"] < done.rounds[0]["metrics"]["loss"]


@pytest.mark.slow
def test_a_stop_changes_nothing(once: Once, tmp_path: Path) -> None:
    shutil.copytree(once(*PRUNING, "num_rounds=2").path, tmp_path / "run")
    assert_same(go_on(tmp_path / "run", 4), once(*PRUNING))


def test_a_client_sends_the_ranks_of_the_instruction_or_those_of_a_cut(tmp_path: Path) -> None:
    plan = Federation(compose(PRUNING))
    assert isinstance(plan.policy, SelfPrunedRanks)
    params = plan.initial_params()
    wide = next(i for i in range(6) if not plan.policy.assign(1, i, {}, params).submodel.widths)
    assigned = plan.policy.assign(1, wide, {}, params)
    assert (assigned.kept, assigned.least) == ({"ranks": 4}, {"ranks": 2})
    again = plan.policy.assign(2, wide, {f"rank.{wide}": torch.tensor(2)}, params)
    assert (again.submodel.widths, again.least) == ({"ranks": Keep.first(2, 4)}, {"ranks": 1})
    layout = plan.submodels.layout(assigned.submodel)
    content = messages.encode_instruction(assigned, messages.encode_params(layout.slice(params)), plan.submodels)
    instruction = messages.decode_instruction(content, plan.submodels)
    assert instruction.least == assigned.least
    update = plan.runtime(str(tmp_path)).train(instruction)
    assert update.widths["ranks"].count == 4, "B is 0 at first, so that no norm falls"
    profile = ClientProfile(wide, 100)
    for count, is_allowed in ((4, True), (2, True), (3, False), (1, False)):
        keep = {"ranks": Keep.first(count, 4)}
        sliced = plan.submodels.layout(replace(assigned.submodel, widths=keep)).slice(params)
        sent = replace(update, widths=keep, params={name: sliced[name] for name in assigned.uploads})
        sent = replace(sent, num_examples=1)
        encoded = messages.encode_update(sent, plan.submodels)
        if is_allowed:
            assert messages.decode_update(encoded, assigned, profile, plan.submodels).widths == keep
        else:
            with pytest.raises(ProtocolError, match=f"{count} units of ranks came, 4 were asked for"):
                messages.decode_update(encoded, assigned, profile, plan.submodels)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (("adapter.cut=widths",), "set adapter.cut=ranks"),
        (("aggregator=coverage_average",), "set aggregator=hetlora"),
        (("adapter.rank_decay=1",), "needs adapter.rank_decay in"),
        (("adapter.rank_penalty=-1",), "needs adapter.rank_penalty of at least 0"),
        (("adapter.min_rank=5",), r"needs adapter.min_rank in \[1, 4\], the rank, not 5"),
        (("strategy=fjord",), "strategy=fjord trains several; choose heterofl"),
    ],
)
def test_what_cannot_be_cut_is_refused(overrides: tuple[str, ...], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Federation(compose((*PRUNING, *overrides)))


def test_options_of_cuts_are_for_cuts() -> None:
    with pytest.raises(ConfigError, match=r"adapter\.self_pruning=true"):
        compose((*LORA, "adapter.rank_decay=0.9"))
