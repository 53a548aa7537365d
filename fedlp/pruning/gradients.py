"""Gradients of the loss: by parameter, and of readers' outputs as their Fisher information."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fedlp.models.forward import forward_logits
from fedlp.models.layers import all_trainable, none_trainable
from fedlp.models.spec import named_tensors
from fedlp.pruning.calibration import choose_half
from fedlp.pruning.kernels.shrinkage import shrink_fisher
from fedlp.pruning.tracing.decoder import is_language_model, path_of_blocks
from fedlp.pruning.tracing.units import output_rows

_POSITIONS = 512  # of a language model's text in one pass


def loss_gradients(
    model: nn.Module,
    batches: Sequence[Tensor],
    labels: Sequence[Tensor],
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
) -> dict[str, Tensor]:
    """Return the gradient of the mean loss with respect to every parameter, as a dict by name.

    Parameters
    ----------
    batches : sequence of Tensor
        Prepared inputs.
    labels : sequence of (n,) or (n, ...)
        Target of each prediction: classes or tokens, -100 where there is none; or values.
    loss : callable
        Mean loss of outputs, (n, outputs), and targets.
    """
    parameters = {name: t for name, t in named_tensors(model).items() if isinstance(t, nn.Parameter)}
    sums = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    with all_trainable(model):
        for batch, target in zip(batches, labels, strict=True):
            logits = forward_logits(model, batch)
            value = loss(logits.flatten(0, -2), target)
            for name, gradient in zip(sums, torch.autograd.grad(value, list(parameters.values())), strict=True):
                sums[name] += gradient / len(batches)
    return sums


def output_fisher(
    model: nn.Module,
    paths: Sequence[str],
    batches: Sequence[Tensor],
    generator: torch.Generator,
    logits_only: bool,
    shift_invariant: bool = True,
) -> dict[str, Tensor]:
    r"""Return the Fisher information of each reader's outputs, :math:`\sum g g^\top / N`, (out, out), by module path.

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
    shift_invariant : bool
        Whether outputs are logits of one softmax, whose mean has no effect; else the mean of the outputs counts too,
        as with the values of a regression.
    """
    sums, num_labels = fisher_sums(model, paths, batches, generator, logits_only, shift_invariant)
    return {path: total / num_labels for path, total in sums.items()}


def shrunk_fisher(
    model: nn.Module,
    paths: Sequence[str],
    batches: Sequence[Tensor],
    generator: torch.Generator,
    logits_only: bool,
    shift_invariant: bool = True,
) -> dict[str, Tensor]:
    """Return the same as :func:`output_fisher`, shrunk by how far two halves of the examples agree on it.

    Of a single example nothing but its mean diagonal entry counts.
    """
    halves = [choose_half(batches, half) for half in (1, 2)]
    sums = [fisher_sums(model, paths, half, generator, logits_only, shift_invariant) for half in halves if half]
    return {path: pool_fisher([(total.pop(path), count) for total, count in sums]) for path in paths}


def pool_fisher(halves: Sequence[tuple[Tensor, int]]) -> Tensor:
    """Return the shrunk Fisher information, (out, out), of the sums over two halves, or one, and their label counts."""
    means = [total / count for total, count in halves if count]
    whole = sum(total for total, _ in halves) / sum(count for _, count in halves)
    assert isinstance(whole, Tensor)
    if len(means) == 1:
        means.append(torch.zeros_like(whole).fill_diagonal_(1.0))  # agrees on nothing but the mean
    return shrink_fisher(means[0], means[1], whole)


def fisher_sums(
    model: nn.Module,
    paths: Sequence[str],
    batches: Sequence[Tensor],
    generator: torch.Generator,
    logits_only: bool,
    shift_invariant: bool = True,
) -> tuple[dict[str, Tensor], int]:
    """Return the sums that :func:`output_fisher` divides by the number of labels, and that number; both add up."""
    sums: dict[str, Tensor] = {}
    num_labels = 0

    def watch(path: str, module: nn.Module, output: Tensor) -> Tensor:
        def collect(gradient: Tensor) -> None:
            rows = output_rows(module, gradient)
            sums[path] = sums[path].addmm_(rows.T, rows) if path in sums else rows.T @ rows

        watched = output if output.requires_grad else output.detach().requires_grad_()
        watched.register_hook(collect)  # type: ignore[no-untyped-call]
        return watched if watched is output else watched.clone()  # a leaf may not be changed in place

    with ExitStack() as stack:
        stack.enter_context(none_trainable(model))  # gradients of outputs alone: half of a backward pass
        stack.enter_context(_recomputed_blocks(model))
        for path in paths:

            def hook(module: nn.Module, _: Any, output: Tensor, path: str = path) -> Tensor:
                return watch(path, module, output)

            stack.callback(model.get_submodule(path).register_forward_hook(hook).remove)
        for batch in _few_positions(model, batches):
            logits = forward_logits(model, batch).flatten(0, -2)
            num_labels += len(logits)
            loss = _drawn_loss(logits, generator, logits_only, shift_invariant)
            del logits  # large, of a language model
            loss.backward()  # type: ignore[no-untyped-call]
    return {path: sums[path].to(torch.float64) for path in paths}, num_labels


def _few_positions(model: nn.Module, batches: Sequence[Tensor]) -> Iterator[Tensor]:
    """Yield the batches; of a language model's in parts, as its logits are large."""
    for batch in batches:
        yield from torch.split(batch, max(1, _POSITIONS // batch.shape[1]) if is_language_model(model) else len(batch))


@contextmanager
def _recomputed_blocks(model: nn.Module) -> Iterator[None]:
    """Keep only the inputs of a language model's blocks for the backward pass, within a context."""
    with ExitStack() as stack:
        if is_language_model(model):
            config: Any = model.config
            if getattr(config, "use_cache", False):  # a block that runs twice would write to it twice
                stack.callback(setattr, config, "use_cache", True)
                config.use_cache = False
            for block in model.get_submodule(path_of_blocks(model)).children():
                block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
                stack.callback(block.__dict__.pop, "forward")
        yield


def _drawn_loss(logits: Tensor, generator: torch.Generator, logits_only: bool, shift_invariant: bool) -> Tensor:
    """Return the negative log-likelihood of labels drawn from the predictions, or random directions of the logits."""
    if logits_only:
        directions = torch.randn(logits.shape, generator=generator).to(logits)
        if shift_invariant:
            directions = directions - directions.mean(dim=1, keepdim=True)
        return (logits * directions).sum()
    return F.cross_entropy(logits, _draw_labels(logits.detach(), generator), reduction="sum")


def _draw_labels(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Return one class of each row, (rows,), drawn with its probability by inversion of the distribution function."""
    heights = torch.rand(len(logits), 1, generator=generator).to(logits)
    sums = logits.softmax(dim=-1).cumsum_(dim=-1)
    found = torch.searchsorted(sums, heights * sums[:, -1:]).flatten()
    return found.clamp_(max=logits.shape[1] - 1)
