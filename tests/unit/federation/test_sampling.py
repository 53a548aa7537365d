"""Draws come from named streams and have the distribution they claim."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fedlp.federation.sampling import Without, depth_probabilities, sample_cohort, sample_level, sample_uploads
from fedlp.models import Layer
from fedlp.rng import Stream, generator, torch_seed

LAYERS = (Layer("conv", ("conv.weight", "conv.bias"), 10), Layer("bn", ("bn.weight", "bn.running_mean"), 4))


def test_a_stream_does_not_depend_on_what_ran_before() -> None:
    first = generator(3, Stream.COHORT, 7).random(4)
    generator(3, Stream.UPLOADS, 7).random(100)
    np.testing.assert_array_equal(first, generator(3, Stream.COHORT, 7).random(4))
    assert not np.array_equal(first, generator(4, Stream.COHORT, 7).random(4))
    assert not np.array_equal(first, generator(3, Stream.UPLOADS, 7).random(4))
    assert torch_seed(0, Stream.MODEL) != torch_seed(1, Stream.MODEL)


def test_a_cohort_is_distinct_sorted_and_uniform() -> None:
    counts = np.zeros(20)
    for server_round in range(600):
        cohort = sample_cohort(0, server_round, range(20), 5)
        assert list(cohort) == sorted(set(cohort))
        assert len(cohort) == 5
        counts[list(cohort)] += 1
    assert abs(counts / 600 - 0.25).max() < 0.08


def test_a_cohort_does_not_depend_on_the_order_of_the_clients() -> None:
    assert sample_cohort(1, 2, [5, 3, 9, 1], 2) == sample_cohort(1, 2, [1, 3, 5, 9], 2)


class Watched(list[int]):
    """Ids that tell how many of them were looked at."""

    looks = 0

    def __getitem__(self, index: Any) -> Any:
        self.looks += 1
        return super().__getitem__(index)

    def __iter__(self) -> Any:
        raise AssertionError("a pass over all ids")


def test_a_small_cohort_of_many_sorted_clients_takes_no_pass_over_them() -> None:
    ids = range(0, 300_000, 3)
    watched = Watched(ids)
    assert sample_cohort(5, 9, watched, 10, is_sorted=True) == sample_cohort(5, 9, list(ids), 10)
    assert watched.looks == 10


def test_ids_without_some_are_those_of_a_filtered_list() -> None:
    ids, left_out = list(range(0, 40, 2)), [38, 4, 6, 7, 0, 99]
    found = [client_id for client_id in ids if client_id not in left_out]
    without = Without(ids, left_out)
    assert list(without) == found
    assert (len(without), without[-1], without[3:5], 36 in without) == (len(found), found[-1], found[3:5], True)
    assert sample_cohort(1, 2, without, 3, is_sorted=True) == sample_cohort(1, 2, found, 3)
    assert sample_cohort(1, 2, without, 99, is_sorted=True) == tuple(found)
    assert not Without([1, 2], [2, 1])


def test_everybody_takes_part_where_no_more_are_asked_for() -> None:
    assert sample_cohort(0, 1, [2, 0, 1], 3) == (0, 1, 2)


@pytest.mark.parametrize("rate", [0.0, 0.3, 1.0])
def test_a_layer_is_uploaded_whole_with_the_given_rate(rate: float) -> None:
    hits = 0
    for server_round in range(400):
        names = sample_uploads(0, server_round, 1, LAYERS, rate, "layer")
        for layer in LAYERS:
            assert len(names & set(layer.tensors)) in (0, len(layer.tensors))
        hits += "conv.weight" in names
    assert hits / 400 == pytest.approx(rate, abs=0.07 if 0 < rate < 1 else 0)


def test_the_official_codes_unit_is_the_tensor() -> None:
    draws = [sample_uploads(0, r, 1, LAYERS, 0.5, "tensor") for r in range(200)]
    assert any(("conv.weight" in names) != ("conv.bias" in names) for names in draws)


def test_depths_are_named_uniform_or_given() -> None:
    assert depth_probabilities("u", 5) == [0.2] * 5
    assert depth_probabilities(3, 5) == pytest.approx([0.1, 0.1, 0.6, 0.1, 0.1])
    assert depth_probabilities(2, 2) == pytest.approx([0.4, 0.6])
    assert depth_probabilities(1, 1) == [1.0]


def test_a_clients_level_is_drawn_once_and_follows_the_distribution() -> None:
    levels = [sample_level(0, Stream.DEPTHS, client, [0.6, 0.1, 0.3]) for client in range(2000)]
    assert levels[:50] == [sample_level(0, Stream.DEPTHS, client, [0.6, 0.1, 0.3]) for client in range(50)]
    np.testing.assert_allclose(np.bincount(levels) / 2000, [0.6, 0.1, 0.3], atol=0.04)
