"""The coverage average on cases small enough to work out by hand, and against Flower's own."""

from __future__ import annotations

import weakref

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, MetricRecord, RecordDict
from flwr.serverapp.strategy.strategy_utils import aggregate_arrayrecords
from safetensors.torch import load, save
from torch import Tensor, nn

from fedlp.federation.aggregation.coverage import Scatter, Slices, region
from fedlp.federation.aggregation.coverage_average import CoverageAverage, WeightedUpdate, coverage_average
from fedlp.types import Keep
from tests.reference.aggregation import coverage_average as naive_average


def test_weights_are_numbers_of_examples() -> None:
    updates: list[WeightedUpdate] = [
        ({"w": torch.tensor([0.0, 4.0])}, {}, 1.0),
        ({"w": torch.tensor([4.0, 8.0])}, {}, 3.0),
    ]
    found, coverage = coverage_average({"w": torch.zeros(2)}, updates)
    assert found["w"].tolist() == [3.0, 7.0]
    assert coverage == {"w": 1.0}


def test_a_layer_that_nobody_returned_stays() -> None:
    params = {"a": torch.tensor([1.0]), "b": torch.tensor([float("nan"), -0.0])}
    found, coverage = coverage_average(params, [({"a": torch.tensor([2.0])}, {}, 5.0)])
    assert found["a"].tolist() == [2.0]
    assert torch.equal(found["b"].view(torch.int32), params["b"].view(torch.int32))
    assert coverage == {"a": 1.0, "b": 0.0}


def test_width_slices_are_averaged_where_they_overlap() -> None:
    half = (Keep.first(1, 2), Keep.first(2, 3))
    updates: list[WeightedUpdate] = [
        ({"w": torch.full((2, 3), 6.0)}, {}, 1.0),
        ({"w": torch.full((1, 2), 2.0)}, {"w": half}, 3.0),
    ]
    found, coverage = coverage_average({"w": torch.zeros(2, 3)}, updates)
    assert found["w"].tolist() == [[3.0, 3.0, 6.0], [6.0, 6.0, 6.0]]
    assert coverage == {"w": 1.0}


def test_coverage_and_covered_say_which_entries_are_new() -> None:
    average = CoverageAverage({"w": torch.zeros(2, 3), "b": torch.zeros(2), "c": torch.zeros(())})
    average.add({"w": torch.ones(1, 2), "b": torch.ones(2)}, {"w": (Keep.first(1, 2), Keep.window(2, 2, 3))}, 1.0)
    found, coverage = average.result()
    assert found["w"].tolist() == [[1.0, 0.0, 1.0], [0.0, 0.0, 0.0]]
    assert coverage == {"w": 2 / 6, "b": 1.0, "c": 0.0}
    covered = average.covered("w")
    assert isinstance(covered, Tensor)
    assert covered.tolist() == [[True, False, True], [False, False, False]]
    assert average.covered("b") is True
    assert average.covered("c") is False


def test_regions_that_together_cover_everything() -> None:
    average = CoverageAverage({"b": torch.zeros(4)})
    for start in (0, 2):
        average.add({"b": torch.ones(2)}, {"b": (Keep.window(start, 2, 4),)}, 1.0)
    assert average.result()[1] == {"b": 1.0}
    assert average.covered("b") is True


def test_an_empty_choice_covers_nothing() -> None:
    average = CoverageAverage({"b": torch.ones(4)})
    average.add({"b": torch.ones(0)}, {"b": (Keep(4, ()),)}, 1.0)
    found, coverage = average.result()
    assert found["b"].tolist() == [1.0] * 4
    assert coverage == {"b": 0.0}
    assert average.covered("b") is False


