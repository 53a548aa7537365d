"""Models whose parameters take no memory until they are cut to size."""

from __future__ import annotations

import torch
from torch import nn

from fedlp.models.cost import count_macs
from fedlp.models.unallocated import allocate, without_parameters


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("frequencies", torch.arange(3.0), persistent=False)


def test_parameters_take_no_memory_and_buffers_keep_their_values() -> None:
    with without_parameters():
        model = Tied()
    assert all(parameter.is_meta for parameter in model.parameters())
    assert model.get_buffer("frequencies").tolist() == [0.0, 1.0, 2.0]
    assert not nn.Linear(2, 2).weight.is_meta, "only inside the block"


def test_allocated_ones_are_of_the_same_shape_and_stay_tied() -> None:
    with without_parameters():
        model = Tied()
    model.embed.weight.requires_grad_(False)
    allocate(model)
    assert model.head.weight is model.embed.weight
    assert not model.head.weight.is_meta
    assert not model.head.weight.requires_grad
    assert model.embed.weight.shape == (6, 4)


class Choosing(nn.Module):
    """Model whose operators need values."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.one(x)
        found: torch.Tensor = self.one(y) if float(y.sum()) > 1e9 else self.other(y)
        return found


def test_a_model_without_memory_costs_what_one_with_values_does() -> None:
    with without_parameters():
        bare = Choosing()
    inputs = torch.randn(2, 6)
    assert count_macs(bare, inputs) == count_macs(Choosing(), inputs)
    assert all(parameter.is_meta for parameter in bare.parameters())
