"""Bounds of the default average: those of the naive twin where somebody is beyond them, else not one bit."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from fedlp.errors import ConfigError, FedLPError
from fedlp.federation.aggregation import clipped_average
from fedlp.federation.aggregation.aggregator import CoverageAverageRule
from fedlp.federation.aggregation.clipped_average import ClippedAverage
from fedlp.federation.aggregation.coverage import Keeps
from fedlp.federation.aggregation.coverage_average import WeightedUpdate, coverage_average
from fedlp.federation.aggregation.norm_bounds import (
    MIN_HOLDERS,
    are_surely_within,
    clipping_scales,
    estimate_squares,
    squared_norm,
    squared_norms,
)
from fedlp.federation.aggregation.stored_updates import StoredUpdates
from fedlp.types import Keep
from tests.reference import robust

SHAPES = {"a": (6, 5), "b": (7,), "deep": (3, 2)}
GEN = torch.Generator().manual_seed(5)
OLD = {name: torch.randn(shape, generator=GEN, dtype=torch.float64) for name, shape in SHAPES.items()}
WHOLE = [(name, ()) for name in SHAPES]
PARTS: list[list[tuple[str, Keeps]]] = [
    WHOLE,
    [("a", (Keep.first(3, 6), Keep.window(2, 3, 5))), ("b", ())],  # a narrow client
    [("b", ()), ("deep", ())],  # a client whose draw left out a layer
]


def update(number: int, size: float, parts: list[tuple[str, Keeps]]) -> WeightedUpdate:
    params: dict[str, Tensor] = {}
    for name, keep in parts:
        shape = [k.count for k in keep] if keep else list(SHAPES[name])
        before = OLD[name][np.ix_(*(k.indices() for k in keep))] if keep else OLD[name]
        params[name] = before + size * torch.randn(shape, generator=GEN, dtype=torch.float64)
    return params, {name: keep for name, keep in parts if keep}, float(1 + number % 3)


def updates(count: int, hostile: int = 0) -> list[WeightedUpdate]:
    """Updates of three kinds of clients; the first ones 100 times as large."""
    return [update(i, 10.0 if i < hostile else 0.1, PARTS[i % 3]) for i in range(count)]


def average(rule: CoverageAverageRule, given: list[WeightedUpdate]) -> dict[str, Tensor]:
    accumulator = rule.begin(OLD)
    for one in given:
        accumulator.add(*one)
    return accumulator.result()[0]


def flat(params: Mapping[str, Tensor], keeps: Mapping[str, Keeps]) -> dict[str, np.ndarray]:
    found = {}
    for name, shape in SHAPES.items():
        whole = np.full(shape, np.nan)
        if name in params:
            index = np.ix_(*(k.indices() for k in keeps[name])) if name in keeps else ...
            whole[index] = params[name].numpy()
        found[name] = whole.ravel()
    return found


@pytest.mark.parametrize("hostile", [0, 1, 3])
@pytest.mark.parametrize("multiple", [1.0, 5.0])
def test_the_average_is_that_of_the_naive_twin(hostile: int, multiple: float) -> None:
    given = updates(15, hostile)
    found = average(CoverageAverageRule(max_norm=multiple), given)
    old = {name: values.numpy().ravel() for name, values in OLD.items()}
    wanted = robust.bounded([flat(p, k) for p, k, _ in given], [w for *_, w in given], old, multiple, MIN_HOLDERS)
    for name, values in found.items():
        np.testing.assert_allclose(values.numpy().ravel(), wanted[name], atol=1e-12)


@pytest.mark.parametrize("hostile", [0, 2])
def test_a_stack_is_averaged_as_its_clients(hostile: int) -> None:
    given = [update(i, 10.0 if i < hostile else 0.1, WHOLE) for i in range(12)]
    alone, together = (ClippedAverage(OLD, 3.0, ["a", "b"]) for _ in range(2))
    for one in given:
        alone.add(*one)
    together.add_stack({name: torch.stack([p[name] for p, *_ in given]) for name in SHAPES}, {}, [w for *_, w in given])
    for name, values in alone.result()[0].items():
        torch.testing.assert_close(together.result()[0][name], values, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(together.scales, alone.scales, rtol=1e-12)
    assert sum(scale < 1.0 for scale in together.scales) == hostile


@pytest.mark.parametrize("hostile", [0, 2])
def test_stacks_of_single_precision_are_averaged_as_their_clients_bit_for_bit(hostile: int) -> None:
    old = {name: values.to(torch.float32) for name, values in OLD.items()}
    given = [update(i, 10.0 if i < hostile else 0.1, WHOLE) for i in range(12)]
    alone, together = (ClippedAverage(old, 3.0, ["a", "b"]) for _ in range(2))
    stacks = {name: torch.stack([p[name].to(torch.float32) for p, *_ in given]) for name in SHAPES}
    for k, (*_, weight) in enumerate(given):
        alone.add({name: stack[k] for name, stack in stacks.items()}, {}, weight)
    for part in (slice(0, 5), slice(5, 12)):
        weights = [weight for *_, weight in given[part]]
        together.add_stack({name: stack[part] for name, stack in stacks.items()}, {}, weights)
    found, wanted = together.result()[0], alone.result()[0]
    assert all(torch.equal(found[name], wanted[name]) for name in SHAPES)
    assert together.scales == alone.scales
    assert sum(scale < 1.0 for scale in together.scales) == hostile


def test_norms_well_within_the_bound_are_only_estimated(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Tensor) -> float:
        raise AssertionError

    monkeypatch.setattr(clipped_average, "squared_norm", refuse)
    old = {"w": torch.randn(300, generator=GEN)}
    average = ClippedAverage(old, 3.0)
    average.add_stack({"w": old["w"] + torch.randn(8, 300, generator=GEN)}, {}, [1.0] * 8)
    average.result()
    assert average.scales == [1.0] * 8
    average.add_stack({"w": (old["w"] + 2.995 * torch.ones(1, 300))}, {}, [1.0])  # too near for an estimate
    with pytest.raises(AssertionError):
        average.result()


@pytest.mark.parametrize("numel", [1, 300, 1 << 15, (1 << 15) + 7, 100_001])
@pytest.mark.parametrize("size", [1e-30, 1e-12, 1.0, 1e15])
def test_estimates_are_off_by_less_than_a_thousandth(numel: int, size: float) -> None:
    before = torch.zeros(numel)
    stack = size * torch.randn(3, numel, generator=GEN)
    np.testing.assert_allclose(estimate_squares(stack, before), squared_norms(stack, before), rtol=1e-3)


def test_estimates_of_what_is_no_number_are_within_no_bound() -> None:
    before = torch.zeros(4)
    for bad in (float("nan"), float("inf"), 1e30):
        stack = torch.ones(6, 4)
        stack[2, 1] = bad
        found = {"w": (estimate_squares(stack, before), 4)}
        assert not are_surely_within([found], ["w"], 3.0)
    good = {"w": (estimate_squares(torch.ones(6, 4), before), 4)}
    assert are_surely_within([good], ["w"], 3.0)
    assert are_surely_within([good], [], 3.0)
    assert not are_surely_within([good, {"v": good["w"]}], ["v", "w"], 3.0)


def test_nobody_beyond_the_bound_changes_no_bit() -> None:
    given = updates(15)
    for name, values in average(CoverageAverageRule(), given).items():
        assert torch.equal(values, average(CoverageAverageRule(max_norm=None), given)[name])


def test_an_update_beyond_the_bound_has_the_norm_of_the_bound() -> None:
    given = [update(i, 10.0 if i == 2 else 0.1, WHOLE) for i in range(7)]
    rule = ClippedAverage(OLD, 3.0)
    for one in given:
        rule.add(*one)
    rule.result()
    assert [scale < 1.0 for scale in rule.scales] == [i == 2 for i in range(7)]
    honest = np.sqrt(sum(squared_norm(given[0][0][name], OLD[name]) for name in SHAPES))
    hostile = np.sqrt(sum(squared_norm(given[2][0][name], OLD[name]) for name in SHAPES))
    assert rule.scales[2] * hostile == pytest.approx(3.0 * honest, rel=0.3)


def test_a_median_of_few_is_no_bound() -> None:
    few, enough = (
        [update(i, 100.0 if i == 0 else 0.1, WHOLE) for i in range(n)] for n in (MIN_HOLDERS - 1, MIN_HOLDERS)
    )
    for name, values in average(CoverageAverageRule(), few).items():
        assert torch.equal(values, coverage_average(OLD, few)[0][name])
    assert not torch.equal(average(CoverageAverageRule(), enough)["a"], coverage_average(OLD, enough)[0]["a"])


def test_a_slice_may_move_as_far_as_whole_tensors_do() -> None:
    """A tenth of the entries, each moved three times as far: per entry beyond twice the median, as a whole not."""
    whole, narrow = {"w": (100 * 0.1**2, 100)}, {"w": (10 * 0.3**2, 10)}
    assert clipping_scales([whole] * 6 + [narrow], 2.0) == [1.0] * 7
    far = {"w": (10 * 3.0**2, 10)}
    scale = clipping_scales([whole] * 6 + [far], 2.0)[-1]
    assert scale**2 * far["w"][0] == pytest.approx(2.0**2 * whole["w"][0])
    assert clipping_scales([narrow] * 6 + [far], 2.0)[-1] == pytest.approx(2.0 * 0.3 / 3.0)


def test_clients_that_differ_widen_the_bound_and_fewer_than_half_cannot() -> None:
    alike, apart = [1.0, 1.1, 0.9, 1.05, 0.95, 1.02], [0.25, 0.5, 1.0, 2.0, 4.0, 8.0]
    for sizes, is_bounded in ((alike, True), (apart, False)):
        scales = clipping_scales([{"w": (10 * size**2, 10)} for size in (*sizes, 8.0)], 3.0)
        assert (scales[-1] < 1.0) == is_bounded
    hostile = clipping_scales([{"w": (10 * size**2, 10)} for size in (*alike, *[1e6] * 5)], 3.0)
    assert [scale < 1.0 for scale in hostile] == [False] * 6 + [True] * 5


def test_no_measure_where_most_change_nothing() -> None:
    still = {"w": (0.0, 4)}
    assert clipping_scales([still] * 6 + [{"w": (9.0, 4)}], 5.0) == [1.0] * 7


def test_statistics_have_a_bound_of_their_own() -> None:
    """A client of honest statistics, whose changes are large, and poisoned weights."""
    given = []
    for i in range(7):
        step = 10.0 if i == 0 else 0.1
        given.append(({"a": OLD["a"] + step, "b": OLD["b"] + 1000.0}, {}, 1.0))
    rule = CoverageAverageRule().begin_round(OLD, {"a"})
    for one in given:
        rule.add(*one)
    found = rule.result()[0]
    assert torch.allclose(found["b"], OLD["b"] + 1000.0)
    assert torch.allclose(found["a"], OLD["a"] + (6 * 0.1 + 0.3) / 7)


def test_integers_are_not_scaled() -> None:
    rule = ClippedAverage({"w": torch.zeros(4), "n": torch.tensor(3)}, 2.0)
    for i in range(6):
        rule.add({"w": torch.full((4,), 50.0 if i == 0 else 0.1), "n": torch.tensor(9)}, {}, 1.0)
    found = rule.result()[0]
    assert int(found["n"]) == 9
    assert torch.allclose(found["w"], torch.full((4,), (5 * 0.1 + 0.2) / 6))


@pytest.mark.parametrize("memory", [0, 500, 10**9])
def test_the_file_changes_no_bit(memory: int) -> None:
    given = updates(12, hostile=2)
    narrow = [
        ({n: v.to(torch.bfloat16 if n == "b" else torch.float32) for n, v in p.items()}, k, w) for p, k, w in given
    ]
    old = {name: values.to(torch.bfloat16 if name == "b" else torch.float32) for name, values in OLD.items()}
    found = []
    for store in (StoredUpdates(), StoredUpdates(memory)):
        rule = ClippedAverage(old, 2.0, None, store)
        for one in narrow:
            rule.add(*one)
        found.append(rule.result()[0])
    assert all(torch.equal(found[0][name], found[1][name]) for name in SHAPES)


def test_updates_come_back_from_the_file_in_order() -> None:
    store = StoredUpdates(memory=0)
    mixed = {
        "half": torch.ones(3, dtype=torch.float16),
        "w": torch.randn(2, 3),
        "n": torch.tensor(7),
        "none": torch.ones(0),
    }
    for i in range(3):
        store.add({name: values + i for name, values in mixed.items()}, {}, float(i + 1))
    for i, (params, _, weight) in enumerate(store):
        assert weight == i + 1
        for name, values in mixed.items():
            assert params[name].dtype == values.dtype
            assert torch.equal(params[name], values + i)


@pytest.mark.parametrize("memory", [0, 1 << 20])
@pytest.mark.parametrize("largest", [0, 1 << 20])
def test_a_stack_comes_back_as_its_clients(memory: int, largest: int) -> None:
    store, stack = StoredUpdates(memory, largest), torch.randn(3, 2, 4)
    store.add({"w": torch.zeros(2, 4)}, {}, 9.0)
    store.add_stack({"w": stack}, {}, [1.0, 2.0, 3.0])
    found = list(store)
    assert [weight for *_, weight in found] == [9.0, 1.0, 2.0, 3.0]
    assert torch.equal(torch.stack([params["w"] for params, *_ in found[1:]]), stack)


def test_a_file_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "absent"))
    with pytest.raises(FedLPError, match=r"do not fit into .*aggregator\.max_norm=null"):
        StoredUpdates(memory=0).add({"w": torch.ones(3)}, {}, 1.0)


@pytest.mark.parametrize("option", ["max_norm", "max_examples"])
@pytest.mark.parametrize("value", [0.5, float("nan"), float("inf")])
def test_bounds_out_of_range(option: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"aggregator.{option}="):
        CoverageAverageRule(**{option: value})


@pytest.mark.parametrize("dtypes", [("float32", "float32"), ("float64", "float32"), ("bfloat16", "bfloat16")])
@pytest.mark.parametrize("count", [1, 7, (1 << 18) + 5])
def test_a_squared_norm_is_that_of_differences_in_float64_block_by_block(dtypes: tuple[str, str], count: int) -> None:
    generator = torch.Generator().manual_seed(count)
    one, two = (torch.randn(count, generator=generator).to(getattr(torch, dtype)) for dtype in dtypes)
    blocks = [part.numpy() for part in torch.split(one.double() - two.double(), 1 << 18)]
    assert squared_norm(one, two) == sum(float(np.einsum("i,i->", block, block)) for block in blocks)
    assert squared_norm(one[:0], two[:0]) == 0.0