@pytest.mark.parametrize("counts", [(0, 1, 0), (1, 2, 2), (2, 3, 2), (4, 6, 5)])
def test_integers_are_rounded_halves_to_even(counts: tuple[int, int, int]) -> None:
    one, two, expected = counts
    updates: list[WeightedUpdate] = [({"n": torch.tensor(value)}, {}, 1.0) for value in (one, two)]
    found, _ = coverage_average({"n": torch.tensor(9)}, updates)
    assert found["n"].dtype == torch.int64
    assert found["n"].item() == expected


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floats_are_summed_in_float64_and_cast_once(dtype: torch.dtype) -> None:
    values = [torch.randn(300, generator=torch.Generator().manual_seed(seed)).to(dtype) for seed in range(50)]
    found, _ = coverage_average({"w": torch.zeros(300, dtype=dtype)}, [({"w": value}, {}, 1.0) for value in values])
    assert torch.equal(found["w"], torch.stack(values).double().mean(0).to(dtype))


def test_an_update_may_have_another_dtype_or_layout_than_the_model() -> None:
    params = {"w": torch.zeros(4, 3, 2, 2), "v": torch.zeros(5)}
    values = torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last)
    updates: list[WeightedUpdate] = [
        ({"w": values, "v": torch.arange(10.0)[::2]}, {}, 2.0),
        ({"v": torch.ones(5).half()}, {}, 2.0),
    ]
    found, _ = coverage_average(params, updates)
    assert torch.equal(found["w"], values)
    assert found["v"].tolist() == [0.5, 1.5, 2.5, 3.5, 4.5]


def test_parameters_may_require_gradients() -> None:
    model = nn.Linear(3, 2)
    found, _ = coverage_average(dict(model.named_parameters()), [(dict(model.named_parameters()), {}, 1.0)])
    assert not found["weight"].requires_grad
    assert torch.equal(found["weight"], model.weight)


@pytest.mark.parametrize("scattered", [False, True])
def test_many_rectangles_in_several_blocks(scattered: bool) -> None:
    rng = np.random.default_rng(0)
    shape = (60, 40) if scattered else (16, 5000)
    rows = Keep.from_indices(np.arange(0, shape[0], 2), shape[0])
    kind: type[Scatter | Slices] = Scatter if scattered else Slices
    columns = Keep.from_indices(np.flatnonzero(rng.random(40) < 0.6), 40) if scattered else Keep.first(4500, 5000)
    assert type(region((rows, columns))) is kind
    params = {"w": torch.from_numpy(rng.standard_normal(shape))}
    updates: list[WeightedUpdate] = [
        ({"w": torch.from_numpy(rng.standard_normal((rows.count, columns.count)))}, {"w": (rows, columns)}, 2.0),
        (
            {"w": torch.from_numpy(rng.standard_normal((10, shape[1])))},
            {"w": (Keep.window(shape[0] - 3, 10, shape[0]), Keep.full(shape[1]))},
            3.0,
        ),
    ]
    average = CoverageAverage(params, block=7 * shape[1], group=1)
    for update in updates:
        average.add(*update)
    found, coverage = average.result()
    expected, weights = naive_average(params, updates)
    np.testing.assert_allclose(found["w"].numpy(), expected["w"], rtol=1e-14)
    assert coverage["w"] == (weights["w"] > 0).mean()


def test_adding_may_go_on_after_a_result() -> None:
    updates: list[WeightedUpdate] = [({"w": torch.full((3,), float(value))}, {}, 1.0) for value in range(5)]
    average = CoverageAverage({"w": torch.zeros(3)}, group=2)
    for count, update in enumerate(updates, start=1):
        average.add(*update)
        assert torch.equal(average.result()[0]["w"], coverage_average({"w": torch.zeros(3)}, updates[:count])[0]["w"])


def test_updates_are_let_go_when_their_group_is_complete() -> None:
    average = CoverageAverage({"w": torch.zeros(100)}, group_bytes=3 * 400)
    alive = []
    for _ in range(10):
        update = torch.randn(100)
        alive.append(weakref.ref(update))
        average.add({"w": update}, {}, 1.0)
        del update
        assert sum(ref() is not None for ref in alive) < 3


