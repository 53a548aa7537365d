"""The coordinate-wise trimmed mean against a plain loop, and against hostile clients."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fedlp.errors import ConfigError
from fedlp.federation.aggregation.trimmed_mean import TrimmedMean
from fedlp.types import Keep
from tests.reference.aggregation import trimmed_mean

SHAPES = {"a": (7,), "b": (6, 5), "c": (4, 3, 2, 2), "s": ()}
Update = tuple[dict[str, Tensor], dict[str, tuple[Keep, ...]]]


def some(rng: np.random.Generator, size: int) -> Keep:
    return Keep.from_indices(np.sort(rng.choice(size, rng.integers(1, size + 1), replace=False)), size)


def random_updates(rng: np.random.Generator, count: int) -> list[Update]:
    """Return updates of slices; not every client returns every tensor, and the last tensor comes from nobody."""
    updates: list[Update] = []
    for _ in range(count):
        names = [name for name in SHAPES if rng.random() < 0.8]
        keeps = {name: tuple(some(rng, size) for size in SHAPES[name]) for name in names if rng.random() < 0.7}
        shapes = {name: [k.count for k in keeps[name]] if name in keeps else SHAPES[name] for name in names}
        updates.append(({n: torch.from_numpy(np.asarray(rng.standard_normal(s))) for n, s in shapes.items()}, keeps))
    return updates


def aggregate(params: dict[str, Tensor], updates: list[Update], fraction: float) -> tuple[dict[str, Tensor], Any, Any]:
    accumulator = TrimmedMean(fraction).begin(params)
    for number, (values, keeps) in enumerate(updates):
        accumulator.add(values, keeps, float(number + 1))
    return (*accumulator.result(), accumulator.covered)


@pytest.mark.parametrize("fraction", ["0", "0.1", "0.25", "0.29", "0.3", "0.49"])
@pytest.mark.parametrize("count", [1, 2, 3, 10, 21])
def test_it_is_the_plain_loop(fraction: str, count: int) -> None:
    rng = np.random.default_rng(count)
    params = {name: torch.from_numpy(np.asarray(rng.standard_normal(shape))) for name, shape in SHAPES.items()}
    params["nobody"] = torch.tensor([float("nan"), -0.0])
    updates = random_updates(rng, count)
    found, coverage, covered = aggregate(params, updates, float(fraction))
    wanted = trimmed_mean(params, updates, Fraction(fraction))
    assert list(found) == list(params)
    for name, value in found.items():
        np.testing.assert_allclose(value.numpy(), wanted[name], rtol=1e-12, atol=1e-15)
        held = np.zeros(params[name].shape, dtype=bool)
        for values, keeps in updates:
            if name in values:
                held[np.ix_(*(keep.indices() for keep in keeps[name])) if name in keeps else ...] = True
        assert coverage[name] == pytest.approx(held.mean())
        assert np.array_equal(np.broadcast_to(np.asarray(covered(name)), held.shape), held)
        untouched = torch.from_numpy(np.asarray(~held))
        assert torch.equal(value[untouched].view(torch.int64), params[name][untouched].view(torch.int64)), "old bits"


def test_a_fraction_that_binary_numbers_miss_trims_as_many_as_it_says() -> None:
    values: list[Update] = [({"w": torch.tensor([float(i)])}, {}) for i in range(100)]
    values[99][0]["w"] += 1e6
    found, _, _ = aggregate({"w": torch.zeros(1)}, values, 0.29)  # 0.29 times 100 is below 29 in float64
    assert found["w"].item() == np.mean(range(29, 71))


def test_hostile_clients_within_the_fraction_do_not_move_it_out_of_the_honest_range() -> None:
    honest: list[Update] = [({"w": torch.tensor([0.9 + 0.01 * i, -1.0])}, {}) for i in range(8)]
    for evil in (1e30, -1e30):
        hostile: list[Update] = [({"w": torch.tensor([evil, evil])}, {})] * 2
        found, _, _ = aggregate({"w": torch.zeros(2)}, [*hostile, *honest], 0.2)
        assert 0.9 <= found["w"][0].item() <= 0.97
        assert found["w"][1].item() == -1.0


def test_integers_are_rounded_and_dtypes_stay() -> None:
    params = {"n": torch.tensor(3), "w": torch.zeros(2, dtype=torch.bfloat16)}
    updates: list[Update] = [({"n": torch.tensor(k), "w": torch.ones(2, dtype=torch.bfloat16)}, {}) for k in (4, 5, 9)]
    found, _, _ = aggregate(params, updates, 0.34)
    assert (found["n"].dtype, found["n"].item()) == (torch.int64, 5)
    assert found["w"].dtype == torch.bfloat16
    assert found["w"].tolist() == [1, 1]


@pytest.mark.parametrize("fraction", [-0.1, 0.5, 1.0, float("nan")])
def test_a_fraction_that_cannot_be_is_refused(fraction: float) -> None:
    with pytest.raises(ConfigError, match=r"aggregator\.fraction=.* is not allowed: it must be in \[0, 0\.5\)"):
        TrimmedMean(fraction)
