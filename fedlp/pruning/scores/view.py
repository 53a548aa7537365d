"""View of one prunable layer for pruning scores.

A *reader* is a linear layer or convolution whose inputs are the prunable units. A score reads the readers'
weights and the statistics of their inputs in the same way from any source: second moments of all calibration
data in one-shot pruning, sums over clients in federated one-shot pruning, a sample of a few vectors in a round.

A score may read only its ``needs``; any other access is refused, since it is not collected everywhere.

=============== ====================================================================================================
weights         weights of the readers, and all parameters that are removed with a unit
input_norms     mean and mean square of each input of a reader
moments         all second moments of a reader's inputs: the Hessian; includes ``input_norms``
gradients       gradient of the loss with respect to every parameter
model           the model itself and the calibration examples
=============== ====================================================================================================
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedlp.errors import ConfigError
from fedlp.models.spec import named_tensors
from fedlp.pruning.calibration import Calibration
from fedlp.pruning.kernels.hessian import any_root, square_root
from fedlp.pruning.kernels.inverses import InverseHessian
from fedlp.pruning.kernels.obs import Problem
from fedlp.pruning.scores.evidence import Evidence, InputStatistics, Precision
from fedlp.types import PrunableLayer

NEEDS = frozenset({"weights", "input_norms", "moments", "gradients", "model"})


@dataclass(frozen=True)
class ReaderView:
    """A score's view of one reader.

    Attributes
    ----------
    path : str
        Module path in the model.
    weight : (outputs, n)
        Weight matrix, float64; the columns of a unit lie together.
    unit_size : int
        Columns per unit.
    statistics : InputStatistics or None
        Statistics of its inputs, if collected; read through the properties below.
    solve : callable
        Returns the initial full-width weights (outputs, n) of the elimination, and the inverse of the damped
        Hessian (n, n).
    fisher : (outputs, outputs) or None
        Fisher information of its outputs, which weighs their errors; None for the identity.
    needs : frozenset of str
        Declared needs of the score.
    """

    path: str
    weight: Tensor
    unit_size: int
    statistics: InputStatistics | None
    solve: Callable[[], tuple[Tensor, Tensor | InverseHessian]]
    fisher: Tensor | None
    needs: frozenset[str]

    @property
    def count(self) -> int:
        """Number of input vectors behind the statistics."""
        return self._read("input_norms").count

    @property
    def mean(self) -> Tensor:
        """Mean of each input, (n,), float64."""
        return self._read("input_norms").mean

    @property
    def square_mean(self) -> Tensor:
        """Mean square of each input, (n,), float64."""
        return self._read("input_norms").square_mean

    @property
    def variance(self) -> Tensor:
        """Variance of each input, (n,), float64, >= 0."""
        return self._read("input_norms").variance

    def hessian(self, centred: bool) -> Tensor:
        r"""Return :math:`\frac{2}{N}\sum xx^\top`, (n, n), float64, of inputs less their mean if ``centred``."""
        return self._read("moments").hessian(centred)

    def problem(self, outputs: int | None = None, generator: torch.Generator | None = None) -> Problem:
        r"""Return the elimination problem of this reader: weights, weighed by the Fisher information, and inverse.

        Parameters
        ----------
        outputs : int or None
            Of a reader that has more, :math:`\Omega F^{1/2} W` takes the place of :math:`F^{1/2} W`, with so many rows
            of independent normal :math:`\Omega`, whose Gram matrix is expected to be the same.
        generator : torch.Generator, optional
            Source of their random numbers, on the CPU.
        """
        self._read("moments")
        weight, inverse = self.solve()
        if outputs is None or len(weight) <= outputs:
            root = None if self.fisher is None else square_root(self.fisher)
        else:
            draws = torch.randn(outputs, len(weight), generator=generator, dtype=weight.dtype).to(weight.device)
            root = draws.div_(math.sqrt(outputs))
            root = root if self.fisher is None else root @ any_root(self.fisher)
        return Problem(weight if root is None else root @ weight, inverse, self.unit_size)

    def _read(self, need: str) -> InputStatistics:
        _require(self.needs, need, f"input statistics of {self.path}")
        assert self.statistics is not None
        return self.statistics


@dataclass(frozen=True)
class LayerView:
    """A score's view of one prunable layer.

    Attributes
    ----------
    layer : PrunableLayer
    evidence : Evidence
        Of the model; read it through the properties below.
    needs : frozenset of str
        Declared needs of the score.
    """

    layer: PrunableLayer
    evidence: Evidence
    needs: frozenset[str]
    _readers: tuple[ReaderView, ...] = ()

    @property
    def num_units(self) -> int:
        """Number of units."""
        return self.layer.num_units

    @property
    def precision(self) -> Precision:
        """Granularity of eliminations."""
        return self.evidence.precision

    @property
    def generator(self) -> torch.Generator:
        """Source of random numbers, on the CPU: equal for equal seeds."""
        return self.evidence.generator

    @property
    def readers(self) -> tuple[ReaderView, ...]:
        """The layers that read the units, in the order of the model."""
        _require(self.needs, "weights", f"the weights of {' '.join(self.layer.readers)}")
        return self._readers

    @property
    def parameters(self) -> dict[str, Tensor]:
        """All parameters of the scored model, detached, by name."""
        _require(self.needs, "weights", "parameters of the model")
        scored = self.evidence.model if self.evidence.scored is None else self.evidence.scored
        return {name: t.detach() for name, t in named_tensors(scored).items() if isinstance(t, nn.Parameter)}

    @property
    def gradients(self) -> Mapping[str, Tensor]:
        """Gradient of the mean loss on the calibration examples, by parameter name."""
        _require(self.needs, "gradients", "gradients of the loss")
        assert self.evidence.gradients is not None
        return self.evidence.gradients

    @property
    def model(self) -> nn.Module:
        """The model in evaluation mode; not to be changed."""
        _require(self.needs, "model", "the model")
        return self.evidence.model

    @property
    def data(self) -> Calibration:
        """The calibration examples."""
        _require(self.needs, "model", "the calibration examples")
        return self.evidence.data

    def sum_columns(self, columns: Callable[[ReaderView], Tensor]) -> Tensor:
        """Return the sum over readers and over the columns of each unit, (units,).

        Parameters
        ----------
        columns : callable
            Returns one number per column of a reader's weight matrix, (n,).
        """
        parts = [columns(reader).view(-1, reader.unit_size).sum(dim=1) for reader in self.readers]
        return torch.stack(parts).sum(dim=0)

    def sum_coupled(self, values: Mapping[str, Tensor]) -> Tensor:
        """Return the sum over all entries removed with each unit, (units,), float64.

        Parameters
        ----------
        values : mapping from parameter name to Tensor
            Of the parameters' shapes; parameters that are absent do not count.
        """
        device = next(iter(values.values())).device
        total = torch.zeros(self.num_units, dtype=torch.float64, device=device)
        for name in self.layer.coupled:
            if name not in values:
                continue
            value = values[name].to(torch.float64)
            for position, dim in enumerate(self.evidence.spec.dims[name]):
                if dim.axis == self.layer.name:
                    along = value.movedim(position, 0).flatten(1) if value.ndim > 1 else value[:, None]
                    per_entry = along.sum(dim=1)
                    if dim.behind:
                        units = torch.from_numpy(dim.units(self.num_units)).to(device)
                        total.index_add_(0, units, per_entry)
                    else:
                        total += per_entry.view(dim.copies, self.num_units, dim.entries).sum(dim=(0, 2))
        return total


def _require(needs: frozenset[str], need: str, read: str) -> None:
    if need not in needs and not (need == "input_norms" and "moments" in needs):
        raise ConfigError(f"a score reads {read} without saying so: add {need!r} to its needs")
