"""Static batch norms: nobody sends statistics; clients of whole models measure them before an evaluation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from flwr.app import Context, Message

from fedlp.apps import runs as assembly
from fedlp.config import compose, to_yaml
from fedlp.errors import ProtocolError
from fedlp.federation.server.batch_norm_statistics import pool_statistics
from fedlp.federation.wire import evaluation_messages, messages
from fedlp.types import ClientProfile, SubModel
from tests.integration.running import TINY_CNN, Finished, run

Once = Callable[..., Finished]
STATIC = (*TINY_CNN, "aggregator.batch_norm=static", "strategy=heterofl", "strategy.widths=[1.0,0.5]")


def test_pooled_statistics_are_those_of_all_examples() -> None:
    values = torch.randn(50, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    parts = [
        ({"n.running_mean": part.mean(dim=0), "n.running_var": part.var(dim=0, unbiased=False)}, len(part))
        for part in values.split([10, 25, 15])
    ]
    found = pool_statistics(parts)
    torch.testing.assert_close(found["n.running_mean"], values.mean(dim=0))
    torch.testing.assert_close(found["n.running_var"], values.var(dim=0, unbiased=False))


def test_statistics_are_those_of_the_evaluated_model(once: Once) -> None:
    done = once(*STATIC)
    plan = assembly.make_plan(to_yaml(done.config))
    runtime = assembly.make_runtime(to_yaml(done.config), str(done.path / "clients"))
    assert done.failures == []
    extra = [client for client in done.rounds[-1]["clients"] if not client["num_examples"]]
    assert 1 <= len(extra) <= 3
    parts = []
    for client in extra:
        assert client["bytes_up"] < client["bytes_down"] / 50
        update = runtime.statistics(SubModel(), done.tensors, client["client_id"])
        parts.append(({name: value.clone() for name, value in update.params.items()}, update.num_examples))
    for name, value in pool_statistics(parts).items():
        torch.testing.assert_close(done.tensors[name], value, rtol=1e-4, atol=1e-5)
    counter = next(name for name in plan.submodels.statistics if name.endswith("tracked"))
    assert done.tensors[counter] == plan.initial_params()[counter], "nobody sent any"


def test_wrong_statistics_are_named_and_not_used(tmp_path: Path) -> None:
    def app(message: Message, context: Context) -> Message:
        reply = assembly.client_app(message, context)
        if message.metadata.message_type == messages.STATISTICS and context.node_config["partition-id"] in (0, 1, 2):
            reply.content[messages.METRICS]["num-examples"] = 10**6
        return reply

    done = run(tmp_path, *STATIC, app=app)
    named = {client for _, client, reason in done.failures if reason == "rejected"}
    assert named
    assert named <= {0, 1, 2}
    assert all(torch.isfinite(value).all() for value in done.tensors.values() if value.is_floating_point())


def test_negative_variances_are_refused() -> None:
    plan = assembly.make_plan(to_yaml(compose(STATIC)))
    names = [n for n in plan.submodels.spec.tensors if n in plan.submodels.statistics]
    values = {n: v.clone() for n, v in plan.initial_params().items() if n in names and v.is_floating_point()}
    next(value for name, value in values.items() if name.endswith("running_var"))[0] = -1.0
    content = evaluation_messages.encode_statistics(values, 3)
    with pytest.raises(ProtocolError, match=r"client 4: .* holds negative variances"):
        evaluation_messages.decode_statistics(content, ClientProfile(4, 9), SubModel(), plan.submodels)


@pytest.mark.parametrize(("chosen", "words"), [("auto", ", and is what is"), ("average", "; the whole one is")])
def test_where_nobody_holds_the_whole_model_it_says_what_is_evaluated(
    chosen: str, words: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    narrow = (*TINY_CNN, "strategy=heterofl", "strategy.widths=[0.5]", "num_rounds=1")
    run(tmp_path, *narrow, f"aggregator.batch_norm={chosen}")
    assert f"no client holds the whole model: the largest sub-model has 25 % of it{words} evaluated" in caplog.text
