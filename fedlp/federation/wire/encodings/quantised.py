r"""Stochastic rounding to 8, 4 or 2 bits with one scale per row.

With b bits, every row (first dimension) of a tensor of two dimensions or more is quantised with a scale of its own,

.. math:: s_i = c \max_j |x_{ij}| / (2^{b-1} - 1), \qquad q_{ij} = \lfloor x_{ij} / s_i + u_{ij} \rfloor, \qquad
   u_{ij} \sim U[0, 1),

which is unbiased: E[s q] = x (the kind of quantisation that FedLP-Q, Entropy 2023, puts on top of FedLP). A
coarseness c above 1 leaves more zeros, which Huffman codes make short, and more noise (as QSGD of few levels, Alistarh
et al., NeurIPS 2017). The scales travel as float32; numbers of 4 and 2 bits share bytes, the first in the lowest bits.
Vectors (biases, norms) and integers stay as they are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fedlp.errors import ConfigError, ProtocolError
from fedlp.federation.wire.encodings.base import is_matrix
from fedlp.federation.wire.packing import Signature
from fedlp.federation.wire.ranges import LARGEST_VALUE
from fedlp.registry import register

_SCALE = "scale of "
LARGEST_SCALE = LARGEST_VALUE / 128  # times any int8 it is in range


@dataclass(frozen=True)
class Quantised:
    """Stochastic rounding to ``bits`` bits, one scale per row.

    Attributes
    ----------
    coarseness : float
        Quantisation step multiplier, >= 1.
    """

    coarseness: float = 1.0

    bits: ClassVar[int] = 8
    row_bytes: ClassVar[float] = 4.0

    def __post_init__(self) -> None:
        if not 1 <= self.coarseness < math.inf:
            raise ConfigError(
                f"upload.coarseness={self.coarseness} is not allowed: it must be a finite number of at least 1"
            )

    def encode(self, params: Mapping[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        """Return quantised matrices with their scales, other tensors unchanged."""
        found: dict[str, Tensor] = {}
        for name, tensor in params.items():
            if not is_matrix(tensor.shape, tensor.dtype):
                found[name] = tensor
                continue
            rows = tensor.detach().cpu().to(torch.float32).flatten(1)
            levels = 2 ** (self.bits - 1) - 1
            scale = rows.abs().amax(dim=1) * self.coarseness / levels
            steps = rows / scale.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
            steps += torch.rand(rows.shape, generator=generator)
            steps = steps.floor_().clamp_(-levels, levels).to(torch.int8)
            found[name] = steps.view(tensor.shape) if self.bits == 8 else pack_bits(steps.flatten(), self.bits)
            found[_SCALE + name] = scale
        return found

    def signature(self, signature: Signature) -> Signature:
        """Return names, shapes and dtypes of the encoded tensors."""
        found: list[tuple[str, tuple[int, ...], torch.dtype]] = []
        for name, shape, dtype in signature:
            if not is_matrix(shape, dtype):
                found.append((name, shape, dtype))
                continue
            size = math.ceil(math.prod(shape) * self.bits / 8)
            found.append((name, shape, torch.int8) if self.bits == 8 else (name, (size,), torch.uint8))
            found.append((_SCALE + name, shape[:1], torch.float32))
        return tuple(found)

    def decode(self, encoded: Mapping[str, Tensor], signature: Signature, who: str) -> dict[str, Tensor]:
        """Return the values; ProtocolError for a scale that is negative, NaN, or so large that values overflow."""
        found: dict[str, Tensor] = {}
        for name, shape, dtype in signature:
            tensor = encoded[name]
            if is_matrix(shape, dtype):
                scale = encoded[_SCALE + name]
                check_scale(scale, name, who)
                count = math.prod(shape)
                steps = tensor.to(torch.float32) if self.bits == 8 else unpack_bits(tensor, count, self.bits)
                tensor = steps.view(shape[0], -1).mul_(scale[:, None]).view(shape)
            found[name] = tensor.to(dtype)
        return found

    def has_rows(self, columns: int) -> bool:
        """Return whether a row is whole bytes."""
        return columns * self.bits % 8 == 0

    def decode_rows(self, encoded: Mapping[str, Tensor], name: str, columns: int, rows: slice | Tensor) -> Tensor:
        """Return chosen rows of a matrix, float32."""
        chosen, scale = encoded[name].view(len(encoded[_SCALE + name]), -1)[rows], encoded[_SCALE + name][rows]
        if self.bits == 8:
            return chosen.to(torch.float32).mul_(scale[:, None])
        return unpack_bits(chosen.flatten(), len(scale) * columns, self.bits).view(-1, columns).mul_(scale[:, None])

    def check_scales(self, encoded: Mapping[str, Tensor], name: str, who: str) -> None:
        """Raise ProtocolError for a scale that is negative, NaN, or so large that values overflow."""
        check_scale(encoded[_SCALE + name], name, who)


@register("encoding", "int8")
@dataclass(frozen=True)
class Int8(Quantised):
    """Stochastic rounding to 8 bits, one scale per row."""


@register("encoding", "int4")
@dataclass(frozen=True)
class Int4(Quantised):
    """Stochastic rounding to 4 bits, one scale per row."""

    bits: ClassVar[int] = 4


@register("encoding", "int2")
@dataclass(frozen=True)
class Int2(Quantised):
    """Stochastic rounding to 2 bits, one scale per row."""

    bits: ClassVar[int] = 2


def check_scale(scale: Tensor, name: str, who: str) -> None:
    """Raise ProtocolError for a scale that is negative, NaN, or so large that values overflow."""
    if not bool(((scale >= 0) & (scale <= LARGEST_SCALE)).all()):
        raise ProtocolError(f"{who}: tensor {name} has a scale outside [0, {LARGEST_SCALE:.3g}]")


def pack_bits(steps: Tensor, bits: int) -> Tensor:
    """Return signed numbers of few bits, (n,) int8, packed into bytes: (ceil(n bits / 8),) uint8."""
    per_byte = 8 // bits
    padded = F.pad(steps, (0, -len(steps) % per_byte)).view(torch.uint8).bitwise_and_(2**bits - 1).view(-1, per_byte)
    packed = padded[:, 0].clone()
    for place in range(1, per_byte):
        packed |= padded[:, place] << (bits * place)
    return packed


def unpack_bits(packed: Tensor, count: int, bits: int) -> Tensor:
    """Return the numbers packed by :func:`pack_bits`, (count,) float32."""
    signed = packed.view(torch.int8)
    steps = torch.empty(len(packed), 8 // bits, device=packed.device)
    for place in range(8 // bits):
        steps[:, place] = signed << (8 - bits * (place + 1)) >> (8 - bits)  # to the top, and down with its sign
    return steps.flatten()[:count]
