"""Values as they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedlp.federation.wire.packing import Signature
from fedlp.registry import register


@register("encoding", "float32")
@dataclass(frozen=True)
class Float32:
    """Unencoded values, 32 bits each."""

    is_plain = True

    def encode(self, params: Mapping[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        """Return the values."""
        return dict(params)

    def signature(self, signature: Signature) -> Signature:
        """Return the signature."""
        return signature

    def decode(self, encoded: Mapping[str, Tensor], signature: Signature, who: str) -> dict[str, Tensor]:
        """Return the values."""
        return {name: encoded[name].to(dtype) for name, _, dtype in signature}
