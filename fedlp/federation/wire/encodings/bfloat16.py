"""Matrices in bfloat16."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedlp.federation.wire.encodings.base import is_matrix
from fedlp.federation.wire.packing import Signature
from fedlp.registry import register


@register("encoding", "bfloat16")
@dataclass(frozen=True)
class BFloat16:
    """Matrices in bfloat16; vectors and integers unchanged."""

    bits = 16

    def encode(self, params: Mapping[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        """Return the values, matrices rounded."""
        return {n: t.to(torch.bfloat16) if is_matrix(t.shape, t.dtype) else t for n, t in params.items()}

    def signature(self, signature: Signature) -> Signature:
        """Return the signature, matrices in bfloat16."""
        return tuple((n, shape, torch.bfloat16 if is_matrix(shape, dtype) else dtype) for n, shape, dtype in signature)

    def decode(self, encoded: Mapping[str, Tensor], signature: Signature, who: str) -> dict[str, Tensor]:
        """Return the values."""
        return {name: encoded[name].to(dtype) for name, _, dtype in signature}

    def has_rows(self, columns: int) -> bool:
        """Return True."""
        return True

    def decode_rows(self, encoded: Mapping[str, Tensor], name: str, columns: int, rows: slice | Tensor) -> Tensor:
        """Return chosen rows of a matrix, float32."""
        return encoded[name][rows].to(torch.float32)

    def check_scales(self, encoded: Mapping[str, Tensor], name: str, who: str) -> None:
        """Do nothing: there are no scales."""
