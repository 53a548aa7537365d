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
from fedlp.pruning import sampled_inputs
from fedlp.pruning.costs.elimination import elimination_macs, quick_elimination_macs
from fedlp.pruning.kernels.hessian import Moments, invert_hessian
from fedlp.pruning.kernels.inverses import LowRankInverse
from fedlp.pruning.kernels.obs import Problem, eliminate
from fedlp.pruning.kernels.sampled_rows import SampledRows
from fedlp.pruning.pruner import Calibration, Pruner
from fedlp.pruning.reader_layers import Method
from fedlp.pruning.sampled_inputs import sample_columns
from fedlp.pruning.scores.evidence import COARSE, FINE
from fedlp.pruning.scores.obs import OBS
from fedlp.pruning.scores.view import ReaderView
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


def scores(data: Calibration, score: str, **how: object) -> dict[str, torch.Tensor]:
    model = small_net()
    spec = trace_widths(model, data.batches[0][:1])
    method = Method(lookup("score", score)(), damping=DAMPING, **how)  # type: ignore[arg-type]
    return score_units(model, model, spec, find_layers(model, spec), data, method, Macs(1.0, 3.0))[0]


@pytest.mark.parametrize("score", ["obs", "slimgpt"])
@pytest.mark.parametrize("centred", [True, False])
def test_all_positions_give_the_pruners_order(
    score: str, centred: bool, data: Calibration, monkeypatch: pytest.MonkeyPatch
) -> None:
    def everything(module: nn.Module, inputs: torch.Tensor, *_: object) -> torch.Tensor:
        return input_columns(module, inputs)

    monkeypatch.setattr(sampled_inputs, "sample_columns", everything)
    found = scores(data, score=score, centred=centred)
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
    torch.testing.assert_close(found.rows(torch.arange(12)), expected, rtol=1e-4, atol=1e-4)


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
    assert price("obs", fisher=True) == price("obs") + 720.0 > 960.0


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
    [
        *((288, 288, 64, 9), (256, 1152, 64, 9), (64, 2304, 32, 9), (32, 768, 64, 16)),
        *((600, 512, 64, 1), (100, 512, 64, 1), (80, 96, 10, 1)),
    ],
)
def test_counted_macs_are_those_that_run(inputs: int, columns: int, outputs: int, unit_size: int) -> None:
    rng = torch.Generator().manual_seed(0)
    rows, weight = torch.randn(inputs, columns, generator=rng), torch.randn(outputs, columns, generator=rng)
    for count, precision in ((elimination_macs, FINE), (quick_elimination_macs, COARSE)):
        steps, block, quick = precision.schedule(columns // unit_size - 1), precision.block, precision.is_quick
        with Counter() as counter:
            inverse = SampledRows(rows).inverse_hessian(True, DAMPING, "x")
            eliminate([Problem(weight, inverse, unit_size)], steps, block=block, large_steps=quick)
        assert count(inputs, columns, outputs, unit_size, steps, block) == pytest.approx(counter.macs, rel=0.05)


def test_coarse_scores_are_about_the_fine_ones_in_less_computation() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 96, 3, padding=1), nn.ReLU(), nn.Conv2d(96, 80, 3), nn.Flatten(), nn.Linear(80, 3)
    )
    batch = torch.randn(16, 2, 3, 3)
    data = Calibration([batch], [torch.arange(16) % 3])
    spec = trace_widths(model, batch[:1])
    layers, macs, method = find_layers(model, spec), Macs(1.0, 3.0), Method(lookup("score", "obs")(), fisher=True)
    found = [score_units(model, model, spec, layers, data, method, macs, each) for each in (FINE, COARSE)]
    assert found[1][1] < 0.75 * found[0][1]
    for name, fine in found[0][0].items():
        half = len(fine) // 2
        best = [set(torch.topk(scores[name], half).indices.tolist()) for scores, _ in found]
        assert len(best[0] & best[1]) > 0.7 * half


@pytest.mark.parametrize("definite", [True, False])
def test_projected_outputs_stand_for_all(definite: bool) -> None:
    rng = torch.Generator().manual_seed(0)
    weight = torch.randn(40, 6, generator=rng, dtype=torch.float64)
    root = torch.randn(40 if definite else 3, 40, generator=rng, dtype=torch.float64)
    fisher, inverse = root.T @ root, torch.eye(6, dtype=torch.float64)
    view = ReaderView("x", weight, 2, SampledRows(torch.ones(2, 6)), lambda: (weight, inverse), fisher, OBS.needs)
    draws = [view.problem(8, rng).weight for _ in range(2000)]
    assert all(len(draw) == 8 for draw in draws)
    expected = weight.T @ fisher @ weight
    mean = torch.stack([draw.T @ draw for draw in draws]).mean(dim=0)
    assert float((mean - expected).norm() / expected.norm()) < 0.05
    whole = view.problem(40, rng).weight
    torch.testing.assert_close(whole.T @ whole, expected)


def test_steps_take_a_part_of_what_is_left() -> None:
    assert FINE.schedule(3) == COARSE.schedule(3) == [1, 1, 1]
    for precision, first in ((FINE, [15, 15]), (COARSE, [31, 30])):
        steps = precision.schedule(511)
        assert (sum(steps), steps[:2], steps[-31:]) == (511, first, [1] * 31)


def test_the_exact_order_is_that_of_the_kernel() -> None:
    """The block in which updates are applied lazily changes no order."""
    torch.manual_seed(0)
    rows, weight = torch.randn(80, 24), torch.randn(5, 24)
    inverse = SampledRows(rows).inverse_hessian(True, DAMPING, "x")
    problem = Problem(weight, inverse, 3)
    orders = {eliminate([problem], [1] * 7, block=block).order for block in (1, 128)}
    assert len(orders) == 1
