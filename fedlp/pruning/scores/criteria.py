r"""Scores of units that need no Hessian, and what they need instead: gradients and Fisher information.

Each score is one number per unit, >= 0; the lowest go first. :math:`W` is the reader's weight matrix, :math:`x` its
input, and the sums run over the unit's columns and all outputs.

========== ================================================= =====================================================
magnitude  sum of w² over everything that goes with the unit  Li et al., ICLR 2017; Fang et al., CVPR 2023 (groups)
wanda      sum of \|W_ij\| sqrt(E x_j²)                       Sun et al., ICLR 2024; structured: An et al., AAAI 2024
flap       sum of Var(x_j) W_ij²                              An et al., AAAI 2024 (WIFV)
taylor     sum of \|w ∂L/∂w\| over everything that goes       Ma et al., NeurIPS 2023 (LLM-Pruner, element-wise)
========== ================================================= =====================================================
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedlp.models.layers import all_trainable
from fedlp.models.spec import forward_logits, named_tensors
from fedlp.pruning.kernels.hessian import Moments
from fedlp.pruning.tracing.units import output_rows
from fedlp.pruning.tracing.widths import WidthSpec
from fedlp.types import PrunableLayer


def magnitude_scores(model: nn.Module, spec: WidthSpec, layer: PrunableLayer) -> Tensor:
    """Return the squared norm of all parameters that go with each unit."""
    return _coupled_sums({name: w.square() for name, w in _parameters(model).items()}, spec, layer)


def taylor_scores(model: nn.Module, spec: WidthSpec, layer: PrunableLayer, gradients: Mapping[str, Tensor]) -> Tensor:
    """Return the summed sizes of weight times gradient of all parameters that go with each unit."""
    parameters = _parameters(model)  # among them biases that pruning has added, which have no gradient
    products = {name: (parameters[name] * gradient).abs() for name, gradient in gradients.items()}
    return _coupled_sums(products, spec, layer)


def wanda_scores(weight: Tensor, moments: Moments, unit_size: int) -> Tensor:
    """Return sums of absolute weights times the inputs' root mean squares; ``weight`` is (out, n)."""
    scale = (moments.gram.diagonal() / moments.count).sqrt()
    return (weight.abs().sum(dim=0) * scale).view(-1, unit_size).sum(dim=1)


def flap_scores(weight: Tensor, moments: Moments, unit_size: int) -> Tensor:
    """Return sums of squared weights times the inputs' variances; ``weight`` is (out, n)."""
    variance = (moments.gram.diagonal() / moments.count - moments.mean.square()).clamp_(min=0.0)
    return (weight.square().sum(dim=0) * variance).view(-1, unit_size).sum(dim=1)


def _parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: t.detach() for name, t in named_tensors(model).items() if isinstance(t, nn.Parameter)}


def _coupled_sums(values: Mapping[str, Tensor], spec: WidthSpec, layer: PrunableLayer) -> Tensor:
    """Return the sum over all entries that go with each unit, (units,), float64."""
    device = next(iter(values.values())).device
    total = torch.zeros(layer.num_units, dtype=torch.float64, device=device)
    for name in layer.coupled:
        if name not in values:
            continue
        value = values[name].to(torch.float64)
        for position, dim in enumerate(spec.dims[name]):
            if dim.axis == layer.name:
                along = value.movedim(position, 0).flatten(1) if value.ndim > 1 else value[:, None]
                per_entry = along.sum(dim=1).view(dim.copies, layer.num_units, dim.entries)
                total += per_entry.sum(dim=(0, 2))
    return total


def loss_gradients(model: nn.Module, batches: Sequence[Tensor], labels: Sequence[Tensor]) -> dict[str, Tensor]:
    """Return the gradient of the mean cross-entropy with respect to every parameter, as a dict by name.

    Parameters
    ----------
    batches : sequence of Tensor
        Prepared inputs.
    labels : sequence of (n,)
        Flat target classes or tokens; -100 where there is none.
    """
    parameters = {name: t for name, t in named_tensors(model).items() if isinstance(t, nn.Parameter)}
    sums = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    with all_trainable(model):
        for batch, target in zip(batches, labels, strict=True):
            logits = forward_logits(model, batch)
            loss = F.cross_entropy(logits.flatten(0, -2), target)
            for name, gradient in zip(sums, torch.autograd.grad(loss, list(parameters.values())), strict=True):
                sums[name] += gradient / len(batches)
    return sums


def output_fisher(
    model: nn.Module, paths: Sequence[str], batches: Sequence[Tensor], generator: torch.Generator, logits_only: bool
) -> dict[str, Tensor]:
    r"""Return what errors of each reader's outputs cost: :math:`\sum g g^\top / N`, (out, out), by module path.

    :math:`g` is the gradient of the negative log-likelihood with respect to the module's output at one position, summed
    over all positions; N counts labels (images or tokens). Labels are drawn from the model's own predictions, so that
    this is the Fisher information: a change :math:`\Delta W` raises the KL divergence from the dense model by about
    :math:`\tfrac14 \operatorname{tr}(F \Delta W H \Delta W^\top)` nats per label (the factors of Martens and Grosse,
    ICML 2015). Losses of different layers can be compared so.

    Parameters
    ----------
    generator : torch.Generator
        Draws the labels.
    logits_only : bool
        Take the squared error of the logits, less their mean, in place of the KL divergence (a Gauss-Newton matrix):
        for a classifier, which is certain of the images that it was trained on, so that the Fisher information there
        is almost zero.
    """
    sums, num_labels = fisher_sums(model, paths, batches, generator, logits_only)
    return {path: total / num_labels for path, total in sums.items()}


def fisher_sums(
    model: nn.Module, paths: Sequence[str], batches: Sequence[Tensor], generator: torch.Generator, logits_only: bool
) -> tuple[dict[str, Tensor], int]:
    """Return the sums that :func:`output_fisher` divides by the number of labels, and that number; both add up."""
    sums: dict[str, Tensor] = {}
    num_labels = 0

    def watch(path: str, module: nn.Module, output: Tensor) -> None:
        def collect(gradient: Tensor) -> None:
            rows = output_rows(module, gradient)
            product = rows.T @ rows
            sums[path] = sums[path] + product if path in sums else product

        output.register_hook(collect)  # type: ignore[no-untyped-call]

    with ExitStack() as stack:
        stack.enter_context(all_trainable(model))
        for path in paths:

            def hook(module: nn.Module, _: Any, output: Tensor, path: str = path) -> None:
                watch(path, module, output)

            stack.callback(model.get_submodule(path).register_forward_hook(hook).remove)
        for batch in batches:
            logits = forward_logits(model, batch).flatten(0, -2)
            if logits_only:
                directions = torch.randn(logits.shape, generator=generator).to(logits)
                loss = (logits * (directions - directions.mean(dim=1, keepdim=True))).sum()
            else:
                chances = logits.detach().softmax(dim=-1).cpu()
                labels = torch.multinomial(chances, 1, generator=generator).flatten().to(logits.device)
                loss = F.cross_entropy(logits, labels, reduction="sum")
            loss.backward()  # type: ignore[no-untyped-call]
            num_labels += len(logits)
    model.zero_grad(set_to_none=True)
    return {path: sums[path].to(torch.float64) for path in paths}, num_labels
