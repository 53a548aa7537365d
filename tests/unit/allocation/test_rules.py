"""Each hand rule gives the sparsities that its paper's formula gives."""

from __future__ import annotations

import math

import numpy as np
import pytest
from fedlp.allocation.rules.hand_rules import HAND_RULES, Evidence, erk_densities, hand_rule, hill_exponent

from fedlp.allocation.budget.solve import solve_budget
from fedlp.allocation.dsa_chains import PUBLISHED, chain_shape, parse_chain
from fedlp.allocation.layer_metrics import compute_statistics
from fedlp.errors import AllocationError
from fedlp.types import PrunableLayer

RNG = np.random.default_rng(0)
SHAPES = [(8, 12), (6, 40), (5, 30, 3, 3), (10, 64), (7, 20)]
WEIGHTS = {f"l{i}": [RNG.normal(size=shape) ** (1 + 2 * (i % 2))] for i, shape in enumerate(SHAPES)}
ELEMENTS = {name: np.abs(w[0].reshape(len(w[0]), -1)) * RNG.lognormal(0, 0.8) for name, w in WEIGHTS.items()}
LAYERS = [
    PrunableLayer(name, 10**6, 1, w[0].size, (), (f"{name}.reader",), i / 4)
    for i, (name, w) in enumerate(WEIGHTS.items())
]
EVIDENCE = Evidence(
    compute_statistics(LAYERS, {name: {"wanda": array} for name, array in ELEMENTS.items()}), WEIGHTS, ELEMENTS
)
SIZES = np.array([layer.num_params for layer in LAYERS], dtype=float)


def normalised(values: list[float]) -> np.ndarray:
    return (np.array(values) - min(values)) / (max(values) - min(values))


def solved(rule: str, sparsity: float) -> np.ndarray:
    """The sparsities that a budget on parameters makes of a rule."""
    shape, amplitude = hand_rule(rule, EVIDENCE, sparsity)

    def cost(kept: dict[str, float]) -> float:
        return sum(layer.num_params * kept[layer.name] / layer.num_units for layer in LAYERS)

    found = solve_budget(LAYERS, shape, amplitude, cost, (1 - sparsity) * SIZES.sum())  # type: ignore[arg-type]
    return np.array([found[layer.name] for layer in LAYERS])


def centred(values: np.ndarray, sparsity: float) -> np.ndarray:
    return sparsity + values - np.average(values, weights=SIZES)


def test_owl_keeps_more_of_what_has_outliers() -> None:
    ratios = [100 * float(np.mean(array > 5 * array.mean())) for array in ELEMENTS.values()]
    keep = normalised(ratios) * 2 * 0.08
    np.testing.assert_allclose(solved("owl", 0.7), centred(-keep, 0.7), atol=1e-9)


@pytest.mark.parametrize(("sparsity", "alpha"), [(0.5, 0.04), (0.6, 0.1), (0.65, 0.125), (0.7, 0.15)])
def test_dlp_prunes_what_has_high_medians(sparsity: float, alpha: float) -> None:
    medians = [float(np.quantile(array, 0.5, method="higher")) for array in ELEMENTS.values()]
    importance = [1 - m / sum(medians) for m in medians]
    wanted = centred(-2 * alpha * normalised(importance), sparsity)
    np.testing.assert_allclose(solved("dlp", sparsity), wanted, atol=1e-9)


def test_alphapruning_scales_sparsities_around_the_mean() -> None:
    exponents = [hill_exponent(w[0].reshape(len(w[0]), -1)) for w in WEIGHTS.values()]
    ratios = normalised(exponents) * 0.6 + 0.7
    eta = 0.6 * SIZES.sum() / (SIZES * ratios).sum()
    np.testing.assert_allclose(solved("alphapruning", 0.6), eta * ratios, atol=1e-9)


def test_the_exponent_is_that_of_a_pareto_tail() -> None:
    """Singular values whose squares are quantiles of a power law with density ~ x^-3."""
    count = 4000
    tail = (1 - (np.arange(count) + 0.5) / count) ** -0.5
    assert hill_exponent(np.diag(np.sqrt(tail[::100]))) == pytest.approx(3.0, rel=0.1)
    values = np.sort(np.linalg.eigvalsh(WEIGHTS["l0"][0] @ WEIGHTS["l0"][0].T))
    wanted = 1 + 4 / sum(math.log(x / values[4]) for x in values[4:])
    assert hill_exponent(WEIGHTS["l0"][0]) == pytest.approx(wanted)


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.9])
def test_erk_densities_go_with_the_sum_of_the_dimensions_over_their_product(sparsity: float) -> None:
    raw = np.array([sum(shape) / math.prod(shape) for shape in SHAPES])
    low, high = 0.0, 1e6
    for _ in range(200):  # the scale at which the clipped densities have the right mean
        middle = 0.5 * (low + high)
        if np.average(np.minimum(1, middle * raw), weights=SIZES) > 1 - sparsity:
            high = middle
        else:
            low = middle
    wanted = np.minimum(1, high * raw)
    found = erk_densities(raw.tolist(), (SIZES / SIZES.sum()).tolist(), 1 - sparsity)
    np.testing.assert_allclose(found, wanted, atol=1e-9)
    np.testing.assert_allclose(solved("erk", sparsity), 1 - wanted, atol=1e-9)


def test_erk_of_everything_is_everything() -> None:
    np.testing.assert_array_equal(erk_densities([1.0, 2.0], [0.5, 0.5], 1.0), [1, 1])


def test_dsa_is_the_published_chain() -> None:
    wanted = chain_shape(parse_chain(PUBLISHED), ELEMENTS)
    shape, amplitude = hand_rule("dsa", EVIDENCE, 0.7)
    assert shape == pytest.approx(wanted)
    assert amplitude == 0.16


def test_layers_that_score_alike_are_pruned_alike() -> None:
    same = dict.fromkeys(ELEMENTS, ELEMENTS["l0"])
    alike = compute_statistics(LAYERS, {name: {"wanda": array} for name, array in same.items()})
    evidence = Evidence(alike, dict.fromkeys(WEIGHTS, WEIGHTS["l0"]), same)
    for rule in HAND_RULES:
        assert set(hand_rule(rule, evidence, 0.5)[0].values()) == {0.0}


def test_what_a_rule_cannot_see_is_told() -> None:
    bare = Evidence(compute_statistics(LAYERS, {layer.name: {} for layer in LAYERS}))
    for rule, message in [
        ("owl", r"rule owl: layer l0 has no wanda\.id\.outlier"),
        ("dlp", r"rule dlp: layer l0 has no wanda\.id\.median"),
        ("alphapruning", "rule alphapruning: layer l0 came without weights"),
        ("erk", "rule erk: layer l0 came without weights"),
        ("dsa", "rule dsa: layer l0 came without Wanda elements"),
        ("best", "there is no allocation rule 'best'"),
    ]:
        with pytest.raises(AllocationError, match=message):
            hand_rule(rule, bare, 0.5)
    with pytest.raises(AllocationError, match="rule owl: there are no layers"):
        hand_rule("owl", Evidence(()), 0.5)
    with pytest.raises(AllocationError, match="the spectrum of its weights has no tail"):
        hill_exponent(np.eye(3))
