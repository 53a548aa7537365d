r"""Newton steps of readers towards the labels: the first-order term that Optimal Brain Surgeon drops.

OBS takes the model to be at a minimum of its loss on the calibration data. Where it is not, because the data are new to
it or because pruning has moved it, the second-order model of the loss has its minimum elsewhere, a step
:math:`-\mathcal F^{-1} g` away. The curvature is that of K-FAC (Martens and Grosse, ICML 2015; for convolutions Grosse
and Martens, ICML 2016): :math:`F \otimes A`, the Fisher information of a reader's outputs and the second moments of
its inputs, both available from pruning. The step size is chosen on held-out data.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedlp.errors import CalibrationError
from fedlp.models.forward import forward_logits
from fedlp.models.layers import all_trainable
from fedlp.pruning.calibration import Calibration
from fedlp.pruning.gradients import output_fisher
from fedlp.pruning.kernels.hessian import Moments
from fedlp.pruning.tracing.units import input_columns, is_transposed, weight_matrix

HELD_OUT = 1 / 8  # of the batches
_DAMPING = 0.01  # of each factor's mean diagonal entry
_FIRST_SIZE, _SMALLEST_SIZE = 1 / 16, 1 / 1024
_Step = tuple[Tensor, Tensor | None]  # of weight (out, columns) and bias (out,)


def newton_steps(
    model: nn.Module,
    paths: Sequence[str],
    data: Calibration,
    steps: int,
    progress: Callable[[int, float], None] = lambda *_: None,
) -> list[float]:
    """Move readers in place, step by step, as long as the loss on held-out batches falls.

    Parameters
    ----------
    model : nn.Module
        In evaluation mode.
    paths : sequence of str
        The readers' modules: linear layers or convolutions.
    data : Calibration
        At least two batches; the last eighth of them, or one, is held out.
    steps : int
        Largest number of steps.
    progress : callable
        Called with the number of a step and the held-out loss after it.

    Returns
    -------
    list of float
        Mean negative log-likelihood of the held-out labels, in nats: before, and after every step that was taken.

    Raises
    ------
    CalibrationError
        If there is only one batch.
    """
    num_held = max(1, round(HELD_OUT * len(data.batches)))
    if num_held >= len(data.batches):
        raise CalibrationError(
            f"Newton steps hold calibration data out, but there is {len(data.batches)} batch of it; give more "
            "calibration.examples, or lower calibration.batch_size"
        )
    fit = Calibration(data.batches[:-num_held], data.labels[:-num_held], data.seed)
    held = Calibration(data.batches[-num_held:], data.labels[-num_held:])
    rng = torch.Generator().manual_seed(data.seed)
    losses, size = [mean_loss(model, held)], _FIRST_SIZE
    with all_trainable(model):
        for number in range(1, steps + 1):
            directions = _directions(model, paths, fit, rng)

            def loss_after(size: float, directions: Mapping[str, _Step] = directions) -> float:
                before = {path: _values(model.get_submodule(path)) for path in directions}
                _move(model, directions, size)
                loss = mean_loss(model, held)
                for path, values in before.items():
                    _write(model.get_submodule(path), values)
                return loss if math.isfinite(loss) else math.inf

            size, loss = _search(loss_after, size)
            if loss >= losses[-1]:
                break
            _move(model, directions, size)
            losses.append(loss)
            progress(number, loss)
    return losses


@torch.no_grad()
def mean_loss(model: nn.Module, data: Calibration) -> float:
    """Return the mean negative log-likelihood of the labels, in nats."""
    total = sum(
        float(F.cross_entropy(_rows(model, batch), labels, reduction="sum"))
        for batch, labels in zip(data.batches, data.labels, strict=True)
    )
    return total / sum(len(labels) for labels in data.labels)


def _directions(model: nn.Module, paths: Sequence[str], data: Calibration, rng: torch.Generator) -> dict[str, _Step]:
    """Return each reader's :math:`F^{-1} G A^{-1}`, the bias as a column of G."""
    fisher = output_fisher(model, paths, data.batches, rng, logits_only=False)
    moments = _input_moments(model, paths, data)
    num_labels = sum(len(labels) for labels in data.labels)
    for batch, labels in zip(data.batches, data.labels, strict=True):
        (F.cross_entropy(_rows(model, batch), labels, reduction="sum") / num_labels).backward()  # type: ignore[no-untyped-call]
    found: dict[str, _Step] = {}
    for path in paths:
        module = model.get_submodule(path)
        gradient = _gradient(module)
        curved = torch.linalg.solve(_damped(fisher[path]), gradient)
        step = torch.linalg.solve(_damped(moments[path].hessian(False) / 2), curved, left=False)
        has_bias = getattr(module, "bias", None) is not None
        found[path] = (step[:, :-1], step[:, -1]) if has_bias else (step, None)
    model.zero_grad(set_to_none=True)
    return found


