"""Pruning method, and *readers*: layers whose inputs are the prunable units.

A reader keeps the statistics of its inputs, and its weights before and after.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from fedlp.pruning.kernels.hessian import DiagonalMoments, Moments, invert_hessian
from fedlp.pruning.kernels.obs import resolve_weight
from fedlp.pruning.kernels.shrinkage import solve_shrunk
from fedlp.pruning.scores.criterion import UnitScore, check_score
from fedlp.pruning.scores.obs import OBS
from fedlp.pruning.scores.view import ReaderView
from fedlp.pruning.tracing.units import kept_columns, weight_matrix, write_weight


@dataclass(frozen=True, slots=True)
class Method:
    """Pruning method: score of units, and recovery of the kept weights.

    Attributes
    ----------
    score : UnitScore
        Saliency of units; those of the least saliency are removed. ``fedlp.registry.lookup("score", name)()`` gives one
        by name.
    recovery : "none", "bias" or "least_squares"
        Readers keep their weights; keep them and add the means of removed inputs to their bias; or are refitted to
        the inputs that stay.
    centred : bool
        least_squares: fit with a bias, which takes the means of removed inputs.
    correction : float
        least_squares: weight of the dense model's outputs in the target of the fit, in [0, 1]; 0 aims at the outputs of
        the same weights on the pruned model's inputs. For a language model's blocks the target includes the drift of
        the residual stream. Without ``damping`` a factor of what one half of the data finds that holds on the other.
    fisher : bool
        Weigh errors of outputs by their Fisher information, for scores that are solved for (OBS, SlimGPT).
    damping : float or None
        Added to the Hessian, as a fraction of its mean diagonal entry. None for shrinkage instead: Hessian, correction
        and Fisher information count as far as two halves of the calibration data agree on them, with any number of
        vectors (:mod:`fedlp.pruning.kernels.shrinkage`).
    keeps_batch_norm : bool
        Leave the variances of batch norms as they are, and subtract the change of a bias from their means; else both
        are estimated anew at the end. Outputs fitted to the dense model's vary less than these, and normalising them
        anew would amplify them.
    """

    score: UnitScore = field(default_factory=OBS)
    recovery: Literal["none", "bias", "least_squares"] = "least_squares"
    centred: bool = True
    correction: float = 0.0
    fisher: bool = False
    damping: float | None = None
    keeps_batch_norm: bool = False

    def __post_init__(self) -> None:
        check_score(self.score)

    @property
    def corrects(self) -> bool:
        """Whether the fit needs the dense model's outputs."""
        return self.recovery == "least_squares" and self.correction > 0

    @property
    def needs_inputs(self) -> bool:
        """Whether statistics of inputs are needed, to choose units or to make up for them."""
        return self.recovery != "none" or self.scores_inputs

    @property
    def scores_inputs(self) -> bool:
        """Whether the score reads statistics of inputs."""
        return bool(self.score.needs & {"input_norms", "moments"})

    @property
    def needs_moments(self) -> bool:
        """Whether all second moments of inputs are needed, not only the diagonal."""
        return self.recovery == "least_squares" or "moments" in self.score.needs

    @property
    def shrinks(self) -> bool:
        """Whether second moments are collected by halves of the data, and shrunk."""
        return self.needs_moments and self.damping is None

    @property
    def adds_bias(self) -> bool:
        """Whether readers get a bias."""
        return self.recovery == "bias" or (self.recovery == "least_squares" and self.centred)


