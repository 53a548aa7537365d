"""What holds of the coverage average whatever the model, the clients and what they returned."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedlp.federation.aggregation.coverage_average import CoverageAverage, coverage_average
from fedlp.types import Keep
from tests.reference.aggregation import as_float64
from tests.reference.aggregation import coverage_average as naive_average

Update = tuple[dict[str, Tensor], dict[str, tuple[Keep, ...]], float]

SHAPES = ((), (1,), (7,), (3, 5), (9, 4), (4, 6, 3, 3), (5, 3, 1, 2), (0, 3))
DTYPES = (torch.float32, torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64)
check = settings(deadline=None, derandomize=True, max_examples=60)
INTEGER_TYPE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass
class Round:
    """A global model and what came back."""

    params: dict[str, Tensor]
    updates: list[Update]

    def scaled(self, factor: float) -> list[Update]:
        return [(values, keeps, weight * factor) for values, keeps, weight in self.updates]


def random_tensor(rng: np.random.Generator, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    if not dtype.is_floating_point:
        return torch.from_numpy(rng.integers(-50, 50, shape)).to(dtype).reshape(shape)
    values = rng.standard_normal(shape) * 10.0 ** rng.integers(-3, 3)
    return torch.tensor(np.where(rng.random(shape) < 0.1, -0.0, values)).to(dtype).reshape(shape)


def random_keep(rng: np.random.Generator, size: int) -> Keep:
    kind = rng.integers(4)
    if kind == 0 or size == 0:
        return Keep.full(size) if size else Keep(0, ())
    if kind == 1:
        return Keep.first(int(rng.integers(1, size + 1)), size)
    if kind == 2:
        return Keep.window(int(rng.integers(size)), int(rng.integers(1, size + 1)), size)
    return Keep.from_indices(np.flatnonzero(rng.random(size) < 0.5), size)


def random_update(rng: np.random.Generator, params: Mapping[str, Tensor], weight: float, flat: bool) -> Update:
    names = [name for name in params if rng.random() < 0.8]
    keeps = {name: tuple(random_keep(rng, size) for size in params[name].shape) for name in names if rng.random() < 0.6}
    values = {}
    for name in names:
        shape = tuple(keep.count for keep in keeps[name]) if name in keeps else tuple(params[name].shape)
        values[name] = random_tensor(rng, shape, params[name].dtype)
    return (flattened(values) if flat else values), keeps, weight


def flattened(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return equal tensors, those of a dtype as neighbours in one buffer, as messages are decoded to."""
    found = {}
    for dtype in {tensor.dtype for tensor in values.values()}:
        names = [name for name in values if values[name].dtype == dtype]
        buffer = torch.cat([values[name].reshape(-1) for name in names])
        parts = torch.split(buffer, [values[name].numel() for name in names])
        found.update({name: part.view(values[name].shape) for name, part in zip(names, parts, strict=True)})
    return {name: found[name] for name in values}


@st.composite
def rounds(draw: st.DrawFn, whole_weights: bool = False) -> Round:
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shapes = draw(st.lists(st.sampled_from(SHAPES), min_size=1, max_size=6))
    params = {f"t{i}": random_tensor(rng, shape, DTYPES[rng.integers(len(DTYPES))]) for i, shape in enumerate(shapes)}
    number = st.integers(1, 10_000).map(float)
    weight = number if whole_weights else st.one_of(number, st.floats(1e-3, 1e6))
    updates = [random_update(rng, params, draw(weight), bool(rng.integers(2))) for _ in range(draw(st.integers(0, 12)))]
    return Round(params, updates)


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(INTEGER_TYPE[tensor.itemsize])


