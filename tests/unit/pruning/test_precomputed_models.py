"""A precomputed model is the pruned one, where errors of other layers play no part."""

from __future__ import annotations

import pytest

from fedlp.pruning.precomputed_models import PrecomputedModel
from fedlp.pruning.pruner import Method, mean_divergence, predictions
from fedlp.pruning.scores.obs import OBS
from tests.unit.pruning.test_pruner import classifier, images, language_model, make_pruner, tokens

METHODS = {"plain": Method(OBS()), "weighed": Method(OBS(), fisher=True, keeps_batch_norm=True)}


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["language", "images"])
def test_one_layer_alone_diverges_as_when_it_is_pruned(kind: str, method: str) -> None:
    model, batches = (language_model(), tokens(3)) if kind == "language" else (classifier(), images(12))
    chosen = METHODS["weighed"] if kind == "images" else METHODS[method]
    held_out = tokens(2, seed=9) if kind == "language" else images(2)
    precomputed = PrecomputedModel(make_pruner(model, chosen, batches), held_out)
    units = {layer.name: layer.num_units for layer in precomputed.layers}
    dense = predictions(model, held_out)
    for layer in (precomputed.layers[1], precomputed.layers[-1]):
        kept = {**units, layer.name: layer.num_units // 2}
        pruned = make_pruner(model, chosen, batches).prune(kept).model
        expected = mean_divergence(dense, predictions(pruned, held_out))
        assert precomputed.divergence(kept) == pytest.approx(expected, rel=1e-3, abs=1e-6)
    assert precomputed.divergence(units) == pytest.approx(0.0, abs=1e-6)


def test_divergences_do_not_depend_on_what_was_tried_before() -> None:
    precomputed = PrecomputedModel(make_pruner(language_model(), METHODS["plain"]), tokens(2))
    units = {layer.name: layer.num_units for layer in precomputed.layers}
    half = {name: count // 2 for name, count in units.items()}
    first = precomputed.divergence(half)
    precomputed.divergence({**units, precomputed.layers[0].name: 1})
    assert precomputed.divergence(half) == first
    assert precomputed.divergence(half, 1) != first
    assert precomputed.on(tokens(1, seed=4)).divergence(half) != first


def test_curves_rise_from_one_unit_to_all_but_one() -> None:
    precomputed = PrecomputedModel(make_pruner(language_model(), METHODS["plain"]), tokens(2))
    for name, curve in precomputed.divergence_curves().items():
        count = next(layer.num_units for layer in precomputed.layers if layer.name == name)
        assert len(curve) == count - 1
        assert curve == sorted(curve)
        assert curve[-1] > 0
