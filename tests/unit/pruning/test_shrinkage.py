"""Few calibration vectors: as much of a matrix counts as two halves of the data agree on."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fedlp.pruning.calibration import choose_half, split_examples, split_rows
from fedlp.pruning.gradients import fisher_sums, pool_fisher, shrunk_fisher
from fedlp.pruning.kernels.hessian import Moments, invert_hessian
from fedlp.pruning.kernels.obs import resolve_weight
from fedlp.pruning.kernels.shrinkage import (
    correction_weight,
    hessian_weight,
    shrink_fisher,
    shrink_hessian,
    solve_shrunk,
)
from fedlp.pruning.layer_statistics import Collector
from fedlp.pruning.pruner import Method
from fedlp.pruning.scores.obs import OBS
from fedlp.pruning.tracing.units import find_layers
from fedlp.pruning.tracing.widths import trace_widths
from tests.reference import shrinkage as naive
from tests.unit.pruning.test_pruner import half, language_model, make_pruner, tokens

OUTPUTS, INPUTS = 5, 12


def draw(count: int, seed: int = 0, size: int = INPUTS) -> Tensor:
    """Return correlated vectors, (count, size), that are not centred."""
    mix = torch.randn(size, size, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    noise = torch.randn(count, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return noise @ mix + 0.3 * noise + 1.0


def moments_of(inputs: Tensor, targets: Tensor | None = None) -> Moments:
    moments = Moments.empty(inputs.shape[1], 0 if targets is None else targets.shape[1])
    moments.add(inputs, targets)
    return moments


def problem(count: int, noise: float = 0.1) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    generator = torch.Generator().manual_seed(7)
    weight, other = torch.randn(2, OUTPUTS, INPUTS, generator=generator, dtype=torch.float64)
    halves = []
    for seed in (0, 1):
        x = draw(count, seed)
        error = noise * torch.randn(count, OUTPUTS, generator=generator, dtype=torch.float64)
        halves.append((x, x @ (weight + 0.1 * other).T + 0.5 + error))
    return weight, halves


# ---- kernels and their twins
@pytest.mark.parametrize("count", [3, 20, 500])
def test_kernels_agree_with_their_twins(count: int) -> None:
    weight, halves = problem(count)
    a, b = (naive.hessian(x) for x, _ in halves)
    whole = naive.hessian(torch.cat([x for x, _ in halves]))
    assert hessian_weight(a, b, whole) == pytest.approx(naive.hessian_weight(a, b, whole))
    torch.testing.assert_close(shrink_hessian(whole, 0.3), naive.shrink_hessian(whole, 0.3))
    torch.testing.assert_close(shrink_fisher(a, b, whole), naive.shrink_fisher(a, b, whole))
    first, rest = (moments_of(*pair) for pair in halves)
    found = solve_shrunk(weight, first + rest, first, True, 0.7, "layer")
    for tensor, expected in zip(found, naive.solve(weight, halves, 0.7), strict=True):
        torch.testing.assert_close(tensor, expected, rtol=1e-6, atol=1e-6)


def test_more_vectors_count_for_more() -> None:
    weights = []
    for count in (4, 16, 64, 4096):
        first, rest = moments_of(draw(count, 0)), moments_of(draw(count, 1))
        weights.append(hessian_weight(first.hessian(True), rest.hessian(True), (first + rest).hessian(True)))
    assert weights == sorted(weights)
    assert weights[0] < 0.8
    assert weights[-1] > 0.99


def test_inputs_without_correlations_are_left_with_their_diagonal() -> None:
    noise = torch.randn(2, 300, INPUTS, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    first, rest = (moments_of(x) for x in noise)
    assert hessian_weight(first.hessian(True), rest.hessian(True), (first + rest).hessian(True)) < 0.3


def test_the_weight_does_not_depend_on_the_scale_of_inputs() -> None:
    scale = torch.logspace(-3, 3, INPUTS, dtype=torch.float64)
    found = []
    for by in (torch.ones_like(scale), scale):
        first, rest = moments_of(draw(10, 0) * by), moments_of(draw(10, 1) * by)
        found.append(hessian_weight(first.hessian(True), rest.hessian(True), (first + rest).hessian(True)))
    assert found[0] == pytest.approx(found[1], rel=1e-3)  # centring adds a little to the diagonal


def test_the_correction_counts_as_far_as_it_holds_on_the_other_half() -> None:
    _, halves = problem(400)
    hessians = [naive.hessian(x) for x, _ in halves]
    step = torch.randn(OUTPUTS, INPUTS, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    right = [step @ h for h in hessians]
    assert correction_weight([step, step], right, hessians) == pytest.approx(1.0)
    assert correction_weight([2 * step, 2 * step], right, hessians) == pytest.approx(0.5)
    assert correction_weight([-step, -step], right, hessians) == 0.0
    assert correction_weight([0 * step, 0 * step], right, hessians) == 0.0


@pytest.mark.parametrize("inputs", [torch.zeros(6, 4), torch.ones(6, 4), torch.eye(6, 4), torch.ones(1, 4)])
@pytest.mark.parametrize("centred", [True, False])
def test_degenerate_inputs_have_an_inverse(inputs: Tensor, centred: bool) -> None:
    x = inputs.double()
    whole, first = moments_of(x), moments_of(x[: len(x) // 2])
    weight, inverse = solve_shrunk(torch.ones(2, 4, dtype=torch.float64), whole, first, centred, 1.0, "layer")
    assert torch.isfinite(inverse).all()
    torch.linalg.cholesky(inverse)
    assert torch.equal(weight, torch.ones_like(weight))


def test_with_few_vectors_the_refit_is_better_on_others_than_with_a_fixed_damping() -> None:
    size, kept, removed = 48, torch.arange(36), torch.arange(36, 48)
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(8, size, generator=generator, dtype=torch.float64)
    factors = torch.randn(6, size, generator=generator, dtype=torch.float64)

    def few_factors(count: int) -> Moments:
        signal = torch.randn(count, 6, generator=generator, dtype=torch.float64) @ factors
        return moments_of(signal + torch.randn(count, size, generator=generator, dtype=torch.float64))

    fresh, first, rest = few_factors(20_000).hessian(True), few_factors(30), few_factors(30)
    whole = first + rest

    def error(inverse: Tensor) -> float:
        refitted = torch.zeros_like(weight)
        refitted[:, kept] = resolve_weight(weight, inverse, kept, removed)
        return float((((refitted - weight) @ fresh) * (refitted - weight)).sum())

    shrunk = error(solve_shrunk(weight, whole, first, True, 0.0, "layer")[1])
    plain = float(((weight[:, removed] @ fresh[removed][:, removed]) * weight[:, removed]).sum())
    assert shrunk < error(invert_hessian(whole.hessian(True), 1e-6, "layer", 60))
    assert shrunk < plain


# ---- halves
def test_every_other_example_over_all_batches_is_in_the_first_half() -> None:
    batches = [torch.arange(3), torch.arange(3, 4), torch.arange(4, 8)]
    assert [found.tolist() for found in split_examples(batches)] == [[True, False, True], [False], [True, False] * 2]
    assert [found.tolist() for found in choose_half(batches, 1)] == [[0, 2], [4, 6]]
    assert [found.tolist() for found in choose_half(batches, 2)] == [[1], [3], [5, 7]]


def test_vectors_lie_example_by_example() -> None:
    chosen = torch.tensor([True, False, True])
    assert split_rows(chosen, 6, False).tolist() == [True, True, False, False, True, True]
    assert split_rows(chosen, 7, False).tolist() == [True] * 3 + [False] * 4
    assert split_rows(torch.tensor([True]), 4, False).tolist() == [True] * 4
    assert split_rows(torch.tensor([True]), 4, True).tolist() == [True, True, False, False]


@pytest.mark.parametrize("sizes", [[4, 3], [1, 1, 1], [1]])
def test_halves_are_of_different_examples_and_add_up(sizes: list[int]) -> None:
    model, batches = language_model(), list(torch.split(tokens(1)[0][: sum(sizes)], sizes))
    layers = find_layers(model, trace_widths(model, batches[0]))
    dense = copy.deepcopy(model)
    found = Collector(model, dense, layers, batches, {}, halves=True).collect(layers[0])[0]
    plain = Collector(model, dense, layers, batches, {}).collect(layers[0])[0]
    assert found.half is not None
    assert plain.half is None
    assert found.moments.count == plain.moments.count
    torch.testing.assert_close(found.moments.hessian(True), plain.moments.hessian(True))
    torch.testing.assert_close(found.moments.target_hessian(True), plain.moments.target_hessian(True))
    if sum(sizes) == 1:
        assert found.half.count == found.moments.count // 2
        return
    alone = Collector(model, dense, layers, choose_half(batches, 1), {}).collect(layers[0])[0]
    assert found.half.count == alone.moments.count
    torch.testing.assert_close(found.half.hessian(True), alone.moments.hessian(True))


def test_fisher_information_is_shrunk_by_halves_of_the_examples() -> None:
    model, batches, path = language_model(), tokens(2), "model.layers.1.mlp.down_proj"

    def rng() -> torch.Generator:
        return torch.Generator().manual_seed(0)

    found = shrunk_fisher(model, [path], batches, rng(), False)[path]
    generator, sums = rng(), []
    for number in (1, 2):
        total, count = fisher_sums(model, [path], choose_half(batches, number), generator, False)
        sums.append((total[path], count))
    means = [total / count for total, count in sums]
    whole = (sums[0][0] + sums[1][0]) / (sums[0][1] + sums[1][1])
    torch.testing.assert_close(found, naive.shrink_fisher(means[0], means[1], whole))
    alone = pool_fisher(sums[:1])
    torch.testing.assert_close(alone, means[0].trace() / len(alone) * torch.eye(len(alone), dtype=alone.dtype))


# ---- whole models
def test_few_vectors_are_named_once(caplog: pytest.LogCaptureFixture) -> None:
    few, many = [tokens(1)[0][:4]], tokens(3)
    with caplog.at_level("WARNING", logger="fedlp"):
        for method in (Method(OBS(), correction=1.0, fisher=True), Method(OBS(), damping=0.01)):
            pruner = make_pruner(language_model(), method, few)
            pruner.prune(half(pruner))
        assert caplog.text.count("Few calibration vectors: 2.0 per input of model.layers.0.mlp.down_proj") == 2
        caplog.clear()
        pruner = make_pruner(language_model(), Method(OBS()), many)
        pruner.prune(half(pruner))
    assert not caplog.text


@pytest.mark.parametrize("examples", [1, 2, 5])
def test_any_number_of_examples_will_do(examples: int) -> None:
    method = Method(OBS(), correction=1.0, fisher=True)
    data = [tokens(1)[0][:examples]]
    found = []
    for way in (method, method, replace(method, damping=1e-6)):
        pruner = make_pruner(language_model(), way, data)
        pruned = pruner.prune(half(pruner)).model
        found.append(torch.cat([p.detach().flatten() for p in pruned.parameters()]))
    assert torch.equal(found[0], found[1])
    assert torch.isfinite(found[0]).all()
    assert not torch.equal(found[0], found[2])