def assert_same_bits(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert torch.equal(bits(found[name]), bits(tensor)), name


@check
@given(rounds())
def test_it_agrees_with_the_naive_twin(case: Round) -> None:
    found, coverage = coverage_average(case.params, case.updates)
    expected, weights = naive_average(case.params, case.updates)
    for name, old in case.params.items():
        rounded = torch.tensor(expected[name])
        rounded = (rounded if old.is_floating_point() else rounded.round()).to(old.dtype)
        tolerance = 2.0 * torch.finfo(old.dtype).eps if old.is_floating_point() else 0.0
        torch.testing.assert_close(found[name], rounded, rtol=tolerance, atol=1e-12)
        if old.numel():
            assert coverage[name] == (weights[name] > 0).mean()


@check
@given(rounds())
def test_what_nobody_returned_keeps_its_bits(case: Round) -> None:
    average = CoverageAverage(case.params)
    for update in case.updates:
        average.add(*update)
    found, coverage = average.result()
    _, weights = naive_average(case.params, case.updates)
    for name, old in case.params.items():
        missing = torch.tensor(np.asarray(weights[name] == 0))
        assert torch.equal(bits(found[name])[missing], bits(old)[missing])
        covered = average.covered(name)
        assert isinstance(covered, bool) or covered.shape == old.shape
        if old.numel():
            assert torch.equal(torch.as_tensor(covered).expand(old.shape), ~missing)
            assert isinstance(covered, bool) == (coverage[name] in (0.0, 1.0))


@check
@given(rounds(), st.integers(1, 40), st.integers(1, 5), st.integers(1, 500))
def test_blocks_and_groups_do_not_change_a_bit(case: Round, block: int, group: int, group_bytes: int) -> None:
    expected, coverage = coverage_average(case.params, case.updates)
    average = CoverageAverage(case.params, block=block, group=group, group_bytes=group_bytes)
    for update in case.updates:
        average.add(*update)
    assert_same_bits(average.result()[0], expected)
    assert_same_bits(average.result()[0], expected)
    assert average.result()[1] == coverage


@check
@given(rounds())
def test_where_tensors_lie_does_not_change_a_bit(case: Round) -> None:
    flat = [(flattened(values), keeps, weight) for values, keeps, weight in case.updates]
    apart = [({n: t.clone() for n, t in values.items()}, keeps, weight) for values, keeps, weight in case.updates]
    assert_same_bits(coverage_average(case.params, flat)[0], coverage_average(case.params, apart)[0])


@check
@given(rounds(), st.randoms(use_true_random=False))
def test_the_order_of_replies_does_not_change_a_bit_once_they_are_sorted(case: Round, random: object) -> None:
    replies = list(enumerate(case.updates))
    random.shuffle(replies)  # type: ignore[attr-defined]
    replies.sort(key=lambda reply: reply[0])
    expected = coverage_average(case.params, case.updates)
    found = coverage_average(case.params, [update for _, update in replies])
    assert_same_bits(found[0], expected[0])
    assert found[1] == expected[1]


@check
@given(rounds(), st.integers(-20, 20))
def test_weights_times_a_power_of_two_do_not_change_a_bit(case: Round, exponent: int) -> None:
    expected, _ = coverage_average(case.params, case.updates)
    assert_same_bits(coverage_average(case.params, case.scaled(2.0**exponent))[0], expected)


@check
@given(rounds(), st.floats(1e-3, 1e3))
def test_the_scale_of_weights_does_not_matter(case: Round, factor: float) -> None:
    expected, _ = coverage_average(case.params, case.updates)
    found, _ = coverage_average(case.params, case.scaled(factor))
    for name, tensor in expected.items():
        if tensor.is_floating_point():  # the mean of integers may be a half up to its last bit
            torch.testing.assert_close(found[name], tensor, rtol=max(1e-6, torch.finfo(tensor.dtype).eps), atol=1e-6)


@check
@given(rounds())
def test_the_average_lies_in_the_convex_hull(case: Round) -> None:
    found, _ = coverage_average(case.params, case.updates)
    for name, old in case.params.items():
        low, high = np.full(old.shape, np.inf), np.full(old.shape, -np.inf)
        for values, keeps, _ in case.updates:
            if name in values:
                where = np.ix_(*(keep.indices() for keep in keeps[name])) if name in keeps else ...
                low[where] = np.minimum(low[where], as_float64(values[name]))
                high[where] = np.maximum(high[where], as_float64(values[name]))
        covered = low <= high
        slack = 1e-12 * np.abs(as_float64(found[name])) if old.dtype == torch.float64 else 0.0
        value = as_float64(found[name])
        assert np.all((low <= value + slack)[covered])
        assert np.all((value - slack <= high)[covered])


@check
@given(rounds())
def test_inputs_are_not_modified(case: Round) -> None:
    params = {name: tensor.clone() for name, tensor in case.params.items()}
    updates = [{name: tensor.clone() for name, tensor in values.items()} for values, _, _ in case.updates]
    found, _ = coverage_average(case.params, case.updates)
    for tensor in found.values():
        tensor.fill_(3)  # nor does the result share memory with them
    assert_same_bits(case.params, params)
    for (values, _, _), copy in zip(case.updates, updates, strict=True):
        assert_same_bits(values, copy)


@check
@given(st.integers(0, 2**32 - 1), st.integers(1, 20), st.integers(1, 20))
def test_if_all_return_all_it_is_numpys_average(seed: int, num_updates: int, size: int) -> None:
    rng = np.random.default_rng(seed)
    weights = [float(weight) for weight in rng.integers(1, 1000, num_updates)]
    # numpy adds a stack of single entries pairwise, so two of them are the smallest tensor that it adds in order
    params = {"a": torch.zeros(size + 1), "b": torch.zeros(size, 3, 2, 2)}
    updates: list[Update] = []
    for weight in weights:
        values = {name: torch.from_numpy(rng.standard_normal(t.shape).astype(np.float32)) for name, t in params.items()}
        updates.append((flattened(values), {}, weight))
    found, coverage = coverage_average(params, updates)
    assert coverage == {"a": 1.0, "b": 1.0}
    for name in params:
        stack = np.stack([values[name].numpy() for values, _, _ in updates])
        expected = np.average(stack, axis=0, weights=weights).astype(np.float32)
        assert np.array_equal(found[name].numpy().view(np.int32), expected.view(np.int32))


@check
@given(rounds())
def test_without_updates_the_model_stays(case: Round) -> None:
    found, coverage = coverage_average(case.params, [])
    assert_same_bits(found, case.params)
    assert set(coverage.values()) == {0.0}


@check
@given(rounds(), st.sampled_from([0.0, -1.0, float("nan"), float("inf"), -float("inf")]))
def test_a_bad_update_counts_for_nothing(case: Round, weight: float) -> None:
    average = CoverageAverage(case.params)
    for update in case.updates:
        average.add(*update)
        with pytest.raises(ValueError, match="weight"):
            average.add(update[0], update[1], weight)
        with pytest.raises(ValueError, match="does not have"):
            average.add({**update[0], "other": torch.zeros(1)}, update[1], 1.0)
    expected, coverage = coverage_average(case.params, case.updates)
    assert_same_bits(average.result()[0], expected)
    assert average.result()[1] == coverage