def test_neighbours_in_memory_that_are_not_neighbours_in_the_model() -> None:
    """A buffer in another order, with a gap, or shared by two names is read name by name."""
    params = {name: torch.zeros(2) for name in "abc"}
    flat = torch.arange(7.0)
    updates: list[WeightedUpdate] = [
        ({"b": flat[0:2], "a": flat[2:4], "c": flat[5:7]}, {}, 1.0),
        ({"a": flat[0:2], "b": flat[2:4], "c": flat[2:4]}, {}, 1.0),
    ]
    found, _ = coverage_average(params, updates)
    assert [found[name].tolist() for name in "abc"] == [[1.0, 2.0], [1.0, 2.0], [3.5, 4.5]]


def test_neighbours_of_which_one_update_has_only_the_first() -> None:
    average = CoverageAverage({"a": torch.zeros(2), "b": torch.zeros(2)}, group=2)
    flat = torch.arange(4.0)
    average.add({"a": flat[:2], "b": flat[2:]}, {}, 1.0)
    average.add({"a": torch.full((2,), 4.0)}, {}, 1.0)
    found, _ = average.result()
    assert found["a"].tolist() == [2.0, 2.5]
    assert found["b"].tolist() == [2.0, 3.0]


def test_neighbours_of_which_an_earlier_group_had_only_the_second() -> None:
    average = CoverageAverage({"a": torch.zeros(2), "b": torch.zeros(2)}, group=1)
    flat = torch.arange(4.0)
    average.add({"b": torch.full((2,), 4.0)}, {}, 1.0)
    average.add({"a": flat[:2], "b": flat[2:]}, {}, 1.0)
    found, _ = average.result()
    assert found["a"].tolist() == [0.0, 1.0]
    assert found["b"].tolist() == [3.0, 3.5]


@pytest.mark.parametrize("keep", [Keep.first(8, 20), Keep.from_indices(np.arange(0, 20, 2), 20)], ids=str)
def test_slices_of_negative_zeros_keep_their_sign(keep: Keep) -> None:
    others = Keep.from_indices(np.setdiff1d(np.arange(20), keep.indices()), 20)
    updates: list[WeightedUpdate] = [
        ({"w": torch.full((each.count,), -0.0)}, {"w": (each,)}, 3.0) for each in (keep, others)
    ]
    found, _ = coverage_average({"w": torch.ones(20)}, updates)
    assert torch.signbit(found["w"]).all()
    assert found["w"].tolist() == [0.0] * 20


def test_the_result_can_be_saved() -> None:
    params = {"a": torch.zeros(2), "b": torch.zeros(3, 2), "n": torch.tensor(3)}
    found, _ = coverage_average(params, [({"a": torch.ones(2), "b": torch.ones(3, 2)}, {}, 1.0)])
    again = load(save(found))
    assert all(torch.equal(again[name], found[name]) for name in params)


def test_it_agrees_with_flowers_average() -> None:
    rng = np.random.default_rng(3)
    params = {"w": torch.zeros(4, 5), "b": torch.zeros(4)}
    updates: list[WeightedUpdate] = []
    records = []
    for weight in (3, 50, 7):
        values = {name: torch.from_numpy(rng.standard_normal(t.shape, np.float32)) for name, t in params.items()}
        updates.append((values, {}, float(weight)))
        metrics = MetricRecord({"num-examples": weight})
        records.append(RecordDict({"arrays": ArrayRecord(values), "metrics": metrics}))
    expected = aggregate_arrayrecords(records, "num-examples").to_torch_state_dict()
    found, _ = coverage_average(params, updates)
    for name in params:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-6, atol=1e-6)


def test_a_tensor_of_the_wrong_shape_is_refused() -> None:
    average = CoverageAverage({"w": torch.zeros(2, 3)})
    with pytest.raises(ValueError, match=r"'w' has shape \(1,\), not \(2, 3\)"):
        average.add({"w": torch.zeros(1)}, {}, 1.0)
    with pytest.raises(ValueError, match=r"'w' has shape \(2, 3\), not \(1, 3\)"):
        average.add({"w": torch.zeros(2, 3)}, {"w": (Keep.first(1, 2), Keep.full(3))}, 1.0)
    assert average.result()[1] == {"w": 0.0}
