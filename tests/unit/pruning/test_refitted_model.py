"""A refitted model is the precomputed one without its moments; one factor refits at every width."""

from __future__ import annotations

import pytest
import torch

from fedlp.errors import CalibrationError
from fedlp.pruning.kernels.obs import resolve_weight
from fedlp.pruning.kernels.removal_factor import refit_ordered, removal_factor, unpack_factor
from fedlp.pruning.precomputed_models import PrecomputedModel, width_level, width_of_level
from fedlp.pruning.pruner import Method, predictions
from fedlp.pruning.refitted_model import MOST_DIVERGENCE, RefittedModel, refit_signature
from fedlp.pruning.scores.obs import OBS
from fedlp.types import PrunableLayer
from tests.unit.pruning.test_pruner import classifier, images, language_model, make_pruner, tokens

METHOD = Method(OBS(), fisher=True, keeps_batch_norm=True)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
def test_one_factor_refits_at_every_width(dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(60, 9, dtype=torch.float64) @ torch.randn(9, 9).double(), torch.randn(4, 9).double()
    inverse, order = torch.linalg.inv(x.T @ x + 0.1 * torch.eye(9)), torch.randperm(9)
    packed = removal_factor(inverse, order).to(dtype)
    assert len(packed) == 9 * 8 // 2
    factor = unpack_factor(packed, 9)
    for removed in range(10):
        kept = order[removed:]
        expected = resolve_weight(weight, inverse, kept, order[:removed])
        torch.testing.assert_close(
            refit_ordered(weight[:, order], factor, removed), expected, rtol=tolerance, atol=tolerance
        )


def test_a_factor_holds_no_scale_of_the_inputs() -> None:
    torch.manual_seed(0)
    x = torch.randn(30, 5, dtype=torch.float64)
    one, other = (removal_factor(torch.linalg.inv(scale * x.T @ x), torch.arange(5)) for scale in (1.0, 1e6))
    torch.testing.assert_close(one, other)
    with pytest.raises(CalibrationError, match="not positive definite"):
        removal_factor(-torch.eye(3).double(), torch.arange(3))


@pytest.mark.parametrize("kind", ["language", pytest.param("images", marks=pytest.mark.slow)])
def test_it_diverges_as_the_model_whose_refits_it_has(kind: str) -> None:
    model, batches = (language_model(), tokens(2)) if kind == "language" else (classifier(), images(6))
    judged = tokens(2, seed=9) if kind == "language" else images(2)
    pruner = make_pruner(model, METHOD, batches)
    precomputed = PrecomputedModel(pruner, judged)
    refits = precomputed.refits(torch.float64)
    signature = refit_signature(model, pruner.layers, torch.float64)
    assert [(name, tuple(t.shape), t.dtype) for name, t in refits.items()] == signature
    refitted = RefittedModel(model, pruner.layers, pruner.norms, METHOD, refits)
    rng = torch.Generator().manual_seed(0)
    plans = [
        {x.name: width_of_level(x, int(torch.randint(1, x.num_units + 1, (1,), generator=rng))) for x in pruner.layers}
        for _ in range(4)
    ]
    plans.append({layer.name: layer.num_units for layer in pruner.layers})
    found = refitted.divergences(judged, plans)
    labels = sum(len(dense) for dense in predictions(model, judged))
    for plan, value in zip(plans, found.tolist(), strict=True):
        assert value / labels == pytest.approx(precomputed.divergence(plan), rel=1e-4, abs=2e-6)
    assert torch.equal(refitted.divergences(judged, plans[::-1]), found.flip(0))


def test_a_ruined_model_counts_as_the_worst() -> None:
    pruner = make_pruner(language_model(), METHOD, tokens(1))
    refits = PrecomputedModel(pruner, tokens(1)).refits(torch.float32)
    path = pruner.layers[-1].readers[0]
    refits[f"{path}.mean"] = torch.full_like(refits[f"{path}.mean"], 3e38)
    refitted = RefittedModel(language_model(), pruner.layers, {}, METHOD, refits)
    plan = {layer.name: 1 for layer in pruner.layers}
    assert refitted.divergences(tokens(1), [plan]).tolist() == [MOST_DIVERGENCE * 8 * 12]


@pytest.mark.parametrize(("fault", "words"), [("order", "no permutation of 2 units"), ("factor", "is not finite")])
def test_refits_of_no_model_are_refused(fault: str, words: str) -> None:
    pruner = make_pruner(language_model(), METHOD, tokens(1))
    refits = PrecomputedModel(pruner, tokens(1)).refits(torch.float32)
    name = next(name for name in refits if name.endswith(fault))
    refits[name] = torch.full_like(refits[name], 0 if fault == "order" else float("nan"))
    with pytest.raises(ValueError, match=words):
        RefittedModel(language_model(), pruner.layers, {}, METHOD, refits)


@pytest.mark.parametrize("num_units", [1, 2, 31, 33, 63, 64, 1000, 4097])
def test_a_level_is_a_byte_and_gives_the_rounded_width(num_units: int) -> None:
    layer = PrunableLayer("a", num_units, 1, num_units, (), (), 0.0)
    step = max(1, num_units // 32)
    for kept in {*range(1, min(num_units, 70)), num_units}:
        level = width_level(layer, kept)
        assert 0 <= level <= 64
        assert width_of_level(layer, level) == min(max(1, round(kept / step) * step), num_units)
