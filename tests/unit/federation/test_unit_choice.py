"""Units scored on a few examples: the scores of the pruner, where both see the same."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fedlp.errors import CalibrationError
from fedlp.federation.client.unit_choice import best_units, score_units
from fedlp.models.cost import Macs
from fedlp.pruning.costs.elimination import elimination_macs
from fedlp.pruning.kernels.hessian import Moments, invert_hessian, square_root
from fedlp.pruning.kernels.inverses import LowRankInverse
from fedlp.pruning.kernels.obs import Problem, eliminate
from fedlp.pruning.kernels.sampled_rows import SampledRows, row_weight
from fedlp.pruning.kernels.shrinkage import hessian_weight, shrink_hessian
from fedlp.pruning.pruner import Calibration, Pruner
from fedlp.pruning.reader_layers import Method
from fedlp.pruning.sampled_inputs import SAMPLE, SampleSize, sample_columns
from fedlp.pruning.scores.evidence import COARSE, EXACT, Precision
from fedlp.pruning.tracing.units import find_layers, input_columns
from fedlp.pruning.tracing.widths import trace_widths
from fedlp.registry import lookup

DAMPING = 0.01


def small_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(6, 5, 3, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(45, 4),
    ).eval()


@pytest.fixture(scope="module")
def data() -> Calibration:
    inputs = torch.randn(24, 2, 8, 8, generator=torch.Generator().manual_seed(1))
    return Calibration(list(inputs.split(12)), [torch.zeros(12, dtype=torch.int64)] * 2)


def scores(
    data: Calibration, score: str, precision: Precision = COARSE, size: SampleSize = SAMPLE, **how: object
) -> dict[str, torch.Tensor]:
    model = small_net()
    spec = trace_widths(model, data.batches[0][:1])
    method = Method(lookup("score", score)(), damping=DAMPING, **how)  # type: ignore[arg-type]
    return score_units(model, model, spec, find_layers(model, spec), data, method, Macs(1.0, 3.0), precision, size)[0]


@pytest.mark.parametrize("score", ["obs", "slimgpt"])
@pytest.mark.parametrize("centred", [True, False])
def test_all_positions_give_the_pruners_order(score: str, centred: bool, data: Calibration) -> None:
    found = scores(data, score, EXACT, SampleSize(per_column=1000), centred=centred)
    model = small_net()
    spec = trace_widths(model, data.batches[0][:1])
    method = Method(lookup("score", score)(), centred=centred, damping=DAMPING)
    pruner = Pruner(model, spec, find_layers(model, spec), data, method)
    collector = pruner.collector(None)
    for layer in pruner.layers:
        whole = pruner.removal_order(layer, collector.collect(layer), layer.num_units - 1)
        ranked = found[layer.name][list(whole.order)]
        assert bool((ranked.diff() >= 0).all()), "what goes first costs least"
        rises = np.maximum.accumulate(np.diff(whole.losses, prepend=0.0) / whole.steps)
        np.testing.assert_allclose(ranked.numpy(), np.repeat(rises, whole.steps), rtol=1e-3)


@pytest.mark.parametrize("centred", [True, False])
def test_few_inputs_give_the_same_inverse_as_their_hessian(centred: bool) -> None:
    rows = torch.randn(5, 12, generator=torch.Generator().manual_seed(0))
    moments = Moments.empty(12)
    moments.add(rows)
    expected = invert_hessian(moments.hessian(centred), DAMPING, "x", 5).to(torch.float32)
    found = SampledRows(rows).inverse_hessian(centred, DAMPING, "x")
    assert isinstance(found, LowRankInverse)
    torch.testing.assert_close(found.dense(), expected, rtol=1e-4, atol=1e-4)


def test_sampled_rows_are_rows_of_the_inputs() -> None:
    inputs = torch.randn(3, 2, 7, 6, generator=torch.Generator().manual_seed(0))
    for conv in (nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(2, 4, (3, 2), stride=(2, 1)), nn.Conv2d(2, 4, 3, dilation=2)):
        drawn = sample_columns(conv, inputs, 9, torch.Generator())
        rows = input_columns(conv, inputs)
        assert drawn.shape == (9, rows.shape[1])
        assert all(bool((rows == row).all(dim=1).any()) for row in drawn)


@pytest.mark.parametrize("score", ["obs", "slimgpt", "wanda", "flap", "taylor", "magnitude", "random"])
def test_every_criterion_scores_every_unit_and_repeats_itself(score: str, data: Calibration) -> None:
    one, other = scores(data, score=score), scores(data, score=score)
    for name, found in one.items():
        assert found.shape == ({"0": 6, "2": 5}[name],)
        assert bool((found >= 0).all())
        assert torch.equal(found, other[name])


def test_the_best_units_are_sorted_and_ties_go_to_the_first() -> None:
    assert best_units(torch.tensor([0.1, 0.9, 0.5, 0.9, 0.9]), 2).indices().tolist() == [1, 3]
    assert best_units(torch.tensor([0.1, 0.9, 0.5, 0.9, 0.9]), 4).indices().tolist() == [1, 2, 3, 4]


def test_inputs_that_are_not_finite_are_named() -> None:
    batch = torch.full((12, 2, 8, 8), float("nan"))
    with pytest.raises(CalibrationError, match="inputs of 2 are not finite"):
        scores(Calibration([batch], [torch.zeros(12, dtype=torch.int64)]), score="obs")


def test_prices_are_those_of_passes_and_eliminations(data: Calibration) -> None:
    model = small_net()
    spec = trace_widths(model, data.batches[0][:1])
    layers, macs = find_layers(model, spec), Macs(10.0, 30.0)

    def price(score: str, **how: object) -> float:
        method = Method(lookup("score", score)(), damping=DAMPING, **how)  # type: ignore[arg-type]
        return score_units(model, model, spec, layers, data, method, macs)[1]

    assert price("random") == price("magnitude") == 0.0
    assert (price("wanda"), price("taylor")) == (240.0, 720.0)
    assert price("obs", fisher=True) == price("obs") + 240.0 > 480.0
    assert price("wanda", fisher=True) == 240.0, "it does not read Fisher information"


class Counter(TorchDispatchMode):
    """Counts the multiply-accumulates of matrix products and factorisations as they run."""

    def __init__(self) -> None:
        super().__init__()
        self.macs = 0.0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        shapes = [arg.shape for arg in args if isinstance(arg, torch.Tensor)]
        match function.__name__.split(".")[0]:
            case "mm" | "bmm":
                self.macs += shapes[0].numel() * shapes[1][-1]
            case "addmm" | "addmm_":
                self.macs += shapes[1].numel() * shapes[2][-1]
            case "linalg_cholesky_ex":
                self.macs += shapes[0].numel() * shapes[0][-1] / 6
            case "cholesky_inverse":
                self.macs += shapes[0].numel() * shapes[0][-1] / 3
            case "cholesky_solve":
                self.macs += shapes[0].numel() * shapes[1][-1]
            case "linalg_solve_triangular":
                self.macs += shapes[1].numel() * shapes[0][-1] / 2
        return result


@pytest.mark.parametrize(
    ("inputs", "columns", "outputs", "unit_size"),
    [(288, 288, 64, 9), (300, 1152, 128, 9), (32, 768, 64, 16), (600, 512, 64, 1), (100, 512, 64, 1), (80, 96, 10, 1)],
)
def test_counted_macs_are_those_that_run(inputs: int, columns: int, outputs: int, unit_size: int) -> None:
    rng = torch.Generator().manual_seed(0)
    rows, weight = torch.randn(inputs, columns, generator=rng), torch.randn(outputs, columns, generator=rng)
    steps, block = COARSE.schedule(columns // unit_size - 1), COARSE.block
    with Counter() as counter:
        inverse = SampledRows(rows).inverse_hessian(True, None, "x")
        eliminate([Problem(weight, inverse, unit_size)], steps, block=block)
    assert elimination_macs(inputs, columns, outputs, unit_size, steps, block) == pytest.approx(counter.macs, rel=0.05)


def test_steps_take_a_part_of_what_is_left_or_a_part_of_all() -> None:
    assert COARSE.schedule(3) == [1, 1, 1]
    steps = COARSE.schedule(511)
    assert (sum(steps), steps[:2], steps[-2:], len(steps)) == (511, [31, 30], [16, 15], 27)
    assert max(len(COARSE.schedule(total)) for total in range(1, 200)) <= 32
    assert Precision(parts=32).schedule(65) == [2, 1] + [1] * 62
    assert EXACT.schedule(4) == [1] * 4


def test_the_fisher_informations_small_eigenvalues_are_left_out() -> None:
    root = torch.randn(6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    matrix = root @ torch.diag(torch.tensor([4.0, 2.0, 1.0, 0.01, 0.01, 0.0], dtype=torch.float64)) @ root.T
    whole, part = square_root(matrix), square_root(matrix, 0.01)
    torch.testing.assert_close(whole.T @ whole, matrix)
    assert len(part) < len(whole)
    assert 0.0 < float((matrix - part.T @ part).trace()) <= 0.01 * float(matrix.trace())
    assert square_root(torch.zeros(3, 3), 0.5).shape == (1, 3)


def test_a_sample_is_of_few_vectors_where_the_hessian_would_be_large() -> None:
    size = SampleSize(per_column=4, most_columns=10, few=7)
    assert [size.num_rows(columns) for columns in (3, 10, 11)] == [12, 40, 7]


def test_single_precision_is_within_a_hundredth() -> None:
    """At the default damping; with a smaller one the Hessian is inverted in float64."""
    rows = torch.randn(80, 24, generator=torch.Generator().manual_seed(0)) @ torch.diag(torch.logspace(0, -4, 24)) + 3.0
    moments = Moments.empty(24)
    moments.add(rows)
    for damping, tolerance in ((DAMPING, 1e-2), (1e-6, 1e-5)):
        expected = invert_hessian(moments.hessian(True), damping, "x", 80)
        found = SampledRows(rows).inverse_hessian(True, damping, "x")
        assert isinstance(found, torch.Tensor)
        torch.testing.assert_close(
            found.to(torch.float64), expected, rtol=tolerance, atol=tolerance * float(expected.max())
        )


def test_the_exact_order_is_that_of_the_kernel() -> None:
    """The block in which updates are applied lazily changes no order."""
    torch.manual_seed(0)
    rows, weight = torch.randn(80, 24), torch.randn(5, 24)
    inverse = SampledRows(rows).inverse_hessian(True, DAMPING, "x")
    problem = Problem(weight, inverse, 3)
    orders = {eliminate([problem], [1] * 7, block=block).order for block in (1, 128)}
    assert len(orders) == 1


@pytest.mark.parametrize("count", [6, 7])
def test_a_small_sample_is_shrunk_by_the_agreement_of_its_halves(count: int) -> None:
    rng = torch.Generator().manual_seed(0)
    rows = torch.randn(count, 2, generator=rng) @ torch.randn(2, 12, generator=rng) + torch.randn(
        count, 12, generator=rng
    )
    x = rows.to(torch.float64) - rows.to(torch.float64).mean(dim=0)
    halves, whole = [2.0 / len(part) * part.T @ part for part in (x[0::2], x[1::2])], 2.0 / count * x.T @ x
    weight = hessian_weight(halves[0], halves[1], whole)
    assert 0.1 < weight < 0.9
    assert row_weight(x / x.square().sum(dim=0).sqrt()) == pytest.approx(weight)
    expected = torch.linalg.inv(shrink_hessian(whole, weight))
    found = SampledRows(rows).inverse_hessian(True, None, "x")
    assert isinstance(found, LowRankInverse)
    torch.testing.assert_close(found.dense().to(torch.float64), expected, rtol=1e-4, atol=1e-4)
    weights = torch.randn(5, 12, generator=rng, dtype=torch.float64)
    one, other = (eliminate([Problem(weights, inverse, 3)], [1, 1, 1]) for inverse in (found, expected))
    assert one.order == other.order
    assert one.losses == pytest.approx(other.losses, rel=1e-4)


def test_constant_inputs_are_free() -> None:
    rows = torch.randn(4, 12, generator=torch.Generator().manual_seed(0))
    rows[:, :3] = 2.0
    for few in (rows, rows * 0.0):
        inverse = SampledRows(few).inverse_hessian(True, None, "x")
        found = eliminate([Problem(torch.ones(2, 12), inverse, 3)], [1, 1, 1])
        assert found.order[0] == 0
        assert found.losses[0] == pytest.approx(0.0, abs=1e-6)
