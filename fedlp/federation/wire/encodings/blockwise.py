r"""Blockwise quantisation to 8 or 4 bits, rounded to nearest: one scale per block of consecutive entries.

A matrix is flattened and divided into blocks of B entries, the last one shorter. With the levels :math:`\ell_k` in
[-1, 1] and the block's scale :math:`s = \max_j |x_j|`, rounded to bfloat16,

.. math:: k_j = \arg\min_k |x_j / s - \ell_k|, \qquad \hat x_j = s \, \ell_{k_j}.

Levels are equidistant (``block8``: 255, ``block4``: 15), or the 16 of NormalFloat (``nf4``; QLoRA, Dettmers et al.,
NeurIPS 2023), quantiles of the normal distribution. With B = 64 an entry takes 8.25 or 4.25 bits. The rounding is
biased but twice as fine as the stochastic one of :mod:`~fedlp.federation.wire.encodings.quantised`: right for tensors
that travel once, as frozen ones do. Vectors and integers stay as they are.

*Deviations* from QLoRA: scales are bfloat16, not quantised a second time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fedlp.errors import ConfigError
from fedlp.federation.wire.encodings.base import is_matrix
from fedlp.federation.wire.encodings.quantised import check_scale, pack_bits, unpack_bits
from fedlp.federation.wire.packing import Signature
from fedlp.registry import register

_SCALE = "scale of "
# fmt: off
NORMAL_LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)
# fmt: on
"""The 4-bit NormalFloat, appendix E of QLoRA."""


@dataclass(frozen=True)
class Blockwise:
    """Rounding to nearest of ``width`` bits, one scale per block.

    Attributes
    ----------
    block_size : int
        Entries per scale, >= 1.
    """

    block_size: int = 64

    width: ClassVar[int] = 8
    levels: ClassVar[tuple[float, ...]] = ()  # equidistant ones if empty

    def __post_init__(self) -> None:
        if self.block_size < 1:
            raise ConfigError(f"block_size={self.block_size} is not allowed: it must be at least 1")

    @property
    def bits(self) -> float:
        """Bits of an entry, its part of the scale included."""
        return self.width + 16 / self.block_size

    def encode(self, params: Mapping[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        """Return quantised matrices with their scales, other tensors unchanged; nothing is drawn."""
        found: dict[str, Tensor] = {}
        for name, tensor in params.items():
            if not is_matrix(tensor.shape, tensor.dtype):
                found[name] = tensor
                continue
            flat = tensor.detach().cpu().to(torch.float32).flatten()
            blocks = F.pad(flat, (0, -len(flat) % self.block_size)).view(-1, self.block_size)
            scale = blocks.abs().amax(dim=1).to(torch.bfloat16)
            shares = blocks / scale.to(torch.float32).clamp(min=torch.finfo(torch.float32).tiny)[:, None]
            codes = self._codes(shares).flatten()[: len(flat)]
            found[name] = codes.view(tensor.shape) if self.width == 8 else pack_bits(codes, self.width)
            found[_SCALE + name] = scale
        return found

    def signature(self, signature: Signature) -> Signature:
        """Return names, shapes and dtypes of the encoded tensors."""
        found: list[tuple[str, tuple[int, ...], torch.dtype]] = []
        for name, shape, dtype in signature:
            if not is_matrix(shape, dtype):
                found.append((name, shape, dtype))
                continue
            size = math.prod(shape)
            packed = (math.ceil(size * self.width / 8),)
            found.append((name, shape, torch.int8) if self.width == 8 else (name, packed, torch.uint8))
            found.append((_SCALE + name, (math.ceil(size / self.block_size),), torch.bfloat16))
        return tuple(found)

    def decode(self, encoded: Mapping[str, Tensor], signature: Signature, who: str) -> dict[str, Tensor]:
        """Return the values; ProtocolError for a scale that is negative, NaN, or so large that values overflow."""
        found: dict[str, Tensor] = {}
        for name, shape, dtype in signature:
            tensor = encoded[name]
            if is_matrix(shape, dtype):
                self.check_scales(encoded, name, who)
                tensor = self._widen(tensor.flatten(), encoded[_SCALE + name], math.prod(shape)).view(shape)
            found[name] = tensor.to(dtype)
        return found

    def has_rows(self, columns: int) -> bool:
        """Return whether a row is whole blocks and bytes."""
        return columns % self.block_size == 0 and columns * self.width % 8 == 0

    def decode_rows(self, encoded: Mapping[str, Tensor], name: str, columns: int, rows: slice | Tensor) -> Tensor:
        """Return chosen rows of a matrix, float32."""
        codes = encoded[name].view(-1, columns * self.width // 8)[rows]
        scale = encoded[_SCALE + name].view(-1, columns // self.block_size)[rows]
        return self._widen(codes.flatten(), scale.flatten(), len(codes) * columns).view(-1, columns)

    def check_scales(self, encoded: Mapping[str, Tensor], name: str, who: str) -> None:
        """Raise ProtocolError for a scale that is negative, NaN, or so large that values overflow."""
        check_scale(encoded[_SCALE + name].to(torch.float32), name, who)

    def _widen(self, codes: Tensor, scale: Tensor, size: int) -> Tensor:
        """Return the values of encoded entries, (size,) float32."""
        if self.width == 8:
            values = codes.to(torch.float32).div_(127)
        else:
            values = _pairs(self.levels, codes.device).index_select(0, codes.to(torch.int32)).flatten()[:size]
        scale, whole = scale.to(torch.float32), size // self.block_size * self.block_size
        values[:whole].view(-1, self.block_size).mul_(scale[: whole // self.block_size, None])
        if whole < size:
            values[whole:].mul_(scale[-1])
        return values

    def _codes(self, shares: Tensor) -> Tensor:
        """Return the number of the level nearest to each share, centred: int8."""
        if not self.levels:
            largest: int = 2 ** (self.width - 1) - 1
            return (shares * largest).round_().clamp_(-largest, largest).to(torch.int8)
        levels = torch.tensor(self.levels)
        nearest: Tensor = torch.bucketize(shares, (levels[1:] + levels[:-1]) / 2)
        return (nearest - len(levels) // 2).to(torch.int8)


@lru_cache(maxsize=8)
def _pairs(levels: tuple[float, ...], device: torch.device) -> Tensor:
    """Return the two values in every byte of 4-bit numbers, (256, 2); of equidistant levels without ``levels``."""
    codes = unpack_bits(torch.arange(256, dtype=torch.int32).to(torch.uint8), 512, 4)
    values = codes.div(7) if not levels else torch.tensor(levels)[codes.to(torch.int64) + len(levels) // 2]
    return values.view(256, 2).to(device)


@register("encoding", "block8")
@dataclass(frozen=True)
class Block8(Blockwise):
    """Rounding to nearest, 8 bits, one scale per block."""


@register("encoding", "block4")
@dataclass(frozen=True)
class Block4(Blockwise):
    """Rounding to nearest, 4 bits, one scale per block."""

    width: ClassVar[int] = 4


@register("encoding", "nf4")
@dataclass(frozen=True)
class NormalFloat4(Blockwise):
    """Rounding to the nearest NormalFloat, 4 bits, one scale per block (as the base of QLoRA)."""

    width: ClassVar[int] = 4
    levels: ClassVar[tuple[float, ...]] = NORMAL_LEVELS