class Reader:
    """Reader during pruning: a linear layer or convolution whose inputs are the prunable units.

    Parameters
    ----------
    path : str
        Path of its module in the model.
    norm : nn.Module or None
        The batch norm that reads its outputs.
    num_units : int
        Units among its inputs.
    targets : bool
        Whether statistics of target outputs are collected.
    halves : bool
        Whether the moments of half of the data are collected by themselves.
    """

    def __init__(
        self, path: str, module: nn.Module, norm: nn.Module | None, num_units: int, targets: bool, halves: bool = False
    ) -> None:
        self.path, self.module, self._norm = path, module, norm
        self.weight = weight_matrix(module).to(torch.float64)
        outputs, columns = self.weight.shape
        self.unit_size = columns // num_units
        self.moments = Moments.empty(columns, outputs if targets else 0, device=self.weight.device)
        self.diagonal: DiagonalMoments | None = None  # in place of the moments, where it is sufficient
        self.half: Moments | None = None  # of half of the data; until the reader is solved
        if halves:
            self.half = Moments.empty(columns, outputs if targets else 0, device=self.weight.device)
        bias: Tensor | None = getattr(module, "bias", None)
        self._bias = torch.zeros(outputs).to(self.weight) if bias is None else bias.detach().to(torch.float64)
        mean: Tensor | None = getattr(norm, "running_mean", None)
        self._mean = None if mean is None else mean.detach().clone()
        self._solved: tuple[Tensor, Tensor] | None = None

    @property
    def statistics(self) -> Moments | DiagonalMoments:
        """Statistics of the inputs as they were collected."""
        return self.moments if self.diagonal is None else self.diagonal

    @property
    def bias(self) -> Tensor:
        """Dense bias, (out,), float64; zero where the module has none."""
        return self._bias

    def shaped_weight(self) -> Tensor:
        """Return the dense weight as (out, in), or (out, in, height, width) of a convolution."""
        return self.weight.view(self.module.weight.shape) if isinstance(self.module, nn.Conv2d) else self.weight

    def solve(self, method: Method) -> tuple[Tensor, Tensor]:
        """Return the full-width weights that fit the reader's target outputs best, and the inverse Hessian."""
        if self._solved is None:
            centred, damping = method.centred, method.damping
            if damping is None:
                assert self.half is not None
                self._solved = solve_shrunk(self.weight, self.moments, self.half, centred, method.correction, self.path)
                self.half = None
            else:
                self._solved = self._solve_damped(method, damping)
        return self._solved

    def _solve_damped(self, method: Method, damping: float) -> tuple[Tensor, Tensor]:
        moments, weight = self.moments, self.weight
        inverse = invert_hessian(moments.hessian(method.centred), damping, self.path, moments.count)
        if moments.cross is not None:
            missed = moments.target_hessian(method.centred) - weight @ moments.hessian(method.centred)
            weight = weight + method.correction * missed @ inverse
        return weight, inverse

    def view(self, method: Method, score: UnitScore, fisher: Tensor | None) -> ReaderView:
        """Return a score's view of the reader; errors of its outputs are weighed by ``fisher``, (out, out)."""
        statistics = self.statistics if self.statistics.count else None
        return ReaderView(
            self.path, self.weight, self.unit_size, statistics, partial(self.solve, method), fisher, score.needs
        )

    def rewrite(self, keep: Tensor, gone: Tensor, method: Method) -> None:
        """Write the reader's new weights, zero at removed units, and its new bias into the module."""
        self.write(*self.solution(keep, gone, method), method)

    def solution(self, keep: Tensor, gone: Tensor, method: Method) -> tuple[Tensor, Tensor | None]:
        """Return new weights (out, columns), zero at removed units, and the new bias; None for the old one."""
        device = self.weight.device
        kept, removed = (kept_columns(units.to(device), self.unit_size) for units in (keep, gone))
        moments, weight = self.moments, torch.zeros_like(self.weight)
        shift: Tensor | None = None
        if method.recovery == "least_squares":
            weight[:, kept] = resolve_weight(*self.solve(method), kept, removed)
            if method.centred:
                holds_mean = moments.cross is None or method.damping is None  # the drift of a mean is mostly noise
                aim = self.weight @ moments.mean + self._bias if holds_mean else moments.target_mean
                shift = aim - weight @ moments.mean
        else:
            weight[:, kept] = self.weight[:, kept]
            if method.recovery == "bias":
                shift = self._bias + self.weight[:, removed] @ self.statistics.mean[removed]
        return weight, shift

    def write(self, weight: Tensor, bias: Tensor | None, method: Method) -> None:
        """Write weights and bias into the module; a batch norm that follows takes the bias in its mean instead."""
        if self._norm is not None and self._mean is not None and bias is not None and method.keeps_batch_norm:
            self._norm.running_mean.copy_(self._mean - (bias - self._bias))  # type: ignore[operator]
        write_weight(self.module, weight, None if self._norm is not None else bias)
