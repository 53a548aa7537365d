"""Models whose parameters take no memory until they are cut to size."""

from __future__ import annotations

import torch
from torch import nn

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