def _input_moments(model: nn.Module, paths: Sequence[str], data: Calibration) -> dict[str, Moments]:
    """Return second moments of each reader's inputs, with a constant 1 for its bias."""
    found: dict[str, Moments] = {}

    def see(module: nn.Module, inputs: tuple[Tensor, ...], _: Any, path: str) -> None:
        columns = input_columns(module, inputs[0]).to(torch.float64)
        if getattr(module, "bias", None) is not None:
            columns = torch.cat([columns, columns.new_ones(len(columns), 1)], dim=1)
        found.setdefault(path, Moments.empty(columns.shape[1], device=columns.device)).add(columns)

    with torch.no_grad(), ExitStack() as stack:
        for path in paths:
            stack.callback(model.get_submodule(path).register_forward_hook(partial(see, path=path)).remove)
        for batch in data.batches:
            forward_logits(model, batch)
    return found


def _gradient(module: nn.Module) -> Tensor:
    """Return the loss gradient as (out, columns), with that of the bias, if any, as the last column."""
    grad: Tensor = module.weight.grad  # type: ignore[assignment]
    matrix = (grad.T if is_transposed(module) else grad.flatten(1)).to(torch.float64)
    bias: nn.Parameter | None = getattr(module, "bias", None)
    if bias is None:
        return matrix
    assert bias.grad is not None
    return torch.cat([matrix, bias.grad.to(torch.float64)[:, None]], dim=1)


def _damped(matrix: Tensor) -> Tensor:
    size = matrix.diagonal().mean().clamp(min=torch.finfo(torch.float64).tiny)
    return matrix + _DAMPING * size * torch.eye(len(matrix)).to(matrix)


def _search(loss_after: Callable[[float], float], size: float) -> tuple[float, float]:
    """Return the best step size by doubling, then halving, while the loss falls; at most 1."""
    loss = loss_after(size)
    for factor in (2.0, 0.5):
        while _SMALLEST_SIZE <= size * factor <= 1.0 and (other := loss_after(size * factor)) < loss:
            size, loss = size * factor, other
    return size, loss


def _move(model: nn.Module, directions: Mapping[str, _Step], size: float) -> None:
    for path, (weight, bias) in directions.items():
        module = model.get_submodule(path)
        old_weight, old_bias = _values(module)
        _write(module, (old_weight - size * weight, None if bias is None else old_bias - size * bias))  # type: ignore[operator]


def _values(module: nn.Module) -> _Step:
    bias: Tensor | None = getattr(module, "bias", None)
    return weight_matrix(module).clone(), None if bias is None else bias.detach().clone()


@torch.no_grad()
def _write(module: nn.Module, values: _Step) -> None:
    weight, bias = values
    weight_matrix(module).copy_(weight)
    if bias is not None:
        module.bias.copy_(bias)  # type: ignore[operator]


def _rows(model: nn.Module, batch: Tensor) -> Tensor:
    return forward_logits(model, batch).flatten(0, -2)
