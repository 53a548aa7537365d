"""Reductions agree with plain loops, are total, and are computed once per layer."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import ArrayLike

from fedlp.allocation import layer_metrics as metrics
from fedlp.allocation.layer_metrics import KEYS, compute_statistics, min_max, ranks, wanda_elements
from fedlp.errors import AllocationError
from fedlp.types import PrunableLayer


def make_layer(name: str, params: int = 10, depth: float = 0.0) -> PrunableLayer:
    return PrunableLayer(name, 4, 1, params, (), (f"{name}.reader",), depth)


def naive(elements: list[float], pre: str, reduce: str) -> float:
    """The reduction with lists and the math module."""
    steps = {"id": lambda x: x, "log": lambda x: math.log(max(x, 1e-12)), "sqrt": math.sqrt, "sq": lambda x: x * x}
    x = [steps[pre](value) for value in elements]
    n, mean = len(x), sum(x) / len(x)
    var = sum((value - mean) ** 2 for value in x) / n
    total = sum(map(abs, x))
    by_size = sorted(x)
    match reduce:
        case "mean":
            return mean
        case "var":
            return var
        case "std":
            return math.sqrt(var)
        case "cv":
            return math.sqrt(var) / abs(mean)
        case "entropy":
            return -sum(abs(v) / total * math.log(abs(v) / total) for v in x if v) / math.log(n)
        case "outlier":
            return sum(value > 5 * mean for value in x) / n
        case "p99":
            return by_size[math.ceil(0.99 * (n - 1))]
        case "median":
            return by_size[math.ceil(0.5 * (n - 1))]
        case _:
            return sum(math.log(max(value, 1e-12)) for value in x) / n


def reduced(elements: ArrayLike, pre: metrics.Pre, reduce: metrics.Reduce) -> float:
    """Return one number of the table of a layer with these elements."""
    (found,) = compute_statistics([make_layer("a")], {"a": {"wanda": np.asarray(elements)}})
    return found.table["wanda", pre, reduce]


@pytest.mark.parametrize(("leaf", "pre", "reduce"), [key for key in KEYS if key[0] == "wanda"])
def test_reductions_agree_with_plain_loops(leaf: str, pre: metrics.Pre, reduce: metrics.Reduce) -> None:
    elements = np.random.default_rng(3).lognormal(0.3, 1.4, (17, 23))
    assert reduced(elements, pre, reduce) == pytest.approx(naive(elements.ravel().tolist(), pre, reduce))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0, 1.7e308), min_size=1, max_size=30))
def test_every_number_of_the_table_is_finite(elements: list[float]) -> None:
    values = np.array(elements)
    (found,) = compute_statistics([make_layer("a")], {"a": {"magnitude": values, "saliency": values}})
    assert len(found.table) == 2 * len(KEYS) / 3
    assert all(math.isfinite(value) for value in found.table.values())


def test_statistics_hold_the_table_once_and_what_is_known_of_the_layer() -> None:
    rng = np.random.default_rng(0)
    layers = [make_layer("a", 30), make_layer("b", 10, 1.0)]
    elements = {layer.name: {leaf: rng.random(50) for leaf in metrics.LEAVES} for layer in layers}
    found = compute_statistics(layers, elements, {"a": 0.1, "b": 0.2})
    assert [layer.name for layer in found] == ["a", "b"]
    assert [layer.share for layer in found] == [0.75, 0.25]
    assert [layer.depth for layer in found] == [0.0, 1.0]
    assert [layer.sensitivity for layer in found] == [0.1, 0.2]
    assert math.isnan(compute_statistics(layers, elements)[0].sensitivity)
    assert set(found[0].table) == set(KEYS)
    assert 60 <= len(KEYS) <= 100
    for leaf, pre, reduce in KEYS:
        assert found[1].table[leaf, pre, reduce] == reduced(elements["b"][leaf], pre, reduce)


def test_wanda_by_hand() -> None:
    np.testing.assert_allclose(wanda_elements([[1.0, -2.0], [0.0, 3.0]], [4.0, 9.0]), [[2, 6], [0, 9]])


def test_logarithms_have_a_floor_and_entropy_is_relative() -> None:
    assert reduced([0.0, 0.0], "log", "mean") == pytest.approx(math.log(1e-12))
    assert reduced([2.0] * 7, "id", "entropy") == pytest.approx(1.0)
    assert reduced([0.0, 5.0], "id", "entropy") == 0.0
    assert reduced([0.0, 0.0], "id", "cv") == 0.0


def test_normalisations_over_layers() -> None:
    np.testing.assert_allclose(min_max([3.0, 1.0, 2.0]), [1, 0, 0.5])
    np.testing.assert_allclose(min_max([2.0, 2.0]), [0, 0])
    np.testing.assert_allclose(ranks([30.0, 1.0, 2.0, 2.0]), [1, 0, 0.5, 0.5])
    np.testing.assert_allclose(ranks([7.0, 7.0]), [0.5, 0.5])
    np.testing.assert_allclose(ranks([7.0]), [0.5])


@pytest.mark.parametrize("bad", [[1.0, math.nan], [math.inf], [-1.0], []])
def test_bad_elements_name_layer_and_leaf(bad: list[float]) -> None:
    with pytest.raises(AllocationError, match="layer a: wanda has"):
        compute_statistics([make_layer("a")], {"a": {"wanda": np.array(bad)}})
