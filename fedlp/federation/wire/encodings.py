r"""How uploads are written: as they are, in bfloat16, or in 8, 4 or 2 bits with stochastic rounding.

With b bits, every row (first dimension) of a tensor of two dimensions or more is quantised with a scale of its own,

.. math:: s_i = c \max_j |x_{ij}| / (2^{b-1} - 1), \qquad q_{ij} = \lfloor x_{ij} / s_i + u_{ij} \rfloor, \qquad
   u_{ij} \sim U[0, 1),

which is right on average: E[s q] = x (the kind of quantisation that FedLP-Q, Entropy 2023, puts on top of FedLP). A
coarseness c above 1 leaves more zeros, which Huffman codes make short, and more noise (as QSGD of few levels, Alistarh
et al., NeurIPS 2017). The scales travel as float32; numbers of 4 and 2 bits share bytes, the first in the lowest bits.
Vectors (biases, norms) and integers stay as they are: they are few, and matter much.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fedlp.errors import ProtocolError
from fedlp.federation.wire.packing import Signature
from fedlp.federation.wire.ranges import LARGEST_VALUE

BITS = {"float32": 32, "bfloat16": 16, "int8": 8, "int4": 4, "int2": 2}
"""Encodings and the bits that a number takes in them."""

_QUANTISED = ("int8", "int4", "int2")
_SCALE = "scale of "
_LARGEST_SCALE = LARGEST_VALUE / 128  # times any int8 it is in range


def encode_values(
    params: Mapping[str, Tensor], encoding: str, generator: torch.Generator, coarseness: float = 1.0
) -> dict[str, Tensor]:
    """Return the tensors that travel for some values.

    Parameters
    ----------
    encoding : one of BITS
        "float32" leaves everything as it is.
    generator : torch.Generator
        On the CPU; draws the rounding.
    coarseness : float
        Of steps, at least 1: they are as many times what the largest number of a row asks for.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in params.items():
        kind = _kind(tensor.shape, tensor.dtype, encoding)
        if kind in _QUANTISED:
            rows = tensor.detach().cpu().to(torch.float32).flatten(1)
            levels = 2 ** (BITS[kind] - 1) - 1
            scale = rows.abs().amax(dim=1) * coarseness / levels
            steps = rows / scale.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
            steps += torch.rand(rows.shape, generator=generator)
            steps = steps.floor_().clamp_(-levels, levels).to(torch.int8)
            found[name] = steps.view(tensor.shape) if kind == "int8" else _pack(steps.flatten(), BITS[kind])
            found[_SCALE + name] = scale
        else:
            found[name] = tensor.to(torch.bfloat16) if kind == "bfloat16" else tensor
    return found


def encoded_signature(signature: Signature, encoding: str) -> Signature:
    """Return names, shapes and dtypes of what travels for tensors of ``signature``."""
    found: list[tuple[str, tuple[int, ...], torch.dtype]] = []
    for name, shape, dtype in signature:
        kind = _kind(shape, dtype, encoding)
        if kind in ("int4", "int2"):
            found.append((name, (math.ceil(math.prod(shape) * BITS[kind] / 8),), torch.uint8))
        else:
            found.append((name, shape, dtype if kind is None else getattr(torch, kind)))
        if kind in _QUANTISED:
            found.append((_SCALE + name, shape[:1], torch.float32))
    return tuple(found)


def encoded_bytes(shape: Sequence[int], dtype: torch.dtype, encoding: str) -> tuple[float, float]:
    """Return the bytes of each entry of a tensor, and of each row beside its entries."""
    kind = _kind(tuple(shape), dtype, encoding)
    return (dtype.itemsize, 0.0) if kind is None else (BITS[kind] / 8, 4.0 if kind in _QUANTISED else 0.0)


def decode_values(encoded: Mapping[str, Tensor], signature: Signature, encoding: str, who: str) -> dict[str, Tensor]:
    """Return the values, in the dtypes of ``signature``; in range where what travels as it is is in range.

    Raises
    ------
    ProtocolError
        If a scale is negative, NaN, or so large that its numbers are out of range; ``who`` is named.
    """
    found: dict[str, Tensor] = {}
    for name, shape, dtype in signature:
        tensor, kind = encoded[name], _kind(shape, dtype, encoding)
        if kind in _QUANTISED:
            scale = encoded[_SCALE + name]
            if not bool(((scale >= 0) & (scale <= _LARGEST_SCALE)).all()):
                raise ProtocolError(f"{who}: tensor {name} has a scale outside [0, {_LARGEST_SCALE:.3g}]")
            steps = tensor.to(torch.float32) if kind == "int8" else _unpack(tensor, math.prod(shape), BITS[kind])
            tensor = steps.view(shape[0], -1).mul_(scale[:, None]).view(shape)
        found[name] = tensor.to(dtype)
    return found


def _kind(shape: tuple[int, ...], dtype: torch.dtype, encoding: str) -> str | None:
    """Return the dtype that a tensor travels in, None for its own."""
    if encoding == "float32" or dtype not in (torch.float32, torch.float64) or len(shape) < 2:
        return None
    return encoding


def _pack(steps: Tensor, bits: int) -> Tensor:
    """Return signed numbers of few bits, (n,) int8, with several in each byte: (ceil(n bits / 8),) uint8."""
    per_byte = 8 // bits
    padded = F.pad(steps, (0, -len(steps) % per_byte)).view(torch.uint8).bitwise_and_(2**bits - 1).view(-1, per_byte)
    packed = padded[:, 0].clone()
    for place in range(1, per_byte):
        packed |= padded[:, place] << (bits * place)
    return packed


def _unpack(packed: Tensor, count: int, bits: int) -> Tensor:
    """Return what :func:`_pack` was given, as (count,) float32."""
    signed = packed.view(torch.int8)
    steps = torch.empty(len(packed), 8 // bits)
    for place in range(8 // bits):
        steps[:, place] = signed << (8 - bits * (place + 1)) >> (8 - bits)  # to the top, and down with its sign
    return steps.flatten()[:count]
