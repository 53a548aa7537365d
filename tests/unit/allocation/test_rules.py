"""Each hand rule gives the sparsities that its paper's formula gives."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import pytest

from fedlp.allocation.dsa_chains import PUBLISHED, chain_shape, parse_chain
from fedlp.allocation.evidence import NEEDS, Evidence, needs_of
from fedlp.allocation.rules.alphapruning import hill_exponent
from fedlp.allocation.rules.erk import erk_densities
from fedlp.errors import AllocationError, ConfigError
from fedlp.registry import lookup, names
from fedlp.types import PrunableLayer

RNG = np.random.default_rng(0)
SHAPES = [(8, 12), (6, 40), (5, 30, 3, 3), (10, 64), (7, 20)]
WEIGHTS = {f"l{i}": [RNG.normal(size=shape) ** (1 + 2 * (i % 2))] for i, shape in enumerate(SHAPES)}
NORMS = {name: [RNG.lognormal(0, 1.6) * RNG.lognormal(0, 0.3, w[0][0].size)] for name, w in WEIGHTS.items()}
ELEMENTS = {name: np.abs(w[0].reshape(len(w[0]), -1)) * np.sqrt(NORMS[name][0]) for name, w in WEIGHTS.items()}
LAYERS = [
    PrunableLayer(name, 10**12, 1, w[0].size, (), (f"{name}.reader",), i / 4)  # so many units that rounding is nothing
    for i, (name, w) in enumerate(WEIGHTS.items())
]
HAND_RULES = ("owl", "dlp", "alphapruning", "erk", "dsa")
SIZES = np.array([layer.num_params for layer in LAYERS], dtype=float)


def normalised(values: list[float]) -> np.ndarray:
    return (np.array(values) - min(values)) / (max(values) - min(values))


def cost(kept: Mapping[str, float]) -> float:
    return sum(layer.num_params * kept[layer.name] / layer.num_units for layer in LAYERS)


def evidence(
    sparsity: float,
    weights: Mapping[str, Sequence[np.ndarray]] = WEIGHTS,
    norms: Mapping[str, Sequence[np.ndarray]] = NORMS,
) -> Evidence:
    return Evidence(LAYERS, sparsity, weights=lambda: weights, input_norms=lambda: norms)


def solved(rule: str, sparsity: float, given: Evidence | None = None, **options: float) -> np.ndarray:
    """The sparsities that a budget on parameters makes of a rule."""
    part = lookup("allocator", rule)(**options)
    kept = part(LAYERS, given or evidence(sparsity), cost, (1 - sparsity) * SIZES.sum())
    assert cost(kept) <= (1 - sparsity) * SIZES.sum()
    return np.array([1 - kept[layer.name] / layer.num_units for layer in LAYERS])


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
    shape = np.array([wanted[layer.name] for layer in LAYERS])
    np.testing.assert_allclose(solved("dsa", 0.7), centred(0.16 * shape, 0.7), atol=1e-9)


def test_depth_alone_gives_a_line_or_a_logarithm() -> None:
    depth = np.array([layer.depth for layer in LAYERS])
    np.testing.assert_allclose(solved("uniform", 0.4), np.full(5, 0.4), atol=1e-9)
    np.testing.assert_allclose(solved("depth_line", 0.4), centred(0.6 * 0.4 * depth, 0.4), atol=1e-9)
    logarithm = np.log(depth * 4 + 1) / np.log(5)
    np.testing.assert_allclose(solved("log_depth", 0.4), centred(1.16 * 0.4**1.134 * logarithm, 0.4), atol=1e-9)


@pytest.mark.parametrize("rule", ["depth_line", "log_depth", *HAND_RULES])
@pytest.mark.parametrize("amplitude", [0.0, 0.25])
def test_an_amplitude_of_ones_own_is_the_range_of_the_sparsities(rule: str, amplitude: float) -> None:
    assert np.ptp(solved(rule, 0.5, amplitude=amplitude)) == pytest.approx(amplitude, abs=1e-9)


@pytest.mark.parametrize("rule", ["depth_line", "log_depth", *HAND_RULES])
@pytest.mark.parametrize("amplitude", [-0.1, 2.5])
def test_an_amplitude_that_cannot_be_is_refused(rule: str, amplitude: float) -> None:
    with pytest.raises(ConfigError, match=rf"allocator\.amplitude={amplitude} is not allowed: it must be in \[0, 2\]"):
        lookup("allocator", rule)(amplitude=amplitude)


def test_layers_that_score_alike_are_pruned_alike() -> None:
    alike = evidence(0.5, dict.fromkeys(WEIGHTS, WEIGHTS["l0"]), dict.fromkeys(NORMS, NORMS["l0"]))
    for rule in HAND_RULES:
        np.testing.assert_allclose(solved(rule, 0.5, alike), np.full(5, 0.5), atol=1e-9)


# ---- evidence
def test_wandas_elements_are_those_of_all_readers_of_a_layer() -> None:
    layer = PrunableLayer("a", 2, 1, 10, (), ("one", "other"), 0.0)
    weights = [np.array([[1.0, -2.0]]), np.array([[3.0, 4.0], [0.0, -1.0]])]
    norms = [np.array([4.0, 9.0]), np.array([1.0, 25.0])]
    found = Evidence([layer], 0.5, weights=lambda: {"a": weights}, input_norms=lambda: {"a": norms})
    np.testing.assert_array_equal(found.wanda["a"], [2, 6, 3, 20, 0, 5])


def test_evidence_is_measured_once_and_only_where_it_is_asked_for() -> None:
    calls: list[str] = []

    def weights() -> Mapping[str, Sequence[np.ndarray]]:
        calls.append("weights")
        return WEIGHTS

    given = Evidence(LAYERS, 0.5, weights=weights, input_norms=lambda: calls.append("input_norms"))
    solved("uniform", 0.5, given)
    assert calls == []
    solved("erk", 0.5, given)
    solved("alphapruning", 0.5, given)
    assert calls == ["weights"]
    assert given.at(0.7).sparsity == 0.7
    assert given.has("weights")
    assert not given.has("unit_scores")


@pytest.mark.parametrize("rule", [name for name in names("allocator") if name != "plan"])
def test_a_rule_says_which_evidence_it_reads(rule: str) -> None:
    """With what it says a rule gives an allocation; without any one of these it says what is missing."""
    layers = [PrunableLayer(x.name, 7, 1, x.num_params, (), x.readers, x.depth) for x in LAYERS]
    scores = {x.name: np.linspace(1, 2, 7) for x in layers}
    suppliers = {
        "weights": lambda: WEIGHTS,
        "input_norms": lambda: NORMS,
        "unit_scores": lambda: scores,
        "error_curves": lambda: {name: np.cumsum(found)[:-1].tolist() for name, found in scores.items()},
    }
    part = lookup("allocator", rule)()
    needed = needs_of(part)
    assert needed <= set(NEEDS)

    def units(kept: Mapping[str, float]) -> float:
        return sum(kept.values())

    kept = part(layers, Evidence(layers, 0.5, **{need: suppliers[need] for need in needed}), units, 20.0)
    assert set(kept) == {x.name for x in layers}
    assert units(kept) <= 20
    for missing in needed:
        bare = Evidence(layers, 0.5, **{need: suppliers[need] for need in needed - {missing}})
        with pytest.raises(AllocationError, match=f"there are no {missing.replace('_', ' ')} here"):
            part(layers, bare, units, 20.0)


def test_a_need_that_does_not_exist_is_refused() -> None:
    class Mine:
        needs = frozenset({"gut_feeling"})

    with pytest.raises(AllocationError, match="needs gut_feeling, which is none of weights"):
        needs_of(Mine())
    assert needs_of(lambda: None) == frozenset()


def test_what_a_rule_cannot_see_is_told() -> None:
    with pytest.raises(ConfigError, match="there is no allocator best"):
        lookup("allocator", "best")
    with pytest.raises(AllocationError, match="the spectrum of its weights has no tail"):
        hill_exponent(np.eye(3))
