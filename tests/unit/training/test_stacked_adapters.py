"""Adapters of several clients on one base: each client's numbers are those of training alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedlp.config import LocalConfig
from fedlp.data.examples import IGNORE_INDEX, DataInfo, Examples
from fedlp.models import state_tensors
from fedlp.models.adapters import LoraOptions, add_adapters
from fedlp.models.dropout import draw_from, drop_stack
from fedlp.models.layers import freeze, masked_gradients
from fedlp.training.loop import train_locally
from fedlp.training.schedules import Moment
from fedlp.training.stacked import train_stacked
from fedlp.training.stacked_adapters import find_adapters
from fedlp.training.stacked_cohort import Trainee, Way, as_cohort
from fedlp.training.stacked_pass import find_obstacle

TOKENS, WINDOW = 13, 6
LENGTHS = (8, 5, 9, 8)
MOMENT = Moment(2, 5)
INFO = DataInfo("text", "causal_lm", (WINDOW,), TOKENS, None, None)


class TinyLM(nn.Module):
    """Tokens to logits, each from the tokens before it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(TOKENS, 8)
        self.up_proj, self.down_proj = nn.Linear(8, 16), nn.Linear(16, 8, bias=False)
        self.head = nn.Linear(8, TOKENS)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embed(tokens).cumsum(dim=1) / 3
        logits: Tensor = self.head(hidden + self.down_proj(F.silu(self.up_proj(hidden))))
        return logits


def make_model(trained: tuple[str, ...] = ("lora_a", "lora_b"), **options: Any) -> nn.Module:
    torch.manual_seed(0)
    model = add_adapters(TinyLM(), LoraOptions(rank=2, **options))
    for name, parameter in model.named_parameters():
        if name.endswith("lora_b"):
            nn.init.normal_(parameter)
    names = [name for name, _ in model.named_parameters()]
    return freeze(model, frozenset(name for name in names if not name.endswith(trained)))


def draw(count: int, seed: int) -> Examples:
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, TOKENS, (count, WINDOW + 1))
    tokens[0, 4:] = IGNORE_INDEX  # padding, which makes clients' losses means over different numbers of tokens
    return Examples(torch.from_numpy(tokens), torch.zeros(count, dtype=torch.int64), None)


def trainees(values: dict[str, Tensor], lengths: tuple[int, ...] = LENGTHS) -> list[Trainee]:
    """Each with tensors in memory of its own, as clients have that keep the base on their disks."""
    return [
        Trainee({name: x.clone() for name, x in values.items()}, draw(count, i), np.random.default_rng(i))
        for i, count in enumerate(lengths)
    ]


def check(model: nn.Module, way: Way, scale: float = 1.0, **options: Any) -> None:
    """Compare; the embeddings of the second client are scaled."""
    config = LocalConfig(**{"optimizer": "sgd", "batch_size": 4, "lr": 0.1, "epochs": 2, **options})
    values = {name: tensor.clone() for name, tensor in state_tensors(model).items()}
    assert find_obstacle(model, INFO, config, frozenset(), pads=False) == ""

    def make_trainees() -> list[Trainee]:
        made = trainees(values)
        made[1].values["embed.weight"].mul_(scale)
        return made

    stacked = train_stacked(model, make_trainees(), INFO, config, (), MOMENT, way)
    alone = make_trainees()
    for trainee, (result, found) in zip(alone, stacked, strict=True):
        for name, tensor in state_tensors(model).items():
            tensor.copy_(trainee.values[name])
        with masked_gradients(model, trainee.masks):
            wanted = train_locally(model, trainee.examples, INFO, config, trainee.rng, (), (), MOMENT)
        assert result.train_loss == pytest.approx(wanted.train_loss, rel=1e-5)
        moved = False
        for name, tensor in state_tensors(model).items():
            torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-5 * max(1e-3, float(tensor.abs().max())))
            moved |= not torch.equal(tensor, trainee.values[name])
        assert moved


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"momentum": 0.9, "weight_decay": 0.01},
        {"max_grad_norm": 0.05},
        {"proximal": 0.5},
        {"optimizer": "adam", "lr": 1e-3},
        {"schedule": "cosine"},
    ],
    ids=str,
)
@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_adapters_of_clients_train_as_alone(options: dict[str, Any], dropout: float) -> None:
    model = make_model(dropout=dropout)
    check(model, Way(adapters=find_adapters(model)), **options)


def test_matrices_that_are_frozen_stay() -> None:
    model = make_model(("lora_b",))
    assert find_adapters(model) == ("up_proj", "down_proj")
    check(model, Way(adapters=find_adapters(model)))


def test_clients_of_unlike_bases_have_a_pass_each() -> None:
    model = make_model()
    check(model, Way(adapters=find_adapters(model)), scale=1.5)


def test_the_base_is_read_once_for_all_clients() -> None:
    model = make_model()
    rows: list[int] = []
    model.embed.register_forward_hook(lambda module, given, output: rows.append(len(given[0])))
    values = {name: tensor.clone() for name, tensor in state_tensors(model).items()}
    config = LocalConfig(optimizer="sgd", batch_size=4)
    way = Way(adapters=find_adapters(model))
    train_stacked(model, trainees(values, (4, 4, 4)), INFO, config, (), MOMENT, way)
    assert rows == [12]


def test_models_that_train_more_than_adapters_are_not_taken_for_such() -> None:
    assert find_adapters(make_model(("lora_a", "lora_b", "head.weight"))) == ()
    assert find_adapters(make_model(("lora_a", "lora_b", "head.weight")), {"head.weight"}) != ()
    normed = make_model()
    normed.add_module("norm", nn.BatchNorm1d(3, affine=False))
    assert find_adapters(normed) == ()
    assert find_adapters(TinyLM()) == ()


def test_equal_tensors_of_clients_are_one() -> None:
    model = make_model()
    values = {name: tensor.clone() for name, tensor in state_tensors(model).items()}
    chosen = trainees(values)
    chosen[2].values["up_proj.lora_a"].mul_(2.0)
    cohort = as_cohort(model, chosen)
    assert cohort.own.keys() == {"up_proj.lora_a"}
    assert cohort.shared.keys() == values.keys() - {"up_proj.lora_a"}


def test_a_stack_draws_what_dropout_draws_for_each_client_alone() -> None:
    stack = torch.rand(3, 5, 7, 8) + 1
    with draw_from([torch.Generator().manual_seed(k) for k in range(3)], [5, 5, 4]):
        found = drop_stack(stack, 0.25)
    for k, rows in enumerate((5, 5, 4)):
        torch.default_generator.manual_seed(k)
        assert torch.equal(found[k, :rows], F.dropout(stack[k, :rows], 0.25))
    assert torch.equal(found[2, 4:], stack[2, 4:])
    with pytest.raises(RuntimeError, match="streams"):
        drop_stack(stack, 0.25)
