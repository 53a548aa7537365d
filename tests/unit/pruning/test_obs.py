"""The OBS kernels against their naive float64 twins, and the identities that any right implementation obeys."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from fedlp.errors import CalibrationError
from fedlp.pruning.kernels.hessian import invert_hessian
from fedlp.pruning.kernels.inverses import LowRankInverse
from fedlp.pruning.kernels.obs import Problem, eliminate, output_error, resolve_weight, unit_saliency
from fedlp.pruning.scores.slimgpt import group_schedule
from tests.reference import obs as naive

DAMPING = 1e-3
SIZES = [(1, 12, 5), (3, 24, 7), (4, 20, 9)]  # unit size, inputs, outputs


def make_layer(inputs: int, outputs: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Return weight, damped Hessian and its inverse, float64."""
    rng = torch.Generator().manual_seed(seed)
    mixing = torch.randn(inputs, inputs, generator=rng, dtype=torch.float64)
    x = torch.randn(200, inputs, generator=rng, dtype=torch.float64) @ mixing
    hessian = 2 / 200 * x.T @ x
    weight = torch.randn(outputs, inputs, generator=rng, dtype=torch.float64)
    return weight, naive.damped(hessian, DAMPING), invert_hessian(hessian, DAMPING, "layer", 200)


def split(order: list[int], inputs: int, unit_size: int) -> tuple[Tensor, Tensor]:
    """Return kept and removed columns."""
    gone = naive.columns_of(sorted(order), unit_size)
    return torch.tensor([c for c in range(inputs) if c not in gone]), torch.tensor(gone)


@pytest.mark.parametrize("block", [1, 2, 5, 64])
@pytest.mark.parametrize(("size", "inputs", "outputs"), SIZES)
def test_greedy_order_and_losses_are_the_naive_ones_for_every_block(
    size: int, inputs: int, outputs: int, block: int
) -> None:
    weight, hessian, inverse = make_layer(inputs, outputs)
    count = inputs // size - 1
    found = eliminate([Problem(weight, inverse, size)], [1] * count, block=block)
    assert list(found.order) == naive.greedy_order([weight], [hessian], [size], count)
    for done in range(1, count + 1):
        kept, _ = split(list(found.order[:done]), inputs, size)
        expected = naive.removal_loss(weight, hessian, kept.tolist())
        assert found.losses[done - 1] == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("block", [2, 7, 64])
