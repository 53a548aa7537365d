r"""Top-k sparsification: the entries of largest magnitude of each matrix, in 2 bits, with their indices.

Of a matrix of n entries the :math:`k = \lceil f n \rceil` of largest magnitude travel: indices as int32, sorted; signs
and one of two magnitudes in 2 bits each. The two magnitudes are the means of the entries below and above the mean. With
error feedback this is the compressor of SparseLoCo (2025) without its chunks; without it, it is biased.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedlp.errors import ConfigError, ProtocolError
from fedlp.federation.wire.encodings.base import is_matrix
from fedlp.federation.wire.encodings.quantised import check_scale, pack_bits, unpack_bits
from fedlp.federation.wire.packing import Signature
from fedlp.registry import register

_INDEX, _SCALE = "indices of ", "scale of "
_BITS = 2


@register("encoding", "topk")
@dataclass(frozen=True)
class TopK:
    """The largest entries of each matrix in 2 bits, with their indices.

    Attributes
    ----------
    fraction : float
        Fraction of the entries of a matrix that are sent, in (0, 1].
    """

    fraction: float = 0.02

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1:
            raise ConfigError(f"upload.fraction={self.fraction} is not allowed: it must be in (0, 1]")

    def encode(self, params: Mapping[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        """Return codes, indices and scale of each matrix, other tensors unchanged."""
        found: dict[str, Tensor] = {}
        for name, tensor in params.items():
            if not is_matrix(tensor.shape, tensor.dtype) or not tensor.numel():
                found[name] = tensor
                continue
            flat = tensor.detach().cpu().to(torch.float32).flatten()
            index = torch.topk(flat.abs(), self._count(tensor.numel()), sorted=False).indices.sort().values
            values = flat[index]
            sizes = values.abs()
            high = sizes >= sizes.mean()
            low = sizes[~high].mean() if bool((~high).any()) else sizes.mean()
            codes = torch.where(values < 0, -1 - high.to(torch.int8), high.to(torch.int8))
            found[name] = pack_bits(codes.to(torch.int8), _BITS)
            found[_INDEX + name] = index.to(torch.int32)
            found[_SCALE + name] = torch.stack([low, sizes[high].mean()])
        return found

    def signature(self, signature: Signature) -> Signature:
        """Return names, shapes and dtypes of the encoded tensors."""
        found: list[tuple[str, tuple[int, ...], torch.dtype]] = []
        for name, shape, dtype in signature:
            if not is_matrix(shape, dtype) or not math.prod(shape):
                found.append((name, shape, dtype))
                continue
            count = self._count(math.prod(shape))
            found.append((name, (math.ceil(count * _BITS / 8),), torch.uint8))
            found.append((_INDEX + name, (count,), torch.int32))
            found.append((_SCALE + name, (2,), torch.float32))
        return tuple(found)

    def decode(self, encoded: Mapping[str, Tensor], signature: Signature, who: str) -> dict[str, Tensor]:
        """Return matrices with zeros at unsent entries; ProtocolError for indices out of range or out of order."""
        found: dict[str, Tensor] = {}
        for name, shape, dtype in signature:
            tensor = encoded[name]
            if is_matrix(shape, dtype) and torch.Size(shape).numel():
                size: int = torch.Size(shape).numel()
                index, scale = encoded[_INDEX + name].to(torch.int64), encoded[_SCALE + name]
                check_scale(scale, name, who)
                if int(index[0]) < 0 or int(index[-1]) >= size or not bool((index[1:] > index[:-1]).all()):
                    raise ProtocolError(f"{who}: the indices of {name} are not sorted, distinct and in [0, {size})")
                codes = unpack_bits(tensor, len(index), _BITS)
                sizes = torch.where((codes == 1) | (codes == -2), scale[1], scale[0])
                signed = torch.where(codes < 0, -sizes, sizes)
                tensor = torch.zeros(size).index_copy_(0, index, signed).view(shape)
            found[name] = tensor.to(dtype)
        return found

    def _count(self, size: int) -> int:
        return max(1, math.ceil(self.fraction * size - 1e-9))  # less what rounding adds to a product
