"""Sample of the inputs of every reader of a model, from passes over a few examples."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedlp.errors import CalibrationError
from fedlp.pruning.kernels.sampled_rows import SampledRows
from fedlp.pruning.tracing.units import input_columns, weight_matrix
from fedlp.types import PrunableLayer


@dataclass(frozen=True, slots=True)
class SampleSize:
    """Number of input vectors sampled for a reader of n columns.

    Attributes
    ----------
    per_column : int
        Vectors per column of a reader whose Hessian is inverted as a matrix.
    most_columns : int
        Columns of such a reader, at most.
    few : int
        Vectors of a wider reader, whose inverse Hessian has their number as its rank.
    """

    per_column: int = 4
    most_columns: int = 640
    few: int = 128

    def num_rows(self, columns: int) -> int:
        """Return the number of vectors for a reader of some columns."""
        return self.per_column * columns if columns <= self.most_columns else self.few


SAMPLE = SampleSize()
"""Sample of a client in a round."""


@contextmanager
def sampling(
    model: nn.Module,
    layers: Sequence[PrunableLayer],
    num_batches: int,
    generator: torch.Generator,
    size: SampleSize = SAMPLE,
) -> Iterator[dict[str, SampledRows]]:
    """Sample the input vectors of each reader in the forward passes within a context.

    Yields a dict by module path, which is filled when the context ends.

    Parameters
    ----------
    model : nn.Module
        In evaluation mode.
    num_batches : int
        Number of the forward passes; as many vectors are drawn from each.

    Raises
    ------
    CalibrationError
        If inputs are not finite; names the reader.
    """
    parts: dict[str, list[Tensor]] = {path: [] for layer in layers for path in layer.readers}
    found: dict[str, SampledRows] = {}

    def note(path: str, module: nn.Module, inputs: Any) -> None:
        wanted = -(-size.num_rows(weight_matrix(module).shape[1]) // num_batches)
        with torch.no_grad():
            parts[path].append(sample_columns(module, inputs[0].detach(), wanted, generator))

    with ExitStack() as stack:
        for path in parts:
            stack.callback(model.get_submodule(path).register_forward_pre_hook(partial(note, path)).remove)
        yield found
    for path, rows in parts.items():
        if not all(bool(torch.isfinite(part).all()) for part in rows):
            raise CalibrationError(f"inputs of {path} are not finite on the client's examples; check its data")
        found[path] = SampledRows(torch.cat(rows))


def sample_columns(module: nn.Module, inputs: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Return ``count`` random rows of :func:`input_columns`, or all if fewer."""
    if not isinstance(module, nn.Conv2d) or module.dilation != (1, 1) or isinstance(module.padding, str):
        rows = input_columns(module, inputs)
        if len(rows) <= count:
            return rows.clone()
        return rows[torch.randperm(len(rows), generator=generator)[:count].to(rows.device)]
    (down, right), (height, width), (top, left) = module.stride, module.kernel_size, module.padding
    padded = F.pad(inputs, (left, left, top, top))
    patches = padded.unfold(2, height, down).unfold(3, width, right)  # a view: only what is drawn is copied
    images, _, rows_of, columns_of = patches.shape[:4]
    places = torch.randperm(images * rows_of * columns_of, generator=generator)[:count].to(inputs.device)
    image, place = places // (rows_of * columns_of), places % (rows_of * columns_of)
    return patches[image, :, place // columns_of, place % columns_of].flatten(1)
