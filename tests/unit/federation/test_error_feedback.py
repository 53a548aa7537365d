"""Error feedback loses nothing: sent values and the residual add up to all updates."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fedlp.federation.client.error_feedback import add_residual, keep_residual
from fedlp.types import Keep

SHAPES = {"a": (6, 4), "b": (5,)}


def some(rng: np.random.Generator, size: int) -> Keep:
    return Keep.from_indices(np.sort(rng.choice(size, rng.integers(1, size), replace=False)), size)


def scatter(values: Tensor, keeps: tuple[Keep, ...]) -> Tensor:
    """Return values at the kept entries of a tensor of zeros."""
    whole = torch.zeros([keep.size for keep in keeps], dtype=values.dtype)
    whole[np.ix_(*(keep.indices() for keep in keeps))] = values
    return whole


def test_sent_values_and_residual_add_up_to_all_updates() -> None:
    rng = np.random.default_rng(0)
    residual: dict[str, Tensor] = {}
    total = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in SHAPES.items()}
    arrived = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in SHAPES.items()}
    for _ in range(6):
        held = {"a": (some(rng, 6), some(rng, 4))}  # "b" is whole
        wholes = held | {"b": (Keep.full(5),)}
        sizes = {name: [keep.count for keep in keeps] for name, keeps in wholes.items()}
        updates = {name: torch.from_numpy(rng.standard_normal(size)) for name, size in sizes.items()}
        for name, update in updates.items():
            total[name] += scatter(update, wholes[name])
        corrected = add_residual(updates, residual, held)
        keeps = {"a": tuple(Keep.first(max(1, size // 2), size) for size in sizes["a"])}  # "b" is not sent
        rows = corrected["a"][: keeps["a"][0].count, : keeps["a"][1].count]
        sent = {"a": (rows * 4).round() / 4}
        residual = keep_residual(corrected, sent, keeps, residual, held, SHAPES)
        inner = scatter(sent["a"], keeps["a"])
        arrived["a"] += scatter(inner, held["a"])
    for name in SHAPES:
        torch.testing.assert_close(arrived[name] + residual[name], total[name])
    assert not torch.equal(residual["a"], torch.zeros(6, 4))


def test_a_tensor_without_a_residual_stays_as_it_is() -> None:
    update = torch.ones(5)
    assert add_residual({"b": update}, {}, {})["b"] is update
    assert add_residual({"b": update}, {"b": torch.ones(5)}, {})["b"].tolist() == [2.0] * 5
    assert update.tolist() == [1.0] * 5
