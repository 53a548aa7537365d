"""Unit selection by a client: saliency of each unit of its sub-model on a few of its own examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from fedlp.models.cost import Macs
from fedlp.pruning.calibration import Calibration
from fedlp.pruning.gradients import loss_gradients, output_fisher
from fedlp.pruning.kernels.inverses import InverseHessian
from fedlp.pruning.kernels.sampled_rows import SampledRows
from fedlp.pruning.reader_layers import Method
from fedlp.pruning.sampled_inputs import check_sample, sample_inputs, sampled_inputs
from fedlp.pruning.scores.criterion import saliencies, scoring_macs
from fedlp.pruning.scores.evidence import FINE, Evidence, Precision
from fedlp.pruning.scores.view import LayerView, ReaderView
from fedlp.pruning.tracing.decoder import is_language_model
from fedlp.pruning.tracing.units import weight_matrix
from fedlp.pruning.tracing.widths import WidthSpec
from fedlp.types import Keep, PrunableLayer


def score_units(
    model: nn.Module,
    scored: nn.Module,
    spec: WidthSpec,
    layers: Sequence[PrunableLayer],
    data: Calibration,
    method: Method,
    macs: Macs,
    precision: Precision = FINE,
) -> tuple[dict[str, Tensor], float]:
    """Return the saliency of each unit, and its compute cost in MACs.

    Saliencies by axis are (units,), float64, >= 0. The cost is in multiply-accumulates: passes over the examples and,
    for OBS, the inversion and elimination of every reader's Hessian, to a few per cent.

    Parameters
    ----------
    model : nn.Module
        The client's model, which the examples run through; not changed.
    scored : nn.Module
        Model of the same architecture with the scored weights: the model itself or the change of its weights.
    spec, layers
        The width axes and prunable layers of ``model``.
    method : Method
        Method with the computed ``score``.
    macs : Macs
        Of the model, per example.
    precision : Precision
        Of eliminations and samples.

    Raises
    ------
    CalibrationError
        If inputs are not finite, or the score gives invalid saliencies.
    """
    model.eval()
    score, rng, price = method.score, torch.Generator().manual_seed(data.seed), 0.0
    gradients = None
    if "gradients" in score.needs:
        gradients = loss_gradients(model, data.batches, data.labels, data.loss)
        price += data.num_examples * macs.training
    rows: dict[str, SampledRows] = {}
    fisher: Mapping[str, Tensor] = {}
    logits_only = not is_language_model(model)
    if method.scores_inputs and method.fisher and logits_only and precision.is_quick:  # in one pass
        with sampled_inputs(model, layers, len(data.batches), rng, precision.vectors) as found_rows:
            paths = [path for layer in layers for path in layer.readers]
            fisher = output_fisher(model, paths, data.batches, rng, True, data.shift_invariant)
        rows = check_sample(found_rows)
        price += data.num_examples * macs.training
    elif method.scores_inputs:
        rows = sample_inputs(model, layers, data.batches, rng, precision.vectors)
        price += data.num_examples * macs.forward
        if method.fisher:
            fisher = output_fisher(model, list(rows), data.batches, rng, logits_only, data.shift_invariant)
            price += data.num_examples * macs.training
    evidence = Evidence(model, spec, data, rng, gradients, scored, precision)
    found = {}
    for layer in layers:
        sampled = [rows.pop(path, None) for path in layer.readers]  # not kept: their moments may be large
        readers = [
            _view_reader(scored, path, layer, method, inputs, fisher.get(path))
            for path, inputs in zip(layer.readers, sampled, strict=True)
        ]
        view = LayerView(layer, evidence, score.needs, tuple(readers))
        found[layer.name] = saliencies(score, view)
        price += scoring_macs(score, view)
    return found, price


def _view_reader(
    scored: nn.Module, path: str, layer: PrunableLayer, method: Method, rows: SampledRows | None, fisher: Tensor | None
) -> ReaderView:
    """Return a score's view of one reader: the scored weights, and a sample of its inputs."""
    weight = weight_matrix(scored.get_submodule(path)).to(torch.float64)
    solve = partial(_solve, weight, rows, method, path)
    return ReaderView(path, weight, weight.shape[1] // layer.num_units, rows, solve, fisher, method.score.needs)


def _solve(
    weight: Tensor, rows: SampledRows | None, method: Method, path: str
) -> tuple[Tensor, Tensor | InverseHessian]:
    """Return the weights that the elimination starts from, and the inverse Hessian."""
    assert rows is not None
    return weight, rows.inverse_hessian(method.centred, method.damping, path)


def best_units(scores: Tensor, count: int) -> Keep:
    """Return the ``count`` units of the highest scores; of equal ones the first."""
    ranked = torch.sort(scores, descending=True, stable=True).indices[:count]
    return Keep.from_indices(np.sort(ranked.numpy()), len(scores))
