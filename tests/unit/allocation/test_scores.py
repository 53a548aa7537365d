"""What the server pools is what the union of the clients' data gives."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlp.allocation.layer_metrics import reduce_elements, wanda_elements
from fedlp.allocation.pooled_scores import (
    ClientScores,
    InputSquares,
    LayerSums,
    LogSums,
    ScalarSum,
    check_scores,
    pool_scores,
    pool_sums,
)
from fedlp.errors import AllocationError
from fedlp.pruning.kernels.hessian import Moments
from fedlp.types import PrunableLayer

LAYERS = [
    PrunableLayer("a", 5, 1, 50, (), ("r0",), 0.0),
    PrunableLayer("b", 2, 3, 60, (), ("r1", "r2"), 1.0),
]
SHAPES = {"a": [(4, 5)], "b": [(3, 6), (2, 6)]}


def draw(seed: int, clients: int) -> tuple[dict[str, list[np.ndarray]], list[dict[str, list[np.ndarray]]]]:
    """Return readers' matrices and, per client, the inputs that each reader saw."""
    rng = np.random.default_rng(seed)
    weights = {name: [rng.normal(size=shape) for shape in shapes] for name, shapes in SHAPES.items()}
    inputs = []
    for _ in range(clients):
        count = int(rng.integers(1, 9))
        inputs.append(
            {
                name: [rng.normal(0, 10 ** rng.uniform(-2, 2), (count, n)) for _, n in shapes]
                for name, shapes in SHAPES.items()
            }
        )
    return weights, inputs


def squares(x: np.ndarray) -> InputSquares:
    return InputSquares(len(x), np.square(x).sum(axis=0))


def answers(inputs: list[dict[str, list[np.ndarray]]]) -> list[ClientScores]:
    return [
        ClientScores(i, {name: tuple(squares(x) for x in readers) for name, readers in client.items()})
        for i, client in enumerate(inputs)
    ]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 6))
def test_pooled_wanda_is_that_of_the_union(seed: int, clients: int) -> None:
    weights, inputs = draw(seed, clients)
    for pre, reduce in (("log", "var"), ("id", "outlier"), ("sqrt", "cv")):
        pooled = pool_scores(answers(inputs), LAYERS, weights, pre, reduce)
        for name, matrices in weights.items():
            elements = []
            for r, matrix in enumerate(matrices):
                union = np.concatenate([client[name][r] for client in inputs])
                elements.append(wanda_elements(matrix, np.square(union).mean(axis=0)).ravel())
            wanted = reduce_elements(np.concatenate(elements), pre, reduce)
            assert pooled[name] == pytest.approx(wanted, rel=1e-9, abs=1e-12)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 6))
def test_three_numbers_per_reader_give_the_variance_of_the_logarithm(seed: int, clients: int) -> None:
    weights, inputs = draw(seed, clients)
    examples = np.random.default_rng(seed).integers(1, 20, clients)
    sent = []
    for i, client in enumerate(inputs):
        sums = {
            name: tuple(
                LogSums.of_inputs(matrix, squares(x), float(examples[i]))
                for matrix, x in zip(weights[name], readers, strict=True)
            )
            for name, readers in client.items()
        }
        sent.append(ClientScores(i, sums))
    pooled = pool_scores(sent, LAYERS, weights)
    for name, matrices in weights.items():
        logs = [  # every client's elements, as often as it has examples
            np.log(wanda_elements(matrix, squares(client[name][r]).mean)).ravel()
            for i, client in enumerate(inputs)
            for r, matrix in enumerate(matrices)
            for _ in range(examples[i])
        ]
        assert pooled[name] == pytest.approx(np.concatenate(logs).var(), rel=1e-8)


def test_scalars_are_weighted_by_examples_and_order_does_not_matter() -> None:
    sent = [
        ClientScores(i, {layer.name: (ScalarSum.of_score(score, n),) for layer in LAYERS})
        for i, (score, n) in enumerate([(0.5, 10), (2.0, 30), (-0.1, 7)])
    ]
    pooled = pool_scores(sent, LAYERS, {})
    assert pooled["a"] == pytest.approx((5 + 60 - 0.7) / 47)
    assert pool_scores(sent[::-1], LAYERS, {}) == pooled


def test_squares_come_from_the_moments_that_pruning_collects() -> None:
    x = torch.arange(12.0).view(4, 3)
    moments = Moments.empty(3)
    moments.add(x)
    found = InputSquares.from_moments(moments)
    np.testing.assert_allclose(found.mean, x.double().square().mean(dim=0).numpy())
    moments.add(x)
    np.testing.assert_allclose((found + found).total, InputSquares.from_moments(moments).total)


BAD: list[tuple[dict[str, tuple[LayerSums, ...]], str]] = [
    ({"a": (ScalarSum(3.0, math.nan),)}, "client 7, layer a: its score is nan"),
    ({"a": (LogSums(1.0, math.inf, 0.0, 0.0),)}, "client 7, layer a: its score is inf"),
    ({"a": (InputSquares(2, np.array([1.0, np.nan, 0, 0, 0])),)}, "client 7, layer a: its score is nan"),
    ({"a": (InputSquares(2, np.array([1.0, -1.0, 0, 0, 0])),)}, "client 7, layer a: its sums of squares are neg"),
    ({"a": (InputSquares(2, np.ones(4)),)}, "client 7, layer a: it sent sums over 4 inputs"),
    ({"a": (ScalarSum(0.0, 0.0),)}, "client 7, layer a: its statistics are of 0 examples"),
    ({"embed": (ScalarSum(3.0, 1.0),)}, "client 7, layer embed: it is not prunable"),
    ({"b": (InputSquares(2, np.ones(6)),)}, "client 7, layer b: it sent 1 statistics, not 2"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_bad_answers_name_client_and_layer(change: dict[str, tuple[LayerSums, ...]], message: str) -> None:
    _, inputs = draw(0, 2)
    good = answers(inputs)
    bad = ClientScores(7, {**good[0].sums, **change})
    for answer in good:
        check_scores(answer, LAYERS)
    with pytest.raises(AllocationError, match=message):
        check_scores(bad, LAYERS)
    with pytest.raises(AllocationError, match=message):
        pool_sums([*good, bad], LAYERS)


def test_what_does_not_fit_together_is_told() -> None:
    _, inputs = draw(0, 2)
    good = answers(inputs)
    with pytest.raises(AllocationError, match="client 0, layer b: its scores are missing"):
        check_scores(ClientScores(0, {"a": good[0].sums["a"]}), LAYERS)
    empty = PrunableLayer("a", 0, 1, 0, (), ("r0",), 0.0)
    with pytest.raises(AllocationError, match="client 0, layer a: it has no units"):
        check_scores(good[0], [empty, LAYERS[1]])
    other = ClientScores(9, {layer.name: (ScalarSum(1.0, 1.0),) for layer in LAYERS})
    with pytest.raises(AllocationError, match="client 9, layer a: its statistics are not of the kind"):
        pool_sums([*good, other], LAYERS)
    with pytest.raises(AllocationError, match="no client sent"):
        pool_sums([], LAYERS)
