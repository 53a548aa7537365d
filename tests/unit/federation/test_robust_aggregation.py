"""Robust rules equal their naive twins where clients hold different entries, and bound what hostile clients do."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedlp.errors import ConfigError
from fedlp.federation.aggregation.aggregator import Aggregator, CoverageAverageRule
from fedlp.federation.aggregation.centred_clipping import CentredClipping
from fedlp.federation.aggregation.krum import Krum
from fedlp.federation.aggregation.median import Median
from fedlp.federation.aggregation.norm_clipping import NormClipping
from fedlp.federation.aggregation.norm_filter import NormFilter
from fedlp.federation.aggregation.trimmed_mean import TrimmedMean
from fedlp.types import Keep
from tests.reference import robust

PLAIN = CoverageAverageRule(max_norm=None)
RNG = np.random.default_rng(3)
SHAPE = (4, 6)
OLD = RNG.normal(size=SHAPE)
ROBUST = [TrimmedMean(0.4), Median(), NormClipping(2.0), NormFilter(2.0), Krum(0.3), CentredClipping()]


def updates(count: int, hostile: int = 0) -> list[tuple[np.ndarray, tuple[Keep, Keep] | None, float]]:
    """Honest updates near the old values, of the first rows and columns of some clients; hostile ones far away."""
    found: list[tuple[np.ndarray, tuple[Keep, Keep] | None, float]] = []
    for number in range(count):
        keeps = None if number % 2 == 0 else (Keep.first(3, 4), Keep.window(number, 4, 6))
        values = OLD + 0.1 * RNG.normal(size=SHAPE)
        if number < hostile:
            values = OLD - 100.0
        if keeps is not None:
            values = values[np.ix_(keeps[0].indices(), keeps[1].indices())]
        found.append((values, keeps, float(1 + number % 3)))
    return found


def full(values: np.ndarray, keeps: tuple[Keep, Keep] | None) -> np.ndarray:
    whole = np.full(SHAPE, np.nan)
    if keeps is None:
        return values
    whole[np.ix_(keeps[0].indices(), keeps[1].indices())] = values
    return whole


def aggregate(rule: Aggregator, given: list[tuple[np.ndarray, tuple[Keep, Keep] | None, float]]) -> np.ndarray:
    accumulator = rule.begin({"w": torch.from_numpy(OLD), "untouched": torch.ones(2)})
    for values, keeps, weight in given:
        accumulator.add({"w": torch.from_numpy(values)}, {} if keeps is None else {"w": keeps}, weight)
    params, coverage = accumulator.result()
    assert torch.equal(params["untouched"], torch.ones(2))
    assert coverage["untouched"] == 0.0
    assert accumulator.covered("untouched") is False
    return params["w"].numpy()


def columns(given: list[tuple[np.ndarray, tuple[Keep, Keep] | None, float]]) -> list[np.ndarray]:
    return [full(values, keeps).ravel() for values, keeps, _ in given]


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.3, 0.49])
def test_trimmed_mean_and_median(fraction: float) -> None:
    given = updates(7)
    stack = np.stack(columns(given))
    wanted = [robust.trimmed_mean(column[~np.isnan(column)].tolist(), fraction) for column in stack.T]
    np.testing.assert_allclose(aggregate(TrimmedMean(fraction), given).ravel(), wanted, atol=1e-12)
    np.testing.assert_allclose(aggregate(Median(), given).ravel(), np.nanmedian(stack, axis=0), atol=1e-12)


def test_norm_clipping() -> None:
    given = updates(6, hostile=2)
    wanted = robust.clipped(columns(given), [weight for *_, weight in given], OLD.ravel(), 2.0)
    np.testing.assert_allclose(aggregate(NormClipping(2.0), given).ravel(), wanted, atol=1e-12)


def test_norm_clipping_is_the_coverage_average_where_nobody_stands_out() -> None:
    given = updates(8)
    np.testing.assert_allclose(aggregate(NormClipping(5.0), given), aggregate(PLAIN, given), atol=1e-12)


def test_norm_filter_leaves_out_what_stands_out() -> None:
    given = updates(8, hostile=2)
    np.testing.assert_allclose(aggregate(NormFilter(3.0), given), aggregate(PLAIN, given[2:]), atol=1e-12)


def test_krum_selects_as_its_twin() -> None:
    given = updates(9, hostile=2)
    chosen = robust.krum_choice(columns(given), 0.3, 0.7)
    assert not {0, 1} & set(chosen)
    equal = [(values, keeps, 1.0) for values, keeps, _ in (given[i] for i in chosen)]
    np.testing.assert_allclose(aggregate(Krum(0.3, 0.7), given), aggregate(PLAIN, equal), atol=1e-12)


def test_centred_clipping_of_equal_updates_is_their_value() -> None:
    step = [(OLD + 0.25, None, 1.0)] * 4
    np.testing.assert_allclose(aggregate(CentredClipping(), step), OLD + 0.25, atol=1e-12)


@pytest.mark.parametrize("rule", ROBUST, ids=lambda rule: type(rule).__name__)
def test_a_quarter_of_hostile_clients_does_not_own_the_result(rule: Aggregator) -> None:
    given = updates(12, hostile=3)
    assert np.abs(aggregate(PLAIN, given) - OLD).max() > 10
    honest = np.abs(np.stack(columns(given[3:])) - OLD.ravel())
    assert np.abs(aggregate(rule, given) - OLD).max() < 3 * np.nanmax(honest)


@pytest.mark.parametrize("rule", [*ROBUST, PLAIN], ids=lambda rule: type(rule).__name__)
def test_a_round_without_updates_changes_nothing(rule: Aggregator) -> None:
    np.testing.assert_array_equal(aggregate(rule, []), OLD)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: TrimmedMean(0.5), "aggregator.fraction"),
        (lambda: NormClipping(0.5), "aggregator.multiple"),
        (lambda: NormFilter(float("nan")), "aggregator.multiple"),
        (lambda: Krum(0.5), "aggregator.hostile"),
        (lambda: Krum(0.2, 0.0), "aggregator.selected"),
        (lambda: CentredClipping(steps=0), "aggregator.steps"),
    ],
)
def test_options_out_of_range(make: object, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make()  # type: ignore[operator]
