"""A client's choice: which units of its sub-model to send, seen on a few of its own examples."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedlp.errors import CalibrationError
from fedlp.federation.client.scoring_costs import elimination_macs
from fedlp.models.cost import Macs
from fedlp.models.spec import forward_logits
from fedlp.pruning.kernels.hessian import Moments, invert_hessian
from fedlp.pruning.kernels.inverses import LowRankInverse
from fedlp.pruning.kernels.obs import Problem, eliminate
from fedlp.pruning.kernels.slimgpt import group_schedule
from fedlp.pruning.pruner import Calibration
from fedlp.pruning.reader_layers import Method, square_root
from fedlp.pruning.scores import criteria
from fedlp.pruning.tracing.decoder import is_language_model
from fedlp.pruning.tracing.units import input_columns, weight_matrix
from fedlp.pruning.tracing.widths import WidthSpec
from fedlp.types import Keep, PrunableLayer

DAMPING = 0.01  # of Hessians where the config leaves it open: a client has few examples
_BLOCK = 256  # columns per block of the elimination
_ROWS = 1  # input vectors per column: positions of an image resemble each other, and a few of them do
_MOST_ROWS = 512  # per layer, and client: with few, what is inverted is small
_PARTS = 32  # of the units that are left go in one step


def score_units(
    model: nn.Module,
    scored: nn.Module,
    spec: WidthSpec,
    layers: Sequence[PrunableLayer],
    data: Calibration,
    method: Method,
    macs: Macs,
) -> tuple[dict[str, Tensor], float]:
    """Return what losing each unit costs, and what it took to find out.

    Scores by axis are (units,), float64, >= 0: ranks and, for OBS, losses. The price is in multiply-accumulates: passes
    over the examples, and for OBS the inversion and elimination of every reader's Hessian, to a few per cent.

    Parameters
    ----------
    model : nn.Module
        The client's model, which the examples run through; not changed.
    scored : nn.Module
        Of the same architecture, with the weights that are to be kept: the model itself or the change of its weights.
    spec, layers
        The width axes and prunable layers of ``model``.
    method : Method
        Its ``score`` says how. With "obs" and "slimgpt" a unit's score is the rise of the loss as it goes, in exact
        greedy order (a 32nd of the units that are left at a time), and never falls along that order.
    macs : Macs
        Of the model, per example.

    Raises
    ------
    CalibrationError
        If the examples give inputs that are not finite.
    """
    model.eval()
    rng = torch.Generator().manual_seed(data.seed)
    examples = sum(len(batch) for batch in data.batches)
    match method.score:
        case "magnitude":
            return {layer.name: criteria.magnitude_scores(scored, spec, layer).cpu() for layer in layers}, 0.0
        case "random":
            return {
                layer.name: torch.rand(layer.num_units, generator=rng, dtype=torch.float64) for layer in layers
            }, 0.0
        case "taylor":
            gradients = criteria.loss_gradients(model, data.batches, data.labels)
            found = {layer.name: criteria.taylor_scores(scored, spec, layer, gradients).cpu() for layer in layers}
            return found, examples * macs.training
    price = examples * (macs.forward + method.fisher * macs.training)
    seen = _observe(model, layers, data.batches, rng)
    fisher: Mapping[str, Tensor] = {}
    if method.fisher:
        paths = [path for layer in layers for path in layer.readers]
        fisher = criteria.output_fisher(model, paths, data.batches, rng, not is_language_model(model))
    weights = {path: weight_matrix(scored.get_submodule(path)).to(torch.float64) for path in seen}
    found = {}
    for layer in layers:
        if method.score in ("wanda", "flap"):
            found[layer.name] = _moment_scores(layer, weights, seen, method.score).cpu()
        else:
            found[layer.name], spent = _losses(layer, weights, seen, method, fisher)
            price += spent
    return found, price


def _moment_scores(
    layer: PrunableLayer, weights: Mapping[str, Tensor], seen: Mapping[str, Tensor], name: Literal["wanda", "flap"]
) -> Tensor:
    """Return the scores of a criterion that looks at inputs one by one."""
    score = criteria.wanda_scores if name == "wanda" else criteria.flap_scores
    parts = []
    for path in layer.readers:
        moments = Moments.empty(seen[path].shape[1], device=seen[path].device)
        moments.add(seen[path])
        parts.append(score(weights[path], moments, len(moments.total) // layer.num_units))
    return torch.stack(parts).sum(dim=0)


def _losses(
    layer: PrunableLayer,
    weights: Mapping[str, Tensor],
    seen: Mapping[str, Tensor],
    method: Method,
    fisher: Mapping[str, Tensor],
) -> tuple[Tensor, float]:
    """Return by how much the loss rises as each unit goes, and what the elimination cost."""
    total = layer.num_units - 1
    if not total:
        return torch.ones(1, dtype=torch.float64), 0.0
    columns = method.score == "slimgpt"
    schedule = _schedule(total) if not columns else [1] * total if layer.unit_size > 1 else group_schedule(total)
    problems, price = [], 0.0
    for path in layer.readers:
        weight = weights[path] if path not in fisher else square_root(fisher[path]) @ weights[path]
        count, size = seen[path].shape
        unit_size = size // layer.num_units
        problems.append(Problem(weight, _invert(seen[path], method, path), unit_size))
        price += elimination_macs(count, size, len(weight), unit_size, schedule, _BLOCK)
    found = eliminate(problems, schedule, score="columns" if columns else "exact", block=_BLOCK)
    rises = np.maximum.accumulate(np.diff(found.losses, prepend=0.0).clip(min=0.0) / found.steps)
    last = sorted(set(range(layer.num_units)) - set(found.order))
    scores = torch.empty(layer.num_units, dtype=torch.float64)
    scores[[*found.order, *last]] = torch.from_numpy(np.repeat([*rises, rises[-1]], [*found.steps, len(last)]))
    return scores, price


def _schedule(total: int) -> list[int]:
    """Return how many units go together: a 32nd of what is left, as nobody sees a curve more finely."""
    steps = []
    while total:
        steps.append(max(1, total // _PARTS))
        total -= steps[-1]
    return steps


def _invert(rows: Tensor, method: Method, path: str) -> Tensor | LowRankInverse:
    """Return the inverse of the damped Hessian of some inputs, (n, n), float32: its damping conditions it well."""
    x = rows.to(torch.float64)
    if method.centred:
        x = x - x.mean(dim=0)
    x = x * math.sqrt(2.0 / len(x))
    count, size = x.shape
    damping = DAMPING if method.damping is None else method.damping
    ridge = damping * float(x.square().sum()) / size
    if count >= size or not ridge:
        return invert_hessian(x.T @ x, damping, path, count).to(torch.float32)
    return LowRankInverse.of(x.T, ridge, torch.float32)


def _observe(
    model: nn.Module, layers: Sequence[PrunableLayer], batches: Sequence[Tensor], rng: torch.Generator
) -> dict[str, Tensor]:
    """Return a sample of what every reader reads, (vectors, columns), from one pass over the examples."""
    found: dict[str, list[Tensor]] = {path: [] for layer in layers for path in layer.readers}
    with ExitStack() as stack, torch.no_grad():
        for path, parts in found.items():

            def note(module: nn.Module, inputs: Any, parts: list[Tensor] = parts) -> None:
                wanted = -(-min(_ROWS * weight_matrix(module).shape[1], _MOST_ROWS) // len(batches))
                parts.append(_sample_columns(module, inputs[0].detach(), wanted, rng))

            stack.callback(model.get_submodule(path).register_forward_pre_hook(note).remove)
        for batch in batches:
            forward_logits(model, batch)
    for path, parts in found.items():
        if not all(bool(torch.isfinite(rows).all()) for rows in parts):
            raise CalibrationError(f"inputs of {path} are not finite on the client's examples; check its data")
    return {path: torch.cat(parts) for path, parts in found.items()}


def _sample_columns(module: nn.Module, inputs: Tensor, count: int, rng: torch.Generator) -> Tensor:
    """Return ``count`` random rows of :func:`input_columns`, or all where they are fewer."""
    if not isinstance(module, nn.Conv2d) or module.dilation != (1, 1) or isinstance(module.padding, str):
        rows = input_columns(module, inputs)
        if len(rows) <= count:
            return rows.clone()
        return rows[torch.randperm(len(rows), generator=rng)[:count].to(rows.device)]
    (down, right), (height, width), (top, left) = module.stride, module.kernel_size, module.padding
    padded = F.pad(inputs, (left, left, top, top))
    patches = padded.unfold(2, height, down).unfold(3, width, right)  # a view: only what is drawn is copied
    images, _, rows_of, columns_of = patches.shape[:4]
    places = torch.randperm(images * rows_of * columns_of, generator=rng)[:count].to(inputs.device)
    image, place = places // (rows_of * columns_of), places % (rows_of * columns_of)
    return patches[image, :, place // columns_of, place % columns_of].flatten(1)


def best_units(scores: Tensor, count: int) -> Keep:
    """Return the ``count`` units of the highest scores; of equal ones the first."""
    ranked = torch.sort(scores, descending=True, stable=True).indices[:count]
    return Keep.from_indices(np.sort(ranked.numpy()), len(scores))