@pytest.mark.parametrize(("size", "inputs", "outputs"), SIZES)
def test_of_few_inputs_no_matrix_is_needed(size: int, inputs: int, outputs: int, block: int) -> None:
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(7, inputs, generator=rng, dtype=torch.float64)
    weight = torch.randn(outputs, inputs, generator=rng, dtype=torch.float64)
    hessian = x.T @ x + 0.1 * torch.eye(inputs, dtype=torch.float64)
    low_rank = LowRankInverse.of(x.T, 0.1, torch.float64)
    torch.testing.assert_close(low_rank.rows(torch.arange(inputs)) @ hessian, torch.eye(inputs, dtype=torch.float64))
    for schedule in ([1] * (inputs // size - 1), [2, 2], [3, *[1] * (inputs // size - 4)]):  # and from large to small
        expected = eliminate([Problem(weight, torch.linalg.inv(hessian), size)], schedule, block=block)
        for large_steps in (False, True):
            found = eliminate([Problem(weight, low_rank, size)], schedule, block=block, large_steps=large_steps)
            assert found.order == expected.order
            assert found.losses == pytest.approx(expected.losses, rel=1e-9)


def test_small_and_large_steps_eliminate_alike() -> None:
    """Steps of many columns carry the weights along, steps of few their Gram matrix."""
    weight, hessian, inverse = make_layer(24, 7)
    for schedule in ([1] * 12, [5, 5, 2], [12]):
        found = eliminate([Problem(weight, inverse, 1)], schedule, block=4)
        for done, loss in zip(itertools.accumulate(schedule), found.losses, strict=True):
            kept, _ = split(list(found.order[:done]), 24, 1)
            assert loss == pytest.approx(naive.removal_loss(weight, hessian, kept.tolist()), rel=1e-9)


def test_outputs_can_be_weighed() -> None:
    weight, hessian, inverse = make_layer(12, 6)
    root = torch.randn(6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    fisher = root @ root.T
    found = eliminate([Problem(root.T @ weight, inverse, 2)], [1, 1, 1])
    kept, _ = split(list(found.order), 12, 2)
    assert found.losses[-1] == pytest.approx(naive.removal_loss(weight, hessian, kept.tolist(), fisher), rel=1e-9)


def test_several_readers_of_the_same_units_lose_what_costs_them_least_together() -> None:
    layers = [(make_layer(12, 5, seed=1), 2), (make_layer(6, 4, seed=2), 1)]
    problems = [Problem(w, inverse, size) for (w, _, inverse), size in layers]
    found = eliminate(problems, [1] * 4, block=3)
    weights, hessians, sizes = [w for (w, _, _), _ in layers], [h for (_, h, _), _ in layers], [s for _, s in layers]
    assert list(found.order) == naive.greedy_order(weights, hessians, sizes, 4)


@pytest.mark.parametrize(("size", "inputs", "outputs"), SIZES)
def test_paper_mode_is_the_literal_algorithm_1(size: int, inputs: int, outputs: int) -> None:
    weight, hessian, inverse = make_layer(inputs, outputs, seed=3)
    schedule = [2, 1, 1] if size == 1 else [1, 1, 1]
    found = eliminate([Problem(weight, inverse, size)], schedule, score="columns", block=2)
    expected, gone = naive.released_slimgpt(weight, hessian, size, schedule)
    assert sorted(found.order) == sorted(gone)
    kept, removed = split(gone, inputs, size)
    torch.testing.assert_close(resolve_weight(weight, inverse, kept, removed), expected[:, kept])


def test_weights_do_not_depend_on_the_order_of_removal_and_are_the_least_squares_refit() -> None:
    weight, hessian, inverse = make_layer(12, 5)
    kept, _ = split([7, 1, 4], 12, 1)
    refit = naive.refit(weight, hessian, kept.tolist())
    torch.testing.assert_close(resolve_weight(weight, inverse, kept, torch.tensor([1, 4, 7])), refit)
    for order in itertools.permutations([7, 1, 4]):
        w, inv = weight.clone(), inverse.clone()
        for p in order:  # equations 2 and 3 of the paper, one column at a time
            w -= torch.outer(w[:, p] / inv[p, p], inv[p])
            inv -= torch.outer(inv[:, p], inv[p]) / inv[p, p]
        torch.testing.assert_close(w[:, kept], refit, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(("size", "inputs", "outputs"), SIZES)
def test_saliency_is_the_loss_of_removing_a_unit_alone(size: int, inputs: int, outputs: int) -> None:
    weight, hessian, inverse = make_layer(inputs, outputs)
    saliency = unit_saliency(weight, inverse, size)
    for unit, value in enumerate(saliency.tolist()):
        kept, removed = split([unit], inputs, size)
        pruned = torch.zeros_like(weight)
        pruned[:, kept] = resolve_weight(weight, inverse, kept, removed)
        assert value == pytest.approx(output_error(weight, pruned, hessian), rel=1e-9)
        assert value == pytest.approx(naive.removal_loss(weight, hessian, kept.tolist()), rel=1e-9)


def test_inputs_are_not_touched() -> None:
    weight, _, inverse = make_layer(24, 7)
    before = [weight.clone(), inverse.clone()]
    eliminate([Problem(weight, inverse, 3)], [1] * 6, block=2)
    eliminate([Problem(weight, inverse, 1)], [6, 6], block=2)
    unit_saliency(weight, inverse, 3)
    assert all(torch.equal(was, now) for was, now in zip(before, [weight, inverse], strict=True))


def test_float32_chooses_almost_as_well() -> None:
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(1024, 128, generator=rng) @ (torch.randn(128, 128, generator=rng) / 128**0.5 + torch.eye(128))
    weight, hessian = torch.randn(32, 128, generator=rng), 2 / 1024 * x.T @ x
    losses = []
    for dtype in (torch.float32, torch.float64):
        inverse = invert_hessian(hessian.to(dtype), 1e-2, "layer", 1024)
        losses.append(eliminate([Problem(weight, inverse, 1)], [1] * 64).losses[-1])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_a_singular_hessian_is_an_error_that_names_layer_rank_and_remedy() -> None:
    x = torch.randn(5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with pytest.raises(CalibrationError, match=r"layer mlp: .* 8 inputs has rank 5, from 5 .*pruner\.damping=0\.01"):
        invert_hessian(x.T @ x, 0.0, "mlp", 5)
    assert torch.isfinite(invert_hessian(x.T @ x, 0.01, "mlp", 5)).all()


def test_the_rank_is_at_most_the_number_of_vectors() -> None:
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    noisy = x.T @ x + torch.diag(torch.full((8,), 1e-3))  # as rounding does to what clients send
    with pytest.raises(CalibrationError, match="8 inputs has rank 5, from 5 calibration vectors"):
        invert_hessian(noisy, 0.0, "mlp", 5)


def test_a_hessian_that_is_not_finite_is_an_error() -> None:
    with pytest.raises(CalibrationError, match="layer mlp: its inputs are not finite"):
        invert_hessian(torch.full((2, 2), torch.nan), 0.1, "mlp", 5)


def test_losing_definiteness_names_the_unit() -> None:
    inverse = torch.eye(4, dtype=torch.float64)
    inverse[2:, 2:] = torch.tensor([[1.0, 2.0], [2.0, 1.0]])
    with pytest.raises(CalibrationError, match="inverse Hessian of unit 1 is not positive definite"):
        eliminate([Problem(torch.eye(4, dtype=torch.float64), inverse, 2)], [1])


# ---- SlimGPT's constants
@pytest.mark.parametrize(
    ("total", "first", "steps"),
    [
        (2752, [1024, 304, 64], 25),
        (5504, [1024, 992, 240, 64], 54),
        (7224, [1024, 1024, 455, 64], 77),
        (688, [88, 64], 11),
    ],
)
def test_dynamic_group_size_is_the_released_one_for_llama_7b(total: int, first: list[int], steps: int) -> None:
    schedule = group_schedule(total)
    assert schedule[: len(first)] == first
    assert len(schedule) == steps
    assert sum(schedule) == total
