"""Options of the local loop: each does what its paper says, and its default changes no bit."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedlp.config import LocalConfig
from fedlp.data.examples import IGNORE_INDEX, DataInfo, Examples
from fedlp.errors import ConfigError
from fedlp.federation.budgets import optimizer_kind
from fedlp.training import loop
from fedlp.training.loop import check_loss, train_locally
from fedlp.training.optimizers import SGD, make_optimizer
from fedlp.training.schedules import Moment, lr_factor, make_schedule

INFO = DataInfo("toy", "classification", (6,), 3, None, None)
RNG = np.random.default_rng(0)
EXAMPLES = Examples(
    torch.from_numpy(RNG.standard_normal((24, 6), dtype=np.float32)), torch.from_numpy(RNG.integers(0, 3, 24)), None
)
PLAIN = LocalConfig(optimizer="sgd", epochs=2, batch_size=8, lr=0.1, momentum=0.9)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))


def trained(config: LocalConfig, **more: Any) -> tuple[nn.Module, float]:
    model = network()
    return model, train_locally(model, EXAMPLES, INFO, config, np.random.default_rng(5), **more).train_loss


def distance(one: nn.Module, other: nn.Module) -> float:
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return math.sqrt(sum(float((a - b).detach().square().sum()) for a, b in pairs))


def test_a_proximal_term_is_its_gradient_and_holds_the_weights_near_the_start() -> None:
    moved = [distance(trained(replace(PLAIN, proximal=mu))[0], network()) for mu in (0.0, 1.0, 5.0)]
    assert moved[0] > moved[1] > moved[2] > 0
    model, mu = network(), 0.7
    anchors = [p.detach().clone() for p in model.parameters()]
    rng = np.random.default_rng(5)
    rng.integers(2**63 - 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(2):
        for index in torch.split(torch.from_numpy(rng.permutation(24)), 8):
            penalty = sum((p - a).square().sum() for p, a in zip(model.parameters(), anchors, strict=True))
            loss = nn.functional.cross_entropy(model(EXAMPLES.inputs[index]), EXAMPLES.targets[index])
            optimizer.zero_grad()
            (loss + mu / 2 * penalty).backward()
            optimizer.step()
    assert distance(trained(replace(PLAIN, proximal=mu))[0], model) < 1e-5


@pytest.mark.parametrize("frozen", [(), ("0.weight",)])
def test_gradients_of_a_large_model_are_not_kept_and_change_no_bit(
    frozen: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(PLAIN, momentum=0.0)
    usual, loss = trained(config, frozen=frozen)
    steps, descend = list[Tensor](), SGD.descend

    def note(optimizer: SGD, parameter: Tensor) -> None:
        steps.append(parameter)
        descend(optimizer, parameter)

    monkeypatch.setattr(loop, "_LARGE", 0)
    monkeypatch.setattr(SGD, "descend", note)
    large, same = trained(config, frozen=frozen)
    assert distance(usual, large) == 0
    assert loss == same
    assert steps
    assert all(parameter.grad is None for parameter in large.parameters())
    assert not any(parameter._post_accumulate_grad_hooks for parameter in large.parameters())


def test_accumulated_batches_are_one_large_batch() -> None:
    large, loss = trained(replace(PLAIN, batch_size=24))
    small, same = trained(replace(PLAIN, batch_size=8, accumulation=3))
    assert distance(large, small) < 1e-6
    assert loss == pytest.approx(same, rel=1e-6)
    uneven, _ = trained(replace(PLAIN, batch_size=9, accumulation=5))  # 9, 9 and 6: weighed by their sizes
    assert distance(large, uneven) < 1e-6
    assert distance(large, network()) > 0.1


def test_accumulation_counts_tokens_not_windows() -> None:
    tokens = torch.tensor([[1, 2, 3, 4], [2, 1, IGNORE_INDEX, IGNORE_INDEX]])
    text = DataInfo("toy", "causal_lm", (3,), 5, None, None)
    tables = []
    for config in (
        LocalConfig(optimizer="sgd", batch_size=2),
        LocalConfig(optimizer="sgd", batch_size=1, accumulation=2),
    ):
        table = nn.Embedding(5, 5)
        nn.init.zeros_(table.weight)
        train_locally(table, Examples(tokens, torch.zeros(2), None), text, config, np.random.default_rng(0))
        tables.append(table.weight.detach())
    torch.testing.assert_close(tables[0], tables[1])


def test_bfloat16_trains_float32_weights_to_about_the_same() -> None:
    exact, loss = trained(PLAIN)
    rough, found = trained(replace(PLAIN, precision="bfloat16"))
    assert all(p.dtype == torch.float32 for p in rough.parameters())
    assert 0 < distance(exact, rough) < 0.1 * distance(exact, network())
    assert found == pytest.approx(loss, rel=0.02)


@pytest.mark.parametrize("name", ["adam", "adamw", "torch.optim:RMSprop"])
def test_an_optimizer_is_torchs(name: str) -> None:
    ours, theirs = network(), network()
    config = LocalConfig(optimizer=name, lr=0.01, weight_decay=0.1)
    kinds: dict[str, Any] = {
        "adam": torch.optim.Adam,
        "adamw": torch.optim.AdamW,
        "torch.optim:RMSprop": torch.optim.RMSprop,
    }
    reference = kinds[name](theirs.parameters(), lr=0.01, weight_decay=0.1)
    optimizer = make_optimizer(list(ours.parameters()), config)
    for factor in (1.0, 0.5, 0.25):
        optimizer.lr = 0.01 * factor
        for group in reference.param_groups:
            group["lr"] = 0.01 * factor
        for model, stepper in ((ours, optimizer), (theirs, reference)):
            model.zero_grad()
            model(EXAMPLES.inputs).square().sum().backward()
            stepper.step()
    assert distance(ours, theirs) == 0


def no_optimizer(params: object, lr: float) -> list[object]:
    return [params, lr]


def test_what_is_no_optimizer_is_refused() -> None:
    with pytest.raises(ConfigError, match="there is no optimizer adagrad"):
        make_optimizer([], LocalConfig(optimizer="adagrad"))
    with pytest.raises(ConfigError, match="builtins:list has no option lr"):
        make_optimizer([], LocalConfig(optimizer="builtins:list"))
    with pytest.raises(ConfigError, match="must give an object with step"):
        make_optimizer([], LocalConfig(optimizer=f"{__name__}:no_optimizer"))


def test_memory_is_counted_with_what_an_optimizer_keeps() -> None:
    kinds = [
        optimizer_kind(LocalConfig(optimizer=name, momentum=momentum, proximal=proximal))
        for name, momentum, proximal in (
            ("sgd", 0.0, 0.0),
            ("sgd", 0.9, 0.0),
            ("sgd", 0.0, 0.1),
            ("sgd", 0.9, 0.1),
            ("adamw", 0.0, 0.0),
        )
    ]
    assert kinds == ["sgd", "momentum", "momentum", "adam", "adam"]


def test_schedules() -> None:
    def curve(chosen: Any, num_rounds: int = 5) -> list[float]:
        schedule = make_schedule(chosen)
        return [lr_factor(schedule, Moment(r, num_rounds), 0.0) for r in range(1, num_rounds + 1)]

    assert curve("constant") == [1.0] * 5
    assert curve("cosine", 4) == pytest.approx([1.0, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2])
    assert curve({"name": "cosine", "floor": 0.2, "warmup_rounds": 2}, 4) == pytest.approx([0.5, 1.0, 1.0, 0.6])
    assert curve({"name": "step", "every": 2, "gamma": 0.1}) == pytest.approx([1, 1, 0.1, 0.1, 0.01])
    assert curve({"name": "warmup", "rounds": 4}) == pytest.approx([0.25, 0.5, 0.75, 1, 1])
    inner = make_schedule({"name": "warmup", "rounds": 2, "within_rounds": True})
    assert [lr_factor(inner, Moment(2, 5), p) for p in (0.0, 0.5)] == pytest.approx([0.5, 0.75])
    cosine = make_schedule({"name": "cosine", "within_rounds": True})
    assert lr_factor(cosine, Moment(2, 2), 0.5) == pytest.approx((1 - math.sqrt(0.5)) / 2)


def half(server_round: int, num_rounds: int, progress: float) -> float:
    """Half the learning rate in the second half of the steps."""
    return 0.5 if progress >= 0.5 else 1.0


@dataclass(frozen=True)
class Wrong:
    """Negative."""

    def __call__(self, server_round: int, num_rounds: int, progress: float) -> float:
        return -1.0


def test_a_schedule_sets_the_learning_rate_of_each_step(monkeypatch: pytest.MonkeyPatch) -> None:
    second = trained(replace(PLAIN, schedule={"name": "step", "every": 1}), moment=Moment(2, 3))[0]
    assert distance(second, trained(replace(PLAIN, lr=0.05))[0]) == 0
    first, plain = trained(replace(PLAIN, schedule="cosine"), moment=Moment(1, 3))[0], trained(PLAIN)[0]
    assert distance(first, plain) == 0
    monkeypatch.setattr("fedlp.training.schedules.lookup", lambda kind, name: half)
    halved = trained(replace(PLAIN, schedule="mine"))[0]
    assert distance(halved, plain) > 0
    monkeypatch.setattr("fedlp.training.schedules.lookup", lambda kind, name: Wrong)
    with pytest.raises(ConfigError, match=r"local\.schedule gives -1\.0 in round 1"):
        trained(replace(PLAIN, schedule="mine"))


@pytest.mark.parametrize(
    ("chosen", "words"),
    [
        ("cosin", "did you mean cosine"),
        ({"name": "cosine", "flor": 1}, "local.schedule=cosine: .*flor"),
        ({"name": "step", "gamma": 2}, "gamma=2 of the step schedule must be in"),
        ({"name": "warmup", "rounds": 0}, "rounds=0 of the warmup schedule"),
        ({"name": "cosine", "floor": -1}, "floor=-1"),
        ({"name": "builtins:len"}, "local.schedule=builtins:len"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused_before_the_run(chosen: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        check_loss(LocalConfig(schedule=chosen), INFO)
