"""Sample of the inputs of every reader of a model, from one pass over a few examples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedlp.errors import CalibrationError
from fedlp.models.forward import forward_logits
from fedlp.pruning.kernels.sampled_rows import SampledRows
from fedlp.pruning.tracing.units import input_columns, weight_matrix
from fedlp.types import PrunableLayer

_ROWS = 1  # input vectors per column: positions of an image resemble each other, and a few of them do


def sample_inputs(
    model: nn.Module, layers: Sequence[PrunableLayer], batches: Sequence[Tensor], generator: torch.Generator, most: int
) -> dict[str, SampledRows]:
    """Return a random sample of the input vectors of each reader, by module path.

    Parameters
    ----------
    model : nn.Module
        In evaluation mode.
    batches : sequence of Tensor
        Prepared inputs; as many vectors are drawn from each.
    most : int
        Vectors of a layer.

    Raises
    ------
    CalibrationError
        If inputs are not finite; names the reader.
    """
    with sampled_inputs(model, layers, len(batches), generator, most) as found, torch.no_grad():
        for batch in batches:
            forward_logits(model, batch)
    return check_sample(found)


@contextmanager
def sampled_inputs(
    model: nn.Module, layers: Sequence[PrunableLayer], num_passes: int, generator: torch.Generator, most: int
) -> Iterator[dict[str, list[Tensor]]]:
    """Fill a dict with the sample of :func:`sample_inputs` during passes of another purpose, within a context.

    Parameters
    ----------
    num_passes : int
        Forward passes that follow.
    most : int
        Vectors of a layer.
    """
    found: dict[str, list[Tensor]] = {path: [] for layer in layers for path in layer.readers}
    with ExitStack() as stack:
        for path, parts in found.items():

            def note(module: nn.Module, inputs: Any, parts: list[Tensor] = parts) -> None:
                wanted = -(-min(_ROWS * weight_matrix(module).shape[1], most) // num_passes)
                parts.append(sample_columns(module, inputs[0].detach(), wanted, generator))

            stack.callback(model.get_submodule(path).register_forward_pre_hook(note).remove)
        yield found


def check_sample(found: Mapping[str, Sequence[Tensor]]) -> dict[str, SampledRows]:
    """Return the sample of each reader; CalibrationError names one that is not finite."""
    for path, parts in found.items():
        if not all(bool(torch.isfinite(rows).all()) for rows in parts):
            raise CalibrationError(f"inputs of {path} are not finite on the client's examples; check its data")
    return {path: SampledRows(torch.cat(list(parts))) for path, parts in found.items()}


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
