r"""How uploads are written: as they are, in bfloat16, or in 8 bits with stochastic rounding.

``int8`` quantises every row (first dimension) of a tensor of two dimensions or more with a scale of its own,

.. math:: s_i = \max_j |x_{ij}| / 127, \qquad q_{ij} = \lfloor x_{ij} / s_i + u_{ij} \rfloor, \qquad
   u_{ij} \sim U[0, 1),

which is right on average: E[s q] = x (the kind of quantisation that FedLP-Q, Entropy 2023, puts on top of FedLP). The
scales travel as float32. Vectors (biases, norms) and integers stay as they are: they are few, and matter much.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fedlp.errors import ProtocolError
from fedlp.federation.packing import Signature

ENCODINGS = ("float32", "bfloat16", "int8")
_LEVELS = 127
_SCALE = "scale of "


def encode_values(params: Mapping[str, Tensor], encoding: str, generator: torch.Generator) -> dict[str, Tensor]:
    """Return the tensors that travel for some values.

    Parameters
    ----------
    encoding : "float32", "bfloat16" or "int8"
        "float32" leaves everything as it is.
    generator : torch.Generator
        On the CPU; draws the rounding.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in params.items():
        kind = _kind(tensor.shape, tensor.dtype, encoding)
        if kind == "int8":
            rows = tensor.detach().cpu().to(torch.float32).flatten(1)
            scale = rows.abs().amax(dim=1) / _LEVELS
            steps = rows / scale.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
            steps += torch.rand(rows.shape, generator=generator)
            found[name] = steps.floor_().clamp_(-_LEVELS, _LEVELS).to(torch.int8).view(tensor.shape)
            found[_SCALE + name] = scale
        else:
            found[name] = tensor.to(torch.bfloat16) if kind == "bfloat16" else tensor
    return found


def encoded_signature(signature: Signature, encoding: str) -> Signature:
    """Return names, shapes and dtypes of what travels for tensors of ``signature``."""
    found: list[tuple[str, tuple[int, ...], torch.dtype]] = []
    for name, shape, dtype in signature:
        kind = _kind(shape, dtype, encoding)
        found.append((name, shape, dtype if kind is None else getattr(torch, kind)))
        if kind == "int8":
            found.append((_SCALE + name, shape[:1], torch.float32))
    return tuple(found)


def decode_values(encoded: Mapping[str, Tensor], signature: Signature, who: str) -> dict[str, Tensor]:
    """Return the values, in the dtypes of ``signature``.

    Raises
    ------
    ProtocolError
        If a scale is negative; ``who`` is named. Values that are not finite are for the caller to find.
    """
    found: dict[str, Tensor] = {}
    for name, shape, dtype in signature:
        tensor = encoded[name]
        if tensor.dtype == torch.int8 and dtype != torch.int8:
            scale = encoded[_SCALE + name]
            if bool((scale < 0).any()):
                raise ProtocolError(f"{who}: tensor {name} has a negative scale")
            values = tensor.to(torch.float32).flatten(1).mul_(scale[:, None])
            tensor = values.view(shape)
        found[name] = tensor.to(dtype)
    return found


def _kind(shape: tuple[int, ...], dtype: torch.dtype, encoding: str) -> str | None:
    """Return the dtype that a tensor travels in, None for its own."""
    if encoding == "float32" or dtype not in (torch.float32, torch.float64) or len(shape) < 2:
        return None
    return encoding
